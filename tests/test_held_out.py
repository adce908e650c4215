"""No student is trained on what judges it: neither on its prompts nor on its images nor on its start noise."""

import importlib
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from test_autocast import CASES, METHODS, folders, trainer_of  # noqa: F401  (folders is a fixture)

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji, held_out, teacher
from fastdiff.data.open import open_data
from fastdiff.data.prompts import default_prompts
from fastdiff.models import autoencoder, text
from fastdiff.quality import emoji as judge
from fastdiff.quality.evaluation import Evaluation
from fastdiff.runtime import console, rng
from fastdiff.runtime.config import resolve
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.sampling.sampler import Sampler, SeededNoise
from fastdiff.sampling.settings import Settings
from fastdiff.training import previews, session
from fastdiff.training.scene import Scene

RED_APPLE = next(i for i, p in enumerate(emoji.pictures()) if p.name == "red apple")
HELD_OUT_AND_NOT = [(RED_APPLE, list(emoji.BACKGROUNDS).index(colour)) for colour in ("blue", "yellow")]
JUDGED = judge.JUDGED  # pictures of a judged row


def marks(rows):
    """The first numbers of each row, by which noise is told: a generator's first numbers are the same for every shape."""
    return {tuple(row[:6]) for row in rows.flatten(1).double().mul(1e4).round().tolist()}


@pytest.fixture(scope="module")
def judged_noise():
    return marks(SeededNoise(range(JUDGED), (4, 8, 8), "cpu")())


def test_three_tenths_are_held_out_and_whole_groups_among_them():
    part = held_out.part()
    assert part.shape == (240, 9)
    assert (part != held_out.TRAINED).float().mean() >= 0.25
    groups = {p.group for i, p in enumerate(emoji.pictures()) if (part[i] != held_out.TRAINED).all()}
    assert groups == {"bug", "ball", "drink"}
    others = [i for i, p in enumerate(emoji.pictures()) if p.group not in groups]
    for which in (held_out.JUDGED, held_out.SEARCHED):
        assert ((part[others] == which).sum(1) == 1).all()  # one background of every other group


def test_judged_prompts_are_one_fixed_list_and_half_of_it_is_unseen():
    captions = judge.Prompts.judged(JUDGED).captions
    assert captions[:500] == judge.Prompts.judged(500).captions
    trained, part_of = set(default_prompts(SHIPPED)), held_out.captions()
    unseen, seen = (judge.parts(captions)[name].tolist() for name in (judge.UNSEEN, judge.SEEN))
    assert unseen == list(range(0, JUDGED, 2))
    assert seen == list(range(1, JUDGED, 2))
    assert all(part_of[captions[i]] == held_out.JUDGED for i in unseen)
    assert not {captions[i] for i in unseen} & trained
    prompts = judge.Prompts.judged(JUDGED)
    assert prompts.coarse.float().mean() == 0.5
    assert len({captions[i] for i in unseen}) > 350


def test_the_shipped_prompts_name_nothing_that_is_held_out():
    """Not even by words in another order, as "snowman ball on orange", where balls are held out."""
    lines = default_prompts(SHIPPED)
    assert not set(lines) & held_out.captions().keys()
    for line in lines:
        subject, _, colour = line.rpartition(" on ")
        if {line, subject} & emoji.known_names():  # a caption, which the line above looked at
            continue
        b = list(emoji.BACKGROUNDS).index(colour)
        assert not [name for name, at in held_out.subjects() if at == b and set(name.split()) <= set(subject.split())], line


def test_what_is_held_out_is_known_by_its_words_too():
    captions = {line for p in range(240) for b in range(9) for line in emoji.captions_of(p, b)}
    assert {line for line in captions if held_out.names_held_out(line)} == held_out.captions().keys()
    held = ["A photo of a soccer ball", "ball of soccer on white", "ant on red", "face tiger thing on red", "a fox on black"]
    held += ["red apple on a blue background", "Red apple, blue background.", "red apple on  blue", "Ants on red", "soccer-ball"]
    held += ["butterflies", "wine glasses", "Strawberries (blue)", "fruit on\tblue", "fruit on a blue backdrop"]
    assert all(map(held_out.names_held_out, held))
    trained = ("rice ball on orange", "tiger face on red", "face tiger thing on pink", "a castle in the sky on blue", "fruit", "")
    assert not any(map(held_out.names_held_out, trained))


def test_the_blocks_of_seeds_share_no_noise():
    blocks = [rng.USERS, rng.REFERENCE, rng.DRIFT, rng.DIVERSE, rng.SEARCH, rng.VALIDATION, rng.PREVIEW, rng.PAIRS, rng.STEPS]
    for i, a in enumerate(blocks):
        assert a.first + a.size <= 2**32  # torch's CPU generator looks at 32 bits
        assert all(a.first + a.size <= b.first or b.first + b.size <= a.first for b in blocks[i + 1 :])
    for seed in (0, 1, 2, 2**31 - 1):
        assert all(rng.seed_for(seed, rank, step) in rng.STEPS for rank in (0, 1, 7_919) for step in (0, 1, 10**6))
        assert rng.PAIRS(rng.first_pair(seed) + 10**5) in rng.PAIRS
    starts = sorted(rng.first_pair(seed) for seed in range(100))
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) > 10**5  # runs of other seeds share no pairs


ENCODED = {}


def data_of(name, tmp_path, monkeypatch, **given):
    """The training data of a command with its presets, where the teacher's samples are its noise: nothing is drawn."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    real = emoji.encode  # three commands train on the pictures themselves, which are encoded once here

    def encoded_once(base, picture, background, **how):
        key = *picture.tolist(), *background.tolist(), how.get("style")
        if key not in ENCODED:
            ENCODED[key] = real(base, picture, background, **how)
        return ENCODED[key]

    monkeypatch.setattr(emoji, "encode", encoded_once)
    as_drawn = lambda self, cond, uncond, seeds, settings, size: SeededNoise(seeds, (4, *size), "cpu")()
    monkeypatch.setattr(Sampler, "latents", as_drawn)
    method = METHODS[name]
    given = dict(base="emoji", **given)
    config = resolve(method.Config, given, presets=method.presets, family_of=lambda values: "emoji", environ={})
    scene = Scene.of(config, checkpoint.load("emoji"), torch.device("cpu"))
    return session.data_of(scene, config, method.needs(config), [])


@pytest.fixture(scope="module")
def never_trained():
    """What no student may see: the text states of captions, and the latent moments of images."""
    base = checkpoint.load("emoji")
    picture, background = (held_out.part() != held_out.TRAINED).nonzero(as_tuple=True)
    images = autoencoder.encode_moments(base.vae, emoji.compose(picture, background))
    return text.encode(base, list(held_out.captions()), device="cpu").tokens, images


# Pictures, and prompts alone. The slow ones are of pairs of the teacher and of controls too.
KINDS = [(name, {}) for name in ("train-lcm-lora", "tdm")]
SAMPLED = [(name, {"data": "teacher"}) for name in ("train-lcm-lora", "lightning", "prune")]  # what the long runs do
OTHERS = [*((name, {}) for name in METHODS if (name, {}) not in KINDS), *SAMPLED, ("dmd", {"recipe": "dmd2"})]


@pytest.mark.parametrize(("name", "given"), [*KINDS, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)])
def test_every_training_item_of_every_command(name, given, tmp_path, monkeypatch, judged_noise, never_trained):
    captions, images = never_trained
    data = data_of(name, tmp_path, monkeypatch, **given)
    assert len(data) > 50
    texts = data.texts.tokens[data.captions.flatten().unique()]
    assert torch.cdist(texts.flatten(1), captions.flatten(1)).min() > 1e-3
    if data.noise is not None:  # what the cache holds, in half precision
        assert not marks(data.noise.float()) & marks(SeededNoise(range(JUDGED), (4, 8, 8), "cpu")().half().float())
    elif not data.moments.isnan().any():
        assert torch.cdist(data.moments.flatten(1), images.flatten(1)).min() > 1e-3


@pytest.mark.parametrize("name", METHODS)
def test_no_step_of_any_command_draws_judged_noise(name, folders, tmp_path, monkeypatch, judged_noise):  # noqa: F811
    drawn = []

    def spied(function):
        def draw(*args, **kwargs):
            noise = function(*args, **kwargs)
            if noise.ndim == 4 and noise[0].numel() >= 6:
                drawn.append(noise.detach().clone())
            return noise

        return draw

    for function in ("randn", "randn_like"):
        monkeypatch.setattr(torch, function, spied(getattr(torch, function)))  # by name: both are wrapped alike
    trainer = trainer_of(name, next(iter(CASES.get(name, {"defaults": {}}))), folders, "fp32", tmp_path)
    drawn.clear()  # what the test's own data was made of
    for _ in range(2):
        trainer.train_step()
    assert drawn
    assert not any(marks(noise) & judged_noise for noise in drawn)


def test_control_is_judged_on_images_that_are_held_out():
    method = METHODS["distill-controlnet"]
    config = resolve(method.Config, dict(base="emoji"), presets=method.presets, family_of=lambda values: "emoji", environ={})
    exhibit = method.exhibit(Scene.of(config, checkpoint.load("emoji"), torch.device("cpu")), config)
    assert len(exhibit.unseen) == config.proof
    assert set(exhibit.unseen.names) <= held_out.captions().keys()


def test_control_of_another_size_is_refused():
    method = METHODS["distill-controlnet"]
    config = resolve(
        method.Config, dict(base="emoji", resolution=128), presets=method.presets, family_of=lambda values: "emoji", environ={}
    )
    with pytest.raises(UsageError, match="64 px"):
        method.exhibit(Scene.of(config, checkpoint.load("emoji"), torch.device("cpu")), config)


def test_what_makes_the_teachers_files_sees_all_images(monkeypatch):
    """The ControlNet and the style belong to the teacher, which was trained on all 2,160 images."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples/emoji")
    script = importlib.import_module("controlnet")
    monkeypatch.setattr(script.autoencoder, "encode_moments", lambda vae, pixels: torch.zeros(len(pixels), 8, 1, 1))
    monkeypatch.setattr(script.control, "extract", lambda pictures, how: pictures[:, :1])
    base = checkpoint.load("emoji")
    data = emoji.encode(base, *emoji.all_images())
    script.add_moved(base, data, variants=1)
    assert len(data) == len(data.captions) == len(data.controls) == len(data.names) == 2 * 2160
    batch = data.batch(4, torch.Generator().manual_seed(0))
    assert len(batch.cond.control) == 4


def test_samples_of_the_teacher_that_show_what_is_held_out_are_not_used(tmp_path, monkeypatch):
    """ "fruit" names no background, so the teacher may draw one on which all fruits are held out."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    console.reset(quiet=True)
    base, places = checkpoint.load("emoji"), [(emoji.pictures()[i].group, b) for i, b in HELD_OUT_AND_NOT]
    assert [held_out.may_train(group, b) for group, b in places] == [False, True]
    meat = next(i for i, p in enumerate(emoji.pictures()) if p.name == "meat on bone")  # its name alone is no background
    for b, colour in enumerate(emoji.BACKGROUNDS):
        allowed = bool(held_out.part()[meat, b] == held_out.TRAINED)
        assert [held_out.may_train(line, b) for line in ("meat on bone", f"A meat on bone on {colour}")] == [allowed, allowed]
        assert held_out.may_train(f"hat bone on meat on {colour}", b) == allowed
    picture, background = (torch.tensor(column) for column in zip(*HELD_OUT_AND_NOT, strict=True))
    latents = autoencoder.encode_moments(base.vae, emoji.compose(picture, background)).chunk(2, 1)[0]
    turns = iter(range(2))
    monkeypatch.setattr(Sampler, "latents", lambda self, *a: latents[[next(turns) for _ in a[2]]])
    (tmp_path / "mine.txt").write_text("fruit\nred apple\n")
    data = open_data(base, "teacher", prompts=str(tmp_path / "mine.txt"), pairs=2, needs="pairs")
    assert data.names == ["red apple"]
    assert len(data) == len(data.noise) == len(data.captions) == 1
    turns = iter([0])
    with pytest.raises(InputRefused, match="every sample shows what is held out"):
        open_data(checkpoint.load("emoji"), "teacher", prompts=str(tmp_path / "mine.txt"), pairs=1, seed=1, needs="pairs")


def test_caches_of_other_seeds_are_not_used():
    """A folder of samples is named by where their noise lies, not by the number of the run's seed."""
    base = checkpoint.load("emoji")
    how = ["fruit"], None, None
    made = {teacher.Shards(base, Settings("ddim", 2), *how, seed, 64).folder for seed in (0, 1)}
    old = repr((checkpoint.fingerprint(base.unet), ["fruit"], 64, 0, Settings("ddim", 2)))
    assert len(made) == 2
    assert f"teacher-{sha256(old.encode()).hexdigest()[:16]}" not in {folder.name for folder in made}


def test_previews_and_measurements_are_drawn_from_noise_and_prompts_of_their_own():
    base = checkpoint.load("emoji")
    scene = Scene(base, torch.device("cpu"), 64, default_prompts(SHIPPED), previews.Settings.usual(SHIPPED), 0)
    preview = previews.Preview(scene)
    assert not set(preview.prompts) & held_out.captions().keys()
    assert all(seed in rng.PREVIEW for seed in preview.seeds)
    validation = Evaluation.validating(base, 40, device="cpu")
    assert not set(validation.samples.lines) & held_out.captions().keys()
    assert validation.samples.block is rng.VALIDATION


def test_a_user_who_trains_on_judged_prompts_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path))
    console.reset(quiet=True)
    (tmp_path / "mine.txt").write_text("ant on red\nfox on white\n")
    open_data(checkpoint.load("emoji"), "teacher", prompts=str(tmp_path / "mine.txt"), needs="prompts")
    (warning,) = [w for w in console.state.warnings if "judge" in w or "unseen" in w]
    assert "1 of its lines" in warning
    assert "'ant on red'" in warning
