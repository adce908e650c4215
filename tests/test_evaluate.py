"""`evaluate`: its figures against other programs and closed forms, what it tells, and what it refuses."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.data import emoji
from fastdiff.lora import adapters
from fastdiff.methods.lcm import guidance_embedded
from fastdiff.quality import features, networks, samples
from fastdiff.quality.distances import Moments, band, cmmd, frechet, gap_closed, kid
from fastdiff.sampling.settings import Settings


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Latency and diversity of a few pictures."""
    monkeypatch.setattr(samples, "TIMED_S", 0)
    monkeypatch.setattr(samples, "TIMED", (1, 1))
    monkeypatch.setattr(samples, "DIVERSE", (2, 2))


# ---- distances


def test_frechet_is_scipys():
    from scipy.linalg import sqrtm

    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 24, generator=g) @ torch.randn(24, 24, generator=g) + k for k in (0, 0.5))
    for n in (400, 12):  # more features than pictures too
        m, r = Moments.of(a[:n]), Moments.of(b)
        root = sqrtm((m.cov @ r.cov).numpy())
        theirs = (m.mean - r.mean).square().sum() + m.cov.trace() + r.cov.trace() - 2 * np.trace(root.real)
        assert frechet(a[:n], r) == pytest.approx(theirs.item(), rel=1e-6)


def test_kid_and_cmmd_in_their_own_formulas():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 8, generator=g).double(), torch.randn(40, 8, generator=g).double() + 0.3
    poly = lambda p, q: (p @ q.T / 8 + 1) ** 3
    off = lambda k: (k.sum() - k.trace()) / (40 * 39)
    found = [kid(x.float(), y.float())[0] for _ in range(2)]
    assert found[0] == found[1]  # its subsets are seeded
    whole = off(poly(x, x)) + off(poly(y, y)) - 2 * poly(x, y).mean()
    assert found[0] == pytest.approx(whole.item(), rel=0.25)  # subsets of half the pictures
    rbf = lambda p, q: torch.exp(-torch.cdist(p, q).square() / (2 * 10**2)).mean()
    assert cmmd(x, y) == pytest.approx(1000 * (rbf(x, x) + rbf(y, y) - 2 * rbf(x, y)).item(), rel=1e-6)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)


def test_without_draws_a_gap_has_no_band():
    x = torch.arange(4.0)
    found = gap_closed(x + 1, x, x + 2, lambda r, i: r[i].mean().item(), "higher", draws=0)
    assert (found["gap_closed"], found["low"], found["gain_high"]) == (0.5, None, None)


def test_a_band_has_the_width_of_the_sampling_error_and_lies_around_the_figure():
    x = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    low, high = band(x, lambda r, i: r[i].mean().item())
    assert low < x.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * (0.3 * 0.7 / 400) ** 0.5, rel=0.2)
    z = torch.randn(100, 16, generator=torch.Generator().manual_seed(1))
    target = Moments(torch.zeros(16).double(), torch.eye(16).double())
    distance = lambda r, i: frechet(r[i], target)
    low, high = band(z, distance)
    assert low < distance(z, torch.arange(100)) < high  # redrawn sets alone would all lie above


# ---- networks that judge


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's network with random weights, as its file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    real = torch.hub.load_state_dict_from_url
    module = sys.modules[FeatureExtractorInceptionV3.__module__]
    blank = FeatureExtractorInceptionV3.load_state_dict
    try:
        module.load_state_dict_from_url = lambda *a, **k: {}
        FeatureExtractorInceptionV3.load_state_dict = lambda self, state: None
        net = FeatureExtractorInceptionV3("random", ["2048"])
    finally:
        module.load_state_dict_from_url, FeatureExtractorInceptionV3.load_state_dict = real, blank
    torch.save(net.state_dict(), path)
    return path


def folder_of(path, pictures):
    path.mkdir(parents=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path / f"{i:03d}.png")
    return path


def test_fid_is_what_torch_fidelitys_command_says(inception, tmp_path, fastdiff, tiny_sd, monkeypatch, capfd):
    """Of the pictures that an evaluation kept, against a folder: the same network, the same figure."""
    from torch_fidelity import fidelity

    every = torch.arange(6)
    real = folder_of(tmp_path / "real", ((emoji.compose(every, every % 9) + 1) * 127.5).to(torch.uint8))
    code, told = fastdiff(
        *("evaluate", "--base", tiny_sd, "--student", tiny_sd, "--num-steps", 2, "--num-images", 5, "--prompts", "prompts.txt"),
        *("--reference", real, "--metrics", "fid", "--inception-weights", inception, "--teacher-steps", 1, "--no-baseline"),
        "--save-images",
    )
    assert code == 0, told
    mine = {row["model"]: row["fid"] for row in told["metrics"]["rows"]}
    saved = tmp_path / "runs" / f"evaluate-{tiny_sd.name}" / "images" / f"{tiny_sd.name}-2-steps-guidance-7.5-dpm++"
    command = ["fidelity", "--input1", saved, "--input2", real, "--fid", "--json"]
    command += ["--feature-extractor-weights-path", inception, "--no-cache", "--batch-size", "6"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    fidelity.main()
    out = capfd.readouterr().out
    theirs = json.loads(out[out.index("{") :])["frechet_inception_distance"]
    assert mine[tiny_sd.name] == pytest.approx(theirs, abs=1e-3)
    assert mine["teacher"] != mine[tiny_sd.name]


def test_the_patch_is_the_centre_at_native_size_and_resizing_is_pils():
    ramp = torch.arange(400).expand(3, 400, 400).clamp(max=255).to(torch.uint8)[None]
    centre = networks.patch(ramp)
    assert centre.shape == (1, 3, 299, 299)
    assert torch.equal(centre[0], ramp[0, :, 50:349, 50:349])
    assert networks.patch(ramp[..., :100, :100]).shape == (1, 3, 100, 100)
    small = networks.resized(ramp, 64)
    theirs = Image.fromarray(ramp[0].permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(small[0].permute(1, 2, 0).numpy(), np.array(theirs))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP of open_clip with random weights: its spec."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    told = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=1, width=16, head_width=8, patch_size=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
    )
    (folder / "tiny-clip.json").write_text(json.dumps(told))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    save_file(open_clip.create_model("tiny-clip").state_dict(), folder / "clip.safetensors")
    return f"tiny-clip:{folder / 'clip.safetensors'}"


def test_clip_score_is_open_clips_cosine(clip):
    import open_clip

    lines = ["a cat", "a dog", "a cat"]
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = features.ClipFeatures(networks.Clip(clip), torch.device("cpu"), lines)
    name, weights = clip.split(":")
    net, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    net.eval()
    images = torch.stack([preprocess(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pictures])
    with torch.no_grad():
        a, b = net.encode_image(images), net.encode_text(open_clip.get_tokenizer(name)(lines))
    theirs = 100 * torch.nn.functional.cosine_similarity(a, b)
    with torch.no_grad():
        seen = extractor.extract(pictures, slice(0, 3))
    torch.testing.assert_close(seen["clip_score"], theirs, rtol=1e-4, atol=1e-4)
    assert set(extractor.extract(pictures, None)) == {"clip"}


# ---- the command


def random_factors(unet, std):
    """A LoRA's factors that change what the network draws."""
    torch.manual_seed(0)
    for p in adapters.attach(unet, 2, 2.0, "style", adapters.ATTENTION):
        torch.nn.init.normal_(p, std=std)
    return adapters.factors(unet, 2.0, "style")


@pytest.fixture(scope="module")
def trained(tiny_sd, tmp_path_factory):
    """A LoRA with a few-step recipe in its header."""
    base = checkpoint.load(str(tiny_sd))
    modules = random_factors(base.unet, 0.2)
    told = {"fastdiff.scheduler": "lcm", "fastdiff.num_steps": "4", "fastdiff.guidance": "1.0", "fastdiff.training.method": "lcm"}
    path = tmp_path_factory.mktemp("trained") / "lcm.safetensors"
    lora.save(lora.Lora(modules, {**told, **lora.layers_told(base.unet.config)}), path)
    return path


def test_rows_figures_and_a_page_that_needs_nothing_else(fastdiff, tiny_sd, trained, tmp_path, monkeypatch):
    given = [
        "evaluate",
        "--base",
        tiny_sd,
        "--lora",
        trained,
        "--num-steps",
        "2,1",
        "--reference",
        "teacher:3",
        "--num-images",
        6,
    ]
    given += ["--prompts", "prompts.txt", "--metrics", "lpips", "--lpips-weights", "embedded"]
    code, told = fastdiff(*given)
    assert code == 0, told
    rows = told["metrics"]["rows"]
    ways = [(row["model"], row["num_steps"], row["guidance"] > 1, row["calls"]) for row in rows]
    assert ways == [
        *(("teacher", 3, True, 6), ("teacher", 1, False, 1), ("teacher", 1, False, 1), ("lcm", 1, False, 1)),
        *(("teacher", 2, False, 2), ("teacher", 1, True, 2), ("lcm", 2, False, 2)),
    ]
    assert [row["timesteps"] for row in rows[1:3]] == [None, [749]]
    assert (rows[0]["drift"], rows[0].get("same_noise")) == (0, None)
    assert all(row["same_noise"] > 0 and row["drift"] > 0 and row["diversity"] > 0 for row in rows[1:])
    latencies = {name for name in told["timings"] if name.startswith("latency_ms/")}
    assert len(latencies) == len(rows)  # as many names as rows: guided and not are two
    assert {"latency_ms/teacher, 3 steps, guidance 7.5 (dpm++)", "latency_ms/lcm, 1 step (lcm)"} <= latencies
    page = (tmp_path / told["outputs"][0]["path"]).read_text()
    assert page.count("data:image/png;base64,") == len(rows) * 6
    assert not re.search(r"(src|href)=.(http|/)", page)
    assert json.loads((tmp_path / told["outputs"][1]["path"]).read_text()) == told["metrics"]

    drawn = []
    real = samples.Samples.draw
    monkeypatch.setattr(samples.Samples, "draw", lambda self, *a: (drawn.append(a[0]), real(self, *a))[1])
    again = fastdiff(*given)[1]
    assert not drawn  # an evaluation goes on where it was
    assert again["metrics"] == told["metrics"]
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "other"))
    anew = fastdiff(*given)[1]
    assert len(drawn) == len(rows)
    assert anew["metrics"] == told["metrics"]


def test_the_teacher_as_its_own_student_is_no_different(fastdiff):
    code, told = fastdiff("evaluate", "--student", "emoji", "--num-steps", 2, "--reference", "teacher:2", "--num-images", 8)
    assert code == 0, told
    first, *_, student = told["metrics"]["rows"]
    assert (student["same_noise"], student["drift"], student["model"]) == (0, 0, "emoji")
    assert [student[k] for k in ("retrieval", "frechet", "background")] == [
        first[k] for k in ("retrieval", "frechet", "background")
    ]


def test_a_style_and_a_control_that_survive_whole(fastdiff, tmp_path):
    """The base as its own student keeps all."""
    lora.save(lora.Lora(random_factors(checkpoint.load("emoji").unet, 0.1), {}), tmp_path / "style.safetensors")
    given = ["evaluate", "--student", "emoji", "--num-steps", 2, "--reference", "teacher:2", "--num-images", 6, "--no-baseline"]
    code, told = fastdiff(*given, "--with-lora", "style.safetensors", "--with-controlnet", "emoji")
    assert code == 0, told
    style, control = told["metrics"]["style"]["emoji 2"], told["metrics"]["control"]["emoji 2"]
    assert style["kept"] == pytest.approx(1, abs=1e-6)
    assert style["moved"] == pytest.approx(1, abs=1e-6)
    assert control["kept"] == pytest.approx(1)
    assert control["agreement"] != control["off"]
    page = (tmp_path / told["outputs"][0]["path"]).read_text()
    assert "<h2>Style</h2>" in page
    assert "<h2>Control</h2>" in page


def test_protocols_set_what_they_say(tmp_path, tiny_sdxl, monkeypatch):
    from fastdiff.commands import evaluate
    from fastdiff.runtime.config import resolve

    (tmp_path / "p.txt").write_text("a cat\n")
    given = dict(protocol="coco10k-lightning", reference=str(tmp_path), prompts=str(tmp_path / "p.txt"))
    made = resolve(evaluate.Config, given, presets=evaluate.PRESETS, family_of=lambda v: "sdxl")
    assert (made.num_images, made.fid_px, made.resolution, made.metrics) == (10_000, 299, 1024, "fid,patch,clip")
    how = evaluate.teacher_settings(made, checkpoint.load(str(tiny_sdxl)))
    assert (how.num_steps, how.guidance) == (32, 6)
    made = resolve(evaluate.Config, dict(given, protocol="coco30k-dmd"), presets=evaluate.PRESETS, family_of=lambda v: "sd15")
    assert (made.num_images, made.fid_px, made.resolution) == (30_000, 256, 512)


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--prompts", "empty.txt"], 2, "no prompts"),
        (["--num-images", 1], 2, "--num-images 1"),
        (["--metrics", "fid", "--inception-weights", "gone.pth"], 2, "gone.pth"),
        (["--metrics", "fid"], 2, "weights-inception-2015-12-05"),
        (["--metrics", "clip", "--clip", "ViT-B-32:gone.pt"], 2, "gone.pt"),
        (["--metrics", "clip", "--clip", "nothing"], 2, "--clip nothing"),
        (["--metrics", "beauty"], 2, "beauty"),
        (["--reference", "gone"], 2, "--reference gone"),
        (["--reference", "one", "--metrics", "lpips", "--lpips-weights", "embedded"], 3, "pictures in it: 1"),
        (["--num-steps", "4,x"], 2, "--num-steps 4,x"),
        (["--lora", "a", "--student", "b"], 2, "--student and --lora"),
        (["--student-controlnet", "emoji"], 2, "--with-controlnet"),
        (["--protocol", "coco30k-dmd"], 2, "give a folder as --reference"),
        (["--student", "emoji"], 2, "of emoji, but --base is sd15"),
        (["--teacher-row", "steps=3 guidance=1,3"], 2, "--teacher-row steps=3 guidance=1,3: 2 guidances for 3 steps"),
    ],
)
def test_refused_in_one_line(flags, code, words, fastdiff, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    folder_of(tmp_path / "one", torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    small = ["--num-images", 2, "--teacher-steps", 1] if "--num-images" not in flags else []
    found, told = fastdiff("evaluate", "--base", tiny_sd, *small, *flags)
    assert found == code, told
    assert words in told["error"]["message"] + (told["error"]["hint"] or "")
    assert not list((tmp_path / "runs").glob("*/report.html"))


def test_what_auto_cannot_have_is_left_out_with_a_word(fastdiff, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, told = fastdiff(
        "evaluate", "--base", tiny_sd, "--num-images", 2, "--reference", "teacher:1", "--prompts", "prompts.txt"
    )
    assert code == 0, told
    for name in ("fid", "clip", "lpips"):
        assert any(w.startswith(f"{name} is not measured") for w in told["warnings"])
    assert "fid" not in told["metrics"]["rows"][0]
    assert cli.main(["evaluate", "--help"]) == 0


def test_a_gap_may_start_at_a_row_that_was_asked_for(fastdiff):
    """Here it is the only one with as many calls as the student."""
    rows = ["scheduler=dpm++ timesteps=999,666,333 guidance=1,3,1", "start=749 steps=1 guidance=1"]
    flags = ["--student", "emoji", "--num-steps", 2, "--reference", "teacher:2", "--num-images", 4, "--no-baseline"]
    code, told = fastdiff("evaluate", *flags, *(word for row in rows for word in ("--teacher-row", row)))
    assert code == 0, told
    table = told["metrics"]["rows"]
    ways = [(row["solver"], row["guidance"], row["timesteps"], row["step_guidance"], row["calls"]) for row in table[1:3]]
    assert ways == [("ddim", 1.0, [749], None, 1), ("dpm++", 3.0, [999, 666, 333], [1.0, 3.0, 1.0], 4)]
    gaps = told["metrics"]["gap_closed"]["emoji 2"]
    assert {name: gap["teacher"] for name, gap in gaps.items()} == {name: table[2][name] for name in ("retrieval", "frechet")}
    assert "latency_ms/teacher, 3 steps, guidance 1, 3, 1 at 999, 666, 333 (dpm++)" in told["timings"]


def test_a_base_with_embedded_guidance_has_no_rows_of_several(fastdiff, tiny_sd, tmp_path):
    base = checkpoint.load(str(tiny_sd))
    base.__dict__["unet"] = guidance_embedded(base.unet, 16).requires_grad_(False)
    write.to_folder(base, tmp_path / "embedded")
    flags = ["evaluate", "--base", "embedded", "--student", "embedded", "--num-images", 2, "--prompts", "prompts.txt"]
    flags += ["--num-steps", 2, "--reference", "teacher:1"]
    code, told = fastdiff(*flags)
    assert code == 0, told
    assert [row["step_guidance"] for row in told["metrics"]["rows"]] == [None] * 3  # the student, and a few-step teacher's rows
    code, told = fastdiff(*flags, "--teacher-row", "steps=3 guidance=1,3,1")
    assert code == 2
    assert "one guidance for all steps" in told["error"]["message"]


def test_the_best_stock_ways_of_so_many_calls():
    from fastdiff.quality.ways import undistilled_ways as ways

    assert ways(FAMILIES["sdxl"], 4) == [
        Settings("dpm++", 4, 1.0, "trailing"),
        Settings("dpm++", 2, 5.0, "trailing"),
        Settings("dpm++", 3, 5.0, "trailing", step_guidance=(1, 5, 1)),
    ]
    for calls in (1, 2, 4, 8):
        found = ways(FAMILIES["emoji"], calls)
        assert all(way.calls == calls for way in found)
        assert {way.guided for way in found} == ({False} if calls == 1 else {False, True})
