"""merge-lora and folding: the result is the sum, diffusers agrees with it, and no input is ever overwritten."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.commands import merge_lora
from fastdiff.commands.merge_lora import Config
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora
from fastdiff.lora.merging import concatenate, reduced
from fastdiff.runtime.errors import InputRefused, UsageError


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
    result = merge_lora.run(Config(accel="lcm.safetensors", style=["anime.safetensors=0.5"], precision=precision))
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
    result = merge_lora.run(Config(accel="lcm.safetensors", style=["anime.safetensors"], output="deep/er/out.safetensors"))
    assert [i["weight"] for i in result.metrics["inputs"]] == [1.0, 0.8]
    assert result.outputs[0].exists()


def test_usage_errors_touch_no_file(files, tmp_path):
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    (tmp_path / "model").mkdir()
    cases = {
        "would overwrite the input": Config(accel="lcm.safetensors", style=["anime.safetensors"], output="./anime.safetensors"),
        "nothing to merge": Config(accel="lcm.safetensors"),
        "must end in .safetensors": Config(accel="lcm.safetensors", style=["anime.safetensors"], output="out"),
        "no such file": Config(accel="lcm.safetensors", style=["none.safetensors"]),
        "--accel is required": Config(),
        "--rank and --format apply to a written LoRA": Config(accel="lcm.safetensors", base="emoji", rank="4"),
        "a whole number above 0, or auto": Config(accel="lcm.safetensors", rank="-3"),
        "needs --tuned": Config(base="emoji", extract=True),
        "either --extract or --reference": Config(base="emoji", tuned="model"),
        "would overwrite the input lcm": Config(accel="lcm.safetensors", base="emoji", output="."),
        "would overwrite the input model": Config(accel="lcm.safetensors", base="model", output="model"),
    }
    for told, config in cases.items():
        with pytest.raises(UsageError, match=told):
            merge_lora.run(config)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_with_a_base_the_weights_are_added_in_fp32_and_cast_once(tiny_sd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key, name = "lora_unet_mid_block_resnets_0_conv1", "mid_block.resnets.0.conv1"
    made = torch.Generator().manual_seed(0)
    items = [Factors(torch.randn(4, 32, 3, 3, generator=made), torch.randn(32, 4, 1, 1, generator=made) * 1e-3) for _ in range(2)]
    recipe = Recipe(method="lcm", scheduler="lcm", num_steps=4, guidance=1.0).to_metadata()
    lora.save(Lora({key: items[0]}, recipe), tmp_path / "lcm.safetensors", dtype=torch.float32)
    lora.save(Lora({key: items[1]}), tmp_path / "anime.safetensors", dtype=torch.float32)
    how = dict(base=str(tiny_sd), precision="fp16")
    result = merge_lora.run(Config(accel="lcm.safetensors", style=["anime.safetensors=0.5"], **how))
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
    monkeypatch.setattr(
        checkpoint, "load", lambda ref, **how: SimpleNamespace(ref=ref, family=FAMILIES["sd15"], allow_pickle=False)
    )
    with pytest.raises(InputRefused, match="`base=sd15` is sd15, but the LoRAs are for sdxl"):
        merge_lora.run(Config(accel="xl.safetensors", base="sd15"))


def test_every_field_is_a_flag():
    from fastdiff.runtime.config import options

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
    assert apply.fold(net, loras) == 2  # a linear factor pair fits the 1 x 1 convolution
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
        apply.fold(net, [(Lora({**good, "lora_unet_gone": factors(1, 4)}), 1.0)])
    odd = Lora({**good, "lora_unet_conv": factors(1, 4, 1)}, source="a.safetensors")
    with pytest.raises(InputRefused, match=r"a.safetensors: only 1 of 2.*\(6, 5, 1, 1\), the model has \(6, 5, 3, 3\)"):
        apply.fold(net, [(odd, 1.0)])
    assert torch.equal(net.to_out[0].weight, before)


def test_apply_reaches_the_encoders_and_leaves_nothing_out():
    encoder = nn.ModuleDict({"encoder": nn.Linear(5, 6)})
    base = SimpleNamespace(family="sd15", unet=Net(), text_encoders=[encoder])
    item = Lora({"lora_unet_conv": factors(0, 4, 3), "lora_te1_text_model_encoder": factors(1, 4)})
    before = encoder["encoder"].weight.clone()
    assert apply.apply(base, [(item, 0.5)]).changed == 2  # te1 is the only encoder of an SD1 base
    torch.testing.assert_close(encoder["encoder"].weight, before + 0.5 * product(factors(1, 4)))
    conv = base.unet.conv.weight.clone()
    item.modules["lora_te2_text_model_encoder"] = factors(1, 4)
    with pytest.raises(InputRefused, match=r"only 2 of 3 modules fit this model; not: lora_te2_"):
        apply.apply(base, [(item, 0.5)])
    assert torch.equal(base.unet.conv.weight, conv)


def random_lora(nets, seed=0):
    """A LoRA on every Linear and Conv2d of the nets, ranks 2 and 3 in turns."""
    torch.manual_seed(seed)
    modules = {}
    for prefix, net in nets.items():
        for i, (key, name) in enumerate(apply.names(net, prefix).items()):
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
    base = SimpleNamespace(family="sd15", unet=ours.unet, text_encoders=[ours.text_encoder])
    assert apply.apply(base, [(lora.load(tmp_path / "x.safetensors"), 1.0)]).changed == len(item.modules)
    for before, mine, other in zip(plain, outputs(ours), outputs(theirs), strict=True):
        assert (mine - before).abs().max() > 1e-2
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


# ---- to a rank, by other rules, by block, out of two checkpoints


def test_rank_is_the_best_approximation_and_tells_the_energy():
    """QR + SVD of the core equals the SVD of the product; the energy is that of the singular values kept."""
    loras = [(example(0, 4, "linear", "conv"), 1.0), (example(10, 4, "linear", "conv"), -0.5)]
    exact = concatenate(loras)
    small, energy = reduced(exact, "2", 0.95, {})
    kept = whole = 0.0
    for key, made in small.modules.items():
        assert made.rank == 2
        full = exact.modules[key].delta().flatten(1).double()
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ vh[:2]
        assert (made.delta().flatten(1).double() - best).norm() / best.norm() < 1e-5
        assert made.shape == exact.modules[key].shape
        kept, whole = kept + s[:2].square().sum().item(), whole + s.square().sum().item()
    assert energy["unet"] == pytest.approx(kept / whole, rel=1e-5)
    auto, energy = reduced(exact, "auto", 0.95, {})
    assert energy["unet"] >= 0.95
    for key, made in auto.modules.items():
        s = torch.linalg.svdvals(exact.modules[key].delta().flatten(1)).square()
        assert s[: made.rank].sum() / s.sum() >= 0.95 - 1e-6
        assert made.rank == 1 or s[: made.rank - 1].sum() / s.sum() < 0.95
    same, energy = reduced(exact, None, 1.0, dict.fromkeys(exact.modules, 8))
    assert energy["unet"] == pytest.approx(1.0)
    assert all(torch.allclose(same.modules[k].delta(), m.delta(), atol=1e-5) for k, m in exact.modules.items())


def test_ties_and_dare_work_on_the_products(files):
    """TIES keeps the largest entries of each product and the sign that wins; on the factors it would mean nothing."""
    fast, style = files
    result = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors=1"], method="ties", density=0.5, precision="fp32")
    )
    read = lora.load(result.outputs[0])
    for key in style.modules:
        deltas = [item.modules[key].delta() for item in (fast, style)]
        trimmed = []
        for delta in deltas:
            k = round(0.5 * delta.numel())
            limit = delta.abs().flatten().sort(descending=True).values[k - 1]
            trimmed.append(torch.where(delta.abs() >= limit, delta, 0))
        sign = torch.sign(sum(trimmed))
        agree = [torch.where(torch.sign(t) == sign, t, 0) for t in trimmed]
        count = sum((a != 0).float() for a in agree).clamp(min=1)
        wanted = sum(agree) / count
        found = read.modules[key].delta().flatten(1)
        rank = read.modules[key].rank
        u, s, vh = torch.linalg.svd(wanted.flatten(1), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert (found - best).norm() / best.norm() < 1e-4
    first = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors"], method="dare-ties", seed=1, output="a.safetensors")
    )
    again = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors"], method="dare-ties", seed=1, output="b.safetensors")
    )
    other = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors"], method="dare-ties", seed=2, output="c.safetensors")
    )
    a, b, c = (lora.load(r.outputs[0]).modules["lora_unet_conv"].delta() for r in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_zero_and_negative_weights(files):
    fast, style = files
    result = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors=-1"], precision="fp32", output="minus.safetensors")
    )
    read = lora.load(result.outputs[0])
    wanted = fast.modules["lora_unet_conv"].delta() - style.modules["lora_unet_conv"].delta()
    torch.testing.assert_close(read.modules["lora_unet_conv"].delta(), wanted, rtol=1e-4, atol=1e-5)
    result = merge_lora.run(
        Config(accel="lcm.safetensors", style=["anime.safetensors=0"], precision="fp32", output="zero.safetensors")
    )
    read = lora.load(result.outputs[0])
    for key, update in fast.modules.items():
        torch.testing.assert_close(read.modules[key].delta(), update.delta(), rtol=1e-5, atol=1e-6)


def test_block_weights_scale_the_style_by_ldm_block():
    names = [
        "down_blocks_1_attentions_0_proj_in",
        "mid_block_attentions_0_proj_in",
        "up_blocks_1_attentions_0_proj_in",
        "conv_in",
    ]
    keys = [f"lora_unet_{name}" for name in names] + ["lora_te_text_model_encoder_layers_0_mlp_fc1"]
    assert [merge_lora.block_of(key) for key in keys] == ["IN04", "M00", "OUT03", "IN00", "BASE"]
    item = Lora({key: factors(i, 2) for i, key in enumerate(keys)})
    numbers = ["2"] + ["1"] * 6 + ["0.5"] + ["0"] * 9  # BASE, six IN, M00, nine OUT
    numbers[3] = "3"  # IN04
    scaled = merge_lora.weighted(item, ",".join(numbers))
    for key, times in zip(keys, (3, 0.5, 0, 1, 2), strict=True):  # IN00 is not in the list of 17: it keeps 1
        torch.testing.assert_close(scaled.modules[key].delta(), times * item.modules[key].delta())
    for wrong in ("1,2,3", "a,b"):
        with pytest.raises(UsageError, match="12 or 20 .SDXL., 17 or 26"):
            merge_lora.weighted(item, wrong)


def test_what_has_no_low_rank_is_refused_with_the_way_out(tmp_path):
    from fastdiff.lora.kinds import Decomposed, Dense

    plain = factors(0, 2)
    dora = Lora({"lora_unet_linear": Decomposed(plain, torch.ones(6), False)}, source="d.safetensors")
    loha = Lora({"lora_unet_linear": Dense(torch.randn(6, 5), "loha")}, source="h.safetensors")
    good = example(0, 4, "linear")
    with pytest.raises(InputRefused, match="a DoRA .* cannot be merged into a LoRA exactly") as caught:
        concatenate([(good, 1.0), (dora, 1.0)])
    assert caught.value.hint == "bake it into a checkpoint with `base`"
    with pytest.raises(InputRefused, match="a LoHa") as caught:
        concatenate([(good, 1.0), (loha, 1.0)])
    assert "`rank=R`" in caught.value.hint
    merged, _ = reduced(concatenate([(good, 1.0), (loha, 0.5)], approximate=True), "5", 1.0, {})
    wanted = good.modules["lora_unet_linear"].delta() + 0.5 * loha.modules["lora_unet_linear"].value
    torch.testing.assert_close(merged.modules["lora_unet_linear"].delta(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputRefused, match="dora .* has no low rank"):
        concatenate([(good, 1.0), (dora, 1.0)], approximate=True)


def tuned_copy(source, folder, loras):
    """A checkpoint with LoRAs in it, in fp32."""
    base = checkpoint.load(str(source))
    apply.apply(base, loras)
    from fastdiff.checkpoints import write

    write.to_folder(base, folder, recipe=Recipe(method="lcm", scheduler="lcm", num_steps=4, guidance=1.0))
    return folder


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_the_lora_between_two_checkpoints_is_the_one_that_was_put_in(kind, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = request.getfixturevalue(kind)
    base = checkpoint.load(str(source))
    prefixes = dict(zip(apply.prefixes(len(base.text_parts)).values(), [base.unet, *base.text_encoders], strict=True))
    item = random_lora(prefixes)
    tuned = tuned_copy(source, tmp_path / "tuned", [(item, 1.0)])
    result = merge_lora.run(
        Config(base=str(source), tuned=str(tuned), extract=True, rank="3", output="out.safetensors", precision="fp32")
    )
    read = lora.load("out.safetensors")
    assert read.modules.keys() == item.modules.keys()
    assert (read.recipe.scheduler, read.recipe.num_steps) == ("lcm", 4)
    for key, update in item.modules.items():
        assert (read.modules[key].delta() - update.delta()).norm() / update.delta().norm() < 1e-3
    assert min(result.metrics["energy"].values()) > 0.9999
    assert result.metrics["left_out"] == 0
    with pytest.raises(UsageError, match="no layer differs"):
        merge_lora.run(Config(base=str(source), tuned=str(source), extract=True, output="none.safetensors"))


def test_acceleration_is_transferred_to_a_third_checkpoint(tiny_sd, tiny_sdxl, tmp_path, monkeypatch):
    """custom + (fast - base), exact in fp32."""
    monkeypatch.chdir(tmp_path)
    base = checkpoint.load(str(tiny_sd))
    fast, style = (random_lora({"lora_unet_": base.unet}, seed) for seed in (1, 2))
    quick = tuned_copy(tiny_sd, tmp_path / "quick", [(fast, 1.0)])
    custom = tuned_copy(tiny_sd, tmp_path / "custom", [(style, 1.0)])
    both = checkpoint.load(str(tiny_sd))
    apply.apply(both, [(fast, 1.0), (style, 1.0)])
    how = dict(base=str(custom), tuned=str(quick), reference=str(tiny_sd), precision="fp32")
    merge_lora.run(Config(**how, output="out"))
    found = checkpoint.load("out")
    assert found.recipe.num_steps == 4
    weights = found.weights("unet")
    for name, p in both.unet.named_parameters():
        torch.testing.assert_close(weights[name], p.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputRefused, match="cannot be subtracted"):
        merge_lora.run(Config(**{**how, "tuned": str(tiny_sdxl)}, output="no"))


def test_ranks_64_and_8_with_other_alphas_and_modules_equal_both_adapters(tiny_sd, tmp_path, monkeypatch):
    """The merged file, folded by us and loaded by stock diffusers, against the two adapters running side by side."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    made = torch.Generator().manual_seed(5)
    pipe = StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True)
    files = {}
    for name, rank, alpha, every in (("a", 64, 32.0, 1), ("b", 8, 4.0, 2)):
        tensors = {}
        for key, layer in list(apply.names(pipe.unet).items())[::every]:
            out, inside, *kernel = pipe.unet.get_submodule(layer).weight.shape
            tensors[f"{key}.lora_down.weight"] = torch.randn(rank, inside, *kernel, generator=made) * 0.03
            tensors[f"{key}.lora_up.weight"] = torch.randn(out, rank, *[1] * len(kernel), generator=made) * 0.03
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        save_file(tensors, f"{name}.safetensors")
        files[name] = len(tensors) // 3
    result = merge_lora.run(Config(accel="a.safetensors", style=["b.safetensors=0.8"], precision="fp32"))
    assert result.metrics["rank_max"] == 72
    two, one = pipe, StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True)
    two.load_lora_weights(".", weight_name="a.safetensors", adapter_name="a")
    two.load_lora_weights(".", weight_name="b.safetensors", adapter_name="b")
    two.set_adapters(["a", "b"], [1.0, 0.8])
    one.load_lora_weights(".", weight_name="a-b.safetensors")
    base = checkpoint.load(str(tiny_sd))
    assert apply.apply(base, [(lora.load("a-b.safetensors"), 1.0)]).changed == files["a"]
    plain = outputs(StableDiffusionPipeline.from_pretrained(tiny_sd, safety_checker=None, local_files_only=True))[1]
    wanted = outputs(two)[1]
    ours = outputs(SimpleNamespace(unet=base.unet, text_encoder=base.text_encoders[0]))[1]
    assert (wanted - plain).abs().max() > 0.1
    assert (ours - wanted).abs().max() <= 1e-5
    assert (outputs(one)[1] - wanted).abs().max() <= 1e-5
