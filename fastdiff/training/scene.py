"""What a run works with: base, device, resolution, prompts, VAE and the teacher's way of sampling, resolved once."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder
from fastdiff.sampling.settings import Settings
from fastdiff.training.config import TrainConfig


@dataclass
class Scene:
    """Resolved from a config by `Scene.of`; whoever needs less than all of it takes those parts."""

    base: Checkpoint
    device: torch.device
    resolution_px: int
    prompts: list[str]  # those that were given, else those that ship with the family
    teacher: Settings  # how the teacher samples training data, and is measured
    seed: int
    vae_ref: str | None = None  # another VAE than the base's, for pictures

    @classmethod
    def of(cls, config: TrainConfig, base: Checkpoint, device: torch.device) -> "Scene":
        """The config's choices, and the family's where it makes none."""
        prompts = read_prompts(Path(config.prompts)) if config.prompts else default_prompts(base.family)
        teacher = config.teacher_sampling(base.family)
        return cls(base, device, config.resolution or base.resolution_px, prompts, teacher, config.seed, config.vae)

    @cached_property
    def vae(self) -> nn.Module:
        """What turns latents into pictures: the base's VAE, or the one that was given."""
        return open_vae(self.base, self.vae_ref)

    @property
    def latent_side(self) -> int:
        return self.resolution_px // self.base.pixels_per_latent


def open_vae(base: Checkpoint, ref: str | None) -> Any:
    """A VAE of that reference that fits the base; without one the base's own."""
    return autoencoder.load(ref, latent_channels=base.unet_config["in_channels"]) if ref else base.vae
