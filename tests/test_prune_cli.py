"""`prune` from command line to files, and what takes a pruned checkpoint: sample, merge-lora, export, training."""

import json
import re

import numpy as np
import pytest
import torch

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.lora import adapters
from fastdiff.models import unet

QUICK = ("--steps=2", "--batch-size=2", "--grad-accum=1", "--resolution=64", "--pairs=2", "--teacher-steps=2", "--device=cpu")
QUICK += ("--prompts=prompts.txt", "--lr=1e-3", "--warmup=0", "--proof=0")


def drawn(path):
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path))) / 255


@pytest.mark.parametrize("layout", ["bk-base", "sdxs-512", "vega"])
def test_a_pruned_checkpoint_draws_in_stock_diffusers_as_here(layout, fastdiff, tiny_sd, tiny_sdxl, tmp_path, monkeypatch):
    base = tiny_sdxl if layout == "vega" else tiny_sd
    code, told = fastdiff("prune", "--base", base, "--layout", layout, "-o", "run", *QUICK)
    assert code == 0, told
    assert set(told["metrics"]["pruned"]) == {"parameters", "gmac"}
    small = checkpoint.load(str(tmp_path / "run" / "model"))
    assert told["metrics"]["pruned"]["parameters"] == sum(p.numel() for p in small.unet.parameters())
    assert small.unet_config == json.loads((tmp_path / "run" / "model" / "unet" / "config.json").read_text())
    started = unet.inheriting(checkpoint.load(str(base)).unet, small.unet_config).state_dict()
    assert any(not torch.equal(started[k], v) for k, v in small.unet.state_dict().items()), "nothing was trained"
    how = [
        "--prompt",
        "a cat",
        "--seed",
        "7",
        "--resolution",
        "64",
        "--scheduler",
        "ddim",
        "--spacing",
        "leading",
        "--num-steps",
        "3",
    ]
    code, told = fastdiff("sample", "--base", "run/model", *how, "--guidance", "2", "-o", "cat.png")
    assert code == 0, told
    assert told["warnings"] == []  # a pruned model wants no scheduler of its own
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"pruned to {layout}" in card
    (text,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    told = re.sub(r"pipe\(prompt, .*\)\.images", "pipe(prompt, num_inference_steps=3, guidance_scale=2.0, **more).images", text)
    told = re.sub(r"pipe.scheduler = .*", "", told)  # the folder's own, with leading spacing
    told = told.replace('"a red apple"', '"a cat"')
    scope = {"more": dict(height=64, width=64, generator=torch.Generator().manual_seed(7))}
    monkeypatch.chdir(tmp_path / "run")
    exec(told, scope)
    theirs = torch.from_numpy(np.array(scope["image"])) / 255
    assert (drawn(tmp_path / "cat.png") - theirs).abs().max() <= 1 / 255 + 1e-6
    hashes = json.loads((tmp_path / "run" / "hashes.json").read_text())["files"]
    assert "model/unet/diffusion_pytorch_model.safetensors" in hashes


@pytest.mark.parametrize(("kind", "layout"), [("tiny_sd", "bk-tiny"), ("tiny_sdxl", "vega"), ("tiny_sdxl", "bk-small")])
def test_surgery_alone_streams_what_is_built_in_memory(kind, layout, fastdiff, request, tmp_path):
    base = request.getfixturevalue(kind)
    code, told = fastdiff("prune", "--base", base, "--layout", layout, "--steps", "0", "-o", "run")
    assert code == 0, told
    assert told["next_command"] == 'fastdiff sample --base run/model --prompt "a red apple"'
    whole, small = checkpoint.load(str(base)), checkpoint.load(str(tmp_path / "run" / "model"))
    built = unet.inheriting(whole.unet, small.unet_config).state_dict()
    for name, tensor in small.unet.state_dict().items():
        assert torch.equal(tensor, built[name]), name
    for part in ("vae", *whole.text_parts):
        mine, its = small.weights(part), whole.weights(part)
        assert all(torch.equal(mine[name], its[name]) for name in its)


def test_a_single_file_is_cut_too(fastdiff, tiny_sd, tmp_path):
    assert fastdiff("export", "--base", tiny_sd, "--single-file", "-o", "one.safetensors")[0] == 0
    code, told = fastdiff("prune", "--base", "one.safetensors", "--base-config", tiny_sd, "--steps", "0", "-o", "a")
    assert code == 0, told
    assert fastdiff("prune", "--base", tiny_sd, "--steps", "0", "-o", "b", "--layout", "sdxs-512")[0] == 0
    a, b = (checkpoint.load(str(tmp_path / name / "model")).weights("unet") for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_file_that_nobody_else_reads_is_written_only_on_demand(fastdiff, tiny_sd, tmp_path, monkeypatch):
    import diffusers

    assert fastdiff("prune", "--base", tiny_sd, "--layout", "bk-tiny", "--steps", "0", "-o", "tiny")[0] == 0
    code, told = fastdiff("export", "--base", "tiny/model", "--single-file", "-o", "tiny.safetensors")
    assert code == 0, told
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "tiny.safetensors"), config=str(tmp_path / "tiny/model")
    )
    stored = checkpoint.load(str(tmp_path / "tiny" / "model")).weights("unet")
    assert all(torch.equal(v, stored[k]) for k, v in pipe.unet.state_dict().items())
    assert fastdiff("prune", "--base", tiny_sd, "--layout", "sdxs-512-xattn", "--steps", "0", "-o", "cross")[0] == 0
    export = ("export", "--base", "cross/model", "--single-file", "-o", "cross.safetensors")
    code, told = fastdiff(*export)
    assert code == 3
    assert "ComfyUI, A1111 and Forge cannot read" in told["error"]["message"]
    assert "--force" in told["error"]["hint"]
    assert not (tmp_path / "cross.safetensors").exists()
    assert fastdiff(*export, "--force")[0] == 0
    again = checkpoint.load(str(tmp_path / "cross.safetensors"), config=str(tmp_path / "cross" / "model")).weights("unet")
    whole = checkpoint.load(str(tmp_path / "cross" / "model")).weights("unet")
    assert all(torch.equal(again[k], whole[k]) for k in whole)


@pytest.mark.slow
def test_a_pruned_emoji_checkpoint_measures_what_was_won_back(fastdiff):
    code, told = fastdiff("prune", "--layout", "bk-tiny", "--steps=2", "--batch-size=2", "--proof=8", "-o", "run")
    assert code == 0, told
    found = told["metrics"]["recovered"]
    assert set(found) == {"retrieval", "frechet"}
    assert set(found["frechet"]) == {"recovered", "low", "high", "before", "student", "teacher"}
    assert [row["model"] for row in told["metrics"]["rows"]] == ["teacher", "before", "student"]
    assert [row["calls"] for row in told["metrics"]["rows"]] == [50, 50, 50]


def test_a_layout_that_was_measured_is_kept_for_a_resumed_run(fastdiff, tiny_sd, tmp_path, monkeypatch):
    from fastdiff.methods.shared import cutting

    seen = []
    choose = lambda base, target, device: (
        seen.append(target) or unet.student_config(base.unet_config, "bk-base", FAMILIES["sd15"])
    )
    monkeypatch.setattr(cutting, "choose", choose)
    common = ("prune", "--base", tiny_sd, *QUICK, "--auto", "--target-speed", "1.1x", "-o", "run")
    code, told = fastdiff(*common, "--steps=1")
    assert code == 0, told
    assert json.loads((tmp_path / "run" / "auto.json").read_text())["layers_per_block"] == 1
    assert checkpoint.load(str(tmp_path / "run" / "model")).unet_config["layers_per_block"] == 1
    assert fastdiff(*common, "--steps=2")[0] == 0
    assert seen == [1.1], "it was measured again"
    assert 'layout = "run/auto.json"' in (tmp_path / "run" / "config.toml").read_text()


def style_of(base, path, layers=None):
    """A LoRA over all layers of a base, with weights that show."""
    net = checkpoint.load(str(base)).unet
    adapters.attach(net, 2, 2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapters.parameters(net, "student"):
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    lora.save(lora.Lora(adapters.factors(net, 2), layers or {}), path, dtype=torch.float32)


def test_a_style_of_the_parent_moves_with_the_layers(fastdiff, tiny_sd, tmp_path):
    style_of(tiny_sd, tmp_path / "style.safetensors")
    assert fastdiff("prune", "--base", tiny_sd, "--layout", "bk-base", "--steps", "0", "-o", "small")[0] == 0
    how = ["--prompt", "a cat", "--resolution", "64", "--num-steps", "2"]
    code, told = fastdiff("sample", "--base", "small/model", "--lora", "style.safetensors", *how)
    assert code == 3
    assert "--remap" in told["error"]["hint"]
    code, told = fastdiff("sample", "--base", "small/model", "--lora", "style.safetensors=0.5", "--remap", *how, "-o", "a.png")
    assert code == 0, told
    # As a file for any program, and folded in: the same picture.
    assert fastdiff("merge-lora", "--accel", "style.safetensors", "--remap", "small/model", "-o", "moved.safetensors",
                    "--precision", "fp32")[0] == 0  # fmt: skip
    assert lora.load(tmp_path / "moved.safetensors").layers == 1
    code, told = fastdiff("sample", "--base", "small/model", "--lora", "moved.safetensors=0.5", *how, "-o", "b.png")
    assert code == 0, told
    assert fastdiff("merge-lora", "--accel", "style.safetensors=0.5", "--remap", "small/model", "--base", "small/model",
                    "-o", "baked", "--precision", "fp32")[0] == 0  # fmt: skip
    code, told = fastdiff("sample", "--base", "baked", *how, "-o", "c.png")
    assert code == 0, told
    plain = fastdiff("sample", "--base", "small/model", *how, "-o", "plain.png")
    assert plain[0] == 0
    a, b, c, none = (drawn(tmp_path / f"{name}.png") for name in ("a", "b", "c", "plain"))
    assert (a - b).abs().max() <= 1 / 255 + 1e-6
    assert (a - c).abs().max() <= 1 / 255 + 1e-6
    assert (a - none).abs().max() > 0.02


def test_a_lora_is_trained_on_a_pruned_base_and_worn_by_it(fastdiff, tiny_sd):
    assert fastdiff("prune", "--base", tiny_sd, "--layout", "bk-base", "--steps", "0", "-o", "small")[0] == 0
    code, told = fastdiff("train-lcm-lora", "--base", "small/model", *QUICK)
    assert code == 0, told
    weights = next(row["path"] for row in told["outputs"] if row["path"].endswith(".safetensors"))
    for more in ([], ["--remap"]):
        code, told = fastdiff("sample", "--base", "small/model", "--lora", weights, *more, "--prompt", "a cat", "--resolution=64")
        assert code == 0, told


def test_controlnets_are_cut_with_the_base(fastdiff, tiny_sd, tmp_path):
    from diffusers import ControlNetModel

    net = ControlNetModel.from_unet(checkpoint.load(str(tiny_sd)).unet, conditioning_embedding_out_channels=(16, 32))
    net.save_pretrained(tmp_path / "edges")
    for i, more in enumerate((["--steps=0"], QUICK)):
        code, told = fastdiff("prune", "--base", tiny_sd, "--layout", "bk-small", "--controlnet", "edges", "-o", f"run{i}", *more)
        assert code == 0, told
        assert str(tmp_path / f"run{i}" / "controlnet-edges").endswith(told["outputs"][1]["path"])
        cut = ControlNetModel.from_pretrained(tmp_path / f"run{i}" / "controlnet-edges")
        assert cut.config.mid_block_type == "UNetMidBlock2D"


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (["--layout", "vega"], 2, "not a layout of emoji networks"),
        (["--layout", "bk-base.json"], 2, "no such layout or file"),
        (["--auto", "--target-speed", "half"], 2, "--target-speed half"),
        (["--steps", "0", "--controlnet", "gone"], 2, "--controlnet gone"),
        (["--steps", "1", "--controlnet", "gone", "--proof", "0"], 2, "--controlnet gone"),
    ],
)
def test_mistakes_are_one_line(args, code, word, fastdiff):
    found, told = fastdiff("prune", *args)
    assert (found, told["ok"]) == (code, False)
    assert word in told["error"]["message"]
    assert "\n" not in told["error"]["message"]


@pytest.mark.parametrize(
    ("told", "code", "word"),
    [
        ("gone", 2, "no such file or folder"),
        ("./gone", 2, "no such file or folder"),
        ("prompts.txt", 3, "not a safetensors file"),
        ("unet", 3, "UNet2DConditionModel"),
    ],
)
def test_a_vae_that_is_none_is_refused(told, code, word, fastdiff, tiny_sd, tmp_path):
    (tmp_path / "unet").symlink_to(tiny_sd / "unet")
    found, answer = fastdiff("sample", "--base", tiny_sd, "--prompt", "a cat", "--vae", told)
    assert found == code
    assert word in answer["error"]["message"]
