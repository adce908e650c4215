"""Diffusers folders as people have them: shards, half precision, pickles; and models that are refused by what they are."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import COMMANDS, arguments

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.commands import inspect
from fastdiff.runtime.errors import InputRefused


def changed(folder, target, **files):
    """A copy of a folder without its weights, whose JSON files have other entries; a value of None takes an entry away."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    for name, entries in files.items():
        path = target / {"index": "model_index.json", "scheduler": "scheduler/scheduler_config.json"}.get(
            name, f"{name}/config.json"
        )
        content = {**json.loads(path.read_text()), **entries}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return target


FLUX = dict(_class_name="FluxPipeline", unet=None, transformer=["diffusers", "FluxTransformer2DModel"])
SD3 = dict(_class_name="StableDiffusion3Pipeline", unet=None, transformer=["diffusers", "SD3Transformer2DModel"])
CASCADE = dict(_class_name="StableCascadePriorPipeline", unet=None, prior=["stable_cascade", "StableCascadeUNet"])
NOT_OURS = {  # what it is called, by the files that say so
    "an inpainting checkpoint": dict(unet=dict(in_channels=9)),
    "an InstructPix2Pix checkpoint": dict(unet=dict(in_channels=8)),
    "an upscaler checkpoint": dict(unet=dict(in_channels=7)),
    "a depth-to-image checkpoint": dict(unet=dict(in_channels=5)),
    "a checkpoint of 12 input channels": dict(unet=dict(in_channels=12)),
    "a checkpoint of 8 output channels": dict(unet=dict(out_channels=8)),
    "an unCLIP checkpoint": dict(unet=dict(class_embed_type="projection", projection_class_embeddings_input_dim=2048)),
    "a class-conditioned checkpoint": dict(unet=dict(num_class_embeds=10)),
    "a UNet that takes other conditions than a text": dict(unet=dict(addition_embed_type="text_image")),
    "a checkpoint of a 16-channel VAE": dict(vae=dict(latent_channels=16)),
    "whose VAE is of an unknown class": dict(vae=dict(_class_name="AsymmetricAutoencoderKL")),
    "FluxPipeline, not a Stable Diffusion checkpoint": dict(index=FLUX),
    "StableDiffusion3Pipeline, not a Stable Diffusion checkpoint": dict(index=SD3),
    "StableCascadePriorPipeline, not a Stable Diffusion checkpoint": dict(index=CASCADE),
    "whose unet is of an unknown class": dict(index=dict(unet=["diffusers", "UNetSpatioTemporalConditionModel"])),
    "an EDM checkpoint": dict(scheduler=dict(_class_name="EDMDPMSolverMultistepScheduler")),
    "a flow checkpoint": dict(scheduler=dict(_class_name="FlowMatchEulerDiscreteScheduler")),
    "takes other conditions than a text": dict(
        index=dict(text_encoder=[None, None], image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    ),
}


@pytest.mark.parametrize("what", NOT_OURS)
def test_what_we_do_not_read_is_refused_by_name_wherever_it_is_opened(tiny_sd, tmp_path, what):
    folder = changed(tiny_sd, tmp_path / "model", **NOT_OURS[what])
    with pytest.raises(InputRefused, match=what) as caught:
        checkpoint.load(str(folder))
    assert "\n" not in str(caught.value)
    assert "SD1.5, SD2.1 and SDXL" in caught.value.hint
    facts = inspect.run(inspect.Config(str(folder))).metrics
    assert (facts["kind"], facts["supported"]) == ("other", False)
    assert what in facts["why_not"]


def test_an_sdxl_refiner_is_refused_by_name(tiny_sdxl, tmp_path):
    refiner = dict(_class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None], requires_aesthetics_score=True)
    plain = dict(cross_attention_dim=1280)
    for i, files in enumerate((dict(index=refiner), dict(unet=plain))):
        with pytest.raises(InputRefused, match="an SDXL refiner"):
            checkpoint.load(str(changed(tiny_sdxl, tmp_path / str(i), **files)))
    one = changed(tiny_sdxl, tmp_path / "one", index=dict(text_encoder=[None, None]))
    with pytest.raises(InputRefused, match="1 text encoders, where SDXL has 2"):
        checkpoint.load(str(one))


@pytest.mark.parametrize("command", ["sample", "export", "bench", "evaluate", *COMMANDS])
def test_every_command_refuses_it_before_any_work(tiny_sd, tmp_path, fastdiff, monkeypatch, command):
    folder = changed(tiny_sd, tmp_path / "model", unet=dict(in_channels=9))
    monkeypatch.setattr(checkpoint.Checkpoint, "network", lambda *a: pytest.fail("a network was loaded"))
    own = {
        "sample": ["sample", "--base", folder, "--prompt", "x"],
        "export": ["export", "--base", folder, "-o", "out"],
        "bench": ["bench", "sample", "--base", folder],
        "evaluate": ["evaluate", "--base", folder, "--student", folder],
    }
    words = own.get(command) or arguments(command, folder, tmp_path, folder)
    for more in ([], ["--dry-run"]) if command in COMMANDS else ([],):
        code, found = fastdiff(*words, *more)
        assert (code, "an inpainting checkpoint (in_channels 9)" in found["error"]["message"]) == (3, True), found["error"]
    if command in COMMANDS:
        code, found = fastdiff("plan", *words)
        assert (code, "an inpainting checkpoint" in found["error"]["message"]) == (3, True), found["error"]


def test_a_base_config_of_such_a_model_is_refused_too(tiny_sd, tmp_path):
    from fastdiff.checkpoints import write

    write.to_file(checkpoint.load(str(tiny_sd)), tmp_path / "one.safetensors")
    with pytest.raises(InputRefused, match="an inpainting checkpoint"):
        checkpoint.load(
            str(tmp_path / "one.safetensors"), config=str(changed(tiny_sd, tmp_path / "model", unet=dict(in_channels=9)))
        )
    first = "model.diffusion_model.input_blocks.0.0.weight"
    content = load_file(tmp_path / "one.safetensors")
    save_file({**content, first: torch.ones(16, 9, 3, 3)}, tmp_path / "nine.safetensors")
    with pytest.raises(InputRefused, match="an inpainting checkpoint"):
        checkpoint.load(str(tmp_path / "nine.safetensors"), config=str(tiny_sd))


# ---- the files of a folder


def split(path, stem, suffix, index):
    """A component's one file as two shards with an index; `stem` and `suffix` are those of the shards."""
    content = load_file(path)
    half, places = sorted(content)[: len(content) // 2], {}
    for i, keys in enumerate((half, [k for k in content if k not in half])):
        name = f"{stem}-0000{i + 1}-of-00002.{suffix}"
        rows = {k: content[k] for k in keys}
        save_file(rows, path.with_name(name)) if suffix == "safetensors" else torch.save(rows, path.with_name(name))
        places |= dict.fromkeys(keys, name)
    path.with_name(index).write_text(json.dumps({"weight_map": places}))
    path.unlink()


def pickled(path, name):
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


LAYOUTS = {  # how the UNet and the text encoder are stored, and whether that takes allow_pickle
    "sharded pickles": (
        lambda p: split(p, "diffusion_pytorch_model", "bin", "diffusion_pytorch_model.bin.index.json"),
        lambda p: split(p, "pytorch_model", "bin", "pytorch_model.bin.index.json"), True,
    ),
    "pickles of half precision": (
        lambda p: pickled(p, "diffusion_pytorch_model.fp16.bin"), lambda p: pickled(p, "pytorch_model.fp16.bin"), True,
    ),
    "sharded half precision": (
        lambda p: split(p, "diffusion_pytorch_model.fp16", "safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        lambda p: split(p, "model.fp16", "safetensors", "model.safetensors.index.fp16.json"), False,
    ),
    "half precision": (
        lambda p: p.rename(p.with_name("diffusion_pytorch_model.fp16.safetensors")),
        lambda p: p.rename(p.with_name("model.fp16.safetensors")), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_a_folder_is_read(tiny_sd, tmp_path, layout):
    unet, text, pickles = LAYOUTS[layout]
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    unet(folder / "unet" / "diffusion_pytorch_model.safetensors")
    text(folder / "text_encoder" / "model.safetensors")
    base, whole = checkpoint.load(str(folder), allow_pickle=pickles), checkpoint.load(str(tiny_sd))
    for part in ("unet", "text_encoder"):
        a, b = base.weights(part), whole.weights(part)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    facts = inspect.run(inspect.Config(str(folder))).metrics
    assert facts["supported"] is not pickles
    if pickles:
        with pytest.raises(InputRefused, match=r"unet has pickled weights alone \(\.bin\)") as caught:
            checkpoint.load(str(folder)).weights("unet")
        assert "`allow_pickle=True`" in caught.value.hint
        assert "pickled weights alone" in facts["why_not"]


def test_a_missing_or_strange_shard_is_named(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    split(path, "diffusion_pytorch_model", "safetensors", "diffusion_pytorch_model.safetensors.index.json")
    (folder / "unet" / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputRefused, match=r"1 of its shards are missing \(diffusion_pytorch_model-00002"):
        checkpoint.load(str(folder)).weights("unet")
    assert inspect.run(inspect.Config(str(folder))).metrics["supported"] is False
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    with pytest.raises(InputRefused, match="looks like a path"):
        checkpoint.load(str(folder)).weights("unet")


def test_supported_is_what_sample_opens(tiny_sd, tmp_path):
    """Integers, unknown and missing layers, and no tokenizer: `inspect` says so from the headers."""
    cases = {
        "integer": lambda t: t.update({"conv_out.bias": torch.ones(4, dtype=torch.int32)}),
        "no place": lambda t: t.update({"conv_strange.bias": torch.ones(4)}),
        "are missing": lambda t: t.pop("conv_out.bias"),
        "the model has": lambda t: t.update({"conv_out.bias": torch.ones(5)}),
    }
    for i, (what, change) in enumerate(cases.items()):
        folder = shutil.copytree(tiny_sd, tmp_path / str(i))
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        content = load_file(path)
        change(content)
        save_file(content, path)
        facts = inspect.run(inspect.Config(str(folder))).metrics
        assert (facts["supported"], what.replace("integer", "not floating point") in facts["why_not"]) == (False, True), what
        with pytest.raises(InputRefused):
            _ = checkpoint.load(str(folder)).unet
    folder = shutil.copytree(tiny_sd, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "no tokenizer" in inspect.run(inspect.Config(str(folder))).metrics["why_not"]
    assert inspect.run(inspect.Config(str(tiny_sd))).metrics["supported"] is True


def test_the_command_line_says_flags(tiny_sd, tmp_path, capfd):
    folder = shutil.copytree(tiny_sd, tmp_path / "model")
    pickled(folder / "unet" / "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
    assert cli.main(["sample", "--base", str(folder), "--prompt", "x", "--device", "cpu"]) == 3
    assert "--allow-pickle" in capfd.readouterr().err
