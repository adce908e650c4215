"""Add LoRAs to a base model: match the modules of a LoRA with the layers of the base, and compute the new weights.

W' = W + sum_i s_i Delta_i(W)         every update acts on the base's own weight, so that the order does not matter
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import single_file
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora.file import Lora, with_first_encoder
from fastdiff.lora.kinds import Dense, Factors, Rescaled, Rotated, Update
from fastdiff.lora.layouts import canonical
from fastdiff.runtime.console import info, warn
from fastdiff.runtime.errors import InputRefused


class Place(NamedTuple):
    """A parameter of a network that an update can change."""

    name: str
    shape: tuple[int, ...]


def places(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, Place]:
    """The parameters of a network by canonical LoRA key, from a mapping of parameter name to shape.

    `prefix` is the component's, as lora_unet_. Names that peft has wrapped are understood.
    """
    result: dict[str, Place] = {}
    for name, shape in shapes.items():
        if ".lora_" in name:
            continue
        module, _, kind = name.replace(".base_layer", "").removeprefix("base_model.model.").rpartition(".")
        if not module or kind not in {"weight", "bias"}:
            continue
        key = canonical(prefix, module) + (".bias" if kind == "bias" else "")
        assert key not in result, f"{name} and {result[key].name} flatten to the same {key}"
        result[key] = Place(name, tuple(shape))
    return result


def fits(update: Update, shape: tuple[int, ...]) -> bool:
    """Whether the update is for a parameter of this shape.

    A 1 x 1 convolution counts as a linear layer, and a matrix (out, in kh kw) is an update of a convolution.
    """
    if update.shape is not None:
        matrix = (*shape[:1], torch.Size(shape[1:]).numel())
        return single_file.strip(update.shape) == single_file.strip(shape) or len(shape) == 4 and update.shape == matrix
    if isinstance(update, Rescaled):
        return len(shape) > 1 and update.vector.numel() == shape[1 if update.on_input else 0]
    assert isinstance(update, Rotated), f"{update.kind} has no shape"
    return update.blocks.shape[-3:-1].numel() == shape[0]


def is_zero(update: Update) -> bool:
    """Whether an update changes nothing whatever the weight, as those that ComfyUI saves for layers without a difference."""
    if isinstance(update, Factors):
        return not bool(update.up.any()) or not bool(update.down.any())
    return isinstance(update, Dense) and not bool(update.value.any())


def fit(
    loras: list[tuple[Lora, float]], table: Mapping[str, Place], *, allow_partial: bool = False, family: Family | None = None
) -> list[Lora]:
    """Check that every module of the LoRAs fits a parameter in `table` (from `places`), and return the LoRAs.

    Modules that change nothing need no layer: they are left out. InputRefused names the modules that do not fit. With
    `allow_partial` those are left out with a warning, and only a LoRA of which nothing fits is refused. `family` is the base's,
    for messages.
    """
    fitted = []
    for lora, _ in loras:
        idle = {key for key, update in lora.modules.items() if key not in table and is_zero(update)}
        if idle and len(idle) < len(lora.modules):
            info(f"{lora.source}: {len(idle)} modules without a layer here change nothing and are left out ({sorted(idle)[0]})")
            lora = replace(lora, modules={key: update for key, update in lora.modules.items() if key not in idle})
        wrong = [f"{key} (no such layer)" for key in lora.modules if key not in table]
        for key in lora.modules.keys() & table.keys():
            if not fits(lora.modules[key], table[key].shape):
                wrong.append(f"{key} ({lora.modules[key].shape or 'its update'}, the model has {table[key].shape})")
        bad = {text.split(" ")[0] for text in wrong}
        good = {key: update for key, update in lora.modules.items() if key not in bad}
        if wrong:
            fitting = f"only {len(good)} of {len(lora.modules)} modules fit this model"
            message = f"{lora.source}: {fitting}; not: {', '.join(sorted(wrong)[:3])}"
            if not good:
                known = lora.family and family and lora.family != family
                names = f"{lora.source} is for {lora.family}, the base is {family}" if known else lora.source
                raise InputRefused(
                    f"{names}: none of its {len(lora.modules)} modules fits ({sorted(wrong)[0]})", "it is for another base"
                )
            if not allow_partial:
                raise InputRefused(message, "it is for another base; `allow_partial=True` applies the rest")
            warn(message)
        fitted.append(replace(lora, modules=good, total=len(lora.modules)))
    return fitted


def updated(weight: Tensor, parts: list[tuple[Update, float]]) -> Tensor:
    """The new weight W + sum_i s_i Delta_i(W) in fp32, for `parts` of update Delta_i and strength s_i."""
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
    """The dotted name of every Linear and Conv2d by canonical key. A layer that peft has wrapped has the name of the wrapper."""
    result = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            outer = name.removesuffix(".base_layer")
            result[canonical(prefix, outer.removeprefix("base_model.model."))] = outer
    return result


@torch.no_grad()
def fold(model: nn.Module, loras: list[tuple[Lora, float]], prefix: str = "lora_unet_", *, allow_partial: bool = False) -> int:
    """Add the LoRAs to a network's weights in place and return the number of modules changed.

    Sums are in fp32 and cast once. Modules whose key lacks the `prefix` are for other components. InputRefused as in `fit`.
    """
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
    torch.clear_autocast_cache()  # it may hold casts of the old weights
    return changed


def encoders(loras: list[tuple[Lora, float]], count: int) -> list[tuple[Lora, float]]:
    """The LoRAs, with their first text encoder renamed to fit a base of `count` text encoders."""
    first = "lora_te1_" if count > 1 else "lora_te_"
    return [(with_first_encoder(lora, first), strength) for lora, strength in loras]


def prefixes(count: int) -> dict[str, str]:
    """The prefix of canonical keys for every component of a base with `count` text encoders."""
    table = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if count > 1 else "lora_te_"}
    return table | ({"text_encoder_2": "lora_te2_"} if count > 1 else {})


class Applied(NamedTuple):
    """The number of layers of a base that changed, and for each LoRA: file, weight, modules applied, modules in total."""

    changed: int
    coverage: list[dict[str, Any]]


NAMED = {"sample": "x0", "epsilon": "the noise (epsilon)", "v_prediction": "v"}  # what a network predicts, in sentences


def warn_of_prediction(base: Checkpoint, loras: Iterable[Lora]) -> None:
    """Warn of every LoRA whose header states that it was trained on a base of another type of prediction than this one.

    A one-step base that predicts x0 was distilled from either, so nothing can be said of LoRAs on it.
    """
    for item in loras:
        kind = item.trained_for
        if kind is None or base.prediction_type in {kind, "sample"}:
            continue
        theirs, ours = NAMED[kind], NAMED[base.prediction_type]
        guess = "" if base.states_prediction else f", as far as is known; if it predicts {theirs}, give `prediction_type={kind}`"
        warn(f"{item.source}: trained on a base that predicts {theirs}, but {base.ref} predicts {ours}{guess}")


def warn_of_mixture(loras: Iterable[Lora]) -> None:
    """Warn where the headers of LoRAs that are added to each other state bases of different types of prediction."""
    kinds = {item.trained_for: item.source for item in loras if item.trained_for}
    if len(kinds) > 1:
        (one, first), (other, second) = kinds.items()
        warn(f"{second} was trained on a base that predicts {NAMED[other]}, {first} on one that predicts {NAMED[one]}")


def apply(base: Checkpoint, loras: list[tuple[Lora, float]], *, allow_partial: bool = False) -> Applied:
    """Add the LoRAs to the `unet` and `text_encoders` of a checkpoint in place.

    InputRefused as in `fit`, and then no weight has changed.
    """
    if not loras:
        return Applied(0, [])
    warn_of_prediction(base, [lora for lora, _ in loras])
    nets: dict[str, nn.Module] = {"lora_unet_": base.unet}
    if any(key.startswith("lora_te") for lora, _ in loras for key in lora.modules):  # otherwise the encoders need not load
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
    """The weights of a component with the LoRAs added, each computed on access, and the number of modules that change."""
    table = places(weights.shapes, prefix)
    readers = dict(weights.readers)
    changed = 0
    for key, place in table.items():
        if parts := [(lora.modules[key], s) for lora, s in loras if key in lora.modules]:
            readers[place.name] = partial(read_updated, weights, place.name, parts)
            changed += 1
    return Weights(readers, weights.shapes, weights.dtypes), changed


def read_updated(weights: Weights, name: str, parts: list[tuple[Update, float]]) -> Tensor:
    """Read one weight and add the updates."""
    return updated(weights[name], parts)
