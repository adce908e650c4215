"""Open the parts of a sampler: device, precision, checkpoint, LoRAs, VAE and ControlNet; and the diffusers pipeline of them."""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, hub, references, single_file, tensors
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import named
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.lora import identify
from fastdiff.lora.file import Weighted, opened, with_weights
from fastdiff.models import autoencoder
from fastdiff.models import controlnet as controlnets
from fastdiff.models.remap import is_pruned, remapped
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError, as_field


def pick_device(name: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` takes CUDA, then MPS, then the CPU. Raises UsageError for `cuda` without a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device=cuda`: no CUDA device on this machine")
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of fp32, bf16 or fp16, and for `auto` the one that `pick_precision` chooses."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[pick_precision(precision, device)]


def pick_precision(precision: str, device: torch.device) -> str:
    """Return fp32, bf16 or fp16 as it is; `auto` is bf16 on a CUDA device that computes in it, fp16 on an older one, else fp32.

    Devices before NVIDIA's Ampere only emulate bf16, which is slower than fp32.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def is_lora(path: str | Path) -> bool:
    """Return whether a file, a folder or a repository of the hub is a LoRA and not a whole network.

    A repository with a model index is none; of others the names of tensors tell. Errors as of `lora.located`.
    """
    if isinstance(path, str) and not references.local(path):
        where = None if named(path) else references.parse(path, "student")
        if where is None or (not where.names_file and hub.holds(where, as_field("student", path), "model_index.json")):
            return False
        path = lora.located(path, "student")
    file = lora.files_of(Path(path).expanduser())[0]
    if file.suffix not in {".safetensors", ".bin", ".pt"} or not file.is_file():
        return False
    table = single_file.flat_table()
    return any(lora.parse(key, table) for key in tensors.open_file(file))


def load_loras(
    base: Checkpoint,
    loras: Weighted,
    *,
    remap: bool = False,
    allow_partial: bool = False,
    allow_pickle: bool = False,
    recognise: bool = True,
) -> list[tuple[lora.Lora, float]]:
    """Open LoRAs for a base, each with its weight.

    `remap` moves LoRAs of the full network to a base that was pruned from it; `recognise` is as in `lora.load`. Raises UsageError
    or InputRefused if a LoRA cannot be read or does not fit the base.
    """
    layers = 2 if remap else base.unet_config.get("layers_per_block", 2)
    how: dict[str, Any] = dict(allow_partial=allow_partial, allow_pickle=allow_pickle, recognise=recognise)
    how["layers"] = layers if isinstance(layers, int) else 2
    items = [(opened(item, **how), weight) for item, weight in with_weights(loras)]
    if items and is_pruned(base):
        return [(remapped(base, item, wanted=remap), weight) for item, weight in items]
    if remap:
        console.warn(f"`remap`: {base.ref} has all layers of its family; nothing to move")
    return items


def with_clip_skip(base: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The base as the recipe of its weights reads prompts. What the user says counts more, with a warning where both differ."""
    skip = recipe.clip_skip
    if skip is None or skip == base.skipped_layers:
        return base
    if base.clip_skip is None:
        return base.reading(clip_skip=skip, said_by="the recipe of the LoRAs")
    said = f"the weights were trained with clip skip {skip}, but pictures are drawn with {base.skipped_layers}"
    console.warn(f"{as_field('clip_skip', base.skipped_layers)}: {said}")
    return base


def tell_clip_skip(base: Checkpoint, loras: Sequence[tuple[lora.Lora, float]]) -> None:
    """Warn of LoRAs that were trained on the states of another layer of the text encoder than the base now takes."""
    for item, _ in loras if base.family.text_layer == -1 else ():
        trained = identify.trained_clip_skip(item.metadata)
        if trained is not None and trained != base.skipped_layers:
            console.warn(
                f"{Path(item.source).name}: its header says that it was trained with clip skip {trained + 1} as sd-scripts "
                f"counts, which is {as_field('clip_skip', trained)}, but pictures are drawn with {base.skipped_layers}"
            )


def open_base(base: Checkpoint | str | Path, precision: str, device: torch.device, *, allow_pickle: bool = False) -> Checkpoint:
    """Open a checkpoint in a precision. One that is open already keeps its dtype unless `precision` names another.

    Raises UsageError if its network is already in memory in another dtype.
    """
    if not isinstance(base, Checkpoint):
        return checkpoint.load(str(base), dtype=pick_dtype(precision, device), allow_pickle=allow_pickle)
    if precision == "auto" or pick_dtype(precision, device) == base.dtype:
        return base
    if "unet" in base.__dict__:
        hint = "use `precision=auto`, or open the checkpoint again"
        raise UsageError(f"`precision={precision}`: the base's network is already in memory in {base.dtype}", hint)
    return replace(base, dtype=pick_dtype(precision, device))


def separate(base: Checkpoint, *parts: str) -> Checkpoint:
    """Copy a checkpoint so that changes to the named parts, such as `unet`, do not reach the original."""
    own = copy(base)
    own.__dict__ |= {part: deepcopy(base.__dict__[part]) for part in parts if part in base.__dict__}
    return own


def open_vae(base: Checkpoint, vae: str | Path | nn.Module | None, *, allow_pickle: bool = False) -> nn.Module | None:
    """Open another VAE for the base: a folder, a hub id or a single file, a pickle with `allow_pickle`.

    Raises InputRefused if its latents have other channels or another size than the base's.
    """
    if vae is None or isinstance(vae, nn.Module):
        return vae
    channels, like = base.unet_config["in_channels"], base.config_of("vae")
    other = autoencoder.load(str(vae), latent_channels=channels, like=like, allow_pickle=allow_pickle)
    if autoencoder.factor(other) != base.pixels_per_latent:
        own, needed = autoencoder.factor(other), base.pixels_per_latent
        raise InputRefused(f"{as_field('vae', vae)}: this VAE has {own} px per latent, the base has {needed}")
    return other


def open_controlnet(base: Checkpoint, controlnet: str | Path | nn.Module | None) -> nn.Module | None:
    """Open a ControlNet for the base, in the base's dtype. Raises UsageError or InputRefused if it does not fit."""
    if controlnet is None or isinstance(controlnet, nn.Module):
        return controlnet
    return controlnets.load(str(controlnet), base.unet_config).to(base.dtype)


def scheduler_arguments(name: str, spacing: str | None) -> dict[str, Any]:
    """Return the config entries with which the diffusers scheduler of our solver `name` gives the same result."""
    spacing, wanted = spacing or SOLVERS[name].spacing, dict[str, Any]()
    if spacing != "lcm":  # LCM and TCD schedulers know no other spacing
        wanted["timestep_spacing"] = spacing
    if name in {"dpm++", "dpm++sde"}:
        wanted |= {"final_sigmas_type": "zero", "algorithm_type": "dpmsolver++" if name == "dpm++" else "sde-dpmsolver++"}
    elif name != "euler":  # diffusers clips x0 to -1..1 unless a config says no; a PNDM or Euler config need not say it
        wanted["clip_sample"] = False
    return wanted


def stock_scheduler(name: str, config: dict[str, Any], *, spacing: str | None, kind: str) -> Any:
    """Build the diffusers scheduler that equals our solver `name`, for a scheduler config and a prediction type `kind`."""
    import diffusers

    kept = {k: v for k, v in config.items() if k not in {"_class_name", "_diffusers_version"}}
    wanted = {"prediction_type": kind, **scheduler_arguments(name, spacing)}
    # getattr: the solver's row names the diffusers class
    return getattr(diffusers, SOLVERS[name].stock).from_config({**kept, **wanted})


def stock_pipeline(base: Checkpoint, scheduler: Any, *, vae: nn.Module | None = None, controlnet: nn.Module | None = None) -> Any:
    """Build the diffusers pipeline of a checkpoint, in its dtype, with copies of the given VAE and ControlNet."""
    import diffusers

    pipe = base.pipeline()
    if base.family.text_layer == -1 and not hasattr(pipe.text_encoder, "text_model"):  # where clip_skip of diffusers looks
        vars(pipe.text_encoder)["text_model"] = pipe.text_encoder  # for the last norm, which transformers 5 has moved
    if vae is not None:
        pipe.vae = deepcopy(vae)
    if controlnet is not None:
        pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=deepcopy(controlnet))
    pipe.scheduler = scheduler
    return pipe if base.dtype == torch.float32 else pipe.to(base.dtype)
