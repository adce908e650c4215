"""Merge LoRAs into one LoRA, exactly or at a chosen rank, or into a checkpoint.

sum_i w_i B_i A_i = [B_1 .. B_n] [w_1 A_1; ..; w_n A_n]    of rank sum_i r_i, exact for any ranks and module sets
rank R: QR of both sides, SVD of the r x r core            the best approximation (Eckart & Young 1936)
ties, dare: on the products B A, never on the factors      Yadav et al. 2023; Yu et al. 2024
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastdiff.checkpoints import checkpoint, published, single_file, tensors, words, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Weights
from fastdiff.lora import apply
from fastdiff.lora.file import Lora, Weighted, load, opened, with_weights
from fastdiff.lora.kinds import Dense, Factors, Update, low_rank_of
from fastdiff.lora.layouts import split
from fastdiff.lora.writing import usage_hint
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, as_field
from fastdiff.runtime.secrets import hidden, hidden_in

NOTICEABLE = 1e-6  # relative error of a stored layer; fp32 stays below, fp16 costs 3e-4, bf16 2e-3
Method = Literal["sum", "ties", "dare-ties", "dare-linear"]


def merge(
    loras: Weighted,
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float = 0.95,
    recipe: str | Recipe | None = None,
    allow_pickle: bool = False,
) -> Lora:
    """Merge several LoRAs, {FILE or Lora: WEIGHT} or a list of FILE or FILE=WEIGHT, into one.

    It has the `recipe` given, or named as in checkpoints/published.py; None: that of the first LoRA that has one. The result is
    exact, and its rank is the sum of the ranks. With `rank` it is the best approximation of that rank; "auto" is the smallest
    rank that keeps the share `energy` of the sum of squared singular values in every module. InputRefused where families or
    shapes differ, or where an update has no low rank.
    """
    given = published.asked(recipe)
    how = dict(allow_pickle=allow_pickle, recognise=given is None)
    ready = [(opened(item, **how), weight) for item, weight in with_weights(loras)]
    assert ready, "no LoRAs to merge"
    merged = concatenate(ready, approximate=rank is not None, recipe=given)
    return merged if rank is None else reduced(merged, str(rank), energy, {})[0]


def recipe_of(loras: Sequence[tuple[Lora, float]], base: Checkpoint | None = None) -> Recipe:
    """The recipe of the first LoRA that has one, else of the base. A warning names other LoRAs that have one too."""
    having = [item for item, _ in loras if item.recipe.scheduler]
    skip = clip_skip_of(loras, base)
    if not having:
        return replace(base.recipe if base else loras[0][0].recipe, clip_skip=skip)
    first, *others = having
    if base and base.recipe.few_steps and base.recipe.method != first.recipe.method:
        settings = published.settings_text(base.recipe)
        console.warn(f"{base.ref}: a few-step checkpoint, whose recipe ({settings}) gives way to that of {first.source}")
    for other in others:
        settings = published.settings_text(other.recipe)
        console.warn(f"{other.source}: has a recipe of its own ({settings}); that of {first.source} is used")
    return replace(first.recipe, clip_skip=skip)


def clip_skip_of(loras: Sequence[tuple[Lora, float]], base: Checkpoint | None = None) -> int | None:
    """The clip skip of the first LoRA that says one, else of the base. A warning names other LoRAs that say another."""
    saying = [(item.source, item.recipe.clip_skip) for item, _ in loras if item.recipe.clip_skip is not None]
    if not saying:
        return base.stated_clip_skip if base else None
    source, skip = saying[0]
    for other, own in saying[1:]:
        if own != skip:
            console.warn(f"{other}: was trained with clip skip {own}; that of {source}, {skip}, is used")
    return skip


def inherited(loras: Sequence[tuple[Lora, float]], base: Checkpoint | None = None) -> dict[str, str]:
    """The header entries for people that a merge of the LoRAs, and of the base that they are added to, keeps."""
    headers = [(base.ref, base.header)] if base else []
    return said([*headers, *((item.source, item.metadata) for item, _ in loras)])


def said(headers: Iterable[tuple[str, dict[str, str]]]) -> dict[str, str]:
    """The entries for people of several headers, each given with its file, without the hints about their own recipes.

    Access tokens in them are left out.
    """
    parents: list[tuple[str, dict[str, str]]] = []
    for source, header in headers:
        old = usage_hint(Recipe.from_metadata(header))  # the result's header gets the hint of its own recipe
        kept = "; ".join(hint for hint in header.get(words.HINT, "").split("; ") if hint != old)
        parents.append((Path(source).name, {**header, words.HINT: kept}))
    return hidden_in(words.joined(parents))


def with_hint(entries: dict[str, str], recipe: Recipe) -> dict[str, str]:
    """The entries for people, whose hint begins with what a recipe says."""
    hint = "; ".join(filter(None, (usage_hint(recipe), entries.get(words.HINT))))
    return {**entries, words.HINT: hint} if hint else entries


def agreed(loras: list[tuple[Lora, float]]) -> tuple[Family | None, list[tuple[Lora, float]]]:
    """The common family of the LoRAs, if any of them states one, and the LoRAs with equal names for the first text encoder.

    InputRefused where they are for different families.
    """
    sources = {item.family: item.source for item, _ in reversed(loras) if item.family}
    if len(sources) > 1:
        (one, first), (other, second), *_ = sources.items()
        raise InputRefused(f"{second} is for {other}, {first} for {one}: LoRAs of different families cannot be merged")
    family = next(iter(sources), None)
    return family, apply.encoders(loras, family.text_encoders if family else 1)


def check_family(loras: list[tuple[Lora, float]], base: Checkpoint) -> None:
    """Raise InputRefused where the LoRAs are for different families, or for another one than the base."""
    family, _ = agreed(loras)
    if family and not base.family.has_name(family.name):
        message = f"{as_field('base', base.ref)} is {base.family}, but the LoRAs are for {family}"
        raise InputRefused(message, f"give a base of family {family}")


def joined(parts: list[tuple[Update, float]], method: Method, density: float) -> Update:
    """Merge the updates of one module, given with their strengths; a 1 x 1 convolution goes with a linear layer.

    A sum of low-rank factors stays low rank: the factors are concatenated. In all other cases the full differences are merged.
    """
    shape = max((update.shape or () for update, _ in parts), key=len)
    parts = [(update if update.shape == shape else update.reshaped(shape), strength) for update, strength in parts]
    factors = [(update, strength) for update, strength in parts if isinstance(update, Factors)]
    if method == "sum" and len(factors) == len(parts):
        down = torch.cat([strength * update.down for update, strength in factors], 0)
        return Factors(down, torch.cat([update.up for update, _ in factors], 1))
    deltas = [update.delta() for update, _ in parts]
    weights = torch.tensor([strength for _, strength in parts])
    if method == "sum" or len(parts) == 1:
        return Dense(sum((w * delta for w, delta in zip(weights, deltas, strict=True)), torch.zeros(())))
    from peft.utils import merge_utils

    merges = {"ties": merge_utils.ties, "dare-ties": merge_utils.dare_ties, "dare-linear": merge_utils.dare_linear}
    return Dense(merges[method](deltas, weights, density))


def concatenate(loras: list[tuple[Lora, float]], *, recipe: Recipe | None = None, **how: Any) -> Lora:
    """The weighted sum of the LoRAs as one LoRA, as `combined` makes it, with its header.

    The header has `recipe`, or that of the first LoRA that has one, and keeps what the LoRAs' headers say to people.
    """
    made = combined(loras, **how)
    family, _ = agreed(loras)
    kinds = [item.trained_for for item, _ in loras if item.trained_for]
    if recipe:
        published.warn_of_family(recipe, family.name if family else None)
    recipe = replace(recipe or recipe_of(loras), family=family.name if family else None)
    if recipe.prediction_type is None and kinds:
        recipe = replace(recipe, prediction_type=kinds[0])
    merged_from = json.dumps([{"name": hidden(Path(item.source).name), "weight": strength} for item, strength in loras])
    made.metadata |= {**inherited(loras), **recipe.to_metadata(), "fastdiff.merged_from": merged_from}
    return made


def combined(
    loras: list[tuple[Lora, float]], *, approximate: bool = False, method: Method = "sum", density: float = 0.5, seed: int = 0
) -> Lora:
    """The weighted sum of the LoRAs as one LoRA in fp32, to be written in the widest dtype of their files.

    For low-rank LoRAs it is exact and its rank is the sum of the ranks. InputRefused names both files where families or shapes
    differ. It also refuses updates that depend on the base's weight (DoRA, IA3, OFT, GLoRA). A sum that is not `approximate`
    refuses all that is no product of factors too (LoHa, LoKr, full differences). `density`, the share of values that TIES and
    DARE keep, and `seed` are for those methods.
    """
    _, loras = agreed(loras)
    for item, _ in loras:
        if not approximate and method == "sum":
            item.factors("merged into a LoRA")
        elif bad := [key for key, update in item.modules.items() if update.needs_weight or len(update.shape or ()) < 2]:
            raise InputRefused(f"{item.source}: {item.modules[bad[0]].kind} ({bad[0]}) has no low rank", "bake it with `base`")
    apply.warn_of_mixture(item for item, _ in loras)
    torch.manual_seed(seed)
    modules: dict[str, Update] = {}
    for key in dict.fromkeys(key for item, _ in loras for key in item.modules):
        parts = [(item, strength) for item, strength in loras if key in item.modules]
        shapes = {single_file.strip(item.modules[key].shape or ()): item.source for item, _ in parts}
        if len(shapes) > 1:
            (one, first), (other, second), *_ = shapes.items()
            raise InputRefused(f"{key} is {one} in {first} but {other} in {second}: they are for different bases")
        modules[key] = joined([(item.modules[key], strength) for item, strength in parts], method, density)
    layers = loras[0][0].layers
    metadata = {} if layers == 2 else {"fastdiff.layers_per_block": str(layers)}
    return Lora(modules, metadata, "the merged LoRA", dtype=tensors.widest(item.dtype for item, _ in loras if item.dtype))


def reduced(item: Lora, rank: str | None, energy: float, full: dict[str, int]) -> tuple[Lora, dict[str, float]]:
    """The best approximation of a LoRA at a lower rank, and the share of energy that it keeps, by component.

    `rank` is a number, or "auto" for the smallest that keeps `energy`, or None for the module's own in `full`. The energy is the
    sum of squared singular values (Eckart & Young 1936).
    """
    modules: dict[str, Update] = {}
    sums: dict[str, tuple[float, float]] = {}
    for key, update in item.modules.items():
        target = full.get(key) if rank is None else None if rank == "auto" else int(rank)
        modules[key], kept, whole = low_rank_of(update, target, energy)
        kept_so_far, whole_so_far = sums.get(part := split(key)[0], (0.0, 0.0))
        sums[part] = (kept_so_far + kept, whole_so_far + whole)
    return replace(item, modules=modules), {part: kept / whole if whole else 1.0 for part, (kept, whole) in sums.items()}


def ranks_of(loras: list[tuple[Lora, float]]) -> dict[str, int]:
    """The rank of each module in an exact merge: the sum of the ranks, where an update without a rank counts as 64."""
    ranks: dict[str, int] = {}
    for item, _ in loras:
        for key, update in item.modules.items():
            ranks[key] = ranks.get(key, 0) + (update.rank if isinstance(update, Factors) else 64)
    return ranks


def largest_error(stored: Lora, loras: Iterable[tuple[Lora, float]]) -> float:
    """The largest relative error |stored - exact| / |exact| of any module, in the Frobenius norm.

    exact is the fp32 sum of the updates in `loras`, weighted.
    """
    worst, loras = 0.0, list(loras)
    for key, update in stored.modules.items():
        made = update.delta()
        deltas = (strength * item.modules[key].delta().reshape(made.shape) for item, strength in loras if key in item.modules)
        exact = sum(deltas, torch.zeros(()))
        norm = torch.linalg.vector_norm(exact).item()
        error = torch.linalg.vector_norm(made - exact).item()
        worst = max(worst, error / norm if norm else error)
    return worst


def rounding(made: Lora, path: Path, exact: list[tuple[Lora, float]] | None = None) -> float:
    """The largest relative error of any module of the file or folder that was written from `made`, as in `largest_error`.

    It is measured against the sum of `exact`, or against `made`.
    A line tells of one that matters, which storing in fp32 would avoid.
    """
    error = largest_error(load(path, layers=made.layers, recognise=False), exact or [(made, 1.0)])
    if error > NOTICEABLE:
        console.info(
            f"{path}: rounding to its precision changes a layer by up to {error:.1e} (relative); `precision=fp32` does not"
        )
    return error


def bake(
    base: Checkpoint | str,
    loras: Weighted,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    recipe: str | Recipe | None = None,
    allow_partial: bool = False,
    **options: Any,
) -> tuple[int, list[Path]]:
    """Write a checkpoint of `base` with LoRAs added; returns the number of modules changed and the paths written.

    `loras` are as in `merge`, `path` is NAME.safetensors or a folder. Weights are added in fp32, tensor by tensor, and cast once:
    to `dtype`, or to the dtype that the base has them in. `recipe` is as in `merge`; the base's may be the first that
    is known. `options` go to `combined`, for methods other than the sum. InputRefused where a LoRA does not fit the base;
    `allow_partial` leaves out the modules that do not.
    """
    base = checkpoint.load(base) if isinstance(base, str) else base
    asked = published.asked(recipe)
    how: dict[str, Any] = dict(allow_pickle=base.allow_pickle, recognise=asked is None)
    ready = [(opened(item, **how), weight) for item, weight in with_weights(loras)]
    check_family(ready, base)
    apply.warn_of_prediction(base, [item for item, _ in ready])
    given, (_, ready) = ready, agreed(ready)
    prefixes = apply.prefixes(len(base.text_parts))
    ready = apply.encoders(ready, len(base.text_parts))
    shapes = {part: base.shapes(part) for part in prefixes}
    table = {key: place for part, prefix in prefixes.items() for key, place in apply.places(shapes[part], prefix).items()}
    fitted = apply.fit(ready, table, allow_partial=allow_partial, family=base.family)
    ready = [(item, strength) for item, (_, strength) in zip(fitted, ready, strict=True)]
    if options.get("method", "sum") != "sum":
        ready = [(combined(ready, **options), 1.0)]
    changed: dict[str, Weights] = {}
    count = 0
    for part, prefix in prefixes.items():
        changed[part], touched = apply.baked(base.weights(part, shapes[part]), prefix, ready)
        count += touched
    if asked:
        published.warn_of_family(asked, base.family.name)
    kept = replace(asked or recipe_of(given, base), family=base.family.name)
    if kept.clip_skip is None:
        kept = replace(kept, clip_skip=clip_skip_of(given, base))
    how = dict(changed=changed, dtype=dtype, recipe=kept, said=with_hint(inherited(given, base), kept))
    path = Path(path).expanduser()
    if path.suffix == ".safetensors":
        return count, write.to_file(base, path, **how)
    write.to_folder(base, path, **how)
    return count, [path]
