"""A single file in the LDM layout, as model sites have them, with the configs and tokenizer of a diffusers folder."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdiff import cli
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.models import text
from fastdiff.runtime.errors import InputRefused

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def ldm_unet(key):
    """A diffusers UNet name of SD1.5's topology as LDM calls it: three entries a level, counted through."""
    stem = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    stem |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    for ours, theirs in stem.items():
        if key.startswith(ours + "."):
            return theirs + key.removeprefix(ours)
    if m := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        place = 1 if m[1] == "attentions" else 2 * int(m[2])
        return f"middle_block.{place}.{inner(m[3])}"
    m = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.*)", key)
    side, level, kind, j, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    name = f"input_blocks.{1 + 3 * level + j}" if side == "down" else f"output_blocks.{3 * level + j}"
    return f"{name}.{int(kind == 'attentions')}.{inner(rest)}"


def inner(rest):
    head, _, tail = rest.partition(".")
    return f"{RESNET[head]}.{tail}" if head in RESNET else rest


def ldm_vae(key):
    key = re.sub(r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block.", key)
    key = re.sub(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.resnets\.", lambda m: f"decoder.up.{3 - int(m[1])}.block.", key)
    key = re.sub(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"decoder.up.{3 - int(m[1])}.upsample.", key)
    key = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", key)
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace("conv_norm_out", "norm_out")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("attn_1.group_norm", "attn_1.norm")
    return re.sub(r"attn_1\.to_(q|k|v|out\.0)\.", lambda m: f"attn_1.{'proj_out' if m[1] == 'out.0' else m[1]}.", key)


@pytest.fixture(scope="module")
def single_file(tiny_sd, tmp_path_factory):
    base = checkpoint.load(str(tiny_sd))
    tensors = {f"model.diffusion_model.{ldm_unet(k)}": v for k, v in base.unet.state_dict().items()}
    for key, value in base.vae.state_dict().items():
        name = f"first_stage_model.{ldm_vae(key)}"
        tensors[name] = value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
    for key, value in base.text_encoders[0].state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return path


def test_every_tensor_arrives(single_file, tiny_sd):
    read, base = checkpoint.load(str(single_file), config=str(tiny_sd)), checkpoint.load(str(tiny_sd))
    assert read.family is FAMILIES["sd15"]
    pairs = [(read.unet, base.unet), (read.vae, base.vae), (read.text_encoders[0], base.text_encoders[0])]
    for found, expected in pairs:
        known = dict(found.state_dict())
        assert known.keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(known[key], value, msg=key)
    assert torch.equal(text.encode(read, ["a cat"]).tokens, text.encode(base, ["a cat"]).tokens)


def test_it_samples_like_the_folder(single_file, tiny_sd, tmp_path):
    for i, base in enumerate(([str(single_file), "--base-config", str(tiny_sd)], [str(tiny_sd)])):
        flags = ["--prompt", "a cat", "--resolution", "64", "--num-steps", "2", "-o", str(tmp_path / f"{i}.png")]
        assert cli.main(["sample", "--device", "cpu", "--base", *base, *flags]) == 0
    from_file, from_folder = (np.array(Image.open(tmp_path / f"{i}.png")).astype(int) for i in (0, 1))
    assert abs(from_file - from_folder).max() <= 1  # the tensors are equal, their strides are not


def test_a_network_of_no_known_width_is_refused_by_it(single_file, capfd):
    assert cli.main(["sample", "--base", str(single_file), "--prompt", "x", "--offline", "--json"]) == 3
    told = json.loads(capfd.readouterr().out)["error"]
    assert "cross-attention of width 32" in told["message"]
    assert "--base-config" in told["hint"]


def test_a_file_that_lacks_layers_is_refused(single_file, tiny_sd, tmp_path):
    tensors = load_file(single_file)
    gone = "model.diffusion_model.output_blocks.4.0.in_layers.2.weight"
    del tensors[gone]
    save_file(tensors, tmp_path / "torn.safetensors")
    with pytest.raises(InputRefused, match="unet"):
        _ = checkpoint.load(str(tmp_path / "torn.safetensors"), config=str(tiny_sd)).unet
