"""LoRAs onto a base: which module goes where, whether all fit, and the new weights.

W' = W + sum_i s_i Delta_i(W)         every update acts on the base's own weight, so that the order does not matter
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import single_file
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora.file import Lora, with_first_encoder
from fastdiff.lora.kinds import Factors, Update
from fastdiff.lora.layouts import canonical
from fastdiff.runtime.console import info, warn
from fastdiff.runtime.errors import InputRefused


class Place(NamedTuple):
    """A parameter that an update can act on."""

    name: str
    shape: tuple[int, ...]


def places(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Place]:
    """Canonical key -> parameter, of a network given as parameter name -> shape; peft's wrappers are seen through."""
    found: dict[str, Place] = {}
    for name, shape in shapes.items():
        if ".lora_" in name:
            continue
        module, _, kind = name.replace(".base_layer", "").removeprefix("base_model.model.").rpartition(".")
        if not module or kind not in {"weight", "bias"}:
            continue
        key = canonical(prefix, module) + (".bias" if kind == "bias" else "")
        assert key not in found, f"{name} and {found[key].name} flatten to the same {key}"
        found[key] = Place(name, tuple(shape))
    return found


def fits(update: Update, shape: tuple[int, ...]) -> bool:
    """Whether the update is for a parameter of that shape; a 1 x 1 convolution is a linear layer."""
    if update.shape is not None:
        return single_file.strip(update.shape) == single_file.strip(shape)
    if update.kind == "ia3":
        return len(shape) > 1 and update.vector.numel() == shape[1 if update.on_input else 0]  # type: ignore[attr-defined]
    return update.blocks.shape[-3:-1].numel() == shape[0]  # type: ignore[attr-defined]


def fit(
    loras: list[tuple[Lora, float]], table: Mapping[str, Place], *, allow_partial: bool = False, family: str = ""
) -> list[Lora]:
    """The LoRAs, each with the modules that have a place in the table.

    All have one, or InputRefused names those that have not; with `allow_partial` they are left out with a warning. None at
    all is an error in any case, which names both families.
    """
    found = []
    for lora, _ in loras:
        wrong = [f"{key} (no such layer)" for key in lora.modules if key not in table]
        for key in lora.modules.keys() & table.keys():
            if not fits(lora.modules[key], table[key].shape):
                wrong.append(f"{key} ({lora.modules[key].shape or 'its update'}, the model has {table[key].shape})")
        bad = {text.split(" ")[0] for text in wrong}
        good = {key: update for key, update in lora.modules.items() if key not in bad}
        if wrong:
            fitting = f"only {len(good)} of {len(lora.modules)} modules fit this model"
            told = f"{lora.source}: {fitting}; not: {', '.join(sorted(wrong)[:3])}"
            if not good:
                names = f"{lora.source} is for {lora.family or 'another family'}, the base is {family or 'another model'}"
                raise InputRefused(
                    f"{names}: none of its {len(lora.modules)} modules fits ({sorted(wrong)[0]})", "it is for another base"
                )
            if not allow_partial:
                raise InputRefused(told, "it is for another base; `allow_partial=True` applies the rest")
            warn(told)
        found.append(replace(lora, modules=good, total=len(lora.modules)))
    return found


def updated(weight: Tensor, parts: list[tuple[Update, float]]) -> Tensor:
    """W + sum_i s_i Delta_i(W) in fp32."""
    base = total = weight.float()
    for update, strength in parts:
        if isinstance(update, Factors):  # the product and the sum in one pass over memory
            up, down = update.up.flatten(1).to(weight.device), update.down.flatten(1).to(weight.device)
            total = torch.addmm(total.flatten(1), up, down, alpha=strength).reshape(weight.shape)
        else:
            moved = update.delta(base.cpu() if update.needs_weight else None).reshape(weight.shape)
            total = total + strength * moved.to(weight.device)
    return total


def names(model: nn.Module, prefix: str = "lora_unet_") -> dict[str, str]:
    """Canonical key -> dotted name of every Linear and Conv2d; one wrapped by peft goes by its outer name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            outer = name.removesuffix(".base_layer")
            found[canonical(prefix, outer.removeprefix("base_model.model."))] = outer
    return found


@torch.no_grad()
def fold(model: nn.Module, loras: list[tuple[Lora, float]], prefix: str = "lora_unet_", *, allow_partial: bool = False) -> int:
    """Change a network's own weights, summed in fp32, cast once; returns the number of modules changed."""
    own = [(replace(lora, modules={k: v for k, v in lora.modules.items() if k.startswith(prefix)}), s) for lora, s in loras]
    own = [(lora, s) for lora, s in own if lora.modules]
    parameters = dict(model.named_parameters())
    table = places({name: tuple(p.shape) for name, p in parameters.items()}, prefix)
    fitted = fit(own, table, allow_partial=allow_partial)
    changed = 0
    for key, place in table.items():
        parts = [(lora.modules[key], s) for lora, (_, s) in zip(fitted, own, strict=True) if key in lora.modules]
        if parts:
            parameters[place.name].copy_(updated(parameters[place.name], parts))
            changed += 1
    return changed


def encoders(loras: list[tuple[Lora, float]], count: int) -> list[tuple[Lora, float]]:
    """The LoRAs with their first text encoder called as a base of `count` encoders calls it."""
    first = "lora_te1_" if count > 1 else "lora_te_"
    return [(with_first_encoder(lora, first), strength) for lora, strength in loras]


def prefixes(count: int) -> dict[str, str]:
    """Component -> prefix for a base of `count` text encoders."""
    found = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if count > 1 else "lora_te_"}
    return found | ({"text_encoder_2": "lora_te2_"} if count > 1 else {})


class Applied(NamedTuple):
    """How many layers of a base changed, and each LoRA's share: file, weight, applied, total."""

    changed: int
    coverage: list[dict[str, Any]]


def apply(base: Checkpoint, loras: list[tuple[Lora, float]], *, allow_partial: bool = False) -> Applied:
    """Change the `unet` and `text_encoders` of a checkpoint; all modules find their place, or none is touched."""
    if not loras:
        return Applied(0, [])
    nets: dict[str, nn.Module] = {"lora_unet_": base.unet}
    if any(key.startswith("lora_te") for lora, _ in loras for key in lora.modules):  # else they need not be read
        loras = encoders(loras, len(base.text_encoders))
        texts = list(prefixes(len(base.text_encoders)).values())[1:]
        nets |= dict(zip(texts, base.text_encoders, strict=True))
    table: dict[str, Place] = {}
    for prefix, net in nets.items():
        table |= places({name: tuple(p.shape) for name, p in net.named_parameters()}, prefix)
    fitted = fit(loras, table, allow_partial=allow_partial, family=base.family)
    for lora in fitted:
        info(f"{lora.source}: {len(lora.modules)} of {lora.total} modules applied")
    ready = [(lora, strength) for lora, (_, strength) in zip(fitted, loras, strict=True)]
    return Applied(
        sum(fold(net, ready, prefix) for prefix, net in nets.items()),
        [
            {"file": lora.source, "weight": strength, "applied": len(lora.modules), "total": lora.total}
            for lora, strength in ready
        ],
    )


def baked(weights: Weights, prefix: str, loras: list[tuple[Lora, float]]) -> tuple[Weights, int]:
    """A component's weights with the LoRAs in them, each made when it is asked for, and how many modules change."""
    table = places(weights.shapes, prefix)
    readers = dict(weights.readers)
    changed = 0
    for key, place in table.items():
        if parts := [(lora.modules[key], s) for lora, s in loras if key in lora.modules]:
            readers[place.name] = lambda name=place.name, parts=parts: updated(weights[name], parts)
            changed += 1
    return Weights(readers, weights.shapes, weights.dtypes), changed
