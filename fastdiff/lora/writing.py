"""Write LoRA files in the layouts that other programs read: kohya's, diffusers' and peft's."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints import single_file, tensors, words
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.tensors import Entry
from fastdiff.lora.file import Format, Lora
from fastdiff.lora.kinds import Factors
from fastdiff.lora.layouts import is_convolution, kernel_of, split
from fastdiff.lora.places import COMPONENTS
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import UsageError, as_field

# Header entries that describe the tensors of the file they were read from, so a new file must not copy them.
STALE = {"lora_adapter_metadata", "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "ss_network_args", "format"}
# transformers 5.6 dropped the level `text_model.` from CLIPTextModel, the class of the first text encoder; the second's keeps it.
FLAT_ENCODER = tuple(int(x) for x in version("transformers").split(".")[:2]) >= (5, 6)


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
    kind = lora.trained_for
    if family := lora.family:
        spec |= family.lora_header
        if kind or not family.predicts_either:  # SD2 has two architectures, and the header must not guess
            architecture = family.architecture_v if kind == "v_prediction" else family.architecture
            spec["modelspec.architecture"] = f"{architecture}/lora"
    if kind:
        spec["modelspec.prediction_type"] = "v" if kind == "v_prediction" else "epsilon"
    own = {k: v for k, v in lora.metadata.items() if k not in STALE}
    hints = dict.fromkeys(text for text in (usage_hint(recipe), *own.get(words.HINT, "").split("; ")) if text)
    network = {"ss_network_module": "networks.lora", "ss_network_dim": dim, "ss_network_alpha": alpha, "format": "pt"}
    return spec | own | network | ({words.HINT: "; ".join(hints)} if hints else {})


def usage_hint(recipe: Recipe) -> str:
    """What the header tells people about sampling, as "4 steps, guidance 1, scheduler lcm"; "" where there is no recipe."""
    hints = {"{} steps": recipe.num_steps, "guidance {:g}": recipe.guidance, "scheduler {}": recipe.scheduler}
    return ", ".join(text.format(value) for text, value in hints.items() if value is not None)


def save(
    lora: Lora,
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    format: Format = "kohya",
    extra_metadata: dict[str, str] | None = None,
) -> None:
    """Write a LoRA of low-rank modules to a file, or with peft's format to a folder.

    kohya is read by ComfyUI, Forge, A1111 and diffusers alike. diffusers has names as `unet.<dotted>.lora_A.weight` and scale 1;
    ComfyUI knows such names for other layers than attention alone, and skips these.
    peft makes a folder for each component, for `PeftModel.from_pretrained`. Without `dtype` the weights keep that of their file;
    those of no file become fp16. InputRefused where a module is not low rank, ValueError where a value is not finite in `dtype`.
    """
    assert lora.modules, "a LoRA without modules"
    path, dtype = Path(path), dtype or lora.dtype or torch.float16
    factors = {key: formed(key, module, lora.family) for key, module in lora.factors("written as a LoRA").items()}
    metadata = {**header(lora, path.stem), **(extra_metadata or {})}
    if format == "peft":
        return save_peft(factors, path, dtype, metadata)
    if format == "diffusers":
        info(f"{path}: ComfyUI skips the attention layers of a LoRA in this layout; kohya's loads there whole")
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


def formed(key: str, factors: Factors, family: Family | None) -> Factors:
    """The factors with as many axes as the weight of the layer `key`, as diffusers demands.

    Where the name does not tell which of the two the layer is, they stay as they are.
    """
    convolution, k = is_convolution(key, family.linear_projection if family else None), kernel_of(key)
    if convolution is True and len(factors.shape) == 2 and not factors.shape[1] % k**2:
        return factors.reshaped((factors.shape[0], factors.shape[1] // k**2, k, k))
    if convolution is False and len(factors.shape) == 4 and factors.shape[2:] == (1, 1):
        return factors.reshaped(factors.shape[:2])
    return factors


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
    """Write `adapter_model.safetensors` and `adapter_config.json` in a folder for each component; UsageError for a file name.

    peft finds layers by the names that they have in the network, so the first text encoder gets those of its class here.
    """
    if folder.suffix == ".safetensors" or folder.is_file():
        raise UsageError(f"{as_field('output', folder)}: peft's layout is a folder", "leave .safetensors out")
    parts: dict[str, dict[str, Factors]] = {}
    for key, module in factors.items():
        component, name = split(key)
        if component == "text_encoder" and FLAT_ENCODER:
            name = name.removeprefix("text_model.")
        parts.setdefault(component, {})[name] = module
    for component in COMPONENTS:
        if component not in parts:  # what an earlier LoRA left there is no part of this one
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (folder / component / name).unlink(missing_ok=True)
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
