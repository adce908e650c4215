"""What is sampled, put together from files: a base, the LoRAs folded into it, another VAE, a ControlNet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import single_file, tensors
from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.models import autoencoder
from fastdiff.models import controlnet as controlnets
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.fast.decoder import decoder_of
from fastdiff.models.fast.unet import unet_of
from fastdiff.models.remap import is_pruned, remapped
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError, as_field
from fastdiff.sampling.engine import Compile
from fastdiff.sampling.sampler import Sampler, decoding


@dataclass
class Assembled:
    """A sampler, how its weights want to be sampled, and how much of each LoRA was applied."""

    sampler: Sampler
    recipe: Recipe
    coverage: list[dict[str, Any]]
    identity: tuple[str, ...] = ()  # hashes of the networks' weights, where they were asked for


def pick_device(name: str) -> torch.device:
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
    base: Checkpoint, specs: Sequence[str], *, remap: bool = False, allow_partial: bool = False, allow_pickle: bool = False
) -> list[tuple[lora.Lora, float]]:
    """FILE[=WEIGHT] of each, for this base; `remap`: they are of the network that it was pruned from."""
    layers = 2 if remap else base.unet_config.get("layers_per_block", 2)
    how = dict(layers=layers if isinstance(layers, int) else 2, allow_partial=allow_partial, allow_pickle=allow_pickle)
    found = [(lora.load(path, **how), weight) for path, weight in (lora.parse_spec(spec, 1.0) for spec in specs)]
    if is_pruned(base):
        return [(remapped(base, item, wanted=remap), weight) for item, weight in found]
    if remap:
        console.warn(f"`remap`: {base.ref} has all layers of its family; nothing to move")
    return found


def recipe_of(base: Checkpoint, loras: Sequence[tuple[lora.Lora, float]]) -> Recipe:
    """The first recipe found: a LoRA's header, else the checkpoint's fastdiff.json."""
    return next((item.recipe for item, _ in loras if item.recipe.scheduler), base.recipe)


def assemble(
    base: Checkpoint,
    loras: Sequence[tuple[lora.Lora, float]] = (),
    *,
    vae: str | None = None,
    controlnet: str | None = None,
    strength: float = 1.0,
    allow_partial: bool = False,
    device: torch.device | str = "cpu",
    folded: bool = False,
    identified: bool = False,
    compile: Compile = "off",
) -> Assembled:
    """Fold the LoRAs in and open the rest; InputRefused where a part does not belong to the base.

    `folded`: to draw with and nothing else, by networks that are faster and cannot be trained; `compile` is the sampler's.
    `identified`: with the hashes of all weights, for what is kept by content.
    """
    recipe = recipe_of(base, loras)
    applied = apply.apply(base, list(loras), allow_partial=allow_partial)
    guide = controlnets.load(controlnet, base.unet_config).to(base.dtype) if controlnet else None
    other = autoencoder.load(vae, latent_channels=base.unet_config["in_channels"]) if vae else None
    if other is not None and autoencoder.factor(other) != base.pixels_per_latent:
        own = autoencoder.factor(other)
        raise InputRefused(f"{as_field('vae', vae)}: {own} px a latent, the base has {base.pixels_per_latent}")
    nets = [base.unet, other or base.vae, *([guide] if guide else [])] if identified else []
    identity = tuple(fingerprint(net) for net in nets)
    net = unet_of(base, device=device) if folded else base.unet
    denoiser = Denoiser(net, base.schedule(), recipe.predicts(base.prediction_type), controlnet=guide, strength=strength)
    if not folded:
        return Assembled(Sampler(base, denoiser, other or base.vae, device=device), recipe, applied.coverage, identity)
    base.release("unet")  # where it was loaded for LoRAs, its weights are the folded network's now
    decoder = decoder_of(base, other, dtype=decoding(base.dtype), device=device)
    sampler = Sampler(base, denoiser, decoder, device=device, compile=compile)
    return Assembled(sampler, recipe, applied.coverage, identity)
