"""Checkpoints out and in again: folder, single file, other programs' layout, and that nothing changes on the way."""

import json

import numpy as np
import pytest
import torch
from conftest import build
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastdiff import cli
from fastdiff.checkpoints import checkpoint, locate, tensors, write
from fastdiff.checkpoints.folders import plain_name
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.runtime.errors import DoesNotFit, GateFailed, InputRefused

KINDS = ["sd15", "sd21", "sdxl", "bk-tiny"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny folder of each kind, built when it is asked for."""
    home, made = tmp_path_factory.mktemp("kinds"), {}

    def get(kind):
        if kind not in made:
            made[kind] = build(home / kind, kind, "v_prediction" if kind == "sd21" else "epsilon")
        return made[kind]

    return get


def picture(pipe):
    made = torch.Generator().manual_seed(3)
    how = dict(num_inference_steps=2, guidance_scale=3.0, height=64, width=64, generator=made, output_type="np")
    pipe.set_progress_bar_config(disable=True)
    return pipe("a cat", **how).images[0]


@pytest.mark.parametrize("kind", KINDS)
def test_folder_to_file_to_stock_diffusers_draws_the_same(folders, kind, tmp_path):
    import diffusers

    folder = folders(kind)
    base = checkpoint.load(str(folder))
    assert base.family.name == ("sd15" if kind == "bk-tiny" else kind)
    written = write.to_file(base, tmp_path / "one.safetensors")
    assert [p.suffix for p in written] == ([".safetensors", ".yaml"] if kind == "sd21" else [".safetensors"])
    cls = diffusers.StableDiffusionXLPipeline if kind == "sdxl" else diffusers.StableDiffusionPipeline
    more = {} if kind == "sdxl" else dict(safety_checker=None, requires_safety_checker=False)
    stock = cls.from_pretrained(folder, local_files_only=True, **more)
    again = cls.from_single_file(str(written[0]), config=str(folder), local_files_only=True, **more)
    # Tensors are equal, but convolutions' memory lies otherwise, and sums may end on another bit.
    assert np.abs(picture(stock) - picture(again)).max() < 2e-6
    for part in base.parts:
        ours = dict(base.weights(part))
        theirs = {plain_name(part, k): v for k, v in getattr(again, part).state_dict().items()}
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k].reshape(ours[k].shape)) for k in ours), part


@pytest.mark.parametrize("kind", KINDS)
def test_file_to_folder_to_file_is_the_same_tensors(folders, kind, tmp_path):
    (first, *_) = write.to_file(checkpoint.load(str(folders(kind))), tmp_path / "one.safetensors")
    middle = checkpoint.load(str(first), config=str(folders(kind)))
    write.to_folder(middle, tmp_path / "folder")
    (last, *_) = write.to_file(checkpoint.load(str(tmp_path / "folder")), tmp_path / "two.safetensors")
    one, two = load_file(first), load_file(last)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_names_that_other_programs_look_for(folders, tmp_path):
    """Formats: the level text_model. is there, open_clip's q, k and v are one, text_projection lies the other way."""
    for kind in ("sd15", "sd21", "sdxl"):
        write.to_file(checkpoint.load(str(folders(kind))), tmp_path / f"{kind}.safetensors")
    one, two, xl = (load_file(tmp_path / f"{kind}.safetensors") for kind in ("sd15", "sd21", "sdxl"))
    q = "encoder.layers.0.self_attn.q_proj.weight"
    assert f"cond_stage_model.transformer.text_model.{q}" in one
    assert one["cond_stage_model.transformer.text_model.embeddings.position_ids"].tolist() == [list(range(12))]
    stacked = two["cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert stacked.shape[0] == 3 * stacked.shape[1]
    assert "cond_stage_model.model.transformer.resblocks.2.ln_1.weight" in two  # one layer more than is used
    assert f"conditioner.embedders.0.transformer.text_model.{q}" in xl
    assert "conditioner.embedders.1.model.text_projection" in xl
    source = checkpoint.load(str(folders("sdxl"))).weights("text_encoder_2")["text_projection.weight"]
    assert torch.equal(xl["conditioner.embedders.1.model.text_projection"], source.T)
    assert xl["first_stage_model.decoder.mid.attn_1.q.weight"].ndim == 4
    assert all(t.is_contiguous() for t in xl.values())
    assert "v_pred" not in xl
    yaml = (tmp_path / "sd21.yaml").read_text()
    assert 'parameterization: "v"' in yaml
    assert "use_linear_in_transformer: True" in yaml
    with safe_open(tmp_path / "sd21.safetensors", "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v2-768-v"


def test_an_sdxl_that_predicts_v_carries_the_markers(folders, tmp_path):
    base = checkpoint.load(str(folders("sdxl")), prediction="v_prediction")
    base.scheduler_config["rescale_betas_zero_snr"] = True
    write.to_file(base, tmp_path / "v.safetensors", recipe=Recipe(method="lcm", scheduler="lcm", num_steps=4))
    written = load_file(tmp_path / "v.safetensors")
    assert written["v_pred"].numel() == written["ztsnr"].numel() == 0
    again = checkpoint.load(str(tmp_path / "v.safetensors"), config=str(folders("sdxl")))
    assert again.prediction_type == "v_prediction"  # though the folder's own scheduler says epsilon
    assert again.scheduler_config["rescale_betas_zero_snr"] is True
    assert (again.recipe.scheduler, again.recipe.num_steps) == ("lcm", 4)


def test_precision_leaves_the_vae_alone(folders, tmp_path):
    write.to_file(checkpoint.load(str(folders("sdxl"))), tmp_path / "half.safetensors", dtype=torch.float16)
    kinds = {}
    for name, tensor in load_file(tmp_path / "half.safetensors").items():
        if tensor.is_floating_point():
            kinds.setdefault(name.split(".")[0], set()).add(tensor.dtype)
    assert kinds["model"] == kinds["conditioner"] == {torch.float16}
    assert kinds["first_stage_model"] == {torch.float32}  # SDXL's overflows in fp16


def test_an_uneven_network_has_no_single_file(folders, tmp_path, monkeypatch):
    base = checkpoint.load(str(folders("sd15")))
    real, uneven = base.config_of, {"unet": {"layers_per_block": [2, 2, 2, 1]}}
    monkeypatch.setattr(base, "config_of", lambda part: {**real(part), **uneven.get(part, {})})
    with pytest.raises(InputRefused, match="uneven"):
        write.to_file(base, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_or_failing_is_noticed(folders, tmp_path, monkeypatch):
    base = checkpoint.load(str(folders("sd15")))
    monkeypatch.setattr(tensors.shutil, "disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(DoesNotFit, match="1 MiB|MiB are free"):
        write.to_file(base, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    real = tensors.TensorFile.__getitem__

    def flipped(self, name):
        tensor = real(self, name)
        return tensor + 1 if self.path.suffix == ".safetensors" and "out.2.bias" in name else tensor

    monkeypatch.setattr(tensors.TensorFile, "__getitem__", flipped)
    with pytest.raises(GateFailed, match=r"out\.2\.bias does not read back"):
        write.to_file(base, tmp_path / "x.safetensors")


def test_the_embedded_checkpoint_as_one_file_needs_nothing_else(tmp_path, capfd, monkeypatch):
    """Export, sample, inspect and back, with no --base-config; then a LoRA baked into the file."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", "--single-file", "-o", "emoji.safetensors"]) == 0
    flags = ["--prompt", "red apple on blue", "--num-steps", "2", "--seed", "1"]
    assert cli.main(["sample", *flags, "-o", "a.png"]) == 0
    assert cli.main(["sample", "--base", "emoji.safetensors", *flags, "-o", "b.png"]) == 0
    from PIL import Image

    one, two = (np.array(Image.open(name)).astype(int) for name in ("a.png", "b.png"))
    assert np.abs(one - two).max() <= 1
    capfd.readouterr()
    assert cli.main(["inspect", "emoji.safetensors", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["metrics"]
    assert (told["kind"], told["family"], told["prediction_type"], told["supported"]) == ("checkpoint", "emoji", "epsilon", True)
    assert cli.main(["export", "--base", "emoji.safetensors", "-o", "folder"]) == 0
    pipe = __import__("diffusers").StableDiffusionPipeline.from_pretrained("folder", local_files_only=True)
    assert pipe.unet.config.cross_attention_dim == 128
    style = str(locate.EMOJI / "style.safetensors")
    assert (
        cli.main(["merge-lora", "--accel", style, "--base", "emoji.safetensors", "-o", "baked.safetensors", "--check", "emoji"])
        == 0
    )
    assert cli.main(["sample", "--base", "baked.safetensors", *flags, "-o", "c.png"]) == 0
    assert (tmp_path / "baked-check.png").exists()
    capfd.readouterr()
    assert cli.main(["export", "--base", "emoji.safetensors", "--single-file", "-o", "emoji.safetensors", "--json"]) == 2
    assert "would overwrite the input" in json.loads(capfd.readouterr().out)["error"]["message"]


@pytest.mark.parametrize("format", ["kohya", "diffusers", "peft"])
def test_a_lora_in_every_layout_that_we_write(tiny_sd, tmp_path, format):
    """Written, loaded by the library that the layout is of, and by us: the same change of every layer."""
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    from fastdiff import lora
    from fastdiff.lora.file import Lora
    from fastdiff.lora.kinds import Factors

    base = checkpoint.load(str(tiny_sd))
    made = torch.Generator().manual_seed(0)
    modules = {}
    for i, (key, name) in enumerate(apply.names(base.unet).items()):
        out, inside, *kernel = base.unet.get_submodule(name).weight.shape
        rank = 2 + i % 3
        down, up = torch.randn(rank, inside, *kernel, generator=made), torch.randn(out, rank, *[1] * len(kernel), generator=made)
        modules[key] = Factors(down * 0.1, up * 0.1)
    item = Lora(modules, Recipe(family="sd15").to_metadata())
    path = tmp_path / ("x" if format == "peft" else "x.safetensors")
    lora.save(item, path, dtype=torch.float32, format=format)
    plain = {k: v.clone() for k, v in base.unet.state_dict().items()}
    apply.fold(base.unet, [(item, 1.0)])
    theirs = UNet2DConditionModel(**base.unet.config)
    theirs.load_state_dict(plain)
    if format == "peft":
        file = path / "unet" / "adapter_model.safetensors"
        merged = PeftModel.from_pretrained(theirs, path / "unet").merge_and_unload()
    else:
        from diffusers import StableDiffusionPipeline

        file = path
        state, alphas = StableDiffusionPipeline.lora_state_dict(str(path), unet_config=theirs.config)
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs)
        theirs.fuse_lora()
        theirs.unload_lora()
        merged = theirs
    read = lora.load(file)
    assert read.modules.keys() == modules.keys()
    for key, update in modules.items():
        torch.testing.assert_close(read.modules[key].delta(), update.delta(), rtol=1e-5, atol=1e-6)
    found = merged.state_dict()
    for key, weight in base.unet.state_dict().items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=key)


def test_sdxl_loras_are_written_with_ldm_names_and_diffusers_takes_them_whole(tiny_sdxl, tmp_path):
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    from fastdiff import lora
    from fastdiff.lora.adapters import TARGETS
    from fastdiff.lora.file import Lora
    from fastdiff.lora.kinds import Factors

    base = checkpoint.load(str(tiny_sdxl))
    made = torch.Generator().manual_seed(0)
    modules = {}
    for key, name in apply.names(base.unet).items():
        if name.endswith(TARGETS):
            out, inside, *kernel = base.unet.get_submodule(name).weight.shape
            down, up = torch.randn(2, inside, *kernel, generator=made), torch.randn(out, 2, *[1] * len(kernel), generator=made)
            modules[key] = Factors(down * 0.1, up * 0.1)
    lora.save(Lora(modules, Recipe(family="sdxl").to_metadata()), tmp_path / "x.safetensors", dtype=torch.float32)
    written = load_file(tmp_path / "x.safetensors")
    assert all(key.startswith(("lora_unet_input_", "lora_unet_output_", "lora_unet_middle_")) for key in written)
    theirs = UNet2DConditionModel(**base.unet.config)
    theirs.load_state_dict(base.unet.state_dict())
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(tmp_path / "x.safetensors"), unet_config=theirs.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, theirs)
    assert sum(hasattr(m, "lora_A") for m in theirs.modules()) == len(modules)
    theirs.fuse_lora()
    theirs.unload_lora()
    read = lora.load(tmp_path / "x.safetensors")
    assert read.modules.keys() == modules.keys()
    apply.fold(base.unet, [(read, 1.0)])
    found = theirs.state_dict()
    for key, weight in base.unet.state_dict().items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5, msg=key)


def test_flattened_encoder_names_are_repaired(folders, tmp_path):
    """NovelAI's files, and what transformers 5.6 makes of CLIP: no level text_model."""
    write.to_file(checkpoint.load(str(folders("sd15"))), tmp_path / "one.safetensors")
    flat = {k.replace(".text_model.", "."): v for k, v in load_file(tmp_path / "one.safetensors").items()}
    save_file(flat, tmp_path / "flat.safetensors")
    one, two = (checkpoint.load(str(tmp_path / f"{n}.safetensors"), config=str(folders("sd15"))) for n in ("one", "flat"))
    a, b = one.weights("text_encoder"), two.weights("text_encoder")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_ldm_names_count_with_the_layers_of_a_pruned_base(tmp_path):
    """One layer a block, as KOALA has: written and read by the count in the header, whoever reads it."""
    from fastdiff import lora
    from fastdiff.lora.file import Lora
    from fastdiff.lora.kinds import Factors

    modules = {
        f"lora_unet_{name}": Factors(torch.ones(2, 8), torch.ones(8, 2))
        for name in (
            "down_blocks_1_attentions_0_proj_in",
            "up_blocks_0_attentions_1_proj_in",
            "up_blocks_1_resnets_0_time_emb_proj",
        )
    }
    told = {**Recipe(family="sdxl").to_metadata(), **lora.layers_told({"layers_per_block": 1})}
    lora.save(Lora(modules, told), tmp_path / "x.safetensors")
    written = {key.split(".")[0] for key in load_file(tmp_path / "x.safetensors")}
    assert written == {
        "lora_unet_input_blocks_3_1_proj_in",
        "lora_unet_output_blocks_1_1_proj_in",
        "lora_unet_output_blocks_2_0_emb_layers_1",
    }
    assert lora.load(tmp_path / "x.safetensors").modules.keys() == modules.keys()
    assert lora.layers_told({"layers_per_block": 2}) == {}
