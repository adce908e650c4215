"""Subtract two checkpoints: extract the difference as a LoRA, or add it to a third checkpoint.

extract    Delta = tuned - base, its best rank R          the LoRA of a fully trained model (Eckart & Young 1936)
transfer   W = base + (tuned - reference)                 exact, in fp32, one cast
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, reopening, tensors, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora import apply, merging
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Dense, Factors, Update, low_rank_of
from fastdiff.options.merge_lora import Config
from fastdiff.runtime import console
from fastdiff.runtime.command import sample_command
from fastdiff.runtime.errors import InputRefused, Result, UsageError, as_field

DEFAULT_RANK = 64
UNCHANGED = 1e-7  # |difference| / |weight|: a layer with less was not trained


def opened(ref: str | None, config: Config) -> Checkpoint:
    """Open a checkpoint with the command's options for base models."""
    assert ref is not None, "the command checks that its checkpoints are given"
    refs = [other for other in (config.base, config.tuned, config.reference) if other]
    single = [other for other in refs if Path(other).expanduser().is_file()]  # the configs are for these, if there are any
    how: dict[str, Any] = dict(
        config=config.base_config if ref in (single or refs) else None,
        prediction=config.prediction_type,
        allow_pickle=config.allow_pickle,
    )
    return checkpoint.load(ref, **how, zero_snr=config.zero_snr and ref == config.base)


def same_kind(one: Checkpoint, other: Checkpoint) -> None:
    """Raise InputRefused if two checkpoints are of different families; warn if they predict different things.

    A one-step student predicts x0, whatever its base does, so nothing can be said of it.
    """
    if one.family != other.family:
        raise InputRefused(f"{other.ref} is {other.family}, {one.ref} is {one.family}: their weights cannot be subtracted")
    kinds = {one.prediction_type, other.prediction_type}
    if len(kinds) > 1 and "sample" not in kinds:
        what = (f"{item.ref} predicts {apply.NAMED[item.prediction_type]}" for item in (one, other))
        console.warn(f"{', but '.join(what)}: their difference is not what a training changed")


def pairs(one: Checkpoint, other: Checkpoint, part: str) -> tuple[Weights, Weights]:
    """The weights of component `part` in two checkpoints; InputRefused where any layer differs in shape."""
    a, b = one.weights(part), other.weights(part)
    differing = [name for name in a.shapes.keys() | b.shapes.keys() if a.shapes.get(name) != b.shapes.get(name)]
    if differing:
        raise InputRefused(f"{other.ref}: {part} differs from {one.ref} in shape: {', '.join(sorted(differing)[:3])}")
    return a, b


def extract(config: Config, output: Path) -> Result:
    """Write the difference between `config.tuned` and `config.base` as a LoRA of every linear and convolution layer that differs.

    Biases, norms and embeddings that differ cannot be part of a LoRA; they are counted in a warning. UsageError where nothing
    differs, InputRefused where the checkpoints do not match.
    """
    base, tuned = opened(config.base, config), opened(config.tuned, config)
    same_kind(base, tuned)
    prefixes = apply.prefixes(len(base.text_parts))
    rank = None if config.rank == "auto" else int(config.rank or DEFAULT_RANK)
    modules: dict[str, Update] = {}
    left_out: list[str] = []
    dtypes: set[torch.dtype] = set()  # of the layers that differ
    sums: dict[str, tuple[float, float]] = {}
    for part, prefix in prefixes.items():
        a, b = pairs(base, tuned, part)
        places = apply.places(a.shapes, prefix)
        with console.progress(len(places), f"extracting {part}") as bar:
            for key, place in places.items():
                bar.update(1)
                before = a[place.name].float()
                delta = b[place.name].float() - before
                if torch.linalg.vector_norm(delta) <= UNCHANGED * torch.linalg.vector_norm(before):
                    continue
                if delta.ndim < 2 or "embedding.weight" in place.name and part != "unet":
                    left_out.append(place.name)
                    continue
                modules[key], kept, whole = low_rank_of(Dense(delta), rank, config.energy)
                dtypes |= {a.dtypes[place.name], b.dtypes[place.name]}
                kept_so_far, whole_so_far = sums.get(part, (0.0, 0.0))
                sums[part] = (kept_so_far + kept, whole_so_far + whole)
    if not modules:
        tuned_field, base_field = as_field("tuned", config.tuned), as_field("base", config.base)
        raise UsageError(f"{tuned_field}: no layer differs from {base_field}; there is nothing to extract")
    if left_out:
        names = ", ".join(left_out[:3])
        console.warn(f"{len(left_out)} biases, norms and embeddings differ too and are no part of a LoRA: {names}")
    recipe = replace(config.recipe_from(tuned.recipe) or Recipe(), family=base.family.name)
    said = merging.said([(one.ref, one.header) for one in (base, tuned)])
    header = {**said, **recipe.to_metadata(), **lora.layers_told(base.unet_config)}
    made = Lora(modules, header, "the extracted LoRA", dtype=tensors.widest(dtypes))
    lora.save(made, output, dtype=tensors.WRITTEN[config.precision], format=config.format)
    ranks = [update.rank for update in modules.values() if isinstance(update, Factors)]
    metrics = {
        "modules": len(modules),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "energy": {part: kept / whole for part, (kept, whole) in sums.items()},
        "left_out": len(left_out),
    }
    return Result([output], metrics, sample_command({"base": base.ref, **base.opening, "lora": output}))


def transfer(config: Config, output: Path) -> Result:
    """Write a checkpoint with the weights `base` + (`tuned` - `reference`) of UNet and text encoders, computed tensor by tensor.

    InputRefused where the three checkpoints differ in family or in the shape of a layer.
    """
    base, tuned, reference = (opened(ref, config) for ref in (config.base, config.tuned, config.reference))
    same_kind(reference, tuned)
    same_kind(base, reference)
    changed: dict[str, Weights] = {}
    for part in ["unet", *base.text_parts]:
        a, b = pairs(reference, tuned, part)
        own, _ = pairs(base, reference, part)
        readers: dict[str, Callable[[], Tensor]] = {name: partial(moved, name, own, tuned=b, reference=a) for name in own}
        changed[part] = Weights(readers, own.shapes, own.dtypes)
    recipe = replace(config.recipe_from(tuned.recipe) or Recipe(), family=base.family.name)
    said = merging.with_hint(merging.said([(one.ref, one.header) for one in (base, tuned)]), recipe)
    how: dict[str, Any] = dict(changed=changed, dtype=tensors.WRITTEN[config.precision], recipe=recipe, said=said)
    if output.suffix == ".safetensors":
        outputs = write.to_file(base, output, **how)
    else:
        write.to_folder(base, output, **how)
        outputs = [output]
    metrics = {"parts": {part: len(weights) for part, weights in changed.items()}}
    return Result(outputs, metrics, sample_command({"base": output, **reopening.opening(base, output)}))


def moved(name: str, own: Weights, tuned: Weights, reference: Weights) -> Tensor:
    """One weight of the base plus the difference of the other two, in fp32."""
    return own[name].float() + (tuned[name].float() - reference[name].float())
