"""Two checkpoints subtracted: the LoRA between them, or one's acceleration added to a third.

extract    Delta = tuned - base, its best rank R          the LoRA of a fully trained model (Eckart & Young 1936)
transfer   W = base + (tuned - reference)                 exact, in fp32, one cast
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora import apply
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Dense, Factors, Update, low_rank_of
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, Result, UsageError, as_field

DEFAULT_RANK = 64
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
UNCHANGED = 1e-7  # relative: below it a layer was not trained


def opened(ref: str, config: Any) -> Checkpoint:
    return checkpoint.load(ref, config=config.base_config, prediction=config.prediction_type, allow_pickle=config.allow_pickle)


def same_kind(one: Checkpoint, other: Checkpoint) -> None:
    if one.family != other.family:
        raise InputRefused(f"{other.ref} is {other.family}, {one.ref} is {one.family}: their weights cannot be subtracted")


def pairs(one: Checkpoint, other: Checkpoint, part: str) -> tuple[Weights, Weights]:
    """The same component of two checkpoints, layer by layer alike."""
    a, b = one.weights(part), other.weights(part)
    odd = [name for name in a.shapes.keys() | b.shapes.keys() if a.shapes.get(name) != b.shapes.get(name)]
    if odd:
        raise InputRefused(f"{other.ref}: {part} differs from {one.ref} in shape: {', '.join(sorted(odd)[:3])}")
    return a, b


def extract(config: Any, output: Path) -> Result:
    """LoRA of every linear and convolution layer that differs; biases and norms have no low rank and are reported."""
    base, tuned = opened(config.base, config), opened(config.tuned, config)
    same_kind(base, tuned)
    prefixes = apply.prefixes(len(base.text_parts))
    rank = None if config.rank == "auto" else int(config.rank or DEFAULT_RANK)
    modules: dict[str, Update] = {}
    left: list[str] = []
    sums: dict[str, list[float]] = {}
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
                    left.append(place.name)
                    continue
                modules[key], kept, whole = low_rank_of(Dense(delta), rank, config.energy)
                mine = sums.setdefault(part, [0.0, 0.0])
                sums[part] = [mine[0] + kept, mine[1] + whole]
    if not modules:
        names = as_field("tuned", config.tuned), as_field("base", config.base)
        raise UsageError(f"{names[0]}: no layer differs from {names[1]}; there is nothing to extract")
    if left:
        console.warn(f"{len(left)} biases, norms and embeddings differ too and are no part of a LoRA: {', '.join(left[:3])}")
    recipe = replace(tuned.recipe, family=base.family)
    made = Lora(modules, {**recipe.to_metadata(), **lora.layers_told(base.unet_config)}, "the extracted LoRA")
    lora.save(made, output, dtype=DTYPES[config.precision], format=config.format)
    ranks = [update.rank for update in modules.values() if isinstance(update, Factors)]
    metrics = {
        "modules": len(modules),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "energy": {part: kept / whole for part, (kept, whole) in sums.items()},
        "left_out": len(left),
    }
    return Result(
        [output],
        metrics,
        f'fastdiff sample --base {shlex.quote(config.base)} --lora {shlex.quote(str(output))} --prompt "a red apple"',
    )


def transfer(config: Any, output: Path) -> Result:
    """`base` + (`tuned` - `reference`), UNet and text encoders, tensor by tensor."""
    base, tuned, reference = (opened(ref, config) for ref in (config.base, config.tuned, config.reference))
    same_kind(reference, tuned)
    same_kind(base, reference)
    changed: dict[str, Weights] = {}
    for part in ["unet", *base.text_parts]:
        a, b = pairs(reference, tuned, part)
        own, _ = pairs(base, reference, part)
        readers = {name: lambda name=name, a=a, b=b, own=own: moved(own[name], b[name], a[name]) for name in own}
        changed[part] = Weights(readers, own.shapes, own.dtypes)
    recipe, dtype = replace(tuned.recipe, family=base.family), DTYPES[config.precision]
    if output.suffix == ".safetensors":
        outputs = write.to_file(base, output, changed=changed, dtype=dtype, recipe=recipe)
    else:
        write.to_folder(base, output, changed=changed, dtype=dtype, recipe=recipe)
        outputs = [output]
    metrics = {"parts": {part: len(weights) for part, weights in changed.items()}}
    return Result(outputs, metrics, f'fastdiff sample --base {shlex.quote(str(output))} --prompt "a red apple"')


def moved(own: Tensor, tuned: Tensor, reference: Tensor) -> Tensor:
    return own.float() + (tuned.float() - reference.float())
