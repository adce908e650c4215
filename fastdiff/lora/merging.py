"""LoRAs to one LoRA, exactly or to a rank, and into a checkpoint.

sum_i w_i B_i A_i = [B_1 .. B_n] [w_1 A_1; ..; w_n A_n]    of rank sum_i r_i, exact for any ranks and module sets
rank R: QR of both sides, SVD of the r x r core            the best approximation (Eckart & Young 1936)
ties, dare: on the products B A, never on the factors      Yadav et al. 2023; Yu et al. 2024
"""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora import apply
from fastdiff.lora.file import Lora, Weighted, opened, with_weights
from fastdiff.lora.kinds import Dense, Factors, Update, low_rank_of
from fastdiff.lora.layouts import split
from fastdiff.runtime.errors import InputRefused, as_field

Method = Literal["sum", "ties", "dare-ties", "dare-linear"]


def merge(
    loras: Weighted, *, rank: int | Literal["auto"] | None = None, energy: float = 0.95, allow_pickle: bool = False
) -> Lora:
    """Several LoRAs as one: {FILE or Lora: WEIGHT}, or a list of FILE or FILE=WEIGHT. The first one's recipe is kept.

    Exact, of the sum of the ranks, unless `rank` asks for the best approximation: a number, or auto for the smallest that keeps
    `energy` of sum sigma^2 in every module. InputRefused where families or shapes differ, or where an update has no low rank.
    """
    ready = [(opened(item, allow_pickle=allow_pickle), weight) for item, weight in with_weights(loras)]
    assert ready, "no LoRAs to merge"
    merged = concatenate(ready, approximate=rank is not None)
    return merged if rank is None else reduced(merged, str(rank), energy, {})[0]


def agreed(loras: list[tuple[Lora, float]]) -> tuple[str | None, list[tuple[Lora, float]]]:
    """The family as far as the LoRAs tell one, and the LoRAs with their first text encoder called alike."""
    told = {item.family: item.source for item, _ in reversed(loras) if item.family}
    if len(told) > 1:
        (one, first), (other, second), *_ = told.items()
        raise InputRefused(f"{second} is for {other}, {first} for {one}: LoRAs of different families cannot be merged")
    family = next(iter(told), None)
    return family, apply.encoders(loras, family.text_encoders if family else 1)


def joined(parts: list[tuple[Update, float]], method: Method, density: float) -> Update:
    """One module's updates as one: side by side where all are factors, else, and for ties and dare, their products."""
    if method == "sum" and all(isinstance(update, Factors) for update, _ in parts):
        down = torch.cat([strength * update.down for update, strength in parts], 0)  # type: ignore[attr-defined]
        return Factors(down, torch.cat([update.up for update, _ in parts], 1))  # type: ignore[attr-defined]
    deltas = [update.delta() for update, _ in parts]
    weights = torch.tensor([strength for _, strength in parts])
    if method == "sum" or len(parts) == 1:
        return Dense(sum(w * delta for w, delta in zip(weights, deltas, strict=True)))  # type: ignore[arg-type]
    from peft.utils import merge_utils

    how = {"ties": merge_utils.ties, "dare-ties": merge_utils.dare_ties, "dare-linear": merge_utils.dare_linear}
    return Dense(how[method](deltas, weights, density))


def concatenate(
    loras: list[tuple[Lora, float]], *, approximate: bool = False, method: Method = "sum", density: float = 0.5, seed: int = 0
) -> Lora:
    """The weighted sum as one LoRA, fp32; the first one's recipe is kept. Exact, of rank sum r_i, for LoRAs of factors.

    Families or shapes that differ raise InputRefused naming both files; so do updates that depend on the base's weight
    (DoRA, IA3, OFT), and unless it is `approximate` what is no product of factors (LoHa, LoKr, full differences).
    """
    family, loras = agreed(loras)
    for item, _ in loras:
        if not approximate and method == "sum":
            item.factors("merged into a LoRA")
        elif bad := [key for key, update in item.modules.items() if update.needs_weight or len(update.shape or ()) < 2]:
            raise InputRefused(f"{item.source}: {item.modules[bad[0]].kind} ({bad[0]}) has no low rank", "bake it with `base`")
    torch.manual_seed(seed)
    modules: dict[str, Update] = {}
    for key in dict.fromkeys(key for item, _ in loras for key in item.modules):
        parts = [(item, strength) for item, strength in loras if key in item.modules]
        shapes = {item.modules[key].shape: item.source for item, _ in parts}
        if len(shapes) > 1:
            (one, first), (other, second), *_ = shapes.items()
            raise InputRefused(f"{key} is {one} in {first} but {other} in {second}: they are for different bases")
        modules[key] = joined([(item.modules[key], strength) for item, strength in parts], method, density)
    recipe = replace(loras[0][0].recipe, family=family and family.name)
    merged_from = json.dumps([{"name": Path(item.source).name, "weight": strength} for item, strength in loras])
    told = {**recipe.to_metadata(), "fastdiff.merged_from": merged_from}
    if (layers := loras[0][0].layers) != 2:
        told["fastdiff.layers_per_block"] = str(layers)
    return Lora(modules, told, "the merged LoRA")


def reduced(item: Lora, rank: str | None, energy: float, full: dict[str, int]) -> tuple[Lora, dict[str, float]]:
    """The best LoRA of a rank (a number, or auto: what keeps `energy`; None: `full`, by module), and the energy kept.

    The energy is sum sigma^2 kept over the whole, by component.
    """
    modules: dict[str, Update] = {}
    sums: dict[str, tuple[float, float]] = {}
    for key, update in item.modules.items():
        asked = full.get(key) if rank is None else None if rank == "auto" else int(rank)
        modules[key], kept, whole = low_rank_of(update, asked, energy)
        before = sums.get(part := split(key)[0], (0.0, 0.0))
        sums[part] = (before[0] + kept, before[1] + whole)
    return replace(item, modules=modules), {part: kept / whole if whole else 1.0 for part, (kept, whole) in sums.items()}


def ranks_of(loras: list[tuple[Lora, float]]) -> dict[str, int]:
    """Sum of the ranks by module: what an exact concatenation would have."""
    found: dict[str, int] = {}
    for item, _ in loras:
        for key, update in item.modules.items():
            found[key] = found.get(key, 0) + (update.rank if isinstance(update, Factors) else 64)
    return found


def largest_error(stored: Lora, loras: Iterable[tuple[Lora, float]]) -> float:
    """max over modules of |stored - exact| / |exact|, Frobenius; exact is the fp32 sum of the deltas themselves."""
    worst, loras = 0.0, list(loras)
    for key, update in stored.modules.items():
        exact = sum(strength * item.modules[key].delta() for item, strength in loras if key in item.modules)
        norm = torch.linalg.vector_norm(exact).item()  # type: ignore[arg-type]
        off = torch.linalg.vector_norm(update.delta() - exact).item()
        worst = max(worst, off / norm if norm else off)
    return worst


def bake(
    base: Checkpoint | str,
    loras: Weighted,
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    allow_partial: bool = False,
    **how: Any,
) -> tuple[int, list[Path]]:
    """Write a checkpoint with LoRAs in it; returns the number of modules changed and what was written.

    Added in fp32, cast once, tensor by tensor. `loras` as in `merge`. `path`: NAME.safetensors, or a folder. `how` is
    `concatenate`'s, where the LoRAs are not simply added. InputRefused where they do not belong to the base.
    """
    base = checkpoint.load(base) if isinstance(base, str) else base
    ready = [(opened(item, allow_pickle=base.allow_pickle), weight) for item, weight in with_weights(loras)]
    family, ready = agreed(ready)
    if family and not base.family.has_name(family.name):
        message = f"{as_field('base', base.ref)} is {base.family}, but the LoRAs are for {family}"
        raise InputRefused(message, f"give a base of family {family}")
    prefixes = apply.prefixes(len(base.text_parts))
    ready = apply.encoders(ready, len(base.text_parts))
    shapes = {part: base.shapes(part) for part in prefixes}
    table = {key: place for part, prefix in prefixes.items() for key, place in apply.places(shapes[part], prefix).items()}
    fitted = apply.fit(ready, table, allow_partial=allow_partial, family=base.family)
    ready = [(item, strength) for item, (_, strength) in zip(fitted, ready, strict=True)]
    if how.get("method", "sum") != "sum":
        ready = [(concatenate(ready, **how), 1.0)]
    changed: dict[str, Weights] = {}
    count = 0
    for part, prefix in prefixes.items():
        changed[part], touched = apply.baked(base.weights(part, shapes[part]), prefix, ready)
        count += touched
    recipe = replace(ready[0][0].recipe, family=base.family.name)
    return count, write_checkpoint(base, Path(path).expanduser(), changed, dtype, recipe)


def write_checkpoint(base: Checkpoint, output: Path, changed: dict[str, Weights], dtype: torch.dtype, recipe: Any) -> list[Path]:
    if output.suffix == ".safetensors":
        return write.to_file(base, output, changed=changed, dtype=dtype, recipe=recipe)
    write.to_folder(base, output, changed=changed, dtype=dtype, recipe=recipe)
    return [output]
