"""The `export` command: writes a checkpoint as a diffusers folder or one file for other programs, or a LoRA in another layout."""

import shlex
from pathlib import Path

import torch

from fastdiff import lora
from fastdiff.checkpoints import write
from fastdiff.lora import merging
from fastdiff.options.export import EXAMPLES, Config
from fastdiff.runtime import console
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import Result, UsageError

DTYPES = {"stored": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def destination(config: Config) -> Path:
    """The path to write to. UsageError where it would overwrite the input or a folder that contains it, or is misnamed."""
    source = Path(config.lora or config.base).expanduser()
    one = config.single_file or (config.lora is not None and config.format != "peft")
    path = Path(config.output or f"{source.stem}-{config.format if config.lora else 'export'}{'.safetensors' if one else ''}")
    path = path.expanduser()
    if one and path.suffix != ".safetensors":
        raise UsageError(f"--output {path}: the name of a file must end in .safetensors", f"use --output {path}.safetensors")
    if source.exists() and source.resolve().is_relative_to(path.resolve()):
        raise UsageError(f"--output {path}: would overwrite the input {source}; choose another name")
    return path


def run(config: Config) -> Result:
    """The `export` command."""
    path, dtype = destination(config), DTYPES[config.precision]
    if config.lora:
        item = lora.load(config.lora, allow_pickle=config.allow_pickle)
        with console.timed("write_s"):
            lora.save(item, path, dtype=dtype, format=config.format)
        return Result([path], {**lora.summary(item), "max_error": merging.rounding(item, path, config.format)})
    base = config.open_base()
    one = path.suffix == ".safetensors"
    if path.is_file() and not one:
        raise UsageError(f"--output {path}: is a file; give the name of a folder")
    with console.timed("write_s"):
        if one:
            outputs = write.to_file(base, path, dtype=dtype, recipe=base.recipe, force=config.force)
        else:
            write.to_folder(base, path, dtype=dtype, recipe=base.recipe if base.recipe.method else None)
            outputs = [path]
    metrics = {"family": base.family.name, "prediction_type": base.prediction_type, "checked": one}
    return Result(outputs, metrics, f'fastdiff sample --base {shlex.quote(str(path))} --prompt "a red apple"')


COMMAND = Runnable(Config, run, examples=EXAMPLES)
