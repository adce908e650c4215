"""merge-lora and folding: the result is the sum, diffusers agrees with it, and no input is ever overwritten."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdiff import merge
from fastdiff.console import InputRefused, UsageError
from fastdiff.io import checkpoint, lora
from fastdiff.io.lora import Factors, Lora
from fastdiff.io.recipe import Recipe
from fastdiff.merge import Config, concatenate


def factors(seed, rank, kernel=None):
    """Random factors of a 5 -> 6 layer, linear or a convolution."""
    made = torch.Generator().manual_seed(seed)
    more, ones = ((kernel, kernel), (1, 1)) if kernel else ((), ())
    return Factors(torch.randn(rank, 5, *more, generator=made), torch.randn(6, rank, *ones, generator=made))


def example(seed, rank, *names, **recipe):
    kernels = {"linear": None, "one": 1, "conv": 3}
    modules = {f"lora_unet_{n}": factors(seed + i, rank, kernels[n]) for i, n in enumerate(names)}
    return Lora(modules, Recipe(**recipe).to_metadata(), f"{'-'.join(names)}{seed}.safetensors")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """lcm.safetensors and anime.safetensors in the current folder."""
    monkeypatch.chdir(tmp_path)
    fast = example(0, 4, "linear", "one", "conv", method="lcm", scheduler="lcm", num_steps=4, guidance=1.0)
    style = example(50, 6, "linear", "conv")
    lora.save(fast, tmp_path / "lcm.safetensors", dtype=torch.float32)
    lora.save(style, tmp_path / "anime.safetensors", dtype=torch.float32)
    return fast, style


def test_concatenation_is_the_weighted_sum():
    loras = [(example(0, 4, "linear", "one", "conv"), 1.0), (example(10, 6, "linear", "one", "conv"), -0.8)]
    loras.append((example(20, 3, "conv"), 0.3))
    merged = concatenate(loras)
    assert {k: m.rank for k, m in merged.modules.items()} == {
        "lora_unet_linear": 10, "lora_unet_one": 10, "lora_unet_conv": 13,
    }  # fmt: skip
    for key, made in merged.modules.items():
        exact = sum(
            w * torch.einsum("or,r...->o...", m.up.flatten(1).double(), m.down.double())
            for item, w in loras
            if (m := item.modules.get(key))
        )
        assert made.delta().shape == exact.shape
        assert (made.delta() - exact).norm() / exact.norm() < 1e-6


def test_recipe_of_the_first_and_the_names_of_all_are_kept():
    recipe = {"method": "lcm", "family": "emoji", "scheduler": "lcm", "num_steps": 4}
    merged = concatenate([(example(0, 4, "linear", **recipe), 1.0), (example(1, 2, "linear"), 0.8)])
    assert merged.recipe == Recipe(**recipe)
    assert json.loads(merged.metadata["fastdiff.merged_from"]) == [
        {"name": "linear0.safetensors", "weight": 1.0},
        {"name": "linear1.safetensors", "weight": 0.8},
    ]
    family = concatenate([(example(0, 4, "linear"), 1.0), (example(1, 2, "linear", family="sd15"), 0.8)]).recipe.family
    assert family == "sd15"


def test_families_and_shapes_that_differ_are_refused_with_both_names():
    one, other = example(0, 4, "linear", family="sd15"), example(1, 4, "linear", family="sdxl")
    with pytest.raises(InputRefused, match="linear0.safetensors is for sd15, linear1.safetensors for sdxl"):
        concatenate([(one, 1.0), (other, 1.0)])
    odd = Lora({"lora_unet_linear": Factors(torch.ones(2, 7), torch.ones(6, 2))}, source="odd.safetensors")
    with pytest.raises(InputRefused, match=r"\(6, 5\) in linear0.safetensors but \(6, 7\) in odd.safetensors"):
        concatenate([(one, 1.0), (odd, 1.0)])


def test_first_encoder_of_sdxl_goes_by_one_name():
    text = "text_model_encoder_layers_0_mlp_fc1"
    one = Lora({f"lora_te1_{text}": factors(0, 2)}, {"fastdiff.family": "sdxl"})
    other = Lora({f"lora_te_{text}": factors(1, 2)})  # nothing in its file says SDXL
    assert {k: m.rank for k, m in concatenate([(one, 1.0), (other, 1.0)]).modules.items()} == {f"lora_te1_{text}": 4}


@pytest.mark.parametrize(("precision", "dtype", "bound"), [("fp16", torch.half, 2e-3), ("fp32", torch.float, 1e-6)])
def test_run_writes_the_sum_and_measures_it(files, tmp_path, precision, dtype, bound):
    fast, style = files
    result = merge.run(Config(accel="lcm.safetensors", style=["anime.safetensors=0.5"], precision=precision))
    (output,) = result.outputs
    assert output.resolve() == tmp_path / "lcm-anime.safetensors"
    read = lora.load(output)
    for key, made in read.modules.items():
        exact = fast.modules[key].delta()
        if key in style.modules:
            exact = exact + 0.5 * style.modules[key].delta()
        assert (made.delta() - exact).norm() / exact.norm() < bound
    metrics = result.metrics
    assert (metrics["modules"], metrics["rank_min"], metrics["rank_max"]) == (3, 4, 10)
    assert [(i["file"], i["weight"], i["modules"]) for i in metrics["inputs"]] == [
        ("lcm.safetensors", 1.0, 3),
        ("anime.safetensors", 0.5, 2),
    ]
    assert metrics["max_error"] < bound
    assert (metrics["max_error"] > 1e-5) == (precision == "fp16")
    assert read.recipe == fast.recipe
    assert result.next_command == 'fastdiff sample --lora lcm-anime.safetensors --prompt "a red apple"'
    from safetensors.torch import load_file

    assert {t.dtype for k, t in load_file(output).items() if "alpha" not in k} == {dtype}


def test_style_has_weight_0_8_unless_given(files):
    result = merge.run(Config(accel="lcm.safetensors", style=["anime.safetensors"], output="deep/er/out.safetensors"))
    assert [i["weight"] for i in result.metrics["inputs"]] == [1.0, 0.8]
    assert result.outputs[0].exists()


def test_usage_errors_touch_no_file(files, tmp_path):
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "model").mkdir()
    cases = {
        "would overwrite the input": Config(accel="lcm.safetensors", style=["anime.safetensors"], output="./anime.safetensors"),
        "nothing to merge": Config(accel="lcm.safetensors"),
        "is named .safetensors": Config(accel="lcm.safetensors", style=["anime.safetensors"], output="out"),
        "no such file": Config(accel="lcm.safetensors", style=["none.safetensors"]),
        "--accel is required": Config(),
        "a whole number above 0, or auto": Config(accel="lcm.safetensors", rank="-3"),
        "needs --tuned": Config(base="emoji", extract=True),
        "either --extract or --reference": Config(base="emoji", tuned="model"),
        "would overwrite the input lcm": Config(accel="lcm.safetensors", base="emoji", output="."),
        "would overwrite the input model": Config(accel="lcm.safetensors", base="model", output="model"),
    }
    for told, config in cases.items():
        with pytest.raises(UsageError, match=told):
            merge.run(config)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_with_a_base_the_weights_are_added_in_fp32_and_cast_once(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key, name = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1"
    made = torch.Generator().manual_seed(0)
    items = [Factors(torch.randn(4, 32, 3, 3, generator=made), torch.randn(32, 4, 1, 1, generator=made) * 1e-3) for _ in range(2)]
    recipe = Recipe(method="lcm", scheduler="lcm", num_steps=4, guidance=1.0).to_metadata()
    lora.save(Lora({key: items[0]}, recipe), tmp_path / "lcm.safetensors", dtype=torch.float32)
    lora.save(Lora({key: items[1]}), tmp_path / "anime.safetensors", dtype=torch.float32)
    result = merge.run(Config(accel="lcm.safetensors", style=["anime.safetensors=0.5"], base=str(tiny_sd)))
    assert [str(p) for p in result.outputs] == ["lcm-anime"]
    assert result.metrics["modules"] == 1
    assert result.next_command == 'fastdiff sample --base lcm-anime --prompt "a red apple"'
    before, after = checkpoint.load(str(tiny_sd)), checkpoint.load("lcm-anime")
    assert (after.recipe.num_steps, after.recipe.family) == (4, "sd15")
    exact = before.weights("unet")[f"{name}.weight"] + items[0].delta() + 0.5 * items[1].delta()
    assert torch.equal(after.weights("unet")[f"{name}.weight"], exact.half())
    for part in ("unet", "text_encoder"):
        old, new = before.weights(part), after.weights(part)
        assert all(torch.equal(old[k].half(), new[k]) for k in old if k != f"{name}.weight")
    old, new = before.weights("vae"), after.weights("vae")
    assert all(torch.equal(old[k], new[k]) for k in old)  # as it was: SDXL's overflows in fp16


def test_a_base_of_another_family_is_refused(files, monkeypatch):
    lora.save(example(0, 4, "linear", family="sdxl"), "xl.safetensors")
    monkeypatch.setattr(checkpoint, "load", lambda ref, **how: SimpleNamespace(family="sd15"))
    with pytest.raises(InputRefused, match="--base sd15 is sd15, but the LoRAs are for sdxl"):
        merge.run(Config(accel="xl.safetensors", base="sd15"))


def test_every_field_is_a_flag():
    from fastdiff.config import options

    named = {"--accel", "--style", "--base", "--output", "--rank", "--block-weights", "--extract", "--tuned", "--check"}
    assert named < {o.flag for o in options(Config)}
    assert all(o.help for o in options(Config))


# ---- folding into a model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_out = nn.ModuleList([nn.Linear(5, 6)])
        self.conv, self.one = nn.Conv2d(5, 6, 3), nn.Conv2d(5, 6, 1)


def product(factors):
    """B A by einsum, not by the code under test."""
    return torch.einsum("or,r...->o...", factors.up.flatten(1), factors.down)


def test_fold_sums_in_fp32_and_casts_once():
    torch.manual_seed(0)
    net = Net().half()
    before = {name: p.detach().float().clone() for name, p in net.named_parameters()}
    items = [
        Lora({"lora_unet_to_out_0": Factors(m.down, m.up * 1e-4), "lora_unet_one": factors(9, 4)})
        for m in (factors(i, 2 + i) for i in range(8))
    ]
    loras = [(item, 0.5 + 0.1 * i) for i, item in enumerate(items)]
    assert lora.fold(net, loras) == 2  # a linear factor pair fits the 1 x 1 convolution
    total = sum(w * product(m) for item, w in loras for m in [item.modules["lora_unet_to_out_0"]])
    exact = before["to_out.0.weight"] + total
    assert torch.equal(net.to_out[0].weight, exact.half())
    sequential = before["to_out.0.weight"].half()
    for item, w in loras:
        sequential = sequential + (w * item.modules["lora_unet_to_out_0"].delta()).half()
    once, often = (net.to_out[0].weight.float() - exact).norm(), (sequential.float() - exact).norm()
    assert once < 0.7 * often
    assert torch.equal(net.conv.weight.float(), before["conv.weight"])


def test_fold_refuses_what_does_not_fit_and_changes_nothing():
    net = Net()
    before = net.to_out[0].weight.clone()
    good = {"lora_unet_to_out_0": factors(0, 4)}
    with pytest.raises(InputRefused, match=r"only 1 of 2 modules fit.*lora_unet_gone \(no such layer\)"):
        lora.fold(net, [(Lora({**good, "lora_unet_gone": factors(1, 4)}), 1.0)])
    odd = Lora({**good, "lora_unet_conv": factors(1, 4, 1)}, source="a.safetensors")
    with pytest.raises(InputRefused, match=r"a.safetensors: only 1 of 2.*\(6, 5, 1, 1\), the model has \(6, 5, 3, 3\)"):
        lora.fold(net, [(odd, 1.0)])
    assert torch.equal(net.to_out[0].weight, before)


def test_apply_reaches_the_encoders_and_leaves_nothing_out():
    encoder = nn.ModuleDict({"encoder": nn.Linear(5, 6)})
    base = SimpleNamespace(unet=Net(), text_encoders=[encoder])
    item = Lora({"lora_unet_conv": factors(0, 4, 3), "lora_te1_text_model_encoder": factors(1, 4)})
    before = encoder["encoder"].weight.clone()
    assert lora.apply(base, [(item, 0.5)]) == 2  # te1 is the only encoder of an SD1 base
    torch.testing.assert_close(encoder["encoder"].weight, before + 0.5 * product(factors(1, 4)))
    conv = base.unet.conv.weight.clone()
    item.modules["lora_te2_text_model_encoder"] = factors(1, 4)
    with pytest.raises(InputRefused, match=r"only 2 of 3 modules fit this model; not: lora_te2_"):
        lora.apply(base, [(item, 0.5)])
    assert torch.equal(base.unet.conv.weight, conv)


def random_lora(nets, seed=0):
    """A LoRA on every Linear and Conv2d of the nets, ranks 2 and 3 in turns."""
    torch.manual_seed(seed)
    modules = {}
    for prefix, net in nets.items():
        for i, (key, name) in enumerate(lora.names(net, prefix).items()):
            out, inside, *kernel = net.get_submodule(name).weight.shape
            rank = 2 + i % 2
            down, up = torch.randn(rank, inside, *kernel), torch.randn(out, rank, *[1] * len(kernel))
            modules[key] = Factors(down * 0.05, up * 0.05)
    return Lora(modules)


def outputs(pipe):
    made = torch.Generator().manual_seed(1)
    ids, x = torch.arange(12)[None], torch.randn(1, 4, 8, 8, generator=made)
    with torch.no_grad():
        cond = pipe.text_encoder(ids)[0]
        return cond, pipe.unet(x, torch.tensor([500]), cond).sample


def test_diffusers_applies_every_layer_of_what_we_write(tiny_sd, tmp_path):
    from diffusers import StableDiffusionPipeline
    from peft.tuners.lora import LoraLayer

    ours = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True)
    theirs = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True)
    plain = outputs(ours)
    item = random_lora({"lora_unet_": ours.unet, "lora_te_": ours.text_encoder})
    lora.save(item, tmp_path / "x.safetensors", dtype=torch.float32)
    theirs.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    layers = [m for net in (theirs.unet, theirs.text_encoder) for m in net.modules() if isinstance(m, LoraLayer)]
    assert len(layers) == len(item.modules) > 200
    base = SimpleNamespace(unet=ours.unet, text_encoders=[ours.text_encoder])
    assert lora.apply(base, [(lora.load(tmp_path / "x.safetensors"), 1.0)]) == len(item.modules)
    for before, mine, other in zip(plain, outputs(ours), outputs(theirs), strict=True):
        assert (mine - before).abs().max() > 1e-2
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
