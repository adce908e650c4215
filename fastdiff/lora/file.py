"""Read LoRA files of any layout into one canonical form, and write them in the layouts that other programs read.

W' = W + sum_i s_i Delta_i(W)         every update acts on the base's own weight, so that the order does not matter
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.checkpoints import single_file, tensors
from fastdiff.checkpoints.family import FAMILIES, PLAIN, Family, of_width, titles
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.tensors import Entry
from fastdiff.lora.kinds import Factors, Update, build, describe
from fastdiff.lora.layouts import OTHERS, READERS, Part, canonical, read_peft, split
from fastdiff.runtime.console import warn
from fastdiff.runtime.errors import InputRefused, UsageError, as_field, quoted

# Header entries that describe the tensors of the file they were read from, so a new file must not copy them.
STALE = {"lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "ss_network_args", "format"}
Format = Literal["kohya", "diffusers", "peft"]
MAX_RANK, MAX_SCALE = 16_384, 10_000.0  # larger ones are signs of a damaged file


@dataclass(eq=False)
class Lora:
    """A LoRA: its updates by canonical module name, and the header of its file. It is hashable and equals only itself."""

    modules: dict[str, Update]
    metadata: dict[str, str] = field(default_factory=dict)
    source: str = "the LoRA"  # its file, or what messages call it
    skipped: list[str] = field(default_factory=list)  # keys that were left out: bundled embeddings, unknown ones where allowed
    total: int = 0  # number of modules in the file, when `modules` holds only those that fit a base

    @property
    def recipe(self) -> Recipe:
        """The sampling settings in the header; ValueError where a number there is malformed."""
        return Recipe.from_metadata(self.metadata)

    @property
    def family(self) -> Family | None:
        """The base's family, by the recipe, the text encoders, the width of cross-attention or the header; None if unknown."""
        if row := FAMILIES.get(self.recipe.family or ""):
            return row
        if any(key.startswith("lora_te2_") for key in self.modules):
            return next(row for row in FAMILIES.values() if row.text_encoders == 2)
        crossing = (m.shape for key, m in self.modules.items() if key.endswith(("attn2_to_k", "attn2_to_v")))
        widths = {shape[1] for shape in crossing if shape}
        if len(widths) == 1 and (row := of_width(widths.pop())):
            return row
        architecture = self.metadata.get("modelspec.architecture", "")
        by_header = (row for row in FAMILIES.values() if row.published and architecture.startswith(row.architecture_stem))
        return next(by_header, None)

    @property
    def layers(self) -> int:
        """Layers in a block of the base UNet, needed to read LDM names; 2 unless the base was pruned."""
        return int(self.metadata.get("fastdiff.layers_per_block", 2))

    def of_unet(self) -> "Lora":
        """This LoRA without the modules of text encoders."""
        return replace(self, modules={k: v for k, v in self.modules.items() if k.startswith("lora_unet_")})

    def for_unet(self, option: str) -> "Lora":
        """`of_unet`, with a warning that modules of text encoders are left out; InputRefused where nothing else is there.

        `option` is the one that named the file.
        """
        unet = self.of_unet()
        if texts := len(self.modules) - len(unet.modules):
            where = as_field(option, self.source)
            if not unet.modules:
                raise InputRefused(f"{where}: changes text encoders alone, which are not trained here")
            warn(f"{where}: its {texts} modules for text encoders are not used; the student has those of the base")
        return unet

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float16, format: Format = "kohya") -> Path:
        """Write this LoRA and return the path. kohya's layout is what every program loads; `save` describes the others."""
        save(self, Path(path).expanduser(), dtype=dtype, format=format)
        return Path(path).expanduser()

    def factors(self, doing: str) -> dict[str, Factors]:
        """The modules, all of which must be low-rank factors; InputRefused names one that is not.

        `doing` completes the message "... cannot be", as "merged into a LoRA".
        """
        result: dict[str, Factors] = {}
        for key, update in self.modules.items():
            if not isinstance(update, Factors):
                kind = {"dora": "a DoRA", "loha": "a LoHa", "lokr": "a LoKr", "full": "a full difference"}.get(
                    update.kind, update.kind
                )
                hint = "bake it into a checkpoint with `base`" + (
                    "" if update.needs_weight else ", or give `rank=R` to approximate it"
                )
                raise InputRefused(f"{self.source}: {kind} ({key}) cannot be {doing} exactly", hint)
            result[key] = update
        return result


def load(path: str | Path, *, layers: int = 2, allow_partial: bool = False, allow_pickle: bool = False) -> Lora:
    """Read a LoRA of any supported layout; the scale alpha / r is multiplied in.

    `layers` is the number of layers in a block of the base, for files with LDM names whose header lacks it. InputRefused where
    any key is unknown, unless `allow_partial`, which leaves such keys out with a warning. Bundled embeddings are always left
    out with a warning.
    """
    file = tensors.open_file(path, allow_pickle=allow_pickle)
    path, metadata = file.path, file.metadata
    for key in file:
        for pattern, kind in OTHERS:
            if re.search(pattern, key) and not key.startswith("bundle_emb."):
                raise InputRefused(f"{path}: {kind} ({key})", f"LoRAs of {titles()} are supported")
    embeddings = [key for key in file if key.startswith("bundle_emb.")]
    if embeddings:
        names = sorted({key.split(".")[1] for key in embeddings})
        warn(f"{path}: its bundled embeddings are left out ({', '.join(names[:5])})")
    table = single_file.flat_table(int(metadata.get("fastdiff.layers_per_block", layers)))
    parts = {key: parse(key, table) for key in file if key not in embeddings}
    unknown = [key for key, part in parts.items() if part is None]
    if unknown:
        message = f"{path}: {len(unknown)} of {len(file)} keys are unknown: {', '.join(unknown[:3])}"
        if not allow_partial or len(unknown) == len(parts):
            raise InputRefused(message, "" if len(unknown) == len(parts) else "`allow_partial=True` leaves them out")
        warn(message)
    known = {key: part for key, part in parts.items() if part}
    if not known:
        raise InputRefused(f"{path}: no LoRA modules in it")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, part in known.items():
        sides = modules.setdefault(part.key, {})
        if part.side in sides:
            raise InputRefused(f"{path}: {part.key} has two sets of weights ({key})")
        sides[part.side] = file[key]
    try:
        Recipe.from_metadata(metadata)
        configs = peft_configs(path, metadata, known.values())
        for part in known.values():
            if part.name and part.side == "down" and configs.get(part.component):
                rank = modules[part.key]["down"].shape[:1].numel()
                alpha = peft_alpha(configs[part.component], part.name, rank)
                modules[part.key].setdefault("alpha", torch.tensor(float(alpha)))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise InputRefused(f"{path}: the header or adapter_config.json is malformed ({quoted(error)})") from error
    updates = {
        key: checked(build(plain_magnitude(sides), f"{path}: {key}"), sides, f"{path}: {key}") for key, sides in modules.items()
    }
    lora = Lora(updates, metadata, str(path), [*embeddings, *unknown])
    return with_first_encoder(lora, (lora.family or PLAIN).lora_text_prefix)


def layers_told(unet_config: Mapping[str, Any]) -> dict[str, str]:
    """The header entry with the number of layers in a block of the base; empty for the usual two. LDM names depend on it."""
    layers = unet_config.get("layers_per_block", 2)
    return {} if layers == 2 else {"fastdiff.layers_per_block": str(layers)}


def parse(key: str, table: Mapping[str, str]) -> Part | None:
    """What the tensor `key` of a LoRA file is; None where no layout has such a name. `table` is `single_file.flat_table`'s."""
    return next(filter(None, (reader(key, table) for reader in READERS)), None)


def plain_magnitude(sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module with peft's DoRA magnitude in kohya's form.

    peft has one value per output, in any shape, which becomes flat here. kohya's shape also says which axis is meant.
    """
    result = dict(sides)
    if "magnitude_out" in result:
        result["magnitude"] = result.pop("magnitude_out").reshape(-1)
    return result


def checked(update: Update, sides: Mapping[str, Tensor], where: str) -> Update:
    """Return the update, or raise InputRefused for a rank or scale so large that the file must be damaged or hostile."""
    rank = update.rank if isinstance(update, Factors) else 1
    alpha = sides["alpha"].float().item() if "alpha" in sides else rank
    if rank > MAX_RANK or alpha / rank > MAX_SCALE:
        raise InputRefused(f"{where}: rank {rank} with alpha {alpha:g} is far too large; the file is damaged")
    return update


def peft_configs(path: Path, metadata: Mapping[str, str], parts: Iterable[Part]) -> dict[str, dict[str, Any]]:
    """The peft config of each component, from the header. For a raw peft file, adapter_config.json beside it is under ""."""
    header = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    configs: dict[str, dict[str, Any]] = {}
    for key, value in header.items():
        configs.setdefault(key.split(".")[0], {})[key.partition(".")[2]] = value
    if any(part.name and not part.component for part in parts):
        config_path = path.parent / "adapter_config.json"
        if config_path.exists():
            configs[""] = json.loads(config_path.read_text())
        else:
            warn(f"{path}: no adapter_config.json beside it, so its scale is unknown; alpha = rank is assumed")
    return configs


def peft_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """The alpha of the module `name` by a peft config, whose patterns match the end of a name. `rank` is that of the tensor."""
    hits = (v for k, v in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", name))
    alpha = next(hits, config.get("lora_alpha")) or rank
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def with_first_encoder(lora: Lora, prefix: str) -> Lora:
    """The LoRA with the prefix of its first text encoder changed to `prefix`: SD1 files have either lora_te_ or lora_te1_.

    InputRefused where one has both.
    """
    renamed = {re.sub(r"^lora_te1?_", prefix, key): update for key, update in lora.modules.items()}
    if len(renamed) < len(lora.modules):
        raise InputRefused(f"{lora.source}: the first text encoder has modules under both lora_te_ and lora_te1_")
    return replace(lora, modules=renamed)


def from_peft(state: dict[str, Tensor], alpha: float | dict, prefix: str = "lora_unet_") -> dict[str, Factors]:
    """The LoRA modules by canonical name of the state dict that `peft.get_peft_model_state_dict(net)` returns.

    `alpha` is one number, or one for each dotted module name. ValueError where the adapter is no plain LoRA.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        part = read_peft(f"unet.{key}", {})
        if not part or part.side == "magnitude_out":
            raise ValueError(f"{key}: not a factor of a plain LoRA")
        own = float(alpha[part.name] if isinstance(alpha, dict) else alpha)
        modules.setdefault(canonical(prefix, part.name), {"alpha": torch.tensor(own)})[part.side] = tensor
    factors: dict[str, Factors] = {}
    for key, sides in modules.items():
        update = build(sides, key)
        assert isinstance(update, Factors), f"{key}: down and up make factors"
        factors[key] = update
    return factors


def balanced(factors: Factors, scale: float) -> tuple[Tensor, Tensor]:
    """The factors down and up of `scale` B A, with the largest value of each row of down near that of the column of up.

    Without this, a scale such as 1 / 64 would make `up` too small for fp16's normal range. Both change by powers of two alone,
    so that the product stays exact.
    """
    down, up = factors.down.flatten(1), factors.up.flatten(1) * scale  # (r, in kh kw), (out, r)
    power = ((up.abs().amax(0) / down.abs().amax(1)).log2() / 2).round()
    shift = torch.exp2(torch.where(power.isfinite(), power, 0.0))
    return (down * shift[:, None]).reshape(factors.down.shape), (up / shift).reshape(factors.up.shape)


def header(lora: Lora, title: str) -> dict[str, str]:
    """The header for a file: the LoRA's own entries, modelspec for user interfaces, sd-scripts' ss_ entries for the family."""
    recipe, ranks = lora.recipe, {update.rank for update in lora.modules.values() if isinstance(update, Factors)}
    dim, alpha = str(*ranks) if len(ranks) == 1 else "Dynamic", str(max(ranks))
    spec = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers", "modelspec.title": title}
    if family := lora.family:
        architecture = family.architecture if recipe.prediction_type == "epsilon" else family.architecture_v
        spec |= {"modelspec.architecture": f"{architecture}/lora", **family.lora_header}
    hints = {"{} steps": recipe.num_steps, "guidance {:g}": recipe.guidance, "scheduler {}": recipe.scheduler}
    if usage := [text.format(value) for text, value in hints.items() if value is not None]:
        spec["modelspec.usage_hint"] = ", ".join(usage)
    own = {k: v for k, v in lora.metadata.items() if k not in STALE}
    network = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha, "format": "pt"}
    return spec | own | network


def save(
    lora: Lora,
    path: Path,
    *,
    dtype: torch.dtype = torch.float16,
    format: Format = "kohya",
    extra_metadata: dict[str, str] | None = None,
) -> None:
    """Write a LoRA of low-rank modules to a file, or with peft's format to a folder.

    kohya is read by ComfyUI, Forge, A1111 and diffusers alike. diffusers has names as `unet.<dotted>.lora_A.weight` and scale 1.
    peft makes a folder for each component, for `PeftModel.from_pretrained`. InputRefused where a module is not low rank,
    ValueError where a value is not finite in `dtype`.
    """
    assert lora.modules, "a LoRA without modules"
    factors, path = lora.factors("written as a LoRA"), Path(path)
    metadata = {**header(lora, path.stem), **(extra_metadata or {})}
    if format == "peft":
        return save_peft(factors, path, dtype, metadata)
    # kohya: UNet layers have diffusers' names for SD1 and SD2 and LDM's for SDXL. Every module has the same alpha, the largest
    # rank of the file, and `up` is divided by alpha / r: diffusers applies the file's most frequent alpha to all attention
    # layers, so different alphas would be scaled wrongly there, even alpha = r where ranks differ.
    largest = float(max(module.rank for module in factors.values()))
    entries: list[Entry] = []
    ldm_names = lora.family is not None and lora.family.lora_names == "ldm"
    for key, module in factors.items():
        sides = balanced(module, module.rank / largest if format == "kohya" else 1.0)
        if format == "kohya":
            name = (
                f"lora_unet_{single_file.to_flat(key[10:], lora.layers)}" if ldm_names and key.startswith("lora_unet_") else key
            )
            entries.append(Entry(f"{name}.alpha", torch.float32, (), lambda: torch.tensor(largest)))
            suffixes = ("lora_down.weight", "lora_up.weight")
        else:
            name, suffixes = ".".join(split(key)), ("lora_A.weight", "lora_B.weight")
        entries += stored(key, name, suffixes, sides, dtype, path)
    tensors.write(path, entries, metadata)


def stored(
    key: str, name: str, suffixes: tuple[str, str], sides: tuple[Tensor, Tensor], dtype: torch.dtype, path: Path
) -> list[Entry]:
    """The two tensors of a module in `dtype`, ready to write; ValueError where one is not finite in it."""
    cast = {
        f"{name}.{suffix}": tensor.detach().to("cpu", dtype).contiguous() for suffix, tensor in zip(suffixes, sides, strict=True)
    }
    if not all(bool(tensor.isfinite().all()) for tensor in cast.values()):
        raise ValueError(f"{path}: {key} is not finite in {str(dtype).removeprefix('torch.')}")
    return tensors.entries(cast)


def save_peft(factors: Mapping[str, Factors], folder: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` in a folder for each component; UsageError for a file name."""
    if folder.suffix == ".safetensors" or folder.is_file():
        raise UsageError(f"{as_field('output', folder)}: peft's layout is a folder", "leave .safetensors out")
    parts: dict[str, dict[str, Factors]] = {}
    for key, module in factors.items():
        component, name = split(key)
        parts.setdefault(component, {})[name] = module
    for component, modules in parts.items():
        entries: list[Entry] = []
        for name, module in modules.items():
            suffixes = ("lora_A.weight", "lora_B.weight")
            entries += stored(name, f"base_model.model.{name}", suffixes, balanced(module, 1.0), dtype, folder)
        tensors.write(folder / component / "adapter_model.safetensors", entries, metadata)
        ranks = {name: module.rank for name, module in modules.items()}
        common = max(set(ranks.values()), key=list(ranks.values()).count)
        odd = {name: rank for name, rank in ranks.items() if rank != common}
        config = dict(
            peft_type="LORA", r=common, lora_alpha=common, target_modules=sorted(ranks), rank_pattern=odd, alpha_pattern=odd,
            bias="none", lora_dropout=0.0, inference_mode=True, use_rslora=False, use_dora=False, task_type=None,
        )  # fmt: skip
        (folder / component / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def summary(lora: Lora) -> dict[str, Any]:
    """The facts about a LoRA that `inspect` and results report: modules, family, kinds, ranks, keys left out."""
    family = lora.family and lora.family.name
    return {"modules": len(lora.modules), "family": family, **describe(lora.modules), "skipped": len(lora.skipped)}


def parse_spec(spec: str, default: float) -> tuple[Path, float]:
    """Split `FILE[=WEIGHT]` into path and weight; `default` is the weight of a FILE alone.

    Where the text after the last = is no number, it belongs to the path. UsageError for an infinite or NaN weight.
    """
    head, _, tail = spec.rpartition("=")
    try:
        strength = float(tail) if head else default
    except ValueError:
        head, strength = "", default
    if not math.isfinite(strength):
        raise UsageError(f"{spec}: the weight must be a finite number")
    return Path(head or spec).expanduser(), strength


Weighted = Mapping[Any, float] | Sequence[Any] | str | Path | Lora | None


def with_weights(loras: Weighted, default: float = 1.0) -> list[tuple[Path | Lora, float]]:
    """Turn any way of naming LoRAs into a list of (path or Lora, weight).

    Accepts {FILE: WEIGHT}, a list of FILE, FILE=WEIGHT or (FILE, WEIGHT), or one FILE. A `Lora` may replace any FILE. UsageError
    for a weight that is not finite.
    """
    if isinstance(loras, Mapping):
        pairs: list[Any] = list(loras.items())
    else:
        pairs = [loras] if isinstance(loras, str | Path | Lora) else list(loras or ())
    result: list[tuple[Path | Lora, float]] = []
    for pair in pairs:
        if isinstance(pair, str):
            result.append(parse_spec(pair, default))
            continue
        item, weight = (pair, default) if isinstance(pair, Path | Lora) else pair
        if not math.isfinite(weight):
            raise UsageError(
                f"{as_field('lora', item.source if isinstance(item, Lora) else item)}: the weight must be a finite number"
            )
        result.append((item if isinstance(item, Lora) else Path(item).expanduser(), float(weight)))
    return result


def opened(item: Path | Lora, **options: Any) -> Lora:
    """The LoRA itself, or the one that is read from a path; `options` go to `load`."""
    return item if isinstance(item, Lora) else load(item, **options)
