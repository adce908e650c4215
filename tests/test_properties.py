"""What holds for any input: the noise schedule, the solvers, LoRA files in all layouts, merging, and the reader of configs."""

import re
import string
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fastdiff import lora
from fastdiff.checkpoints import single_file
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS, Grid, jump
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.lora import layouts
from fastdiff.lora.kinds import Factors
from fastdiff.lora.merging import concatenate
from fastdiff.runtime import config
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=150)
settings.load_profile("steady")
KINDS = ("epsilon", "v_prediction", "sample")


# ---- the noise schedule


@st.composite
def schedules(draw, length=None, zero_snr=None):
    """Schedules of scheduler configs: of any length, of both kinds of betas, with and without zero terminal SNR."""
    start = draw(st.floats(1e-5, 5e-3))
    return NoiseSchedule.from_config(
        {
            "num_train_timesteps": length or draw(st.integers(100, 1200)),
            "beta_start": start,
            "beta_end": start + draw(st.floats(1e-3, 0.03)),
            "beta_schedule": draw(st.sampled_from(["linear", "scaled_linear"])),
            "rescale_betas_zero_snr": draw(st.booleans()) if zero_snr is None else zero_snr,
        }
    )


seeds = st.integers(0, 2**31 - 1)


def noisy(schedule, seed, n=4):
    """x0 and eps (n, 3, 2, 2) and timesteps (n,) of that seed."""
    generator = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, n, 3, 2, 2, generator=generator)
    return x0, eps, torch.randint(len(schedule), (n,), generator=generator)


def exact(schedule, t):
    """alpha_t and sigma_t in float64, (n, 1, 1, 1)."""
    return (values[t].double().reshape(-1, 1, 1, 1) for values in (schedule.alpha, schedule.sigma))


@given(schedules())
def test_signal_and_noise_have_variance_one_and_the_signal_falls(schedule):
    alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
    assert (alpha.square() + sigma.square() - 1).abs().max() < 1e-6
    assert (alpha.diff() < 0).all()
    assert (sigma.diff() >= 0).all()
    assert alpha.min() >= 0
    assert sigma[-1] > sigma[0] > 0
    t = torch.arange(len(schedule) - 1)
    ratio = (alpha[t] / sigma[t]).square()
    torch.testing.assert_close(schedule.snr(t).double(), ratio, rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.noise_scale(t).double(), ratio.rsqrt(), rtol=1e-5, atol=0)


@given(schedules(zero_snr=False))
def test_rescaling_to_zero_snr_ends_at_pure_noise_and_keeps_the_start(schedule):
    """Lin et al. 2024, algorithm 1, written out: sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value."""
    betas = 1 - schedule.alpha.double().square() / torch.cat([torch.ones(1).double(), schedule.alpha[:-1].double().square()])
    rescaled = NoiseSchedule.from_config({"trained_betas": betas.tolist(), "rescale_betas_zero_snr": True})
    first, last = schedule.alpha[0].double(), schedule.alpha[-1].double()
    wanted = (schedule.alpha.double() - last) * first / (first - last)
    torch.testing.assert_close(rescaled.alpha.double(), wanted, rtol=0, atol=2e-4)
    assert rescaled.zero_terminal_snr
    assert not schedule.zero_terminal_snr
    assert rescaled.sigma[-1] == 1
    assert rescaled.alpha[0] == pytest.approx(schedule.alpha[0].item(), abs=1e-6)


@given(schedules(), seeds, st.floats(-3, 3))
def test_adding_noise_is_the_formula_and_linear(schedule, seed, factor):
    x0, eps, t = noisy(schedule, seed)
    alpha, sigma = exact(schedule, t)
    torch.testing.assert_close(schedule.add_noise(x0, eps, t).double(), alpha * x0 + sigma * eps, rtol=0, atol=1e-5)
    other_x0, other_eps, _ = noisy(schedule, seed + 1)
    together = schedule.add_noise(x0 + factor * other_x0, eps + factor * other_eps, t)
    apart = schedule.add_noise(x0, eps, t) + factor * schedule.add_noise(other_x0, other_eps, t)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


@given(schedules(), seeds, st.sampled_from(KINDS))
def test_a_networks_answer_is_read_as_the_formula_and_converts_back(schedule, seed, kind):
    """Of the true x0 and eps, of whatever kind the network is; what divides by a small alpha or sigma is allowed its digits."""
    x0, eps, t = noisy(schedule, seed)
    alpha, sigma = exact(schedule, t)
    if kind == "epsilon":
        assume((alpha > 0).all())  # pure noise does not tell x0
    answer = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind].float()
    x_t = schedule.add_noise(x0, eps, t)
    prediction = schedule.predict(answer, x_t, t, kind)
    lost = 1e-6 / {"epsilon": alpha, "sample": sigma, "v_prediction": torch.ones(1)}[kind]
    assert ((prediction.x0 - x0).abs() < 10 * lost.clamp(min=1e-6)).all()
    assert ((prediction.eps - eps).abs() < 10 * lost.clamp(min=1e-6)).all()
    torch.testing.assert_close(schedule.output(prediction, t, kind).double(), answer.double(), rtol=0, atol=2e-5)
    for other in KINDS:  # the target of any kind of network is that formula of x0 and eps
        target = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[other]
        torch.testing.assert_close(schedule.output(Prediction(x0, eps), t, other).double(), target.double(), rtol=0, atol=1e-5)


@given(schedules(zero_snr=False), seeds, st.floats(0, 15))
def test_guidance_is_the_same_in_both_coordinates(schedule, seed, guidance):
    """Guiding x0 and guiding eps give one point: x_t = alpha x0 + sigma eps holds afterwards, and 1 is no guidance."""
    x_t, _, t = noisy(schedule, seed)
    cond, uncond = (noisy(schedule, seed + i)[1] for i in (1, 2))
    cond, uncond = (schedule.predict(out, x_t, t, "v_prediction") for out in (cond, uncond))
    guided = cond.guide(uncond, guidance)
    alpha, sigma = exact(schedule, t)
    torch.testing.assert_close(alpha * guided.x0 + sigma * guided.eps, x_t.double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(cond.guide(uncond, 1.0).x0, cond.x0, rtol=0, atol=1e-5)


@given(schedules(), st.data())
def test_sampling_grids_fall_and_stay_within_the_schedule(schedule, data):
    total, num_steps = len(schedule), data.draw(st.integers(1, 50))
    for spacing in ("trailing", "leading", "linspace", "lcm"):
        t = schedule.grid(num_steps, spacing)
        assert len(t) == num_steps
        assert t[0] <= total - 1
        assert t[-1] >= 0
        assert (t.diff() < 0).all()
    assert schedule.grid(num_steps)[0] == total - 1  # trailing starts at the noisiest timestep
    few = schedule.grid(num_steps, "lcm")
    assert set(few.tolist()) <= set(schedule.ddim_grid(50).tolist())
    for n in (0, -1, total + 1):
        with pytest.raises(ValueError, match="`num_steps` must be between"):
            schedule.grid(n)


@given(schedules(), st.data())
def test_the_distillation_grid_ends_each_of_n_equal_parts(schedule, data):
    n = data.draw(st.integers(1, len(schedule)))
    t, part = schedule.ddim_grid(n), len(schedule) // n
    assert len(t) == n
    assert t[0] == part - 1
    assert (t.diff() == part).all()
    assert t[-1] < len(schedule)


# ---- the solvers


@given(schedules(zero_snr=False), seeds)
def test_a_jump_keeps_x0_and_eps_and_steps_add_up(schedule, seed):
    """DDIM with a fixed prediction is deterministic: from t to s and on to u is the jump from t to u."""
    x0, eps, t = noisy(schedule, seed)
    s = t // 2
    x_s = jump(schedule, Prediction(x0, eps), s)
    reread = schedule.predict(eps, x_s, s, "epsilon")
    u = s // 2
    lost = 1e-5 / schedule.alpha[s].min().item()
    torch.testing.assert_close(jump(schedule, reread, u), jump(schedule, Prediction(x0, eps), u), rtol=0, atol=lost)
    torch.testing.assert_close(jump(schedule, Prediction(x0, eps), None), x0, rtol=0, atol=0)
    torch.testing.assert_close(jump(schedule, Prediction(x0, eps), -1), x0, rtol=0, atol=0)


@given(schedules(length=840, zero_snr=False), seeds, st.integers(1, 8), st.sampled_from(sorted(SOLVERS)))
def test_a_network_that_knows_the_picture_leads_every_solver_to_it(schedule, seed, num_steps, name):
    """Of grids whose parts are equal, as DDIM's fixed stride needs; TCD ends at index 0, where a little noise is left."""
    x0, noise, _ = noisy(schedule, seed)

    def denoise(x_t, t):
        return schedule.predict(x0, x_t, t.expand(len(x_t)), "sample")

    grid = Grid(schedule, schedule.grid(num_steps, SOLVERS[name].spacing), final_index=None)
    t = grid.t[:1].expand(len(x0))
    end = SOLVERS[name].run(denoise, schedule.add_noise(x0, noise, t), grid, lambda: torch.zeros_like(x0))
    wanted = schedule.add_noise(x0, noise, torch.tensor(0)) if name == "tcd" else x0
    torch.testing.assert_close(end, wanted, rtol=0, atol=1e-3)


# ---- LoRA files


def names_of(family):
    """Dotted names of the weights of linear and convolution layers of the family's networks, by component, with their shapes."""
    from fastdiff.checkpoints.checkpoint import Checkpoint

    base = Checkpoint(family.name, family.home, family)
    return {
        part: {
            name.removesuffix(".weight"): tuple(shape)
            for name, shape in base.shapes(part).items()
            if name.endswith(".weight") and len(shape) in {2, 4} and "embedding.weight" not in name
        }
        for part in ("unet", *base.text_parts)
    }


NAMES = {name: names_of(family) for name, family in FAMILIES.items()}
PREFIXES = {family.name: ("lora_unet_", family.lora_text_prefix, "lora_te2_") for family in FAMILIES.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layers_name_survives_every_layout(family):
    """All layers of the family's networks, not a draw of them: dotted, flat, LDM and peft names tell the same module."""
    table = single_file.flat_table()
    for prefix, (part, shapes) in zip(PREFIXES[family], NAMES[family].items(), strict=False):
        keys = {name: layouts.canonical(prefix, name) for name in shapes}
        assert len(set(keys.values())) == len(keys)  # flattening confuses no two layers
        for name, key in keys.items():
            component, dotted = layouts.split(key)
            assert (component, layouts.canonical(prefix, dotted)) == (part, key)
            assert dotted.endswith(name)  # a text encoder's has `text_model.` in front
            spellings = {
                f"{key}.lora_down.weight": key,
                f"{part}.{dotted}.lora_A.weight": key,
                f"{part}.base_model.model.{dotted}.lora_A.default.weight": key,
                f"{part}.{dotted}.lora.down.weight": key,
                f"{part}.{dotted}.lora_linear_layer.down.weight": key,
            }
            if part == "unet" and FAMILIES[family].lora_names == "ldm":
                spellings[f"lora_unet_{single_file.to_flat(key.removeprefix(prefix))}.lora_down.weight"] = key
            for spelling, wanted in spellings.items():
                entry = lora.parse(spelling, table)
                assert entry is not None, spelling
                first = entry.key.replace("lora_te_", prefix) if part == "text_encoder" else entry.key
                assert (first, entry.side) == (wanted, "down"), spelling


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


shapes_of_weights = st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(), (1, 1), (3, 3)])).map(
    lambda sizes: (4 * sizes[0], 4 * sizes[1], *sizes[2])  # (out, in[, kh, kw])
)


def random_factors(seed, shape, rank):
    out, inside, *kernel = shape
    return Factors(randn(seed, rank, inside, *kernel), randn(seed + 1, out, rank, *[1] * len(kernel)))


def product(up, down):
    """B A of factors in float64, in the weight's shape."""
    return torch.einsum("or,r...->o...", up.double().flatten(1), down.double())


@st.composite
def loras(draw, family=None, most=5):
    """A LoRA of random factors on some layers of a family's networks, each of a rank of its own."""
    family = family or draw(st.sampled_from(sorted(FAMILIES)))
    layers = [(prefix, name) for prefix, names in zip(PREFIXES[family], NAMES[family].values(), strict=False) for name in names]
    chosen = draw(st.lists(st.sampled_from(layers), min_size=1, max_size=most, unique=True))
    modules = {
        layouts.canonical(prefix, name): random_factors(draw(seeds), draw(shapes_of_weights), draw(st.integers(1, 9)))
        for prefix, name in chosen
    }
    return lora.Lora(modules, Recipe(family=family).to_metadata())


@given(loras(), st.sampled_from(["kohya", "diffusers", "peft"]))
def test_a_lora_survives_every_layout_that_is_written(item, layout):
    if layout == "peft":  # of a text encoder's file peft names no component, and this layer is not below `text_model`
        assume("lora_te2_text_projection" not in item.modules)
    with TemporaryDirectory() as name:
        path = Path(name) / ("x" if layout == "peft" else "x.safetensors")
        item.save(path, dtype=torch.float32, format=layout)
        files = sorted(path.rglob("*.safetensors")) if layout == "peft" else [path]
        modules = {}
        for file in files:
            read = lora.load(file)
            assert read.recipe == item.recipe
            # A peft file does not say which text encoder it is for: its folder does.
            prefix = {"text_encoder": item.family.lora_text_prefix, "text_encoder_2": "lora_te2_"}.get(file.parent.name)
            modules |= {re.sub(r"^lora_te1?_", prefix, key) if prefix else key: update for key, update in read.modules.items()}
    assert modules.keys() == item.modules.keys()
    for key, module in item.modules.items():  # a written layer has the axes of its name, whatever shape was drawn
        torch.testing.assert_close(modules[key].delta().reshape(module.shape), module.delta(), rtol=1e-5, atol=1e-5)


def block_diagonal(blocks):
    """(I + Q)(I - Q)^-1 of each block (n, b, b), transposed, as one matrix: Cayley's rotation."""
    q = blocks.double() - blocks.double().transpose(-1, -2)
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q)).transpose(-1, -2))


def lora_side(w, rank, alpha, seed):
    module = random_factors(seed, w.shape, rank)
    tensors = {"lora_down.weight": module.down, "lora_up.weight": module.up, "alpha": torch.tensor(alpha)}
    return tensors, alpha / rank * product(module.up, module.down)


def loha_sides(w, rank, alpha, seed):
    out, inner = w.shape[0], w[0].numel()
    a1, b1, a2, b2 = (randn(seed + i, *shape) for i, shape in enumerate([(out, rank), (rank, inner)] * 2))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(alpha)}
    return tensors, (alpha / rank * (a1.double() @ b1.double()) * (a2.double() @ b2.double())).reshape(w.shape)


def lokr_sides(w, rank, alpha, seed):
    out, inside, *kernel = w.shape
    first, a, b = randn(seed, 2, 2), randn(seed + 1, out // 2, rank), randn(seed + 2, rank, inside // 2, *kernel)
    tensors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(alpha)}
    return tensors, (alpha / rank * torch.einsum("ac,bd...->abcd...", first.double(), product(a, b))).reshape(w.shape)


def full_side(w, rank, alpha, seed):
    difference = randn(seed, *w.shape)
    return {"diff": difference}, difference.double()


def ia3_sides(w, rank, alpha, seed):
    on_input = bool(seed % 2)
    vector = randn(seed, w.shape[1 if on_input else 0])
    view = [-1 if axis == int(on_input) else 1 for axis in range(w.ndim)]
    return {"weight": vector, "on_input": torch.tensor(on_input)}, w.double() * vector.double().reshape(view)


def glora_sides(w, rank, alpha, seed):
    out, inside, *kernel = w.shape
    ones = [1] * len(kernel)
    a1, a2 = randn(seed, inside, rank, *ones), randn(seed + 1, rank, inside, *ones)
    b = random_factors(seed + 2, w.shape, rank)
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b.up, "b2.weight": b.down, "alpha": torch.tensor(alpha)}
    mixed = torch.einsum("oi...,ij->oj...", w.double(), a1.double().flatten(1) @ a2.double().flatten(1))
    return tensors, alpha / rank * (mixed + product(b.up, b.down))


def oft_sides(w, rank, alpha, seed):
    blocks = 0.3 * randn(seed, w.shape[0] // 4, 4, 4)
    turned = (block_diagonal(blocks) @ w.double().flatten(1)).reshape(w.shape)
    return {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}, turned - w.double()


def dora_sides(w, rank, alpha, seed):
    tensors, inner = lora_side(w, rank, alpha, seed)
    magnitude = 1 + randn(seed + 2, len(w)).abs()
    moved, view = w.double() + inner, (-1, *[1] * (w.ndim - 1))
    turned = moved * (magnitude.double() / moved.flatten(1).norm(dim=1)).reshape(view)
    return {**tensors, "dora_scale": magnitude.reshape(view)}, turned - w.double()


WRITERS = dict(
    lora=lora_side, loha=loha_sides, lokr=lokr_sides, full=full_side, ia3=ia3_sides, glora=glora_sides, oft=oft_sides,
    dora=dora_sides,
)  # fmt: skip
FLAT_PREFIXES = ["lora_unet_", "lycoris_", "LDM names"]


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=40)
@given(shapes_of_weights, st.integers(1, 6), st.floats(0.1, 20), seeds, st.sampled_from(FLAT_PREFIXES), st.data())
def test_a_module_of_every_kind_is_its_formula_in_every_flat_layout(kind, shape, rank, alpha, seed, prefix, data):
    """Delta(W) of the file, in float32, is that of the paper's formula in float64; the base's weight is random too."""
    layer = data.draw(st.sampled_from(sorted(NAMES["sdxl"]["unet"]))).replace(".", "_")
    weight = randn(seed + 10, *shape)
    sides, wanted = WRITERS[kind](weight, rank, alpha, seed)
    stem = f"lora_unet_{single_file.to_flat(layer)}" if prefix == "LDM names" else prefix + layer
    with TemporaryDirectory() as name:
        save_file({f"{stem}.{side}": tensor.contiguous() for side, tensor in sides.items()}, f"{name}/x.safetensors")
        read = lora.load(f"{name}/x.safetensors")
    (update,) = read.modules.values()
    assert list(read.modules) == [f"lora_unet_{layer}"]
    assert update.kind == kind
    scale = wanted.abs().max().item()
    torch.testing.assert_close(update.delta(weight).double().reshape(shape), wanted, rtol=0, atol=2e-5 * max(1.0, scale))


# ---- merging


@given(st.data(), st.lists(st.floats(-2, 2, width=16), min_size=1, max_size=4))
def test_merging_is_the_weighted_sum_by_concatenated_ranks(data, strengths):
    """Linear in the weights, of the sum of the ranks, and the same in any order and in two goes."""
    layers = [f"lora_unet_mid_block_attentions_0_proj_{name}" for name in ("in", "out")] + ["lora_unet_conv_in"]
    shape_of = {layer: data.draw(shapes_of_weights) for layer in layers}
    items = []
    for _ in strengths:
        chosen = data.draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
        items.append(
            lora.Lora({key: random_factors(data.draw(seeds), shape_of[key], data.draw(st.integers(1, 6))) for key in chosen})
        )
    pairs = list(zip(items, strengths, strict=True))
    merged = concatenate(pairs)
    several = {"reversed": concatenate(pairs[::-1]), "twice as strong": concatenate([(item, 2 * w) for item, w in pairs])}
    several["in two goes"] = concatenate([(concatenate(pairs[:1]), 1.0), *pairs[1:]])
    assert merged.modules.keys() == {key for item in items for key in item.modules}
    for key, module in merged.modules.items():
        wanted = sum(w * product(item.modules[key].up, item.modules[key].down) for item, w in pairs if key in item.modules)
        assert module.rank == sum(item.modules[key].rank for item in items if key in item.modules)
        near = dict(rtol=0, atol=2e-5 * max(1.0, wanted.abs().max().item()))
        torch.testing.assert_close(module.delta().double(), wanted, **near)
        for how, other in several.items():
            factor = 2 if how == "twice as strong" else 1
            torch.testing.assert_close(other.modules[key].delta().double(), factor * wanted, rtol=0, atol=factor * near["atol"])


# ---- the reader of configs


@dataclass
class Settings:
    base: Annotated[str, "where to start"] = "emoji"
    steps: Annotated[int, "optimiser steps", Range(1, 10_000)] = 1000
    learning_rate: Annotated[float, "of Adam", Range(above=0, below=1)] = 1e-4
    resolution: Annotated[int | None, "pixels a side", Range(8, multiple_of=8)] = None
    guidance: float | None = None
    scheduler: Annotated[Literal["ddim", "euler", "lcm"], "the sampler"] = "lcm"
    prompts: list[str] = field(default_factory=list)
    verbose: bool = False
    note: str | None = "kept"


OPTIONS = {option.name: option for option in config.options(Settings)}
optional_text = st.text().filter(lambda text: text != config.NONE)  # the word for None
VALUES = {
    "base": st.text(),
    "steps": st.integers(1, 10_000),
    "learning_rate": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "resolution": st.none() | st.integers(1, 500).map(lambda n: 8 * n),
    "guidance": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "scheduler": st.sampled_from(["ddim", "euler", "lcm"]),
    "prompts": st.lists(st.text()),
    "verbose": st.booleans(),
    "note": st.none() | optional_text,
}
configs = st.builds(Settings, **VALUES)


def as_text(value):
    """As a flag or a variable has it."""
    if value is None:
        return config.NONE
    return "\n".join(value) if isinstance(value, list) else str(value)


@given(configs)
def test_a_config_of_any_values_survives_toml(values):
    assert Settings(**config.from_toml(Settings, config.to_toml(values))) == values


@given(configs)
def test_the_text_of_a_value_reads_as_the_value(values):
    for name, option in OPTIONS.items():
        value = vars(values)[name]
        if option.repeated:  # a variable has one of them a line
            value = [line for text in value for line in text.splitlines() if line]
        typed = config.coerce(option, value, name, text=False)
        assert config.coerce(option, as_text(value), name, text=True) == typed == value
    for word, truth in config.BOOLS.items():
        assert config.coerce(OPTIONS["verbose"], word.upper(), "verbose", text=True) is truth


SOURCES = ("flags", "variables", "file", "preset")  # the first that has a value wins; behind them is the default
printable = st.text(string.ascii_letters + string.digits + " .,:/", min_size=1).filter(lambda text: text.strip() != "")
GIVEN = {**VALUES, "base": printable, "prompts": st.lists(printable, min_size=1), "note": printable.filter(lambda t: t != "none")}


@given(st.data())
def test_a_flag_beats_a_variable_beats_the_file_beats_the_preset_beats_the_default(data):
    given_values = {
        source: data.draw(st.fixed_dictionaries({}, optional={k: v.filter(lambda x: x is not None) for k, v in GIVEN.items()}))
        for source in SOURCES
    }
    given_values["preset"].pop("base", None)  # which names the preset
    flags = {name: given_values["flags"].get(name) for name in OPTIONS}  # None: not given
    variables = {OPTIONS[name].variable: as_text(value) for name, value in given_values["variables"].items()}
    empty = {option.variable: "" for option in OPTIONS.values()}  # an empty variable is none
    asked = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text("".join(f"{name} = {config._literal(value)}\n" for name, value in given_values["file"].items()))
        resolved = config.resolve(
            Settings,
            flags,
            file=path,
            presets={"family": given_values["preset"], "another family": {"steps": 9999}},
            family_of=lambda values: asked.append(values["base"]) or "family",
            environ={**empty, **variables},
        )
    wanted = {**vars(Settings())}
    for source in reversed(SOURCES):
        wanted |= given_values[source]
    assert vars(resolved) == wanted
    assert asked == [wanted["base"]]


@given(st.sampled_from(sorted(OPTIONS)), st.data())
def test_a_misspelt_key_is_refused_with_the_word_that_was_meant(name, data):
    place, letter = data.draw(st.integers(1, len(name) - 1)), data.draw(st.sampled_from("qxz"))
    left_out = data.draw(st.booleans())
    wrong = name[:place] + ("" if left_out else letter) + name[place + left_out :]
    assume(wrong not in OPTIONS)
    with pytest.raises(UsageError, match=f"run.toml: unknown key '{wrong}'") as caught:
        config.from_toml(Settings, f"{wrong} = 1\n", source="run.toml")
    assert caught.value.hint == f"did you mean {name}?"


@given(
    st.sampled_from(["steps", "learning_rate", "resolution"]),
    st.integers(-(10**9), 10**9) | st.floats(-10, 10, allow_subnormal=False),
)
def test_a_number_outside_its_range_is_refused_and_one_inside_is_taken(name, number):
    within = {
        "steps": lambda n: 1 <= n <= 10_000,
        "learning_rate": lambda n: 0 < n < 1,
        "resolution": lambda n: n >= 8 and n % 8 == 0,
    }[name](number)
    if OPTIONS[name].kind is int:
        assume(float(number).is_integer())
    words = {"steps": "at least 1 and at most 10000", "learning_rate": "above 0 and below 1"}
    for read in (
        lambda: config.from_toml(Settings, f"{name} = {config._literal(number)}", source="run.toml")[name],
        lambda: vars(config.resolve(Settings, {name: int(number) if OPTIONS[name].kind is int else number}, environ={}))[name],
    ):
        if within:
            assert read() == number
        else:
            with pytest.raises(UsageError, match=f"{name}.*must be {words.get(name, 'at least 8 and a multiple of 8')}"):
                read()
