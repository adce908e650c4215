"""Data sources: the embedded pictures, folders, the teacher's own samples."""

import json

import pytest
import torch
from PIL import Image

from fastdiff.console import InputRefused, UsageError
from fastdiff.data import embedded, folder, open_data, teacher
from fastdiff.data.batch import Encoded
from fastdiff.io import checkpoint
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond

OPEN = dict(prompts=None, resolution_px=64, pairs=3, seed=0, device="cpu")


def test_every_picture_is_drawn_in_every_style_and_named_once():
    names = [p.name for p in embedded.pictures()]
    assert len(names) == len(set(names)) == 240
    for style in embedded.STYLES:
        cells = embedded.sprites(style)
        assert cells.shape == (240, 4, 64, 64)
        assert (cells[:, 3].flatten(1).mean(1) > 0.05).all(), style
    with pytest.raises(ValueError, match="unknown emoji style 'anime'"):
        embedded.sprites("anime")


def test_the_background_is_read_back_from_the_corners():
    every = torch.arange(240)
    for colour in range(len(embedded.BACKGROUNDS)):
        pixels = embedded.compose(every, torch.full_like(every, colour))
        assert (embedded.background_of(pixels) == colour).all()


def test_captions():
    apple = next(i for i, p in enumerate(embedded.pictures()) if p.name == "red apple")
    blue = list(embedded.BACKGROUNDS).index("blue")
    assert embedded.caption(apple, blue) == "red apple on blue"
    assert embedded.caption(apple, None) == "red apple"
    assert embedded.caption(apple, blue, coarse=True) == "fruit on blue"


def test_the_vae_gives_the_pictures_back():
    base = checkpoint.load("emoji")
    pixels = embedded.compose(torch.arange(0, 240, 10), torch.arange(24) % 9)
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
    assert [c for _, c in folder.captioned(tmp_path)] == ["same", "same"]


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
    with pytest.raises(UsageError, match="--data nowhere"):
        open_data(base, "nowhere", **OPEN)
    with pytest.raises(UsageError, match="use --resolution 64"):
        open_data(base, "emoji", **{**OPEN, "resolution_px": 128})


def test_teacher_data_is_sampled_once_and_cached(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat\n\na dog\n")
    assert teacher.read_prompts(prompts) == ["a cat", "a dog"]
    first = open_data(checkpoint.load(str(tiny_sd)), "teacher", **{**OPEN, "prompts": str(prompts)})
    assert first.moments.shape == (3, 8, 8, 8)
    assert first.captions.tolist() == [[0], [1], [0]]
    monkeypatch.setattr(teacher.Sampler, "latents", lambda *a: pytest.fail("sampled again"))
    second = open_data(checkpoint.load(str(tiny_sd)), "teacher", **{**OPEN, "prompts": str(prompts)})
    assert torch.equal(first.moments, second.moments)
    with pytest.raises(UsageError, match="no such file"):
        teacher.read_prompts(tmp_path / "gone.txt")


def test_default_prompts_of_full_size_models_exist():
    assert len(teacher.default_prompts("sdxl")) >= 50
    assert len(set(teacher.default_prompts("emoji"))) == 240 * 9


def test_text_equals_the_pipelines(tiny_sd, tiny_sdxl):
    for path in (tiny_sd, tiny_sdxl):
        base = checkpoint.load(str(path))
        pipeline = base.pipeline()
        found, empty = text.encode(base, ["a cat", "dogs"]), text.unconditional(base)
        told = pipeline.encode_prompt(["a cat", "dogs"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        torch.testing.assert_close(found.tokens, told[0])
        torch.testing.assert_close(empty.tokens.expand_as(told[1]), told[1])
        if base.family == "sdxl":
            torch.testing.assert_close(found.pooled, told[2])
            torch.testing.assert_close(empty.pooled.expand_as(told[3]), told[3])


def test_an_article_does_not_change_what_is_drawn():
    """ "a red apple" is "red apple" to the embedded checkpoint, though its captions have no articles."""
    base = checkpoint.load("emoji")
    plain = [embedded.caption(p, 6 if p % 2 else None) for p in range(0, len(embedded.pictures()), 12)]
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
