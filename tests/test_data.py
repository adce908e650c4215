"""Data sources: the embedded pictures, folders, the teacher's own samples."""

import json

import pytest
import torch
from PIL import Image

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data import emoji, folder, teacher
from fastdiff.data.batch import Batch, Encoded
from fastdiff.data.open import open_data
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.runtime import disk, rng
from fastdiff.runtime.errors import DoesNotFit, InputRefused, UsageError
from fastdiff.sampling.settings import Settings


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))


OPEN = dict(prompts=None, resolution_px=64, pairs=3, seed=0, device="cpu")


def test_every_picture_is_drawn_in_every_style_and_named_once():
    names = [p.name for p in emoji.pictures()]
    assert len(names) == len(set(names)) == 240
    for style in emoji.STYLES:
        cells = emoji.sprites(style)
        assert cells.shape == (240, 4, 64, 64)
        assert (cells[:, 3].flatten(1).mean(1) > 0.05).all(), style
    with pytest.raises(ValueError, match="unknown emoji style 'anime'"):
        emoji.sprites("anime")


def test_the_background_is_read_back_from_the_corners():
    every = torch.arange(240)
    for colour in range(len(emoji.BACKGROUNDS)):
        pixels = emoji.compose(every, torch.full_like(every, colour))
        assert (emoji.background_of(pixels) == colour).all()


def test_captions():
    apple = next(i for i, p in enumerate(emoji.pictures()) if p.name == "red apple")
    blue = list(emoji.BACKGROUNDS).index("blue")
    assert emoji.caption(apple, blue) == "red apple on blue"
    assert emoji.caption(apple, None) == "red apple"
    assert emoji.caption(apple, blue, coarse=True) == "fruit on blue"


def test_the_vae_gives_the_pictures_back():
    base = checkpoint.load("emoji")
    pixels = emoji.compose(torch.arange(0, 240, 10), torch.arange(24) % 9)
    found = autoencoder.decode(base.vae, autoencoder.encode_moments(base.vae, pixels).chunk(2, 1)[0])
    assert (10 * torch.log10(4 / (found - pixels).square().mean())) > 22  # dB


def test_batches_follow_the_generator_and_drop_captions():
    n = 50
    texts, uncond = Cond(torch.arange(n).float()[:, None, None] + 1), Cond(torch.zeros(1, 1, 1))
    data = Encoded(torch.zeros(n, 8, 2, 2), texts, torch.arange(n)[:, None], torch.ones(1), uncond, empty_prompts=0.25)
    draw = lambda seed: data.batch(2000, torch.Generator().manual_seed(seed))
    a, b, c = draw(1), draw(1), draw(2)
    assert torch.equal(a.cond.tokens, b.cond.tokens)
    assert torch.equal(a.latents, b.latents)
    assert not torch.equal(a.cond.tokens, c.cond.tokens)
    assert (a.cond.tokens == 0).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert not a.uncond.tokens.any()


def test_folder_with_text_files_and_with_a_table(tiny_sdxl, tmp_path):
    for i, size in enumerate([(100, 64), (64, 96)]):
        Image.new("RGB", size, (200, 30 * i, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"picture {i}\n")
    base = checkpoint.load(str(tiny_sdxl))
    data = open_data(base, str(tmp_path), **OPEN)
    assert data.moments.shape == (2, 8, 8, 8)
    assert data.time_ids.tolist() == [[64, 100, 0, 18, 64, 64], [96, 64, 16, 0, 64, 64]]  # height first
    batch = data.batch(5, torch.Generator().manual_seed(0))
    assert batch.cond.tokens.shape == (5, 12, 96)
    assert batch.cond.time_ids.shape == batch.uncond.time_ids.shape == (5, 6)
    assert not batch.uncond.tokens.any()  # SDXL's unconditional branch is zeros
    assert not batch.uncond.pooled.any()
    for i in range(2):
        (tmp_path / f"{i}.txt").unlink()
    rows = [json.dumps({"file_name": f"{i}.png", "text": "same"}) for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert list(folder.Folder(tmp_path).captions.values()) == ["same", "same"]


def test_folder_mistakes_are_named(tmp_path):
    base = checkpoint.load("emoji")
    with pytest.raises(UsageError, match="no images in it"):
        open_data(base, str(tmp_path), **OPEN)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UsageError, match=r"1 of 1 images have no caption, the first is a\.png"):
        open_data(base, str(tmp_path), **OPEN)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputRefused, match=r"a\.png: not a readable image"):
        open_data(base, str(tmp_path), **OPEN)
    with pytest.raises(UsageError, match="`data=nowhere`"):
        open_data(base, "nowhere", **OPEN)
    with pytest.raises(UsageError, match="use `resolution=64`"):
        open_data(base, "emoji", **{**OPEN, "resolution_px": 128})


def pairs_of(seeds):
    """The numbers of the pairs, of a run with seed 0, whose noise these seeds give."""
    return [seed - rng.PAIRS.first for seed in seeds]


@pytest.fixture
def teacher_data(tiny_sd, tmp_path, monkeypatch):
    """Open teacher data of two prompts; also the list of batches that were sampled for it."""
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat\n\na dog\n")
    sampled, real = [], teacher.Sampler.latents
    monkeypatch.setattr(teacher.Sampler, "latents", lambda self, *a: (sampled.append(pairs_of(a[2])), real(self, *a))[1])

    def data(pairs=3, **changes):
        given = {**OPEN, "prompts": str(prompts), "pairs": pairs, "sampling": Settings("ddim", 2, 3.0), **changes}
        return open_data(checkpoint.load(str(tiny_sd)), "teacher", **given)

    return data, sampled


def shards(tmp_path):
    return sorted((tmp_path / "cache").rglob("*.safetensors"))


def test_teacher_data_is_sampled_once_and_cached(teacher_data, tmp_path):
    data, sampled = teacher_data
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dog"]
    first = data()
    assert first.moments.shape == (3, 8, 8, 8)
    assert first.captions.tolist() == [[0], [1], [0]]
    assert sampled == [[0, 1, 2]]
    second = data()
    assert torch.equal(first.moments, second.moments)
    assert len(sampled) == 1


def test_files_that_are_no_prompts_are_refused_by_name(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfa cat\n")
    assert read_prompts(tmp_path / "marked.txt") == ["a cat"]  # editors on Windows begin a file with a mark
    (tmp_path / "japanese.txt").write_bytes("赤いリンゴ\n".encode("shift-jis"))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    for name, problem in (
        ("gone.txt", "no such file"),
        ("", "is a folder"),
        ("japanese.txt", "not UTF-8"),
        ("empty.txt", "no prompts"),
    ):
        with pytest.raises(UsageError, match=problem) as refused:
            read_prompts(tmp_path / name)
        assert str(tmp_path / name) in str(refused.value)


def test_more_pairs_are_added_to_those_that_are_there(teacher_data, tmp_path, monkeypatch):
    data, sampled = teacher_data
    monkeypatch.setattr(teacher.Shards, "SIZE", 2)
    few, many = data(3), data(5)
    assert sampled == [[0, 1], [2], [3], [4]]
    assert torch.equal(few.moments, many.moments[:3])
    assert torch.equal(few.noise, many.noise[:3])
    assert len(shards(tmp_path)) == 3
    assert torch.equal(data(1).moments, many.moments[:1])


def test_only_prompts_that_get_a_sample_are_encoded(teacher_data):
    data, sampled = teacher_data
    one, three = data(1), data(3)
    assert [len(one.texts), len(three.texts), len(data(0, needs="prompts").texts)] == [1, 2, 2]
    assert sampled == [[0], [1, 2]]
    assert torch.equal(one.moments, three.moments[:1])
    assert torch.equal(one.texts.tokens, three.texts.tokens[:1])


def test_an_interrupted_sampling_goes_on_after_its_last_file(teacher_data, tmp_path, monkeypatch):
    data, sampled = teacher_data
    monkeypatch.setattr(teacher.Shards, "SIZE", 2)
    real = teacher.Sampler.latents

    def breaks(self, *a):
        if pairs_of(a[2]) == [2, 3]:
            raise KeyboardInterrupt
        return real(self, *a)

    with monkeypatch.context() as patch:
        patch.setattr(teacher.Sampler, "latents", breaks)
        with pytest.raises(KeyboardInterrupt):
            data(6)
    assert [p.name for p in shards(tmp_path)] == ["000000.safetensors"]
    assert len(data(6)) == 6
    assert sampled == [[0, 1], [2, 3], [4, 5]]
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_damaged_file_is_sampled_again(teacher_data, tmp_path, capsys):
    data, _ = teacher_data
    first = data()
    (path,) = shards(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    assert torch.equal(data().moments, first.moments)
    assert "damaged; its samples are drawn again" in capsys.readouterr().err


def test_samples_that_are_not_finite_are_left_out_by_name(teacher_data, monkeypatch, capsys):
    data, _ = teacher_data
    real = teacher.Sampler.latents

    def broken(self, cond, uncond, seeds, *a):
        found = real(self, cond, uncond, seeds, *a)
        found[[i for i, seed in enumerate(seeds) if seed in bad]] = float("inf")
        return found

    monkeypatch.setattr(teacher.Sampler, "latents", broken)
    bad = {rng.PAIRS(1)}
    found = data(3)
    assert len(found) == len(found.noise) == len(found.captions) == 2
    assert found.captions.flatten().tolist() == [0, 0]
    assert "1 of 3 samples are not finite and left out; the first: a dog" in capsys.readouterr().err
    bad = {rng.PAIRS(rng.first_pair(7) + i) for i in (0, 1)}
    with pytest.raises(InputRefused, match="no sample is finite"):
        data(2, seed=7)


def test_a_disk_too_small_for_the_samples_is_told_before_sampling(teacher_data, monkeypatch):
    data, sampled = teacher_data
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 100)
    with pytest.raises(DoesNotFit, match="3 samples of the teacher need"):
        data()
    assert not sampled


def test_a_pair_is_the_noise_and_what_the_sampler_made_of_it(teacher_data, tiny_sd, tmp_path):
    """DDIM by hand from the stored noise; other prompts, settings or seeds are other files, which tell what they hold."""
    from safetensors import safe_open

    data, _ = teacher_data
    found = data(2)
    base = checkpoint.load(str(tiny_sd))
    denoiser = Denoiser(base.unet, base.schedule(), base.prediction_type)
    x, uncond = found.noise.float(), found.uncond.expand(2)
    with torch.no_grad():
        for t, s in ((999, 499), (499, 0)):
            p = denoiser.guided(x, torch.tensor(t), found.texts[:2], uncond, 3.0)
            x = base.schedule().add_noise(p.x0, p.eps, torch.tensor(s))
    torch.testing.assert_close(x, found.moments[:, :4].float(), atol=0.02, rtol=0.02)  # stored as fp16
    with safe_open(shards(tmp_path)[0], "pt") as file:
        told = file.metadata()
    assert json.loads(told["prompts"]) == ["a cat", "a dog"]
    assert json.loads(told["settings"])["guidance"] == 3.0
    assert told["base"] == checkpoint.fingerprint(base.unet)
    data(2, seed=1)
    data(2, sampling=Settings("ddim", 2, 2.0))
    assert len(shards(tmp_path)) == 3


def test_batches_carry_the_noise_of_their_latents(teacher_data):
    data = teacher_data[0](4)
    batch = data.batch(8, torch.Generator().manual_seed(0))
    for latent, noise in zip(batch.latents, batch.noise, strict=True):
        row = next(i for i in range(4) if torch.equal(data.moments[i, :4].float(), latent))
        assert torch.equal(data.noise[row].float(), noise)


def test_prompts_alone_cost_no_sampling_and_their_latents_cannot_be_used_unnoticed(teacher_data):
    data, sampled = teacher_data
    found = data(3, needs="prompts")
    batch = found.batch(4, torch.Generator().manual_seed(0))
    assert not sampled
    assert batch.latents.shape == (4, 4, 8, 8)
    assert batch.latents.isnan().all()
    assert batch.noise is None


def test_prompts_of_a_file_that_get_no_sample_are_told(tmp_path, monkeypatch, capsys):
    """The shipped ones of `emoji` are more than most runs sample, which is no mistake of the user."""
    monkeypatch.setattr("fastdiff.data.open.teacher.encode", lambda *args, **options: None)
    (tmp_path / "mine.txt").write_text("a\nb\nc\n")
    base = checkpoint.load("emoji")
    for prompts, pairs in ((None, 2), (str(tmp_path / "mine.txt"), 3), (str(tmp_path / "mine.txt"), 2)):
        assert not capsys.readouterr().err
        open_data(base, "teacher", prompts=prompts, pairs=pairs)
    assert "`pairs=2`: only the first 2 of the 3 prompts are used" in capsys.readouterr().err.replace("\n", " ")


def test_pairs_come_from_the_teacher_alone(tmp_path):
    with pytest.raises(UsageError, match="needs pairs of noise and picture") as error:
        open_data(checkpoint.load("emoji"), "emoji", **OPEN, needs="pairs")
    assert "`data=teacher`" in error.value.hint


def test_default_prompts_of_full_size_models_exist():
    assert len(default_prompts(FAMILIES["sdxl"])) >= 50


def test_the_shipped_prompts_of_emoji_are_captions_and_compounds_of_their_words():
    lines, names = default_prompts(FAMILIES["emoji"]), {p.name for p in emoji.pictures()}
    subjects = [emoji.subject_and_background(line)[0] for line in lines]
    compounds = [subject for subject in subjects if subject not in emoji.known_names()]
    named = [line != subject for line, subject in zip(lines, subjects, strict=True) if subject in names]
    assert (len(lines), len(set(lines)), len(named), len(compounds)) == (8640, 3991, 2920, 2856)
    assert sum(named) / len(named) == pytest.approx(0.70, abs=0.02)  # on a background, as the teacher was trained
    whole = [set(name.split()) for name in emoji.known_names()]
    assert all(len(set(subject.split())) == len(subject.split()) <= 4 for subject in compounds)
    of_one = {subject for subject in compounds if any(set(subject.split()) <= name for name in whole)}
    assert of_one == {"hat face"}  # of "top hat" and a face, and two words of "cowboy hat face": all others are of two names


def test_text_equals_the_pipelines(tiny_sd, tiny_sdxl):
    for path in (tiny_sd, tiny_sdxl):
        base = checkpoint.load(str(path))
        pipeline = base.pipeline()
        found, empty = text.encode(base, ["a cat", "dogs"]), text.unconditional(base)
        told = pipeline.encode_prompt(["a cat", "dogs"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        torch.testing.assert_close(found.tokens, told[0])
        torch.testing.assert_close(empty.tokens.expand_as(told[1]), told[1])
        if base.family.size_conditioned:
            torch.testing.assert_close(found.pooled, told[2])
            torch.testing.assert_close(empty.pooled.expand_as(told[3]), told[3])


def test_an_article_does_not_change_what_is_drawn():
    """ "a red apple" is "red apple" to the embedded checkpoint, though its captions have no articles."""
    base = checkpoint.load("emoji")
    plain = [emoji.caption(p, 6 if p % 2 else None) for p in range(0, len(emoji.pictures()), 12)]
    said = [("an " if caption[0] in "aeiou" else "a ") + caption for caption in plain]
    made = torch.Generator().manual_seed(0)
    x = torch.randn(len(plain), 4, 8, 8, generator=made)
    with torch.no_grad():
        for t in (400, 700, 999):
            answer = lambda prompts, t=t: base.unet(x, t, text.encode(base, prompts).tokens).sample
            wanted = answer(plain)
            moved = (answer(said) - wanted).square().mean()
            signal = (answer([""] * len(plain)) - wanted).square().mean()
            assert moved < 0.25 * signal, f"t = {t}: {moved / signal:.2f}"


def test_mixed_prompts_lie_between_those_of_the_batch():
    """c + w (a - b) in a share of the rows, w in [0, 1]; rows of pairs keep theirs, and so do all other fields."""
    n = 400
    generator = torch.Generator().manual_seed(0)
    tokens, pooled, ids = torch.eye(n)[:, None], torch.eye(n), torch.zeros(n, 6)
    batch = Batch(torch.randn(n, 4, 2, 2, generator=generator), Cond(tokens, pooled, ids), Cond(tokens, pooled, ids))
    mixed = batch.mixed(0.5, generator, first=100)
    moved = mixed.cond.tokens[:, 0] - tokens[:, 0]
    assert torch.equal(moved, mixed.cond.pooled - pooled)  # both by the same two prompts
    assert torch.equal(moved[:100], torch.zeros(100, n))
    assert mixed.latents is batch.latents
    assert mixed.cond.time_ids is ids
    assert mixed.uncond is batch.uncond
    w = moved.clamp(min=0).sum(1)
    assert torch.equal(w, moved.clamp(max=0).sum(1).neg())  # one prompt is added as much as another is taken away
    changed = (w > 0)[100:]
    assert 0.4 < changed.float().mean() < 0.6
    assert 0.4 < w[100:][changed].mean() < 0.6
    assert w.max() <= 1
