"""What a sampler is put together from: a device, LoRAs and the checkpoint that wears them, another VAE, a ControlNet."""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, single_file, tensors
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.lora.file import Weighted, opened, with_weights
from fastdiff.models import autoencoder
from fastdiff.models import controlnet as controlnets
from fastdiff.models.remap import is_pruned, remapped
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError, as_field


def pick_device(name: str | torch.device) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device=cuda`: no CUDA device on this machine")
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto: bf16 on CUDA, else fp32."""
    precision = precision if precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def is_lora(path: str | Path) -> bool:
    """Whether a file holds an update of a network and not a network; by the names of its tensors."""
    if Path(path).suffix not in {".safetensors", ".bin", ".pt"} or not Path(path).is_file():
        return False
    table = single_file.flat_table()
    return any(lora.parse(key, table) for key in tensors.open_file(path))


def load_loras(
    base: Checkpoint, loras: Weighted, *, remap: bool = False, allow_partial: bool = False, allow_pickle: bool = False
) -> list[tuple[lora.Lora, float]]:
    """LoRAs with their weights, for this base; `remap`: they are of the network that it was pruned from."""
    layers = 2 if remap else base.unet_config.get("layers_per_block", 2)
    how = dict(layers=layers if isinstance(layers, int) else 2, allow_partial=allow_partial, allow_pickle=allow_pickle)
    items = [(opened(item, **how), weight) for item, weight in with_weights(loras)]
    if items and is_pruned(base):
        return [(remapped(base, item, wanted=remap), weight) for item, weight in items]
    if remap:
        console.warn(f"`remap`: {base.ref} has all layers of its family; nothing to move")
    return items


def recipe_of(base: Checkpoint, loras: Sequence[tuple[lora.Lora, float]]) -> Recipe:
    """The first recipe found: a LoRA's header, else the checkpoint's fastdiff.json."""
    return next((item.recipe for item, _ in loras if item.recipe.scheduler), base.recipe)


def open_base(base: Checkpoint | str | Path, precision: str, device: torch.device, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint behind a reference; one that is open keeps its precision unless another is asked for."""
    if not isinstance(base, Checkpoint):
        return checkpoint.load(str(base), dtype=pick_dtype(precision, device), allow_pickle=allow_pickle)
    if precision == "auto" or pick_dtype(precision, device) == base.dtype:
        return base
    if "unet" in base.__dict__:
        hint = "give `precision=auto`, or open the checkpoint anew"
        raise UsageError(f"`precision={precision}`: the base's network is in memory in {base.dtype}", hint)
    return replace(base, dtype=pick_dtype(precision, device))


def separate(base: Checkpoint, *parts: str) -> Checkpoint:
    """A copy of the checkpoint whose networks of those names are its own, also where the checkpoint has them in memory."""
    own = copy(base)
    own.__dict__ |= {part: deepcopy(base.__dict__[part]) for part in parts if part in base.__dict__}
    return own


def open_vae(base: Checkpoint, vae: str | Path | nn.Module | None) -> nn.Module | None:
    """Another VAE for the base; InputRefused where its latents are others."""
    if vae is None or isinstance(vae, nn.Module):
        return vae
    other = autoencoder.load(str(vae), latent_channels=base.unet_config["in_channels"])
    if autoencoder.factor(other) != base.pixels_per_latent:
        raise InputRefused(
            f"{as_field('vae', vae)}: {autoencoder.factor(other)} px a latent, the base has {base.pixels_per_latent}"
        )
    return other


def open_controlnet(base: Checkpoint, controlnet: str | Path | nn.Module | None) -> nn.Module | None:
    """A ControlNet of the base, in its precision."""
    if controlnet is None or isinstance(controlnet, nn.Module):
        return controlnet
    return controlnets.load(str(controlnet), base.unet_config).to(base.dtype)


def stock_scheduler(name: str, config: dict[str, Any], *, spacing: str | None, kind: str) -> Any:
    """The scheduler of diffusers that equals one of ours, on the checkpoint's schedule, for a network that outputs `kind`."""
    import diffusers

    spacing, wanted = spacing or SOLVERS[name].spacing, {"prediction_type": kind}
    if spacing != "lcm":  # which is LCM's and TCD's own
        wanted["timestep_spacing"] = spacing
    if name == "dpm++":
        wanted["final_sigmas_type"] = "zero"
    kept = {k: v for k, v in config.items() if k not in {"_class_name", "_diffusers_version"}}
    # getattr: the class that the solver's row names
    return getattr(diffusers, SOLVERS[name].stock).from_config({**kept, **wanted})


def stock_pipeline(base: Checkpoint, scheduler: Any, *, vae: nn.Module | None = None, controlnet: nn.Module | None = None) -> Any:
    """The stock diffusers pipeline over a checkpoint's networks, in its precision."""
    import diffusers

    pipe = base.pipeline()
    if vae is not None:
        pipe.vae = deepcopy(vae)
    if controlnet is not None:
        pipe = diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=deepcopy(controlnet))
    pipe.scheduler = scheduler
    return pipe if base.dtype == torch.float32 else pipe.to(base.dtype)
