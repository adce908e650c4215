"""The `export` command: writes a checkpoint as a diffusers folder or one file for other programs, or a LoRA in another layout."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import component, references, reopening, tensors, vae_file, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.lora import merging
from fastdiff.models import autoencoder
from fastdiff.options.export import EXAMPLES, Config
from fastdiff.runtime import console, outputs
from fastdiff.runtime.command import Runnable, sample_command
from fastdiff.runtime.errors import InputRefused, Result, UsageError, as_field
from fastdiff.sampling import assemble

if TYPE_CHECKING:  # networks are cast to it: torch types every attribute of a module as a tensor or a module
    from diffusers.models.modeling_utils import ModelMixin


def destination(config: Config) -> Path:
    """The path to write to. UsageError where it is misnamed, cannot be written, or would overwrite an input."""
    if config.lora and (config.vae or config.format == "taesd"):
        raise UsageError("--lora: a LoRA has no VAE", "leave out --vae, and --format taesd")
    if config.lora and config.single_file:
        raise UsageError("--single-file: is for checkpoints; the file of a LoRA is one already", "leave it out")
    if config.format == "taesd":
        if config.single_file:
            raise UsageError("--single-file: with --format taesd two files are written into a folder", "leave out one of both")
        return outputs.as_folder(config.output or "vae_approx")  # `write_taesd` knows which files it writes there
    if not config.lora and config.format != "kohya":
        raise UsageError(f"--format {config.format}: is the layout of a LoRA, and there is no --lora", "leave it out")
    source = references.called(config.lora or config.base, "lora" if config.lora else "base")
    one = config.single_file or (config.lora is not None and config.format != "peft")
    path = Path(config.output or f"{source}-{config.format if config.lora else 'export'}{'.safetensors' if one else ''}")
    if one and path.suffix != ".safetensors":
        raise UsageError(f"--output {path}: the name of a file must end in .safetensors", f"use --output {path}.safetensors")
    path = outputs.as_file(path) if path.suffix == ".safetensors" else outputs.as_folder(path)
    outputs.spare(path, inputs(config))
    return path


def inputs(config: Config) -> list[str | None]:
    """What the command reads, as it was given."""
    return [config.lora] if config.lora else [config.base, config.base_config, config.vae]


def run(config: Config) -> Result:
    """The `export` command."""
    path, dtype = destination(config), tensors.WRITTEN[config.precision]
    if config.lora:
        assert config.format != "taesd", "refused by `destination`"
        item = lora.load(config.lora, allow_pickle=config.allow_pickle)
        with console.timed("write_s"):
            lora.save(item, path, dtype=dtype, format=config.format)
        return Result([path], {**lora.summary(item), "max_error": merging.rounding(item, path)})
    base = config.open_base()
    if config.format == "taesd":
        return write_taesd(config, base, path)
    one = path.suffix == ".safetensors"
    base = base if config.vae is None else with_vae(base, config, single=one)
    with console.timed("write_s"):
        if one:
            paths = write.to_file(base, path, dtype=dtype, recipe=base.recipe, force=config.force)
        else:
            write.to_folder(base, path, dtype=dtype, recipe=base.recipe if base.recipe.method else None)
            paths = [path]
    metrics = {"family": base.family.name, "prediction_type": base.prediction_type, "checked": one}
    return Result(paths, metrics, sample_command({"base": path, **reopening.opening(base, path)}))


def open_vae(base: Checkpoint, config: Config) -> nn.Module:
    """The VAE that the config names, or else the base's own; InputRefused where its latents do not fit the base's."""
    other = assemble.open_vae(base, config.vae, allow_pickle=config.allow_pickle)
    return base.vae if other is None else other


def with_vae(base: Checkpoint, config: Config, *, single: bool) -> Checkpoint:
    """The base with the VAE of the config in place of its own, in the precision that this VAE is stored in.

    InputRefused for a tiny VAE that would go into a `single` file.
    """
    assert config.vae is not None
    net = open_vae(base, config)
    if single and autoencoder.is_tiny(net):
        raise InputRefused(
            f"{as_field('vae', config.vae)}: a tiny VAE has no place in a single file; ComfyUI reads it from files of its own",
            "write those with `format=taesd`, or export the checkpoint as a folder",
        )
    path = component.locate(config.vae, "vae", "VAE", files=True, allow_pickle=config.allow_pickle)
    stored = vae_file.stored_dtype(path, allow_pickle=config.allow_pickle)
    changed = base.shaped("vae", config_of(net))
    changed.__dict__["vae"] = nn.Module.to(net, stored)  # diffusers' own `to` warns of layers to keep in fp32, here of none
    console.info(f"{base.ref}: its VAE becomes that of {config.vae}, {str(stored).removeprefix('torch.')}")
    return changed


def config_of(net: nn.Module) -> dict[str, Any]:
    """The config of a diffusers network, with the name of its class."""
    return json.loads(cast("ModelMixin", net).to_json_string())


def write_taesd(config: Config, base: Checkpoint, folder: Path) -> Result:
    """Write a tiny VAE as the two files of TAESD's layout. InputRefused for a network of another shape."""
    if folder.suffix == ".safetensors":
        raise UsageError(f"--format taesd: writes two files into a folder, not --output {folder}", "give the name of a folder")
    net, ref, name = open_vae(base, config), config.vae or base.ref, base.family.taesd
    state = net.state_dict()
    if reason := vae_file.unlike_taesd(config_of(net), vae_file.shapes_of(state)):
        raise InputRefused(
            f"{as_field('vae' if config.vae else 'base', ref)}: cannot be written as TAESD: {reason}",
            "diffusers and fastdiff take it as it is; distill-vae makes TAESD's shape with `width=64` and `blocks=3,3,3,1`",
        )
    if not bool(state[vae_file.LAST_OF_ENCODER].any()):
        console.info(f"{ref}: its encoder is untrained; the files draw pictures and encode none")
    halves = [path for given in inputs(config) if given for path in both_halves(Path(given).expanduser())]
    outputs.spare(folder, halves, written=[folder / f"{name}_{part}.safetensors" for part in vae_file.SHIFT])
    with console.timed("write_s"):
        paths = vae_file.write_taesd(state, folder, name, tensors.WRITTEN[config.precision])
    console.info(f"for ComfyUI, put both into models/vae_approx; the node Load VAE then lists {name}")
    return Result(paths, {"family": base.family.name})


def both_halves(path: Path) -> list[Path]:
    """The path of an input, and of the other of TAESD's two files beside it, which is read too."""
    if not path.is_file():
        return [path]
    pairs = (("decoder", "encoder"), ("encoder", "decoder"))
    return [path, *(path.with_name(path.name.replace(one, other)) for one, other in pairs if one in path.name)]


COMMAND = Runnable(Config, run, examples=EXAMPLES)
