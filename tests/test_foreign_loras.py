"""LoRAs as other programs write them: LyCORIS' flat convolutions, ComfyUI, peft, sd-scripts; wrong headers; what inspect says.

The oracle of every change is its formula in float64.
"""

import json
import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_lora_layouts import ATTENTION, ROWS, Made, R, cayley, flat, ldm_key, leveled, product
from test_single_file import ldm_unet

from fastdiff import cli, lora
from fastdiff.checkpoints import checkpoint, tensors
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.commands import inspect
from fastdiff.lora import apply, merging
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Factors
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused

CONVS = r"(conv1|conv2|conv_in|conv_out|samplers\.0\.conv)$"  # the 3 x 3 ones of every family
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
CROSS = Q.replace("attn1_to_q", "attn2_to_k")


@cache
def opened(path):
    return checkpoint.load(str(path))


def written(folder, found, metadata=None, name="x.safetensors"):
    save_file({k: v.clone().contiguous() for k, v in found.items()}, folder / name, metadata)
    return folder / name


def check_applied(made, path, base, extra=0):
    """Load the file, apply it to a fresh copy of the base, and compare every parameter with the formula."""
    read = lora.load(path)
    fresh = checkpoint.load(str(base))
    assert apply.apply(fresh, [(read, 1.0)]).changed == len(made.expected) == len(read.modules) - extra
    nets = {"unet": fresh.unet, **dict(zip(fresh.text_parts, fresh.text_encoders, strict=True))}
    for part, net in nets.items():
        for name, new in net.named_parameters():
            old = made.parameters[part][name].detach()
            if (part, name) not in made.expected:
                assert torch.equal(new, old), f"{part} {name} was changed"
                continue
            wanted = made.expected[part, name](old.double())
            error = (new.detach().double() - (old.double() + wanted)).norm() / wanted.norm()
            assert error < 1e-6, f"{part} {name}: {error:.1e}"
    return read


# ---- convolutions whose updates are matrices


def loha_of(made, w, scale=1.0):
    out, inner = w.shape[0], w.shape[1:].numel()
    a1, a2 = made.randn(out, R, scale=0.3), made.randn(out, R, scale=0.3)
    b1, b2 = made.randn(R, inner), made.randn(R, inner)
    delta = ((a1.double() @ b1.double()) * (a2.double() @ b2.double()) * scale).reshape(w.shape)
    return {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}, delta


def lokr_of(made, w, scale=1.0, both=False):
    """W1 full, or of rank R with `both`; W2 of rank R, a matrix (out, in kh kw) also for a convolution."""
    (out, inside), kernel = w.shape[:2], w.shape[2:]
    p, q = (2 if out % 2 == 0 else 1), (2 if inside % 2 == 0 else 1)
    a, b = made.randn(out // p, R, scale=0.5), made.randn(R, inside // q * kernel.numel(), scale=0.5)
    found = {"lokr_w2_a": a, "lokr_w2_b": b}
    second = (a.double() @ b.double()).reshape(out // p, inside // q, *kernel)
    if both:
        found |= {"lokr_w1_a": made.randn(p, R), "lokr_w1_b": made.randn(R, q)}
        first = found["lokr_w1_a"].double() @ found["lokr_w1_b"].double()
    else:
        found["lokr_w1"] = made.randn(p, q)
        first = found["lokr_w1"].double()
    return found, scale * torch.einsum("ac,bd...->abcd...", first, second).reshape(w.shape)


def flat_lora(made, w, scale=1.0):
    down, up = made.randn(R, w.shape[1:].numel()), made.randn(w.shape[0], R)
    return {"lora_down.weight": down, "lora_up.weight": up}, scale * (up.double() @ down.double()).reshape(w.shape)


def flat_diff(made, w, scale=1.0):
    delta = made.randn(w.shape[0], w.shape[1:].numel())
    return {"diff": delta}, delta.double().reshape(w.shape)


FLAT = {"loha": loha_of, "lokr": lokr_of, "lora": flat_lora, "diff": flat_diff}


def flat_convs(made, sdxl, kind, pattern=CONVS):
    for name, w in made.layers("unet", pattern):
        found, delta = FLAT[kind](made, w, 1.0 if kind == "diff" else 2 / R)
        stem = flat("unet", name, sdxl)
        made.tensors |= {f"{stem}.{k}": v for k, v in found.items()}
        made.tensors |= {} if kind == "diff" else {f"{stem}.alpha": torch.tensor(2.0)}
        made.expect("unet", f"{name}.weight", lambda w, d=delta: d)


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("kind", FLAT)
def test_flat_convolutions_are_applied_by_their_formula(kind, base, request, tmp_path):
    base = request.getfixturevalue(base)
    made = Made(opened(base))
    flat_convs(made, base.name == "sdxl", kind)
    assert len(made.expected) > 20
    check_applied(made, written(tmp_path, made.tensors), base)


def test_a_flat_glora_of_a_convolution(tiny_sd, tmp_path):
    made = Made(opened(tiny_sd))
    for name, w in made.layers("unet", r"conv1$"):
        out, inside = w.shape[:2]
        a1, a2, b1, b2 = made.randn(inside, R), made.randn(R, inside), made.randn(out, R), made.randn(R, inside * 9)
        found = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(1.5)}
        made.tensors |= {f"{flat('unet', name, False)}.{k}": v for k, v in found.items()}

        def delta(w, a1=a1, a2=a2, b1=b1, b2=b2):
            mixed = torch.einsum("oi...,ij->oj...", w, a1.double() @ a2.double())
            return 1.5 / R * (mixed + (b1.double() @ b2.double()).reshape(w.shape))

        made.expect("unet", f"{name}.weight", delta)
    check_applied(made, written(tmp_path, made.tensors), tiny_sd)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_rank_merge_of_flat_convolutions_is_written_as_convolutions(kind, tiny_sd, tmp_path, monkeypatch):
    """Also by the command; every layer gets the axes that its weight has, so that diffusers takes the file."""
    monkeypatch.chdir(tmp_path)
    made = Made(opened(tiny_sd))
    flat_convs(made, False, kind, r"(conv1|conv_in|samplers\.0\.conv|conv_shortcut|attentions\.\d\.proj_in|to_q)$")
    written(tmp_path, made.tensors, {"fastdiff.family": "sd15"})
    assert (
        cli.main(["merge-lora", "--accel", "x.safetensors", "--rank", "64", "--precision", "fp32", "-o", "merged.safetensors"])
        == 0
    )
    found = load_file(tmp_path / "merged.safetensors")
    for name, w in made.layers("unet"):
        if ("unet", f"{name}.weight") in made.expected:
            down, up = (found[f"{flat('unet', name, False)}.lora_{side}.weight"] for side in ("down", "up"))
            assert (down.shape[1:], up.shape[:1], up.shape[2:]) == (w.shape[1:], w.shape[:1], (1,) * (w.ndim - 2)), name
    read = lora.load(tmp_path / "merged.safetensors")
    lookup = {flat("unet", name, False): made.expected["unet", f"{name}.weight"](w) for name, w in made.layers("unet")
              if ("unet", f"{name}.weight") in made.expected}  # fmt: skip
    for key, update in read.modules.items():
        wanted = lookup[key]
        error = (update.delta().double().reshape(wanted.shape) - wanted).norm() / wanted.norm()
        assert error < (1e-5 if wanted[0].numel() <= 64 or wanted.shape[0] <= 64 else 1), f"{key} {error:.1e}"
    from diffusers import StableDiffusionPipeline

    theirs = checkpoint.load(str(tiny_sd)).unet
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path / "merged.safetensors"), unet_config=theirs.config)
    StableDiffusionPipeline.load_lora_into_unet(state, alphas, theirs)


def test_sdxls_linear_projections_are_written_as_such(tmp_path):
    """SDXL's proj_in is a linear layer, SD1's a convolution: a file may have either, a written one has the right one."""
    key = "lora_unet_down_blocks_1_attentions_0_proj_in"
    made = torch.Generator().manual_seed(0)
    down, up = torch.randn(R, 8, generator=made), torch.randn(6, R, generator=made)
    for family, ndim in (("sdxl", 2), ("sd21", 2), ("sd15", 4), ("emoji", 4)):
        for given in (Factors(down, up), Factors(down[..., None, None], up[..., None, None])):
            lora.save(Lora({key: given}, {"fastdiff.family": family}), tmp_path / "x.safetensors", dtype=torch.float32)
            assert {v.ndim for k, v in load_file(tmp_path / "x.safetensors").items() if "alpha" not in k} == {ndim}, family
            delta = lora.load(tmp_path / "x.safetensors").modules[key].delta()
            torch.testing.assert_close(delta.flatten(1).double(), up.double() @ down.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["loha", "lokr", "glora-free"])
def test_dora_of_other_kinds(kind, tiny_sd, tmp_path):
    """LyCORIS weight_decompose: the norm over the inputs (out, 1, 1, 1) or over the outputs (1, in, 1, 1), of flat updates."""
    made = Made(opened(tiny_sd))
    for i, (name, w) in enumerate(made.layers("unet", r"(to_q|conv1)$")):
        found, inner = FLAT["lora" if kind == "glora-free" else kind](made, w)
        axis = i % 2 if w.shape[0] != w.shape[1] else 0
        m = 1 + made.randn(w.shape[axis]).abs()
        view = [-1 if j == axis else 1 for j in range(w.ndim)]
        stem = flat("unet", name, False)
        made.tensors |= {f"{stem}.{k}": v for k, v in found.items()} | {f"{stem}.dora_scale": m.reshape(view)}

        def delta(w, inner=inner, m=m, axis=axis, view=view):
            moved = w + inner
            norm = moved.transpose(0, axis).flatten(1).norm(dim=1)
            return moved * (m.double() / norm).reshape(view) - w

        made.expect("unet", f"{name}.weight", delta)
    check_applied(made, written(tmp_path, made.tensors), tiny_sd)


# ---- scales


def test_an_alpha_that_is_not_used_is_not_judged(tmp_path):
    """LyCORIS stores alpha = dim for a LoKr of two full matrices, and dim = 100000 forces these; in fp16 that is infinite."""
    made = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(2, 2, generator=made), torch.randn(3, 4, generator=made)
    for alpha in (torch.tensor(1e5), torch.tensor(1e5).half(), torch.tensor(100_000), torch.tensor(-1.0)):
        read = lora.load(written(tmp_path, {f"{Q}.lokr_w1": w1, f"{Q}.lokr_w2": w2, f"{Q}.alpha": alpha}))
        torch.testing.assert_close(read.modules[Q].delta().double(), torch.kron(w1.double(), w2.double()), rtol=1e-6, atol=0)
    for suffix, value in (("diff", torch.randn(6, 8, generator=made)), ("weight", torch.randn(6, generator=made))):
        lora.load(written(tmp_path, {f"{Q}.{suffix}": value, f"{Q}.alpha": torch.tensor(1e6)}))


def test_a_scale_that_is_used_is_judged_by_alpha_over_rank(tmp_path):
    """20000 over rank 32 is 625, not 20000: of LoHa and LoKr the rank counts too. Beyond 10000 all kinds are refused."""
    made = Made.__new__(Made)
    made.generator = torch.Generator().manual_seed(0)
    r, w = 32, torch.empty(6, 8)
    randn = lambda *shape: torch.randn(*shape, generator=made.generator)
    loha = {"hada_w1_a": randn(6, r), "hada_w1_b": randn(r, 8), "hada_w2_a": randn(6, r), "hada_w2_b": randn(r, 8)}
    lokr = {"lokr_w1": randn(2, 2), "lokr_w2_a": randn(3, r), "lokr_w2_b": randn(r, 4)}
    glora = {"a1.weight": randn(8, r), "a2.weight": randn(r, 8), "b1.weight": randn(6, r), "b2.weight": randn(r, 8)}
    wanted = {
        "loha": loha["hada_w1_a"].double() @ loha["hada_w1_b"].double()
        * (loha["hada_w2_a"].double() @ loha["hada_w2_b"].double()),
        "lokr": torch.kron(lokr["lokr_w1"].double(), lokr["lokr_w2_a"].double() @ lokr["lokr_w2_b"].double()),
        "glora": glora["b1.weight"].double() @ glora["b2.weight"].double(),
    }  # fmt: skip
    for kind, found in (("loha", loha), ("lokr", lokr), ("glora", glora)):
        module = {f"{Q}.{k}": v for k, v in found.items()}
        update = lora.load(written(tmp_path, {**module, f"{Q}.alpha": torch.tensor(20_000.0)})).modules[Q]
        delta = update.delta(torch.zeros_like(w)).double()
        assert (delta - 625 * wanted[kind]).norm() < 1e-6 * (625 * wanted[kind]).norm(), kind
        with pytest.raises(InputRefused, match="far too large"):
            lora.load(written(tmp_path, {**module, f"{Q}.alpha": torch.tensor(1e6)}))
        with pytest.raises(InputRefused, match="alpha has NaN"):
            lora.load(written(tmp_path, {**module, f"{Q}.alpha": torch.tensor(float("nan"))}))


def test_lycoris_trained_scalar_multiplies(tiny_sd, tmp_path):
    """Older LyCORIS with use_scalar stores it; newer ones multiply it in before they save."""
    made = Made(opened(tiny_sd))
    for i, (name, w) in enumerate(made.layers("unet", r"(to_q|conv1)$")):
        found, delta = (flat_lora, loha_of, lokr_of)[i % 3](made, w)
        stem = flat("unet", name, False)
        made.tensors |= {f"{stem}.{k}": v for k, v in found.items()} | {f"{stem}.scalar": torch.tensor(0.3)}
        made.expect("unet", f"{name}.weight", lambda w, d=delta: torch.tensor(0.3).double() * d)
    check_applied(made, written(tmp_path, made.tensors), tiny_sd)


@pytest.mark.parametrize("given", ["True", True, "False"])
def test_rank_stabilised_lycoris(given, tmp_path):
    """Trained at alpha / sqrt(r). LyCORIS stores alpha sqrt(r), so that alpha / r is right, but of GLoRA the plain alpha."""
    made = Made.__new__(Made)
    made.generator = torch.Generator().manual_seed(0)
    found, delta = loha_of(made, torch.empty(6, 8), 2 / R**0.5)
    found = {f"{Q}.{k}": v for k, v in found.items()} | {f"{Q}.alpha": torch.tensor(2 * R**0.5)}
    a1, a2, b1, b2 = made.randn(8, R), made.randn(R, 8), made.randn(6, R), made.randn(R, 8)
    glora = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(2.0)}
    path = written(
        tmp_path, found | {f"{CROSS}.{k}": v for k, v in glora.items()}, {"ss_network_args": json.dumps({"rs_lora": given})}
    )
    read = lora.load(path).modules
    assert (read[Q].delta().double() - delta).norm() < 1e-6 * delta.norm()
    w = made.randn(6, 8)
    wanted = (2 / R if given == "False" else 2 / R**0.5) * (w.double() @ a1.double() @ a2.double() + b1.double() @ b2.double())
    assert (read[CROSS].delta(w).double() - wanted).norm() < 1e-6 * wanted.norm()


# ---- ComfyUI


def comfy_name(part, name, sdxl):
    if part != "unet":
        encoder = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}[part]
        return f"text_encoders.{encoder}.transformer.{leveled(part, name)}"
    if name.startswith("add_embedding"):
        return f"diffusion_model.label_emb.0.{'0' if name.endswith('1') else '2'}"
    found = ldm_unet(f"{name}.weight").removesuffix(".weight")
    if sdxl and found.endswith(".conv"):
        found = re.sub(r"(output_blocks\.\d+)\.\d\.conv", r"\1.2.conv", found)
    return f"diffusion_model.{found}"


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("names", [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")])
def test_what_comfyui_saves(names, base, request, tmp_path):
    """Factors of all layers, differences of norms and biases; its text encoders too, whose last layer has no difference."""
    base, sdxl = request.getfixturevalue(base), "sdxl" in base
    made = Made(opened(base))
    for part, parameters in made.parameters.items():
        for i, (name, w) in enumerate(parameters.items()):
            module, _, kind = name.rpartition(".")
            stem = comfy_name(part, module, sdxl)
            if w.ndim == 1:
                delta = made.randn(*w.shape)
                made.tensors[f"{stem}.{'diff' if kind == 'weight' else 'diff_b'}"] = delta
                made.expect(part, name, lambda w, d=delta: d.double())
            else:
                down, up = made.pair(w)
                scale = 1 + i % 3 if names[0] == "lora_A.weight" else 1
                made.tensors |= {f"{stem}.{names[0]}": down, f"{stem}.{names[1]}": up}
                made.tensors |= {f"{stem}.alpha": torch.tensor(float(scale * R))} if scale > 1 else {}
                made.expect(part, name, product(down, up, scale))
    # ComfyUI's CLIP-L has a projection, which nothing changes: an update of zero for a layer that we do not have.
    last = "text_encoders.clip_l.transformer.text_projection"
    made.tensors |= {f"{last}.{names[0]}": made.randn(R, 32), f"{last}.{names[1]}": torch.zeros(32, R)}
    path = written(tmp_path, made.tensors)
    read = check_applied(made, path, base, extra=1)
    prefix = "lora_te1_" if sdxl else "lora_te_"
    assert {key[: len(prefix)] for key in read.modules if key.startswith("lora_te")} <= {prefix, "lora_te2_"}
    facts = inspect.run(inspect.Config(str(path))).metrics
    assert (facts["layouts"], facts["supported"], facts["kind"]) == (["ComfyUI"], True, "LoRA")


def test_comfyuis_names_for_sd2_and_other_kinds(tmp_path):
    layer = "text_encoders.clip_h.transformer.text_model.encoder.layers.1.self_attn.q_proj"
    made = torch.Generator().manual_seed(0)
    loha = {f"hada_w{i}_{x}": torch.randn(*s, generator=made) for i in "12" for x, s in (("a", (6, R)), ("b", (R, 8)))}
    found = {f"diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.{k}": v for k, v in loha.items()}
    found |= {f"{layer}.lora_up.weight": torch.ones(6, R), f"{layer}.lora_down.weight": torch.ones(R, 6)}
    read = lora.load(written(tmp_path, found))
    assert {key: update.kind for key, update in read.modules.items()} == {
        Q: "loha", "lora_te_text_model_encoder_layers_1_self_attn_q_proj": "lora",
    }  # fmt: skip
    with pytest.raises(InputRefused, match="keys are unknown"):
        lora.load(written(tmp_path, {**found, "diffusion_model.no_such.lora_up.weight": torch.ones(2, 2)}))


# ---- a 1 x 1 convolution beside a linear layer


@pytest.mark.parametrize("method", ["sum", "ties"])
@pytest.mark.parametrize("order", [(2, 4), (4, 2)])
def test_a_convolution_of_one_point_merges_with_a_linear_layer(order, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    key = "lora_unet_down_blocks_1_attentions_0_proj_in"
    made, wanted = torch.Generator().manual_seed(0), torch.zeros(6, 8, dtype=torch.float64)
    for i, ndim in enumerate(order):
        down, up = torch.randn(R + i, 8, generator=made), torch.randn(6, R + i, generator=made)
        ones = [1] * (ndim - 2)
        pair = {
            f"{key}.lora_down.weight": down.reshape(*down.shape, *ones),
            f"{key}.lora_up.weight": up.reshape(*up.shape, *ones),
        }
        written(tmp_path, pair, {"fastdiff.family": "sd15"}, f"{i}.safetensors")
        wanted += (1.0, 0.5)[i] * up.double() @ down.double()
    command = f"merge-lora --accel 0.safetensors --style 1.safetensors=0.5 --precision fp32 --method {method} -o x.safetensors"
    assert cli.main(command.split()) == 0
    read = lora.load(tmp_path / "x.safetensors")
    if method == "sum":
        assert (read.modules[key].delta().flatten(1).double() - wanted).norm() < 1e-6 * wanted.norm()
    assert load_file(tmp_path / "x.safetensors")[f"{key}.lora_down.weight"].ndim == 4


# ---- sd-scripts' OFT, and what peft writes


def test_sd_scripts_oft(tiny_sdxl, tmp_path):
    """networks/oft.py: oft_unet_ + LDM names, `alpha` bounds the norm of Q by alpha times the outputs."""
    made = Made(opened(tiny_sdxl))
    for i, (name, w) in enumerate(made.layers("unet", r"attn\d" + ATTENTION)):
        out = w.shape[0]
        blocks, alpha = made.randn(4, out // 4, out // 4, scale=0.5), (0.02, 10.0)[i % 2]
        stem = ldm_key("unet", name, True).replace("lora_unet_", "oft_unet_")
        made.tensors |= {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(alpha)}
        q = blocks.double() - blocks.double().transpose(-1, -2)
        turn = torch.block_diag(*cayley(q / 2 * min(1.0, alpha * out / q.norm().item())))
        made.expect("unet", f"{name}.weight", lambda w, turn=turn: turn.T @ w - w)
    check_applied(made, written(tmp_path, made.tensors), tiny_sdxl)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr full", "lokr both"])
def test_pefts_loha_and_lokr(kind, tiny_sd, tmp_path):
    """Made and merged by peft itself, with ranks and alphas by pattern. peft scales full LoKr matrices too, LyCORIS does not."""
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    unet = checkpoint.load(str(tiny_sd)).unet
    how = dict(target_modules=["to_q", "conv1", "proj_in"], rank_pattern={"conv1": 2}, alpha_pattern={"to_q": 7}, r=3, alpha=5,
               init_weights=False, use_effective_conv2d=kind == "lokr both")  # fmt: skip
    if kind == "loha":
        config = LoHaConfig(**how)
    else:
        config = LoKrConfig(**how | dict(r=99 if kind == "lokr full" else 3, decompose_both=kind == "lokr both"))
    torch.manual_seed(0)
    wrapped = get_peft_model(unet, config)
    wrapped.save_pretrained(tmp_path / "x")
    old = {k: v.clone() for k, v in opened(tiny_sd).unet.state_dict().items()}
    merged = wrapped.merge_and_unload().state_dict()
    fresh = checkpoint.load(str(tiny_sd))
    for path in (tmp_path / "x" / "adapter_model.safetensors", tmp_path / "x"):  # the folder is taken too
        read = lora.load(path)
    count = apply.apply(fresh, [(read, 1.0)]).changed
    assert count == len(read.modules) == sum(re.search(r"\.(to_q|conv1|proj_in)\.weight", k) is not None for k in old)
    for key, weight in fresh.unet.state_dict().items():
        moved = (merged[key] - old[key]).norm()
        assert (weight - merged[key]).norm() <= 1e-5 * moved, key
    facts = inspect.run(inspect.Config(str(tmp_path / "x"))).metrics
    assert (facts["layouts"], facts["supported"], facts["kinds"]) == (["peft"], True, {kind[:4]: count})


UP, DOWN = torch.ones(6, R), torch.ones(R, 8)
OTHERS = {
    "ControlNet-LLLite": {"lllite_unet_input_blocks_1_1_attn1_to_q.conditioning1.0.weight": torch.ones(2, 2)},
    "IP-Adapter": {"image_proj.proj.weight": torch.ones(2, 2), "ip_adapter.1.to_k_ip.weight": torch.ones(2, 2)},
    "T2I-Adapter": {"body.0.block1.weight": torch.ones(2, 2)},
    "Control-LoRA": {"lora_controlnet": torch.ones(1), "input_hint_block.0.weight": torch.ones(2, 2)},
    "peft adapter other than": {"base_model.model.down_blocks.0.attentions.0.proj_in.oft_R.weight": torch.ones(2, 2)},
    "peft adapter other than ": {"base_model.model.mid_block.attentions.0.proj_in.ia3_l": torch.ones(2, 1)},
    "peft adapter other than  ": {"base_model.model.mid_block.attentions.0.proj_in.vera_lambda_b": torch.ones(2)},
    "peft adapter other than   ": {"base_model.model.mid_block.attentions.0.proj_in.boft_R": torch.ones(1, 1, 2, 2)},
    "a LoRA of a transformer": {"lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": UP},
    "a LoRA of a transformer ": {"diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight": DOWN},
    "a LoRA of a transformer  ": {"diffusion_model.blocks.0.attn.qkv.lora_A.weight": DOWN},
    "a LoRA of Stable Cascade": {"lora_prior_unet_blocks_0.lora_up.weight": UP},
    "replaces weights": {f"{Q}.reshape_weight": torch.ones(2)},
    "replaces weights ": {"diffusion_model.input_blocks.0.0.set_weight": torch.ones(2, 2)},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("alone", [True, False])
def test_other_files_are_refused_by_name(what, alone, tmp_path):
    plain = {} if alone else {f"{Q}.lora_up.weight": UP, f"{Q}.lora_down.weight": DOWN}
    path = written(tmp_path, {**plain, **OTHERS[what]})
    with pytest.raises(InputRefused, match=what.strip()) as caught:
        lora.load(path)
    assert caught.value.hint
    facts = inspect.run(inspect.Config(str(path))).metrics
    assert facts["supported"] is False
    assert what.strip() in facts["why_not"]
    assert facts["hint"]


def test_a_peft_adapter_of_another_type_is_named_by_its_config(tmp_path):
    stem = "base_model.model.mid_block.attentions.0.proj_in"
    path = written(tmp_path, {f"{stem}.lora_A.weight": DOWN, f"{stem}.lora_B.weight": UP})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA", "r": R}))
    with pytest.raises(InputRefused, match="type VERA"):
        lora.load(path)


# ---- which family


def crossing(width, kind="lora"):
    made = Made.__new__(Made)
    made.generator = torch.Generator().manual_seed(0)
    found, _ = FLAT[kind](made, torch.empty(8, width))
    return {f"{CROSS}.{k}": v for k, v in found.items()}


HEADERS = (
    {"fastdiff.family": "sdxl", "fastdiff.num_steps": "4"},
    {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
    {"ss_base_model_version": "sdxl_base_v1-0"},
    {
        "fastdiff.family": "sdxl",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "ss_base_model_version": "sdxl_base_v1-0",
    },
)


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("header", HEADERS)
def test_a_wrong_header_is_told_and_ignored(kind, header, tmp_path):
    path = written(tmp_path, crossing(768, kind), header)
    read = lora.load(path)
    assert read.family is FAMILIES["sd15"]
    assert read.recipe.family in {None, "sd15"}
    assert read.recipe.num_steps == (4 if "fastdiff.num_steps" in header else None)
    assert any("sdxl" in line and "sd15" in line for line in console.state.warnings)
    assert inspect.run(inspect.Config(str(path))).metrics["family"] == "sd15"
    other = lora.load(written(tmp_path, crossing(768), {"fastdiff.family": "sd15"}, "y.safetensors"))
    assert merging.agreed([(read, 1.0), (other, 1.0)])[0] is FAMILIES["sd15"]


def test_sample_takes_a_lora_whose_header_is_wrong(tmp_path):
    import fastdiff

    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    width = opened("emoji").unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.shape
    pair = {f"{layer}.lora_down.weight": torch.ones(2, width[1]), f"{layer}.lora_up.weight": torch.ones(width[0], 2)}
    path = written(tmp_path, pair, {"fastdiff.family": "sdxl"})
    assert fastdiff.Sampler("emoji", loras={path: 1.0}, device="cpu").coverage[0]["applied"] == 1


TELLING = {  # module -> shape of its weight, and the family that it shows
    "lora_te2_text_model_encoder_layers_0_mlp_fc1": ((12, 8), "sdxl"),
    "lora_unet_add_embedding_linear_1": ((12, 8), "sdxl"),
    "lora_unet_down_blocks_2_attentions_0_transformer_blocks_3_attn1_to_q": ((8, 8), "sdxl"),
    CROSS: ((8, 2048), "sdxl"),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": ((1024, 1024), "sd21"),
}


@pytest.mark.parametrize("key", TELLING)
def test_layers_that_show_the_family(key, tmp_path):
    (out, inside), family = TELLING[key]
    found = {f"{key}.lora_down.weight": torch.ones(2, inside), f"{key}.lora_up.weight": torch.ones(out, 2)}
    read = lora.load(written(tmp_path, found, {"fastdiff.family": "sd15"}))
    assert (read.family, read.recipe.family) == (FAMILIES[family], family)
    assert any("sd15" in line for line in console.state.warnings)


def test_a_right_header_stays_and_chooses_where_layers_leave_a_choice(tmp_path):
    console.state.warnings.clear()
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    found = {f"{te}.lora_down.weight": torch.ones(2, 768), f"{te}.lora_up.weight": torch.ones(768, 2)}
    for family in ("sd15", "sdxl"):  # both have a first encoder of this width
        assert lora.load(written(tmp_path, found, {"fastdiff.family": family})).family is FAMILIES[family]
    assert not console.state.warnings
    assert lora.load(written(tmp_path, found, {"fastdiff.family": "sd21"})).family is None
    header = {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}  # as sd-scripts writes
    assert lora.load(written(tmp_path, found, header)).family is FAMILIES["sdxl"]
    assert lora.load(written(tmp_path, found, {"ss_v2": "False", "ss_base_model_version": "sd_v1"})).family is FAMILIES["sd15"]


# ---- peft's folders


def all_layers(base, seed=0):
    """A LoRA of every linear and convolution layer of a base, with ranks 2 to 4."""
    made, modules = torch.Generator().manual_seed(seed), {}
    nets = dict(zip(apply.prefixes(len(base.text_encoders)).values(), [base.unet, *base.text_encoders], strict=True))
    for prefix, net in nets.items():
        for i, (key, name) in enumerate(apply.names(net, prefix).items()):
            out, inside, *kernel = net.get_submodule(name).weight.shape
            down = torch.randn(2 + i % 3, inside, *kernel, generator=made) * 0.1
            modules[key] = Factors(down, torch.randn(out, 2 + i % 3, *[1] * len(kernel), generator=made) * 0.1)
    return Lora(modules, Recipe(family=base.family.name).to_metadata())


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sdxl"])
def test_pefts_folders_load_in_peft_with_every_weight(base, request, tmp_path):
    from peft import PeftModel

    base = request.getfixturevalue(base)
    ours, theirs = checkpoint.load(str(base)), checkpoint.load(str(base))
    item = all_layers(ours)
    lora.save(item, tmp_path, dtype=torch.float32, format="peft")
    parts = ["unet", *ours.text_parts]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(parts)
    read = {}
    for part, net in zip(parts, [theirs.unet, *theirs.text_encoders], strict=True):
        wrapped = PeftModel.from_pretrained(net, tmp_path / part)
        stored = load_file(tmp_path / part / "adapter_model.safetensors")
        held = {k.replace(".default.", "."): v for k, v in wrapped.state_dict().items() if ".lora_" in k}
        assert held.keys() == stored.keys()
        assert all(torch.equal(held[k], stored[k]) for k in held)
        wrapped.merge_and_unload()
        read |= lora.load(tmp_path / part).modules
    apply.apply(ours, [(item, 1.0)])
    for one, other in zip([ours.unet, *ours.text_encoders], [theirs.unet, *theirs.text_encoders], strict=True):
        weights = dict(other.named_parameters())
        for name, weight in one.named_parameters():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert {key.replace("lora_te_", "lora_te1_" if len(parts) > 2 else "lora_te_") for key in read} == item.modules.keys()


# ---- inspect agrees with load

PLAIN = {f"{Q}.lora_down.weight": DOWN, f"{Q}.lora_up.weight": UP}
LINEAR = {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN}
STRANGE = {
    "no up": {f"{CONV}.lora_down.weight": DOWN},
    "ranks differ": {f"{CONV}.lora_down.weight": DOWN, f"{CONV}.lora_up.weight": torch.ones(6, R + 1)},
    "a vector": {f"{CONV}.lora_down.weight": torch.ones(8), f"{CONV}.lora_up.weight": UP},
    "a number": {f"{CONV}.lora_down.weight": torch.tensor(1.0), f"{CONV}.lora_up.weight": torch.tensor(1.0)},
    "empty": {f"{CONV}.lora_down.weight": torch.ones(0, 8), f"{CONV}.lora_up.weight": torch.ones(6, 0)},
    "integers": {f"{CONV}.lora_down.weight": DOWN.long(), f"{CONV}.lora_up.weight": UP},
    "NaN alpha": {f"{Q}.alpha": torch.tensor(float("nan"))},
    "huge alpha": {f"{Q}.alpha": torch.tensor(1e7)},
    "two alphas": {f"{Q}.alpha": torch.ones(2)},
    "a long alpha": {f"{Q}.alpha": torch.ones(64, 64)},
    "zero alpha": {f"{Q}.alpha": torch.tensor(0.0)},
    "alpha alone": {f"{CONV}.alpha": torch.tensor(1.0)},
    "half a LoHa": {f"{CONV}.hada_w1_a": UP, f"{CONV}.hada_w1_b": DOWN},
    "a LoHa of two shapes": {f"{CONV}.{k}": v for k, v in {**LINEAR, "hada_w2_a": torch.ones(5, R)}.items()},
    "a LoHa": {f"{CROSS}.{k}": v for k, v in LINEAR.items()},
    "a LoKr without W2": {f"{CONV}.lokr_w1": UP},
    "a LoKr, full, alpha 1e5": {f"{CROSS}.lokr_w1": UP, f"{CROSS}.lokr_w2": UP, f"{CROSS}.alpha": torch.tensor(1e5)},
    "GLoRA": {f"{CROSS}.{k}.weight": v for k, v in {"a1": torch.ones(8, R), "a2": DOWN, "b1": UP, "b2": DOWN}.items()},
    "GLoRA of two widths": {f"{CROSS}.{k}.weight": v for k, v in {"a1": UP, "a2": DOWN, "b1": UP, "b2": DOWN}.items()},
    "GLoRA without b2": {f"{CROSS}.{k}.weight": v for k, v in {"a1": UP, "a2": DOWN, "b1": UP}.items()},
    "OFT of no squares": {f"{CROSS}.oft_blocks": torch.ones(2, 3, 4)},
    "BOFT of odd blocks": {f"{CROSS}.oft_blocks": torch.ones(2, 2, 3, 3)},
    "DoRA of another height": {f"{Q}.dora_scale": torch.ones(7, 1)},
    "DoRA alone": {f"{CONV}.dora_scale": torch.ones(6, 1)},
    "IA3": {f"{CROSS}.weight": torch.ones(6), f"{CROSS}.on_input": torch.tensor(0)},
    "on_input alone": {f"{CROSS}.on_input": torch.tensor(0)},
    "unknown": {"something.else": torch.ones(1)},
    "embedding": {"bundle_emb.word.string_to_param.*": torch.ones(2, 8)},
    "twice": {"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": DOWN},
    "scalar of two": {f"{Q}.scalar": torch.ones(2)},
    "Tucker of other ranks": {f"{Q}.lora_mid.weight": torch.ones(R + 1, R, 3, 3)},
    "wrong header": ({}, {"fastdiff.num_steps": "four"}),
    "wrong adapter header": ({}, {"lora_adapter_metadata": "{"}),
    "too many layers": ({}, {"fastdiff.layers_per_block": "1000000000"}),
    "wrong layers": ({}, {"fastdiff.layers_per_block": "two"}),
    "another family": ({}, {"fastdiff.family": "sdxl"}),
    "on_input of two": {f"{CROSS}.weight": torch.ones(6), f"{CROSS}.on_input": torch.zeros(2)},
    "both first encoders": {f"{p}text_model_encoder_layers_0_mlp_fc1.{k}": v for p in ("lora_te_", "lora_te1_")
                            for k, v in (("lora_down.weight", DOWN), ("lora_up.weight", UP))},
}  # fmt: skip


def agrees(path):
    """Whether `load` takes a file, after checking that `inspect` says the same of it without reading its weights."""
    try:
        lora.load(path)
        loads = True
    except InputRefused:
        loads = False
    read, numbers = tensors.TensorFile.__getitem__, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tensors.TensorFile, "__getitem__", lambda self, name: numbers.append(self.layouts[name]) or read(self, name)
        )
        facts = inspect.run(inspect.Config(str(path))).metrics
    assert all(torch.Size(layout.shape).numel() == 1 for layout in numbers)
    assert facts["supported"] == loads, facts
    assert loads == ("why_not" not in facts) == ("commands" in facts)
    return loads


@pytest.mark.parametrize("what", STRANGE)
def test_inspect_says_supported_where_load_takes_the_file(what, tmp_path):
    found = STRANGE[what]
    found, metadata = found if isinstance(found, tuple) else (found, None)
    takes = {"zero alpha", "a LoHa", "a LoKr, full, alpha 1e5", "GLoRA", "IA3", "embedding", "another family"}
    assert agrees(written(tmp_path, {**PLAIN, **found}, metadata)) == (what in takes)


def test_inspect_agrees_on_every_layout(tiny_sd, tmp_path):
    for row in ROWS:
        made = Made(opened(tiny_sd))
        ROWS[row](made, False)
        found = list(made.tensors.items())
        assert agrees(written(tmp_path, made.tensors)), row
        agrees(written(tmp_path, dict(found[:30:2])))  # every second tensor is gone


COMMANDS = {  # what a file has beside a plain LoRA -> the commands that take it
    "": ({}, ["sample", "merge-lora --base", "merge-lora", "export --lora"]),
    "loha": ({f"{CROSS}.{k}": v for k, v in LINEAR.items()}, ["sample", "merge-lora --base", "merge-lora --rank"]),
    "bias": ({f"{CONV}.diff_b": torch.ones(6)}, ["sample", "merge-lora --base"]),
    "ia3": (STRANGE["IA3"], ["sample", "merge-lora --base"]),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_inspect_names_the_commands_that_take_a_file(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, commands = COMMANDS[kind]
    path = written(tmp_path, {**PLAIN, **found})
    assert inspect.run(inspect.Config(str(path))).metrics["commands"] == commands
    merged = cli.main(["merge-lora", "--accel", "x.safetensors", "--rank", "2", "-o", "r.safetensors"])
    assert (merged == 0) == (len(commands) > 2)
    assert (cli.main(["export", "--lora", "x.safetensors", "-o", "e.safetensors"]) == 0) == ("export --lora" in commands)


def test_the_family_of_kinds_without_factors(tmp_path):
    for kind in FLAT:
        assert inspect.run(inspect.Config(str(written(tmp_path, crossing(2048, kind))))).metrics["family"] == "sdxl"


def test_help_says_what_comfyui_skips(capfd):
    assert cli.main(["export", "--help"]) == 0
    text = re.sub(r"[\s│]+", " ", capfd.readouterr().out)
    assert "of diffusers' layout ComfyUI skips attention layers" in text
