"""Every layout in which LoRAs are found, on networks like SD1.5's and SDXL's: what is applied equals the formula."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from test_single_file import ldm_unet

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.lora import apply
from fastdiff.runtime import console

R = 3
ATTENTION = r"\.(to_[qkv]|to_out\.0)$"


class Made:
    """A file under construction: tensors, and what each parameter should change by, as a function of its weight."""

    def __init__(self, base, seed=0):
        self.base, self.generator = base, torch.Generator().manual_seed(seed)
        self.tensors, self.expected, self.config = {}, {}, None
        nets = {"unet": base.unet, **dict(zip(base.text_parts, base.text_encoders, strict=True))}
        self.parameters = {part: dict(net.named_parameters()) for part, net in nets.items()}

    def randn(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.generator) * scale

    def layers(self, part, pattern=""):
        """(dotted name, weight) of linear and convolution layers."""
        for name, p in self.parameters[part].items():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and p.ndim in {2, 4} and "embedding.weight" not in name and re.search(pattern, module):
                yield module, p

    def expect(self, part, name, delta):
        self.expected[part, name] = delta

    def pair(self, weight, kernel_in_down=True):
        """down, up of rank R for a weight."""
        out, inside, *kernel = weight.shape
        ones = [1] * len(kernel)
        return self.randn(R, inside, *(kernel if kernel_in_down else ones)), self.randn(out, R, *ones)


def product(down, up, scale=1.0):
    return lambda w: scale * torch.einsum("or,r...->o...", up.double().flatten(1), down.double())


def flat(part, name, sdxl):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    return prefix + leveled(part, name).replace(".", "_")


def leveled(part, name):
    return name if part == "unet" or name.startswith("text_") else f"text_model.{name}"


# ---- one function a row


def kohya(made, sdxl, key=flat, parts=None):
    """Per-module alpha, linear and convolution, text encoders."""
    for part in parts or made.parameters:
        for i, (name, w) in enumerate(made.layers(part)):
            down, up = made.pair(w)
            alpha = float(1 + i % 4)
            stem = key(part, name, sdxl)
            made.tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}
            made.expect(part, f"{name}.weight", product(down, up, alpha / R))


def ldm_key(part, name, sdxl):
    if part != "unet":
        return flat(part, name, sdxl)
    if name.startswith("add_embedding"):
        return {"1": "lora_unet_label_emb_0_0", "2": "lora_unet_label_emb_0_2"}[name[-1]]
    found = ldm_unet(f"{name}.weight").removesuffix(".weight")
    if found.endswith(".conv") and sdxl:  # every SDXL up block with an upsampler has attention
        found = re.sub(r"(output_blocks\.\d+)\.\d\.conv", r"\1.2.conv", found)
    return "lora_unet_" + found.replace(".", "_")


def kohya_ldm(made, sdxl):
    kohya(made, sdxl, ldm_key)


def lycoris_prefix(made, sdxl):
    kohya(made, sdxl, lambda part, name, _: "lycoris_" + name.replace(".", "_"), parts=["unet"])


def dotted(made, pattern, text_pattern, names, only=""):
    for part in made.parameters:
        for name, w in made.layers(part, only if part == "unet" else r"self_attn\." if only else ""):
            down, up = made.pair(w)
            shape = pattern if part == "unet" else text_pattern
            for side, tensor in zip(names, (down, up), strict=True):
                made.tensors[shape.format(part=part, name=leveled(part, name), side=side)] = tensor
            made.expect(part, f"{name}.weight", product(down, up))


def diffusers_oldest(made, sdxl):
    for part in made.parameters:
        pattern = r"attn\d" + ATTENTION if part == "unet" else r"self_attn\."
        for name, w in made.layers(part, pattern):
            down, up = made.pair(w)
            module, last = (name.removesuffix(".0") if part == "unet" else leveled(part, name)).rsplit(".", 1)
            last = last.replace("_proj", "") if part != "unet" else last.removeprefix("to_")
            stem = f"{part}.{module}{'.processor' if part == 'unet' else ''}.to_{last}_lora"
            made.tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
            made.expect(part, f"{name}.weight", product(down, up))


def diffusers_mid(made, sdxl):
    text = "{part}.{name}.lora_linear_layer.{side}.weight"
    dotted(made, "{part}.{name}.lora.{side}.weight", text, ("down", "up"))


def diffusers_now(made, sdxl):
    dotted(made, "{part}.{name}.lora_{side}.weight", "{part}.{name}.lora_{side}.weight", ("A", "B"))


def raw_peft(made, sdxl):
    for name, w in made.layers("unet"):
        down, up = made.pair(w)
        stem = f"base_model.model.{name}"
        made.tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        alpha = 7 if name.endswith("conv1") else 2
        made.expect("unet", f"{name}.weight", product(down, up, alpha / R))
    made.config = {"r": R, "lora_alpha": 2, "alpha_pattern": {"conv1": 7}}


def unet(made, sdxl, each, pattern=""):
    """`each(module's flat key, weight)` gives tensors by suffix and the delta."""
    for name, w in made.layers("unet", pattern):
        stem = flat("unet", name, sdxl)
        found, delta = each(w)
        made.tensors |= {f"{stem}.{suffix}": tensor for suffix, tensor in found.items()}
        made.expect("unet", f"{name}.weight", delta)


def locon(made, sdxl):
    def each(w):
        down, up = made.pair(w)
        return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.0)}, product(down, up, 1 / R)

    unet(made, sdxl, each, r"conv")


def tucker(made, sdxl):
    def each(w):
        out, inside, kh, kw = w.shape
        core, down, up = made.randn(R, R, kh, kw), made.randn(R, inside, 1, 1), made.randn(out, R, 1, 1)
        tensors = {"lora_mid.weight": core, "lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
        delta = torch.einsum("pqhw,op,qi->oihw", core.double(), up.double().flatten(1), down.double().flatten(1))
        return tensors, lambda w: delta * 2 / R

    unet(made, sdxl, each, r"\.conv[12]$")


def loha(made, sdxl):
    def each(w):
        out, inside, *kernel = w.shape
        inner = inside * torch.Size(kernel).numel()
        a1, b1, a2, b2 = made.randn(out, R), made.randn(R, inner), made.randn(out, R), made.randn(R, inner)
        delta = ((a1.double() @ b1.double()) * (a2.double() @ b2.double()) * 6 / R).reshape(w.shape)
        tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(6.0)}
        return tensors, lambda w: delta

    def each_plain(w):
        return each(w)

    for name, w in made.layers("unet"):
        if w.ndim == 2:
            stem = flat("unet", name, sdxl)
            tensors, delta = each_plain(w)
            made.tensors |= {f"{stem}.{k}": v for k, v in tensors.items()}
            made.expect("unet", f"{name}.weight", delta)
    for name, w in made.layers("unet", r"\.conv1$"):  # Tucker cores
        out, inside, kh, kw = w.shape
        stem = flat("unet", name, sdxl)
        t1, t2 = made.randn(R, R, kh, kw), made.randn(R, R, kh, kw)
        a1, b1, a2, b2 = made.randn(R, out), made.randn(R, inside), made.randn(R, out), made.randn(R, inside)
        found = {"hada_t1": t1, "hada_t2": t2, "hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        made.tensors |= {f"{stem}.{k}": v for k, v in found.items()}
        halves = [
            torch.einsum("pqhw,po,qi->oihw", t.double(), a.double(), b.double()) for t, a, b in ((t1, a1, b1), (t2, a2, b2))
        ]
        made.expect("unet", f"{name}.weight", lambda w, d=halves[0] * halves[1]: d)


def lokr(made, sdxl):
    """In turns: both full (alpha is ignored), W2 low rank, both low rank; Tucker on convolutions."""
    for i, (name, w) in enumerate(made.layers("unet", r"\.(to_q|to_v|ff\.net\.2|conv1)$")):
        out, inside, *kernel = w.shape
        stem, found = flat("unet", name, sdxl), {"alpha": torch.tensor(2.0)}
        o2, i2 = out // 2, inside // 2
        kind = i % 3
        if kind == 2:
            a, b = made.randn(2, R), made.randn(R, 2)
            found |= {"lokr_w1_a": a, "lokr_w1_b": b}
            first = a.double() @ b.double()
        else:
            found["lokr_w1"] = made.randn(2, 2)
            first = found["lokr_w1"].double()
        if kernel and kind:
            t, a, b = made.randn(R, R, *kernel), made.randn(R, o2), made.randn(R, i2)
            found |= {"lokr_t2": t, "lokr_w2_a": a, "lokr_w2_b": b}
            second = torch.einsum("pqhw,po,qi->oihw", t.double(), a.double(), b.double())
        elif kind:
            a, b = made.randn(o2, R), made.randn(R, i2)
            found |= {"lokr_w2_a": a, "lokr_w2_b": b}
            second = a.double() @ b.double()
        else:
            found["lokr_w2"] = made.randn(o2, i2, *kernel)
            second = found["lokr_w2"].double()
        if kernel:
            delta = torch.einsum("ac,bdhw->abcdhw", first, second).reshape(w.shape)
        else:
            delta = torch.einsum("ac,bd->abcd", first, second).reshape(w.shape)
        made.tensors |= {f"{stem}.{k}": v for k, v in found.items()}
        made.expect("unet", f"{name}.weight", lambda w, d=delta * (2 / R if kind else 1): d)


def full(made, sdxl):
    """Differences of weights and biases of layers, and of norms."""
    for name, w in made.parameters["unet"].items():
        module, _, kind = name.rpartition(".")
        norm = w.ndim == 1 and made.parameters["unet"][f"{module}.weight"].ndim == 1
        suffix = {("weight", False): "diff", ("bias", False): "diff_b", ("weight", True): "w_norm", ("bias", True): "b_norm"}
        delta = made.randn(*w.shape)
        made.tensors[f"{flat('unet', module, sdxl)}.{suffix[kind, norm]}"] = delta
        made.expect("unet", name, lambda w, d=delta: d.double())


def ia3(made, sdxl):
    for name, w in made.layers("unet", r"\.(to_k|to_v|ff\.net\.2)$"):
        on_input = name.endswith("ff.net.2")
        vector, stem = made.randn(w.shape[1 if on_input else 0]), flat("unet", name, sdxl)
        made.tensors |= {f"{stem}.weight": vector, f"{stem}.on_input": torch.tensor(int(on_input))}
        made.expect("unet", f"{name}.weight", lambda w, v=vector, i=on_input: w * (v.double() if i else v.double()[:, None]))


def glora(made, sdxl):
    def each(w):
        out, inside, *kernel = w.shape
        ones = [1] * len(kernel)
        a1, a2 = made.randn(inside, R, *ones), made.randn(R, inside, *ones)
        b1, b2 = made.randn(out, R, *ones), made.randn(R, inside, *kernel)
        tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(1.5)}

        def delta(w):
            mix = a1.double().flatten(1) @ a2.double().flatten(1)
            plain = product(b2, b1)(w)
            return 1.5 / R * (torch.einsum("oi...,ij->oj...", w, mix) + plain)

        return tensors, delta

    unet(made, sdxl, each, r"\.(to_q|to_k|conv1)$")


def cayley(blocks):
    q = blocks.double() - blocks.double().transpose(-1, -2)
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft(made, sdxl):
    """Block-diagonal rotations; every second one rescaled, every third one with a constraint that binds."""
    for i, (name, w) in enumerate(made.layers("unet", r"\.(to_q|conv1)$")):
        out, stem = w.shape[0], flat("unet", name, sdxl)
        blocks = made.randn(out // 4, 4, 4, scale=0.5)
        rescale = 1 + made.randn(out, *[1] * (w.ndim - 1), scale=0.3) if i % 2 else None
        constraint = 1e-2 if i % 3 == 0 else 0.0
        made.tensors |= {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(constraint)}
        if rescale is not None:
            made.tensors[f"{stem}.rescale"] = rescale
        q = blocks.double() - blocks.double().transpose(-1, -2)
        if constraint:
            blocks = blocks.double() * min(1.0, constraint * out / q.norm().item())
        turn = torch.block_diag(*cayley(blocks).transpose(-1, -2))

        def delta(w, turn=turn, rescale=rescale):
            new = (turn @ w.flatten(1)).reshape(w.shape)
            return (new if rescale is None else new * rescale.double()) - w

        made.expect("unet", f"{name}.weight", delta)


def boft(made, sdxl):
    """Two butterfly factors over 16 or 32 outputs in blocks of 4: written out as whole matrices here."""
    for name, w in made.layers("unet", r"\.to_q$"):
        out, stem = w.shape[0], flat("unet", name, sdxl)
        blocks = made.randn(2, out // 4, 4, 4, scale=0.5)
        made.tensors |= {f"{stem}.oft_blocks": blocks, f"{stem}.alpha": torch.tensor(0.0)}
        whole = torch.eye(out, dtype=torch.float64)
        for i, factor in enumerate(cayley(blocks)):
            k = 2**i * 2
            index = torch.arange(out).reshape(-1, 2, k).transpose(1, 2).reshape(-1)  # new row -> old row
            shuffle = torch.eye(out, dtype=torch.float64)[index]
            whole = shuffle.T @ torch.block_diag(*factor) @ shuffle @ whole
        made.expect("unet", f"{name}.weight", lambda w, m=whole: m @ w - w)


def dora(made, sdxl, peft=False):
    """kohya: along outputs and inputs in turns; peft: along outputs, with a header that says alpha."""
    for i, (name, w) in enumerate(made.layers("unet", r"\.(to_q|ff\.net\.2|conv1)$")):
        down, up = made.pair(w)
        by_input = not peft and i % 2 == 1 and w.shape[0] != w.shape[1]
        axis = 1 if by_input else 0
        m = 1 + made.randn(w.shape[axis]).abs()
        view = [1] * w.ndim
        view[axis] = -1
        if peft:
            shape = (1, -1, 1, 1) if w.ndim == 4 else (-1,)
            stem = f"unet.{name}"
            made.tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
            made.tensors[f"{stem}.lora_magnitude_vector{'.weight' if i % 2 else ''}"] = m.reshape(shape)
        else:
            stem = flat("unet", name, sdxl)
            made.tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
            made.tensors[f"{stem}.dora_scale"] = m.reshape(view)

        def delta(w, down=down, up=up, m=m, axis=axis, view=view):
            moved = w + product(down, up, 1.0 if peft else 1 / R)(w)
            norm = moved.transpose(0, axis).flatten(1).norm(dim=1)
            return moved * (m.double() / norm).reshape(view) - w

        made.expect("unet", f"{name}.weight", delta)


def dora_peft(made, sdxl):
    dora(made, sdxl, peft=True)


def bundled(made, sdxl):
    kohya(made, sdxl)
    made.tensors["bundle_emb.my word.string_to_param.*"] = torch.ones(2, 8)


ROWS = {
    "K1 kohya, diffusers names": kohya,
    "K2 kohya, LDM names": kohya_ldm,
    "D0 diffusers oldest": diffusers_oldest,
    "D1 diffusers mid": diffusers_mid,
    "D2 diffusers now": diffusers_now,
    "P raw peft": raw_peft,
    "L1 LoCon": locon,
    "L2 Tucker": tucker,
    "L3 LoHa": loha,
    "L4 LoKr": lokr,
    "L5 full, norm, bias": full,
    "L6 IA3": ia3,
    "L7 GLoRA": glora,
    "L7 OFT": oft,
    "L7 BOFT": boft,
    "X DoRA kohya": dora,
    "X DoRA peft": dora_peft,
    "E bundled embeddings": bundled,
    "S SimpleTuner": lycoris_prefix,
}


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("row", ROWS)
def test_applied_equals_expected(row, kind, request, tmp_path):
    sdxl = kind == "tiny_sdxl"
    base = checkpoint.load(str(request.getfixturevalue(kind)))
    made = Made(base)
    ROWS[row](made, sdxl)
    assert len(made.expected) > 5
    save_file({k: v.contiguous() for k, v in made.tensors.items()}, tmp_path / "x.safetensors")
    if made.config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(made.config))
    before = {(part, k): p.detach().clone() for part, ps in made.parameters.items() for k, p in ps.items()}
    read = lora.load(tmp_path / "x.safetensors")
    assert apply.apply(base, [(read, 1.0)]).changed == len(made.expected) == len(read.modules)
    for (part, name), old in before.items():
        new = made.parameters[part][name].detach()
        if (part, name) not in made.expected:
            assert torch.equal(new, old), f"{part} {name} was changed"
            continue
        wanted = made.expected[part, name](old.double())
        error = (new.double() - (old.double() + wanted)).norm() / wanted.norm()
        assert error < 1e-6, f"{part} {name}: {error:.1e}"
    if row.startswith("E"):
        assert read.skipped == ["bundle_emb.my word.string_to_param.*"]
        assert any("my word" in line for line in console.state.warnings)


def test_every_update_scales_with_its_weight_and_adds_on_the_base_itself(tiny_sd, tmp_path):
    """W + s1 D1(W) + s2 D2(W), in any order: a DoRA acts on the base's weight, not on what another LoRA made of it."""
    base = checkpoint.load(str(tiny_sd))
    one, two = Made(base, 1), Made(base, 2)
    dora(one, False)
    locon(two, False)
    files = []
    for i, made in enumerate((one, two)):
        save_file({k: v.contiguous() for k, v in made.tensors.items()}, tmp_path / f"{i}.safetensors")
        files.append(lora.load(tmp_path / f"{i}.safetensors"))
    both = sorted(set(one.expected) & set(two.expected))
    assert both
    found = []
    for order in (files, files[::-1]):
        fresh = checkpoint.load(str(tiny_sd))
        apply.apply(fresh, [(item, 0.5 if item is files[0] else -0.25) for item in order])
        found.append(dict(fresh.unet.named_parameters()))
    old = dict(base.unet.named_parameters())
    for _, name in both:
        w = old[name].double()
        wanted = w + 0.5 * one.expected["unet", name](w) - 0.25 * two.expected["unet", name](w)
        for weights in found:
            torch.testing.assert_close(weights[name].double(), wanted, rtol=1e-5, atol=1e-5)
