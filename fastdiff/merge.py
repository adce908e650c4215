"""The `merge-lora` command: LoRA + LoRA exactly, without a base, or LoRAs baked into a checkpoint.

sum_i w_i B_i A_i = [B_1 .. B_n] [w_1 A_1; ..; w_n A_n]    of rank sum_i r_i, exact for any ranks and module sets
"""

import json
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastdiff import console
from fastdiff.console import InputRefused, Result, UsageError
from fastdiff.io import lora
from fastdiff.io.lora import Factors, Lora

PRESETS: dict[str, dict[str, Any]] = {}
EXAMPLES = """fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors
fastdiff merge-lora --accel lcm.safetensors --style a.safetensors=0.6 --style b.safetensors=0.4 -o fast.safetensors
fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors --base sd15 -o fast-anime"""
ACCEL_WEIGHT, STYLE_WEIGHT = 1.0, 0.8  # a few-step LoRA was distilled at 1; a style at 1 beside it overdraws
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Config:
    accel: Annotated[str, "the few-step LoRA, FILE[=WEIGHT], weight 1 unless given; its recipe is kept"]
    style: Annotated[list[str], "FILE[=WEIGHT], weight 0.8 unless given; repeat for more"] = field(default_factory=list)
    base: Annotated[str | None, "bake into this checkpoint and write a diffusers folder; needs no other LoRA"] = field(
        default=None, metadata={"flags": ["-b"]}
    )
    base_config: Annotated[str | None, "folder or hub id with configs and tokenizers, for a single-file base"] = None
    output: Annotated[str | None, "default <accel>-<style>.safetensors; with --base a folder <accel>-<style>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    precision: Annotated[Literal["fp16", "fp32"], "of the written tensors; the sum itself is always fp32"] = "fp16"


def agreed(loras: list[tuple[Lora, float]]) -> tuple[str | None, list[tuple[Lora, float]]]:
    """The family as far as the LoRAs tell one, and the LoRAs with their first text encoder called alike."""
    told = {item.family: item.source for item, _ in reversed(loras) if item.family}
    if len(told) > 1:
        (one, first), (other, second), *_ = told.items()
        raise InputRefused(f"{second} is for {other}, {first} for {one}: LoRAs of different families cannot be merged")
    family = next(iter(told), None)
    prefix = "lora_te1_" if family == "sdxl" else "lora_te_"
    return family, [(lora.with_first_encoder(item, prefix), strength) for item, strength in loras]


def concatenate(loras: list[tuple[Lora, float]]) -> Lora:
    """The weighted sum as one LoRA of rank sum r_i per module, fp32; the first LoRA's recipe is kept.

    Families or shapes that differ raise InputRefused naming both files.
    """
    family, loras = agreed(loras)
    modules: dict[str, Factors] = {}
    for key in dict.fromkeys(key for item, _ in loras for key in item.modules):
        parts = [(item, strength) for item, strength in loras if key in item.modules]
        shapes = {item.modules[key].shape: item.source for item, _ in parts}
        if len(shapes) > 1:
            (one, first), (other, second), *_ = shapes.items()
            raise InputRefused(f"{key} is {one} in {first} but {other} in {second}: they are for different bases")
        down = torch.cat([strength * item.modules[key].down for item, strength in parts], 0)  # (sum r, in, ...)
        up = torch.cat([item.modules[key].up for item, _ in parts], 1)  # (out, sum r, ...)
        modules[key] = Factors(down, up)
    recipe = replace(loras[0][0].recipe, family=family)
    merged_from = json.dumps([{"name": Path(item.source).name, "weight": strength} for item, strength in loras])
    return Lora(modules, {**recipe.to_metadata(), "fastdiff.merged_from": merged_from}, "the merged LoRA")


def largest_error(stored: Lora, loras: list[tuple[Lora, float]]) -> float:
    """max over modules of |stored - exact| / |exact|, Frobenius; exact is the fp32 sum of the deltas themselves."""
    worst = 0.0
    for key, factors in stored.modules.items():
        exact = sum(strength * item.modules[key].delta() for item, strength in loras if key in item.modules)
        norm = torch.linalg.vector_norm(exact).item()
        off = torch.linalg.vector_norm(factors.delta() - exact).item()
        worst = max(worst, off / norm if norm else off)
    return worst


def destination(config: Config, inputs: list[Path]) -> Path:
    """Where the result goes; never onto an input, nor onto a folder that holds one."""
    suffix = "" if config.base else ".safetensors"
    path = Path(config.output or "-".join(p.stem for p in inputs) + suffix).expanduser()
    if config.base and (path.suffix == ".safetensors" or path.is_file()):
        raise UsageError(f"--output {path}: with --base a folder is written; give the name of a folder")
    if not config.base and path.suffix != ".safetensors":
        raise UsageError(f"--output {path}: a LoRA file is named .safetensors", f"use --output {path}.safetensors")
    if config.base and Path(config.base).expanduser().exists():
        inputs = [*inputs, Path(config.base).expanduser()]
    for file in inputs:
        if file.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"--output {path}: would overwrite the input {file}; choose another name")
    return path


def bake(config: Config, loras: list[tuple[Lora, float]], output: Path) -> int:
    """Fold into the base in fp32, cast once, write a diffusers folder; returns the number of modules changed."""
    from fastdiff.io import checkpoint

    base = checkpoint.load(config.base, dtype=torch.float32, config=config.base_config)
    family, loras = agreed(loras)
    if family and family != base.family:
        message = f"--base {config.base} is {base.family}, but the LoRAs are for {family}"
        raise InputRefused(message, f"give a base of family {family}")
    changed = lora.apply(base, loras)
    for net in (base.unet, *base.text_encoders):  # the VAE stays fp32: SDXL's overflows in fp16
        net.to(DTYPES[config.precision])
    checkpoint.save(base, output, recipe=replace(loras[0][0].recipe, family=base.family))
    return changed


def run(config: Config) -> Result:
    """The `merge-lora` command."""
    specs = [lora.parse_spec(config.accel, ACCEL_WEIGHT)]
    specs += [lora.parse_spec(spec, STYLE_WEIGHT) for spec in config.style]
    if len(specs) == 1 and not config.base:
        raise UsageError("nothing to merge with --accel", "give --style FILE, or --base to bake it into a checkpoint")
    output = destination(config, [path for path, _ in specs])
    loras = [(lora.load(path), strength) for path, strength in specs]
    inputs = [{"file": item.source, "weight": w, "modules": len(item.modules)} for item, w in loras]
    if config.base:
        with console.timed("bake_s"):
            metrics: dict[str, Any] = {"modules": bake(config, loras, output), "inputs": inputs}
        return Result([output], metrics, f'fastdiff sample --base {shlex.quote(str(output))} --prompt "a red apple"')
    with console.timed("merge_s"):
        merged = concatenate(loras)
        lora.save(merged, output, dtype=DTYPES[config.precision])
        error = largest_error(lora.load(output), agreed(loras)[1])
    ranks = [factors.rank for factors in merged.modules.values()]
    metrics = {
        "modules": len(ranks),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "inputs": inputs,
        "max_error": error,
    }
    base = f"--base {merged.family} " if merged.family else ""
    command = f'fastdiff sample {base}--lora {shlex.quote(str(output))} --prompt "a red apple"'
    return Result([output], metrics, command)
