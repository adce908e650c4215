"""LoRA files: any supported layout in, one canonical form inside, the layout that every program reads out.

    W' = W + sum_i w_i (alpha_i / r_i) B_i A_i,   A = down, B = up (Hu et al. 2021, eq. 3)

A module is called by its kohya name without suffix: `lora_unet_` + the diffusers dotted name with _ for dots; text
encoders are `lora_te_` (SD1, SD2), or `lora_te1_` and `lora_te2_` (SDXL). Flattening a dotted name is always possible
and the reverse needs the model, so LoRAs can be merged without a base. Shapes: r rank, kh kw convolution kernel.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.console import InputRefused, UsageError, warn
from fastdiff.io.recipe import Recipe

COMPONENTS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
ROOTS = {  # how names begin inside a component, for files that do not say which one it is
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_in", "conv_out", "time_embedding.", "add_embedding."),
    "text_encoder": ("text_model.", "encoder.layers."),
}
FAMILIES: dict[str, tuple[int, str, dict[str, str]]] = {  # cross-attention width, modelspec architecture, kohya's own
    "emoji": (128, "stable-diffusion-v1", {}),
    "sd15": (768, "stable-diffusion-v1", {"ss_v2": "False"}),
    "sd21": (1024, "stable-diffusion-v2-768-v", {"ss_v2": "True"}),
    "sdxl": (2048, "stable-diffusion-xl-v1-base", {"ss_base_model_version": "sdxl_base_v1-0"}),
}
OTHER_KINDS = (  # refused by name: half of such a file read as a plain LoRA would be silently wrong
    (r"\.dora_scale$|lora_magnitude_vector", "a DoRA"),
    (r"\.hada_[wt]\d", "a LoHa"),
    (r"\.lokr_[wt]\d", "a LoKr"),
    (r"\.lora_mid\.", "a LoCon with Tucker cores"),
    (r"\.b?oft_", "an OFT"),
    (r"\.[ab][12]\.weight$", "a GLoRA"),
    (r"\.on_input$|\.ia3_l", "an IA3"),
    (r"\.diff(_b)?$|\.[wb]_norm$", "a full difference"),
    (r"^bundle_emb\.", "a LoRA with bundled embeddings"),
    (r"^lycoris_", "a file of the LyCORIS wrapper"),
    (r"_lora\.(down|up)\.weight$", "a LoRA in the layout of diffusers before 0.18"),
    (r"^lora_unet_(input_blocks|middle_block|output_blocks|time_embed_\d|label_emb|out_\d)", "a LoRA with LDM names"),
    (r"^(lora_)?transformer[._]|^lora_unet_(double|single|joint)_blocks", "a LoRA of a transformer (SD3, Flux)"),
    (r"^(model\.diffusion_model|first_stage_model|cond_stage_model)\.", "a whole checkpoint (give it as --base)"),
)
OTHER_FILES = (  # how they begin, what they are, what to do
    (
        rb"PK\x03\x04|\x80[\x02-\x05][^\0]",
        "a pickle (.ckpt, .pt, .bin), which can run code",
        "convert it to safetensors",
    ),
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights", "run: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, not the weights", "download the file again"),
    (rb"", "not a safetensors file, or corrupt, empty or cut short", "download or copy the file again"),
)
# True of the tensors they were written with, not of those that we write.
STALE = {"lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "ss_network_args"}


@dataclass
class Factors:
    """One module's update: down (r, in[, kh, kw]), up (out, r[, 1, 1]), fp32; alpha / r is already part of `up`."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (out, in[, kh, kw])."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """B A in the weight's shape (out, in[, kh, kw]), fp32."""
        return (self.up.flatten(1).float() @ self.down.flatten(1).float()).reshape(self.shape)


@dataclass
class Lora:
    """Modules by canonical name, and the header of the file."""

    modules: dict[str, Factors]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "the LoRA"  # what messages call it: its file

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_metadata(self.metadata)

    @property
    def family(self) -> str | None:
        """emoji, sd15, sd21 or sdxl, as the recipe, the cross-attention's width or the header says; None = unknown."""
        if self.recipe.family:
            return self.recipe.family
        if any(key.startswith("lora_te2_") for key in self.modules):
            return "sdxl"
        widths = {m.shape[1] for key, m in self.modules.items() if key.endswith(("attn2_to_k", "attn2_to_v"))}
        told = self.metadata.get("modelspec.architecture", "").removesuffix("/lora")
        by_width = (name for name, (width, _, _) in FAMILIES.items() if widths == {width})
        by_header = (name for name, (_, spec, _) in FAMILIES.items() if name != "emoji" and told.startswith(spec[:19]))
        return next(by_width, None) or next(by_header, None)


class Part(NamedTuple):
    """What one tensor of a file is."""

    key: str  # canonical module
    side: str  # down, up or alpha
    component: str = ""  # whose header entries apply; "" = the file does not say
    name: str = ""  # dotted, inside the component; "" = the layout is flat and holds its own alphas


def canonical(prefix: str, name: str) -> str:
    """`prefix` + the flattened name; transformers 5.6 dropped the level `text_model.` that every program expects."""
    flat = name.replace(".", "_")
    outside = prefix == "lora_unet_" or flat.startswith(("text_model_", "text_projection"))
    return prefix + (flat if outside else "text_model_" + flat)


def read_kohya(key: str) -> Part | None:
    """`lora_unet_<flat>.lora_down.weight`, `.lora_up.weight`, `.alpha` (sd-scripts, the published LCM-LoRAs)."""
    found = re.fullmatch(r"(lora_(?:unet|te|te1|te2)_)([^.]+)\.(?:lora_(down|up)\.weight|alpha)", key)
    return found and Part(canonical(found[1], found[2]), found[3] or "alpha")


def read_peft(key: str) -> Part | None:
    """`unet.<dotted>.lora_A.weight` (diffusers now), `base_model.model.<dotted>.lora_A[.<adapter>].weight` (peft)."""
    found = re.fullmatch(r"(.+)\.lora_([AB])(?:\.[^.]+)?\.weight", key)
    return found and dotted(found[1], {"A": "down", "B": "up"}[found[2]])


def read_diffusers(key: str) -> Part | None:
    """`unet.<dotted>.lora.down.weight`, `text_encoder.<dotted>.lora_linear_layer.down.weight` (diffusers 0.18 on)."""
    found = re.fullmatch(r"(.+)\.(?:lora(?:_linear_layer)?\.(down|up)\.weight|alpha)", key)
    return found and dotted(found[1], found[2] or "alpha")


READERS = (read_kohya, read_peft, read_diffusers)  # a further layout = one more function here


def dotted(path: str, side: str) -> Part | None:
    """A dotted module path with or without its component and peft's wrapper in front."""
    component, _, name = path.partition(".")
    if component not in COMPONENTS:
        component, name = "", path
    told = "" if name.startswith("base_model.model.") else component
    name = name.removeprefix("base_model.model.")
    component = component or next((c for c, roots in ROOTS.items() if name.startswith(roots)), "")
    return Part(canonical(COMPONENTS[component], name), side, told, name) if component else None


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; anything else is refused with what it is."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.is_dir():
        raise InputRefused(f"{path}: a folder, not a LoRA file", f"name the file: {path}/<name>.safetensors")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        with path.open("rb") as file:
            head = file.read(64)
        _, kind, hint = next(row for row in OTHER_FILES if re.match(row[0], head))
        raise InputRefused(f"{path}: {kind}", hint) from error
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error


def load(path: str | Path) -> Lora:
    """Read a LoRA of any supported layout, all of it or not at all (InputRefused); scales are folded into `up`."""
    tensors, metadata = read_file(path := Path(path).expanduser())
    for key in tensors:
        for pattern, kind in OTHER_KINDS:
            if re.search(pattern, key):
                raise InputRefused(f"{path}: {kind} is not supported ({key})")
    parts = {key: next(filter(None, (reader(key) for reader in READERS)), None) for key in tensors}
    if unknown := [key for key, part in parts.items() if part is None]:
        raise InputRefused(f"{path}: {len(unknown)} of {len(tensors)} keys are unknown: {', '.join(unknown[:3])}")
    if not parts:
        raise InputRefused(f"{path}: no LoRA modules in it")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, part in parts.items():
        sides = modules.setdefault(part.key, {})
        if part.side in sides:
            raise InputRefused(f"{path}: {part.key} has two sets of weights ({key})")
        sides[part.side] = tensors[key]
    try:
        Recipe.from_metadata(metadata)
        configs = peft_configs(path, metadata, parts.values())
        for part in parts.values():
            if part.name and part.side == "down" and configs.get(part.component):
                rank = modules[part.key]["down"].shape[:1].numel()
                alpha = peft_alpha(configs[part.component], part.name, rank)
                modules[part.key].setdefault("alpha", torch.tensor(float(alpha)))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputRefused(f"{path}: what its header or adapter_config.json says is broken ({error})") from error
    factors = {key: build(sides, f"{path}: {key}") for key, sides in modules.items()}
    lora = Lora(factors, metadata, str(path))
    return with_first_encoder(lora, "lora_te1_" if lora.family == "sdxl" else "lora_te_")


def peft_configs(path: Path, metadata: Mapping[str, str], parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """Component -> peft config: out of the header; under "" adapter_config.json beside a raw peft file."""
    header = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        configs.setdefault(key.split(".")[0], {})[key.partition(".")[2]] = value
    if any(part.name and not part.component for part in parts):
        beside = path.parent / "adapter_config.json"
        if beside.exists():
            configs[""] = json.loads(beside.read_text())
        else:
            warn(f"{path}: no adapter_config.json beside it, so its scale is unknown; alpha = rank is assumed")
    return configs


def peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """A module's alpha; peft's patterns match the end of a name. The rank is the tensor's, whatever the config says."""
    hits = (v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", name))
    alpha = next(hits, config.get("lora_alpha")) or rank
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def build(sides: Mapping[str, Tensor], where: str) -> Factors:
    """Checked fp32 factors of one module with alpha / r folded into `up`; no alpha, or 0, means alpha = r (kohya)."""
    if missing := {"down", "up"} - set(sides):
        raise InputRefused(f"{where}: {' and '.join(sorted(missing))} missing")
    for side, tensor in sides.items():
        if side != "alpha" and not tensor.is_floating_point():
            raise InputRefused(f"{where}: {side} is {tensor.dtype}, not floating point")
        if not bool(tensor.float().isfinite().all()):
            raise InputRefused(f"{where}: {side} has NaN or infinite values")
    down, up = (sides[k].detach().to("cpu", torch.float32, copy=True) for k in ("down", "up"))
    pair = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if (down.ndim, up.ndim) not in {(2, 2), (4, 4)} or up.shape[2:].numel() != 1 or not down.numel() or not up.numel():
        raise InputRefused(f"{where}: shapes {pair} are no linear or convolution pair")
    if (rank := down.shape[0]) != up.shape[1]:
        raise InputRefused(f"{where}: down and up differ in rank, shapes {pair}")
    alpha = sides.get("alpha", torch.tensor(0.0))
    if alpha.numel() != 1 or alpha.item() < 0:
        raise InputRefused(f"{where}: alpha must be one number above 0, not {alpha.tolist()}")
    return Factors(down, up * ((alpha.item() or rank) / rank))


def with_first_encoder(lora: Lora, prefix: str) -> Lora:
    """The same LoRA with its first text encoder called `prefix`: SD1 files exist with lora_te_ and with lora_te1_."""
    renamed = {re.sub(r"^lora_te1?_", prefix, key): factors for key, factors in lora.modules.items()}
    if len(renamed) < len(lora.modules):
        raise InputRefused(f"{lora.source}: the first text encoder is there as lora_te_ and as lora_te1_")
    return replace(lora, modules=renamed)


def from_peft(state: dict[str, Tensor], alpha: float | dict, prefix: str = "lora_unet_") -> dict[str, Factors]:
    """Canonical modules of `peft.get_peft_model_state_dict(net)`; alpha is one for all, or by dotted module name."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if not (part := read_peft(f"unet.{key}")):
            raise ValueError(f"{key}: not a factor of a plain LoRA")
        own = float(alpha[part.name] if isinstance(alpha, dict) else alpha)
        modules.setdefault(canonical(prefix, part.name), {"alpha": torch.tensor(own)})[part.side] = tensor
    return {key: build(sides, key) for key, sides in modules.items()}


def names(model: nn.Module, prefix: str = "lora_unet_") -> dict[str, str]:
    """Canonical key -> dotted name of every Linear and Conv2d; one wrapped by peft goes by its outer name."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and not re.search(r"\.lora_[AB]\.", name):
            outer = name.removesuffix(".base_layer")
            key = canonical(prefix, outer.removeprefix("base_model.model."))
            assert key not in found, f"{outer} and {found[key]} flatten to the same {key}"
            found[key] = outer
    return found


def check(model: nn.Module, loras: list[tuple[Lora, float]], prefix: str) -> dict[str, Tensor]:
    """The model's weights, if every `prefix` module of the LoRAs has its place among them, else InputRefused."""
    layers = {key: model.get_submodule(name) for key, name in names(model, prefix).items()}
    table = {key: getattr(layer, "base_layer", layer).weight for key, layer in layers.items()}
    shapes = {key: tuple(weight.shape) for key, weight in table.items()}
    plain = lambda shape: shape[:2] if math.prod(shape[2:]) == 1 else shape  # noqa: E731  (1 x 1 conv = linear)
    for lora, _ in loras:
        wanted = {key: factors.shape for key, factors in lora.modules.items() if key.startswith(prefix)}
        wrong = [f"{key} (no such layer)" for key in wanted if key not in shapes]
        odd = [key for key in wanted.keys() & shapes.keys() if plain(wanted[key]) != plain(shapes[key])]
        wrong += [f"{key} ({wanted[key]}, the model has {shapes[key]})" for key in odd]
        if wrong:
            fit = f"only {len(wanted) - len(wrong)} of {len(wanted)} modules fit this model"
            raise InputRefused(f"{lora.source}: {fit}; not: {', '.join(sorted(wrong)[:3])}", "it is for another base")
    return table


@torch.no_grad()
def fold(model: nn.Module, loras: list[tuple[Lora, float]], prefix: str = "lora_unet_") -> int:
    """W <- W + sum_i w_i B_i A_i, summed in fp32, cast once; returns the number of modules changed, after `check`."""
    table = check(model, loras, prefix)
    used = {key: weight for key, weight in table.items() if any(key in lora.modules for lora, _ in loras)}
    for key, weight in used.items():
        total = weight.float()
        for lora, strength in loras:
            if factors := lora.modules.get(key):
                moved = Factors(factors.down.to(weight.device), factors.up.to(weight.device))
                total = total + strength * moved.delta().reshape(weight.shape)
        weight.copy_(total)
    return len(used)


def apply(base: Any, loras: list[tuple[Lora, float]]) -> int:
    """Fold into the `unet` and `text_encoders` of a checkpoint; all modules find their place, or none is touched."""
    nets = {"lora_unet_": base.unet}
    if any(key.startswith("lora_te") for lora, _ in loras for key in lora.modules):  # else they need not be read
        first = "lora_te1_" if len(base.text_encoders) > 1 else "lora_te_"
        loras = [(with_first_encoder(lora, first), strength) for lora, strength in loras]
        nets |= zip((first, "lora_te2_"), base.text_encoders, strict=False)
    for lora, _ in loras:
        if stray := [key for key in lora.modules if not key.startswith(tuple(nets))]:
            raise InputRefused(f"{lora.source}: no place in the base for {len(stray)} modules: {', '.join(stray[:3])}")
    for prefix, net in nets.items():
        check(net, loras, prefix)
    return sum(fold(net, loras, prefix) for prefix, net in nets.items())


def balanced(factors: Factors, scale: float) -> tuple[Tensor, Tensor]:
    """Factors of `scale` B A; powers of two make rows of `down` as large as columns of `up`, exactly.

    Otherwise a folded 1 / 64 would push `up` into fp16's subnormals.
    """
    down, up = factors.down.flatten(1), factors.up.flatten(1) * scale  # (r, in kh kw), (out, r)
    power = ((up.abs().amax(0) / down.abs().amax(1)).log2() / 2).round()
    shift = torch.exp2(torch.where(power.isfinite(), power, 0.0))
    return (down * shift[:, None]).reshape(factors.down.shape), (up / shift).reshape(factors.up.shape)


def header(lora: Lora, title: str) -> dict[str, str]:
    """The LoRA's own entries, modelspec (which UIs show) and the ss_ ones of sd-scripts (which tell the family)."""
    recipe, ranks = lora.recipe, {factors.rank for factors in lora.modules.values()}
    dim, alpha = str(*ranks) if len(ranks) == 1 else "Dynamic", str(max(ranks))
    spec = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers", "modelspec.title": title}
    if lora.family in FAMILIES:
        _, architecture, extra = FAMILIES[lora.family]
        if lora.family == "sd21" and recipe.prediction_type == "epsilon":
            architecture = "stable-diffusion-v2-512"
        spec |= {"modelspec.architecture": f"{architecture}/lora", **extra}
    hints = {"{} steps": recipe.num_steps, "guidance {:g}": recipe.guidance, "scheduler {}": recipe.scheduler}
    if told := [text.format(value) for text, value in hints.items() if value is not None]:
        spec["modelspec.usage_hint"] = ", ".join(told)
    own = {k: v for k, v in lora.metadata.items() if k not in STALE}
    network = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha, "format": "pt"}
    return spec | own | network


def save(lora: Lora, path: Path, *, dtype: torch.dtype = torch.float16, extra_metadata: dict | None = None) -> None:
    """Write kohya's layout, staged beside `path` and renamed.

    One alpha for the whole file, its largest rank, and alpha / r divided out of `up`: diffusers gives attention layers
    the file's most frequent alpha, so that any other choice is mis-scaled there, alpha = r at mixed ranks included.
    """
    assert lora.modules, "a LoRA without modules"
    path, tensors = Path(path), {}
    alpha = float(max(factors.rank for factors in lora.modules.values()))
    for key, factors in lora.modules.items():
        for side, tensor in zip(("down", "up"), balanced(factors, factors.rank / alpha), strict=True):
            stored = tensors[f"{key}.lora_{side}.weight"] = tensor.detach().to("cpu", dtype).contiguous()
            if not bool(stored.isfinite().all()):
                raise ValueError(f"{path}: {key} is not finite in {str(dtype).removeprefix('torch.')}")
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        staged.write_bytes(serialised(tensors, {**header(lora, path.stem), **(extra_metadata or {})}))
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def serialised(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """The bytes of a safetensors file, its metadata in order: the library's own order differs from run to run,

    and a file that it writes itself is readable by nobody else (mode 600).
    """
    from safetensors.torch import save

    data = save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    told = json.loads(data[8:start])
    told["__metadata__"] = dict(sorted(told["__metadata__"].items()))
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def parse_spec(spec: str, default: float) -> tuple[Path, float]:
    """`FILE[=WEIGHT]`; a path with = whose tail is no number is a plain path."""
    head, _, tail = spec.rpartition("=")
    try:
        strength = float(tail) if head else default
    except ValueError:
        head, strength = "", default
    if not math.isfinite(strength):
        raise UsageError(f"{spec}: the weight must be a finite number")
    return Path(head or spec).expanduser(), strength
