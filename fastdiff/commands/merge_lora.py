"""The `merge-lora` command: merges LoRAs into one LoRA or into a checkpoint, or extracts a LoRA from two checkpoints."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints import references, reopening, single_file, tensors
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.published import AUTO
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.commands import compare
from fastdiff.lora import apply, difference, merging
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Dense, Factors, Update
from fastdiff.models.remap import remapped
from fastdiff.options.merge_lora import EXAMPLES, Config
from fastdiff.runtime import console, outputs
from fastdiff.runtime.command import Runnable, sample_command
from fastdiff.runtime.errors import InputRefused, Result, UsageError

ACCEL_WEIGHT, STYLE_WEIGHT = 1.0, 0.8  # a few-step LoRA was distilled at 1; a style beside it is too strong at 1
BLOCKS = {  # length of the list -> its blocks in order, as the LoRA block weight extension defines them
    17: ["BASE", *(f"IN{i:02}" for i in (1, 2, 4, 5, 7, 8)), "M00", *(f"OUT{i:02}" for i in range(3, 12))],
    26: ["BASE", *(f"IN{i:02}" for i in range(12)), "M00", *(f"OUT{i:02}" for i in range(12))],
    12: ["BASE", *(f"IN{i:02}" for i in (4, 5, 7, 8)), "M00", *(f"OUT{i:02}" for i in range(6))],
    20: ["BASE", *(f"IN{i:02}" for i in range(9)), "M00", *(f"OUT{i:02}" for i in range(9))],
}


def block_of(key: str, layers: int = 2) -> str:
    """The LDM block of a module, as IN04, M00 or OUT11; BASE for text encoders and layers outside the blocks."""
    flat = single_file.to_flat(key.removeprefix("lora_unet_"), layers) if key.startswith("lora_unet_") else ""
    match = re.match(r"(input|middle|output)_blocks?_(\d+)", flat)
    if not match:
        return "BASE"
    return "M00" if match[1] == "middle" else f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"


def weighted(item: Lora, text: str | None) -> Lora:
    """The LoRA with every module scaled by the number of its block. Blocks that the list does not name keep 1.

    UsageError where the list has an unknown length; InputRefused where a module's kind cannot be scaled.
    """
    if text is None:
        return item
    try:
        numbers = [float(x) for x in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in BLOCKS:
        raise UsageError(f"--block-weights {text}: needs 12 or 20 (SDXL), 17 or 26 (SD1, SD2) numbers separated by commas")
    table = dict(zip(BLOCKS[len(numbers)], numbers, strict=True))
    scaled: dict[str, Update] = {}
    for key, update in item.modules.items():
        strength = table.get(block_of(key, item.layers), 1.0)
        if strength == 1:
            scaled[key] = update
        elif isinstance(update, Factors):
            scaled[key] = update.scaled(strength)
        elif isinstance(update, Dense):
            scaled[key] = Dense(strength * update.value, update.kind)
        else:
            raise InputRefused(f"{item.source}: a {update.kind} module ({key}) cannot be scaled by --block-weights")
    return replace(item, modules=scaled)


def destination(config: Config, loras: list[Path]) -> Path:
    """The path to write to. UsageError where it is misnamed, cannot be written, or would overwrite an input."""
    bakes = bool(config.base) and not config.extract
    plain = "" if bakes or config.format == "peft" else ".safetensors"
    named = [lora.called(p) for p in loras] or [references.called(ref) for ref in (config.base, config.tuned) if ref]
    if len(loras) == 1 and not (config.base or config.remap):  # its own name is taken
        named.append(config.recipe if config.recipe != AUTO else config.format if config.format != "kohya" else "changed")
    path = Path(config.output or "-".join(named) + plain)
    if plain and path.suffix != ".safetensors":
        raise UsageError(f"--output {path}: a LoRA file must end in .safetensors", f"use --output {path}.safetensors")
    path = outputs.as_file(path) if path.suffix == ".safetensors" else outputs.as_folder(path)
    checkpoints = (config.base, config.base_config, config.tuned, config.reference, config.remap, config.check)
    outputs.spare(path, [*loras, *checkpoints])
    return path


def joining(config: Config) -> dict[str, Any]:
    """The keywords for `merging.concatenate` that say how updates are joined."""
    return dict(approximate=config.rank is not None, method=config.method, density=config.density, seed=config.seed)


def check_flags(config: Config) -> None:
    """UsageError where options do not go together, or one that is needed is missing."""
    if config.rank not in {None, "auto"} and not (str(config.rank).isdecimal() and int(config.rank) > 0):  # type: ignore[arg-type]
        raise UsageError(f"--rank {config.rank}: a whole number above 0, or auto")
    if config.tuned:
        if not config.base or bool(config.extract) == bool(config.reference):
            raise UsageError("--tuned needs --base and either --extract or --reference")
        if config.accel or config.style or config.remap:
            raise UsageError("--tuned goes without --accel, --style and --remap; merge the LoRA that --extract writes")
    elif config.base and (config.rank or config.format != "kohya"):
        raise UsageError("--rank and --format apply to a written LoRA, but with --base a checkpoint is written", "leave one out")
    elif config.extract or config.reference:
        raise UsageError(f"--{'extract' if config.extract else 'reference'} needs --tuned CHECKPOINT")
    elif not config.accel:
        raise UsageError("--accel is required", "give --accel FILE, or --extract with --base and --tuned")
    elif not (config.style or config.base or config.remap or config.rank or rewrites(config)):
        raise UsageError(
            "nothing to merge with --accel",
            "give --style FILE, --remap PRUNED, --recipe NAME, or --base to bake it into a checkpoint",
        )


def rewrites(config: Config) -> bool:
    """Whether options change the header, the layout or the precision of a LoRA, which may then be alone."""
    settings = (config.num_steps, config.scheduler, config.guidance, config.eta, config.timesteps)
    given = any(value is not None for value in settings)
    return given or config.recipe != AUTO or config.format != "kohya" or config.precision != "stored"


def opened(config: Config, specs: list[tuple[Path, float]]) -> list[tuple[Lora, float]]:
    """The LoRAs with their weights, moved to the pruned checkpoint and scaled by block where options ask for it."""
    how: dict[str, Any] = dict(allow_partial=config.allow_partial, allow_pickle=config.allow_pickle)
    items = [lora.load(path, **how, recognise=i > 0 or config.recipe == AUTO) for i, (path, _) in enumerate(specs)]
    if config.remap:
        pruned = open_remap(config)
        apply.warn_of_prediction(pruned, items)
        items = [remapped(pruned, item, wanted=True) for item in items]
    items = [items[0], *(weighted(item, config.block_weights) for item in items[1:])]
    return [(item, strength) for item, (_, strength) in zip(items, specs, strict=True)]


def chosen(config: Config, loras: list[tuple[Lora, float]], base: Checkpoint | None) -> Recipe:
    """The recipe of the result: the options', or that of the inputs. A warning says where there is none."""
    own = merging.recipe_of(loras, base) if config.recipe == AUTO else Recipe()
    recipe = config.recipe_from(own) or own
    if not recipe.scheduler and config.recipe == AUTO:
        console.warn(
            f"--accel {loras[0][0].source}: no recipe is known for it, so the result is drawn with the base's usual many steps; "
            "--recipe NAME (lcm, lightning-4, hyper-8, dmd2, ...) attaches one, and --recipe none says that this is meant"
        )
    return recipe


def written(config: Config, loras: list[tuple[Lora, float]], output: Path) -> tuple[Lora, dict[str, Any]]:
    """Merge the LoRAs into one and write it; returns the LoRA, and the figures of the result."""
    with console.timed("merge_s"):
        merged, energy = merging.concatenate(loras, recipe=chosen(config, loras, None), **joining(config)), {}
        if config.rank or config.method != "sum":
            merged, energy = merging.reduced(merged, config.rank, config.energy, merging.ranks_of(merging.agreed(loras)[1]))
        lora.save(merged, output, dtype=tensors.WRITTEN[config.precision], format=config.format)
    ranks = [update.rank for update in merged.modules.values() if isinstance(update, Factors)]
    metrics: dict[str, Any] = {"modules": len(ranks), "rank_min": min(ranks), "rank_max": max(ranks)}
    if energy:
        metrics["energy"] = energy
    exact = [(merged, 1.0)] if energy else merging.agreed(loras)[1]  # what a lower rank costs is told by its energy
    metrics["max_error"] = merging.rounding(merged, output, exact)
    return merged, metrics


def open_remap(config: Config) -> Checkpoint:
    """The pruned checkpoint. Where there is a base too, `base_config` is for those of the two that are single files."""
    assert config.remap is not None, "LoRAs are moved to it"
    given = config.base_config if not config.base or Path(config.remap).expanduser().is_file() else None
    return replace(config, base=config.remap, base_config=given).open_base()


def drawn_on(config: Config, merged: Lora) -> dict[str, Any]:
    """The options of `sample` that open a base for the merged LoRA: one that the command was given, else that of its family."""
    if config.remap:
        pruned = open_remap(config)
        return {"base": pruned.ref, **pruned.opening}
    base = config.check or (merged.family and merged.family.name)
    return {"base": base} if base else {}


def run(config: Config) -> Result:
    """The `merge-lora` command."""
    check_flags(config)
    if config.tuned:
        output = destination(config, [])
        with console.timed("merge_s"):
            return difference.extract(config, output) if config.extract else difference.transfer(config, output)
    specs = [lora.parse_spec(config.accel or "", ACCEL_WEIGHT, "accel")]
    specs += [lora.parse_spec(spec, STYLE_WEIGHT, "style") for spec in config.style]
    output = destination(config, [path for path, _ in specs])
    config.recipe_from(Recipe(scheduler="ddim"))  # reports a wrong value before anything heavy is loaded
    loras = opened(config, specs)
    inputs = [{"file": item.source, "weight": w, **lora.summary(item)} for item, w in loras]
    metrics: dict[str, Any]
    if config.base:
        with console.timed("bake_s"):
            base = config.open_base()
            merging.check_family(loras, base)
            how = dict(dtype=tensors.WRITTEN[config.precision], allow_partial=config.allow_partial, **joining(config))
            count, paths = merging.bake(base, loras, output, recipe=chosen(config, loras, base), **how)
        metrics = {"modules": count, "inputs": inputs}
        drawn: dict[str, Any] = {"base": output, **reopening.opening(base, output)}
    else:
        merged, metrics = written(config, loras, output)
        paths, metrics["inputs"] = [output], inputs
        drawn = {**drawn_on(config, merged), "lora": output}
    if config.check:
        sheets, metrics["check"] = compare.before_and_after(config.check, loras, output, baked=bool(config.base))
        paths += sheets
    return Result(paths, metrics, sample_command(drawn))


COMMAND = Runnable(Config, run, examples=EXAMPLES)
