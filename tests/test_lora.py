"""LoRA files: every layout to one form, what is written, what is refused."""

import json
import math
import os
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
KQ, KCONV = (f"lora_unet_{name.replace('.', '_')}" for name in (Q, CONV))
KTEXT = "lora_te_" + TEXT.replace(".", "_")


def factors(seed, out=6, inside=5, rank=4, kernel=None):
    """Random (down, up) of a linear layer, or of a convolution with that kernel."""
    made = torch.Generator().manual_seed(seed)
    more, ones = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    return torch.randn(rank, inside, *more, generator=made), torch.randn(out, rank, *ones, generator=made)


def product(down, up, scale=1.0):
    """scale B A by einsum, not by the code under test."""
    return scale * torch.einsum("or,r...->o...", up.flatten(1), down)


def write(folder, tensors, metadata=None, name="x.safetensors"):
    save_file(tensors, folder / name, metadata)
    return folder / name


def kohya(key, down, up, alpha=None):
    tensors = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    return tensors if alpha is None else {**tensors, f"{key}.alpha": torch.tensor(alpha)}


def pair(pattern, down, up):
    """Tensors under a layout's two names: `pattern` has {} where down / A or up / B stands."""
    names = ("A", "B") if "lora_{}" in pattern else ("down", "up")
    return {pattern.format(names[0]): down, pattern.format(names[1]): up}


# ---- layouts


def test_kohya_with_a_different_alpha_in_every_module(tmp_path):
    linear, conv, text = factors(0), factors(1, kernel=3, rank=2), factors(2, rank=3)
    path = write(tmp_path, {**kohya(KQ, *linear, 2.0), **kohya(KCONV, *conv, 8.0), **kohya(KTEXT, *text, 1)})
    read = lora.load(path)
    assert set(read.modules) == {KQ, KCONV, KTEXT}
    assert read.modules[KCONV].shape == (6, 5, 3, 3)
    assert read.modules[KCONV].rank == 2
    for key, (down, up), scale in ((KQ, linear, 2 / 4), (KCONV, conv, 8 / 2), (KTEXT, text, 1 / 3)):
        torch.testing.assert_close(read.modules[key].delta(), product(down, up, scale))


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_no_alpha_and_alpha_zero_mean_alpha_equals_rank(tmp_path, alpha):
    down, up = factors(0)
    read = lora.load(write(tmp_path, kohya(KQ, down, up, alpha)))
    torch.testing.assert_close(read.modules[KQ].delta(), product(down, up))


def test_an_integer_alpha_is_read_as_a_number(tmp_path):
    down, up = factors(0)
    read = lora.load(write(tmp_path, kohya(KQ, down, up, 8)))
    torch.testing.assert_close(read.modules[KQ].delta(), product(down, up, 2.0))


@pytest.mark.parametrize(
    ("unet", "text"),
    [
        (f"unet.{Q}.lora_{{}}.weight", f"text_encoder.{TEXT}.lora_{{}}.weight"),
        (f"unet.{Q}.lora_{{}}.weight", f"text_encoder.{TEXT.removeprefix('text_model.')}.lora_{{}}.weight"),
        (f"unet.{Q}.lora.{{}}.weight", f"text_encoder.{TEXT}.lora_linear_layer.{{}}.weight"),
        (f"base_model.model.{Q}.lora_{{}}.weight", f"base_model.model.{TEXT}.lora_{{}}.weight"),
        (f"unet.base_model.model.{Q}.lora_{{}}.default.weight", f"text_encoder.{TEXT}.lora_{{}}.default.weight"),
        (f"{Q}.lora_{{}}.weight", f"{TEXT}.lora_{{}}.weight"),
        (f"unet.{Q}.lora_{{}}.weight", KTEXT),  # two layouts in one file: diffusers drops the second silently
    ],
)
def test_dotted_layouts_have_scale_one_and_the_same_names(tmp_path, unet, text):
    linear, encoder = factors(0), factors(1)
    tensors = pair(text, *encoder) if "{}" in text else kohya(text, *encoder)
    read = lora.load(write(tmp_path, {**pair(unet, *linear), **tensors}))
    assert set(read.modules) == {KQ, KTEXT}
    torch.testing.assert_close(read.modules[KQ].delta(), product(*linear))
    torch.testing.assert_close(read.modules[KTEXT].delta(), product(*encoder))


def test_diffusers_header_gives_alpha_patterns_and_rslora(tmp_path):
    linear, conv, text = factors(0), factors(1, kernel=3, rank=2), factors(2)
    tensors = {
        **pair(f"unet.{Q}.lora_{{}}.weight", *linear),
        **pair(f"unet.{CONV}.lora_{{}}.weight", *conv),
        **pair(f"text_encoder.{TEXT}.lora_{{}}.weight", *text),
    }
    told = {"unet.r": 4, "unet.lora_alpha": 8, "unet.rank_pattern": {"conv1": 2}, "unet.alpha_pattern": {"conv1": 3}}
    told |= {"text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True}
    read = lora.load(write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(told)}))
    torch.testing.assert_close(read.modules[KQ].delta(), product(*linear, 8 / 4))
    torch.testing.assert_close(read.modules[KCONV].delta(), product(*conv, 3 / 2))
    torch.testing.assert_close(read.modules[KTEXT].delta(), product(*text, 6 / math.sqrt(4)))


def test_raw_peft_takes_its_scale_from_the_config_beside_it(tmp_path):
    down, up = factors(0)
    path = write(tmp_path, pair(f"base_model.model.{Q}.lora_{{}}.weight", down, up))
    torch.testing.assert_close(lora.load(path).modules[KQ].delta(), product(down, up))
    assert any("adapter_config.json" in line for line in console.state.warnings)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2, "alpha_pattern": {}}))
    torch.testing.assert_close(lora.load(path).modules[KQ].delta(), product(down, up, 0.5))
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(InputRefused, match="adapter_config"):
        lora.load(path)


def test_a_stray_adapter_config_does_not_touch_a_diffusers_file(tmp_path):
    down, up = factors(0)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 400}))
    read = lora.load(write(tmp_path, pair(f"unet.{Q}.lora_{{}}.weight", down, up)))
    torch.testing.assert_close(read.modules[KQ].delta(), product(down, up))


def test_sdxl_calls_its_encoders_te1_and_te2(tmp_path):
    tensors = {**pair(f"text_encoder.{TEXT}.lora_{{}}.weight", *factors(0))}
    tensors |= pair(f"text_encoder_2.{TEXT}.lora_{{}}.weight", *factors(1))
    tensors |= pair("text_encoder_2.text_projection.lora_{}.weight", *factors(2))
    read = lora.load(write(tmp_path, tensors))
    flat = TEXT.replace(".", "_")
    assert set(read.modules) == {f"lora_te1_{flat}", f"lora_te2_{flat}", "lora_te2_text_projection"}
    assert read.family is FAMILIES["sdxl"]
    alone = lora.load(write(tmp_path, kohya(f"lora_te1_{flat.removeprefix('text_model_')}", *factors(0))))
    assert set(alone.modules) == {KTEXT}  # nothing says SDXL; the level text_model is back


def test_family_from_the_layers_then_the_header():
    wide = {"lora_unet_x_attn2_to_k": Factors(*factors(0, inside=2048))}
    narrow = {"lora_unet_x_attn1_to_k": Factors(*factors(0))}
    assert Lora(wide).family is FAMILIES["sdxl"]
    assert Lora(wide, {"fastdiff.family": "emoji"}).family is FAMILIES["sdxl"]  # no emoji layer is so wide
    assert Lora(narrow, {"fastdiff.family": "emoji"}).family is FAMILIES["emoji"]
    assert Lora(narrow, {"modelspec.architecture": "stable-diffusion-v2-512/lora"}).family is FAMILIES["sd21"]
    assert Lora(narrow, {"modelspec.architecture": "stable-diffusion-v1/lora"}).family is FAMILIES["sd15"]
    assert Lora(narrow).family is None


# ---- writing


def test_round_trip_is_exact_in_fp32_and_keeps_digits_in_fp16(tmp_path):
    tiny = factors(0)[0], factors(0)[1] * 1e-6  # as after folding alpha = 1 of a high rank: subnormal in fp16
    before = Lora({KQ: Factors(*tiny), KCONV: Factors(*factors(1, rank=4, kernel=3))})
    lora.save(before, tmp_path / "a" / "b.safetensors", dtype=torch.float32)
    exact = lora.load(tmp_path / "a" / "b.safetensors")
    lora.save(before, tmp_path / "half.safetensors")
    half = lora.load(tmp_path / "half.safetensors")
    for key, value in before.modules.items():
        torch.testing.assert_close(exact.modules[key].delta(), value.delta(), rtol=1e-6, atol=1e-12)
        error = (half.modules[key].delta() - value.delta()).norm() / value.delta().norm()
        assert error < 1e-3
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.safetensors"]  # nothing staged is left


def test_a_fresh_adapter_whose_up_is_zero_can_be_written(tmp_path):
    down, up = factors(0)
    lora.save(Lora({KQ: Factors(down, torch.zeros_like(up))}), tmp_path / "x.safetensors")
    assert not lora.load(tmp_path / "x.safetensors").modules[KQ].delta().any()


def test_written_keys_alpha_and_header(tmp_path):
    recipe = Recipe(method="lcm", family="sd15", scheduler="lcm", num_steps=4, guidance=1.0)
    stale = {"lora_adapter_metadata": '{"unet.lora_alpha": 99}', "ss_network_dim": "7", "ss_tag": "kept"}
    item = Lora({KQ: Factors(*factors(0)), KCONV: Factors(*factors(1, rank=4, kernel=3))}, recipe.to_metadata() | stale)
    lora.save(item, tmp_path / "fast.safetensors", extra_metadata={"fastdiff.note": "x"})
    tensors = load_file(tmp_path / "fast.safetensors")
    suffixes = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(tensors) == {f"{key}.{suffix}" for key in (KQ, KCONV) for suffix in suffixes}
    assert tensors[f"{KQ}.alpha"].dtype == torch.float32
    assert tensors[f"{KQ}.alpha"].item() == 4
    assert tensors[f"{KQ}.lora_up.weight"].dtype == torch.float16
    with safe_open(tmp_path / "fast.safetensors", "pt") as file:
        told = file.metadata()
    assert told["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert told["modelspec.usage_hint"] == "4 steps, guidance 1, scheduler lcm"
    assert told["modelspec.title"] == "fast"
    assert told["ss_network_module"] == "networks.lora"
    assert told["ss_network_dim"] == told["ss_network_alpha"] == "4"
    assert told["ss_tag"] == "kept"
    assert told["fastdiff.note"] == "x"
    assert "lora_adapter_metadata" not in told
    assert lora.load(tmp_path / "fast.safetensors").recipe == recipe
    item.modules[KCONV] = Factors(*factors(1, rank=2, kernel=3))
    lora.save(item, tmp_path / "mixed.safetensors", dtype=torch.float32)
    tensors = load_file(tmp_path / "mixed.safetensors")
    # One alpha in the file whatever the ranks: diffusers gives attention the most frequent one.
    assert tensors[f"{KQ}.alpha"] == tensors[f"{KCONV}.alpha"] == 4
    read = lora.load(tmp_path / "mixed.safetensors")
    torch.testing.assert_close(read.modules[KCONV].delta(), item.modules[KCONV].delta())
    told = lora.header(item, "t")
    assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("Dynamic", "4")


def test_the_same_weights_are_the_same_bytes_in_any_process(tmp_path):
    """The library orders the header by a hash seeded anew in every process."""
    code = """
        import sys, torch
        from fastdiff.lora import Lora, save
        from fastdiff.lora.kinds import Factors
        told = {f"k{i}": "caf\u00e9" * i for i in range(9)}
        save(Lora({"lora_unet_conv_in": Factors(torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1))}, told), sys.argv[1])
    """
    paths = [tmp_path / "a" / "x.safetensors", tmp_path / "b" / "x.safetensors"]
    for path in paths:
        subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], check=True)
    first, second = (path.read_bytes() for path in paths)
    assert first == second
    assert lora.load(paths[0]).metadata["k3"] == "caf\u00e9" * 3
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o666 & ~umask


def test_what_fp16_cannot_hold_is_not_written(tmp_path):
    down, up = factors(0)
    with pytest.raises(ValueError, match=KQ):
        lora.save(Lora({KQ: Factors(down * 1e6, up * 1e6)}), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# ---- refusals


def without(side):
    return {k: v for k, v in kohya(KQ, *factors(0), 4.0).items() if side not in k}


def spoiled(side, value):
    tensors = kohya(KQ, *factors(0), 4.0)
    key = next(k for k in tensors if side in k)
    return {**tensors, key: value(tensors[key])}


BROKEN = {
    "lora_up|up missing": without("lora_up"),
    "down missing": without("lora_down"),
    "NaN": spoiled("lora_down", lambda t: t.index_fill(0, torch.tensor([1]), float("nan"))),
    "up has NaN or infinite": spoiled("lora_up", lambda t: t * float("inf")),
    "differ in rank": spoiled("lora_up", lambda t: t[:, :3].contiguous()),
    "not floating": spoiled("lora_up", lambda t: t.to(torch.int8)),
    "alpha has NaN": spoiled("alpha", lambda t: t * float("nan")),
    "alpha must be one number": spoiled("alpha", lambda t: -t),
    "alpha must be one number ": spoiled("alpha", lambda t: t.repeat(2)),
    "linear or convolution": spoiled("lora_up", lambda t: t[..., None].contiguous()),
    "1 of 4 keys are unknown: something.else": {**kohya(KQ, *factors(0), 4.0), "something.else": torch.ones(1)},
    "2 of 2 keys are unknown": pair(f"{KQ}.lora_{{}}.weight", *factors(0)),  # kohya's names never have lora_A
    "no LoRA modules": {},
    "two sets": {**kohya(KQ, *factors(0)), **pair(f"unet.{Q}.lora_{{}}.weight", *factors(0))},
}


@pytest.mark.parametrize("told", BROKEN)
def test_broken_contents_are_refused_in_one_line(tmp_path, told):
    path = write(tmp_path, BROKEN[told])
    with pytest.raises(InputRefused, match=told.strip()) as caught:
        lora.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


FOREIGN = {
    "a whole checkpoint": {"model.diffusion_model.out.2.weight": torch.ones(1)},
    "a LoRA of a transformer": {"transformer.blocks.0.attn.to_q.lora_A.weight": torch.ones(4, 5)},
    "a textual inversion embedding": {"emb_params": torch.ones(2, 8)},
    "a motion LoRA": {"down_blocks.0.motion_modules.0.to_q.lora_A.weight": torch.ones(4, 5)},
}
HALVES = {  # of another module, beside a whole one: none may pass for a plain LoRA or be left out
    "magnitude alone cannot": {f"{KCONV}.dora_scale": torch.ones(6, 1)},
    "these tensors: w1_a": {f"{KCONV}.hada_w1_a": torch.ones(6, 2)},
    "kron1 .2, 2., kron2_a": {f"{KCONV}.lokr_w1": torch.ones(2, 2), f"{KCONV}.lokr_w2_a": torch.ones(2, 2)},
    "Tucker core": {**kohya(KCONV, *factors(1, kernel=1)), f"{KCONV}.lora_mid.weight": torch.ones(3, 4, 3, 3)},
    "on_input alone cannot": {f"{KCONV}.on_input": torch.ones(1)},
    "DoRA magnitude .7, 1. for a weight": {**kohya(KCONV, *factors(1)), f"{KCONV}.dora_scale": torch.ones(7, 1)},
    "magnitude alone cannot ": {f"unet.{CONV}.lora_magnitude_vector.weight": torch.ones(6)},
    "far too large": kohya(KCONV, *factors(1), 1e6),
    "down is empty": kohya(KCONV, torch.ones(0, 5), torch.ones(6, 0)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_lora_of_ours_is_refused_by_name(tmp_path, kind):
    with pytest.raises(InputRefused, match=kind):
        lora.load(write(tmp_path, {**kohya(KQ, *factors(0), 4.0), **FOREIGN[kind]}))


@pytest.mark.parametrize("told", HALVES)
def test_half_an_update_is_refused(tmp_path, told):
    with pytest.raises(InputRefused, match=told.strip()):
        lora.load(write(tmp_path, {**kohya(KQ, *factors(0), 4.0), **HALVES[told]}))


def test_unknown_keys_are_left_out_only_when_allowed(tmp_path):
    path = write(tmp_path, {**kohya(KQ, *factors(0), 4.0), "something.else": torch.ones(1)})
    with pytest.raises(InputRefused, match="1 of 4 keys are unknown") as caught:
        lora.load(path)
    assert "`allow_partial=True`" in caught.value.hint
    read = lora.load(path, allow_partial=True)
    assert (set(read.modules), read.skipped) == ({KQ}, ["something.else"])
    assert any("something.else" in line for line in console.state.warnings)
    with pytest.raises(InputRefused, match="2 of 2 keys are unknown"):
        lora.load(write(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}), allow_partial=True)


def test_files_that_are_no_safetensors_are_called_by_name(tmp_path):
    good = write(tmp_path, kohya(KQ, *factors(0), 4.0)).read_bytes()
    path = tmp_path / "bad.safetensors"
    torch.save({"a": torch.ones(2)}, tmp_path / "zip.ckpt")
    torch.save({"a": torch.ones(2)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    contents = {
        "pickle": (tmp_path / "zip.ckpt").read_bytes(),
        "pickle ": (tmp_path / "old.ckpt").read_bytes(),
        "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "web page": b"\n<!DOCTYPE html><html></html>",
        "cut short": good[:-7],
        "cut short ": good[:40],
        "cut short  ": good + b"more",
        "empty": b"",
        "corrupt": b"\x08" + bytes(7) + b"{not js}",
    }
    for told, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(InputRefused, match=told.strip()) as caught:
            lora.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputRefused, match="folder"):
        lora.load(tmp_path)
    with pytest.raises(UsageError, match="no such file") as caught:
        lora.load(tmp_path / "missing.safetensors")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "metadata",
    [
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(": 3}}'},
        {"lora_adapter_metadata": '{"unet.lora_alpha": "many"}'},
        {"fastdiff.num_steps": "four"},
    ],
)
def test_a_broken_header_is_refused(tmp_path, metadata):
    with pytest.raises(InputRefused, match="header"):
        lora.load(write(tmp_path, pair(f"unet.{Q}.lora_{{}}.weight", *factors(0)), metadata))


def test_weights_after_the_file_name(tmp_path):
    assert [str(lora.parse_spec("a.safetensors=0.8", 1.0)[0]), lora.parse_spec("a=0.8", 1.0)[1]] == [
        "a.safetensors",
        0.8,
    ]
    assert lora.parse_spec("a.safetensors", 0.5)[1] == 0.5
    assert str(lora.parse_spec("x=1.safetensors", 0.5)[0]) == "x=1.safetensors"
    assert lora.parse_spec("x=1.safetensors=-2", 0.5)[1] == -2
    with pytest.raises(UsageError, match="finite"):
        lora.parse_spec("a.safetensors=nan", 1.0)


# ---- a model's names


def test_names_come_from_the_model_and_go_past_peft():
    net = nn.ModuleDict({"to_out": nn.ModuleList([nn.Linear(5, 6)]), "conv": nn.Conv2d(5, 6, 3), "n": nn.LayerNorm(6)})
    assert apply.names(net) == {"lora_unet_to_out_0": "to_out.0", "lora_unet_conv": "conv"}
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert apply.places(shapes, "lora_unet_")["lora_unet_n"] == ("n.weight", (6,))
    assert apply.places(shapes, "lora_unet_")["lora_unet_conv.bias"] == ("conv.bias", (6,))
    encoder = nn.ModuleDict({"encoder": nn.Linear(5, 6)})
    assert apply.names(encoder, "lora_te_") == {"lora_te_text_model_encoder": "encoder"}
    assert apply.names(nn.ModuleDict({"text_model": encoder}), "lora_te2_") == {
        "lora_te2_text_model_encoder": "text_model.encoder"
    }
    inner = nn.ModuleDict({"base_layer": nn.Linear(5, 6), "lora_A": nn.ModuleDict({"default": nn.Linear(5, 4)})})
    wrapped = nn.ModuleDict({"to_q": inner})
    assert apply.names(wrapped) == {"lora_unet_to_q": "to_q"}
    item = Lora({"lora_unet_to_q": Factors(*factors(0))})
    before = inner["base_layer"].weight.clone()
    wrapped["to_q"].base_layer = inner["base_layer"]
    assert apply.fold(wrapped, [(item, 1.0)]) == 1
    torch.testing.assert_close(inner["base_layer"].weight, before + product(*factors(0)))


def test_from_peft_folds_one_alpha_or_one_for_each():
    down, up = factors(0)
    state_dict = {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}
    torch.testing.assert_close(lora.from_peft(state_dict, 8.0)[KQ].delta(), product(down, up, 2.0))
    torch.testing.assert_close(lora.from_peft(state_dict, {Q: 2.0})[KQ].delta(), product(down, up, 0.5))
    made = lora.from_peft(state_dict, 4.0)[KQ]
    down.zero_()  # training goes on
    assert made.delta().any()
    with pytest.raises(ValueError, match="plain LoRA"):
        lora.from_peft({f"{Q}.lora_magnitude_vector": torch.ones(6)}, 4.0)


# ---- what the libraries write


def test_what_peft_and_diffusers_write_is_read_with_its_scale(tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet", local_files_only=True)
    clean = {k: v.clone() for k, v in unet.state_dict().items()}
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], rank_pattern={"conv1": 2}, alpha_pattern={"conv1": 7},
        init_lora_weights=False,
    )  # fmt: skip
    wrapped = get_peft_model(unet, config)
    count = len(apply.names(wrapped, "lora_unet_").keys())
    assert count == sum(isinstance(m, nn.Linear | nn.Conv2d) for m in UNet2DConditionModel(**unet.config).modules())
    wrapped.save_pretrained(tmp_path / "peft")
    state_dict = get_peft_model_state_dict(wrapped)
    plain = {k.removeprefix("base_model.model."): v for k, v in state_dict.items()}
    told = {k: v for k, v in config.to_dict().items() if k in {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "new", unet_lora_layers=plain, unet_lora_adapter_metadata=told)
    merged = wrapped.merge_and_unload().state_dict()
    files = [tmp_path / "peft" / "adapter_model.safetensors", *(tmp_path / "new").iterdir()]
    assert len(files) == 2
    for file in files:
        fresh = UNet2DConditionModel(**unet.config)
        fresh.load_state_dict(clean)
        read = lora.load(file)
        assert len(read.modules) == len(state_dict) // 2 == apply.fold(fresh, [(read, 1.0)])
        for key, weight in fresh.state_dict().items():
            torch.testing.assert_close(weight, merged[key], rtol=1e-4, atol=1e-5)
