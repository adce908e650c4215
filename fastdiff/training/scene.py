"""What a run works with: base, device, resolution, prompts, VAE and the teacher's way of sampling, resolved once."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder
from fastdiff.options.train import TrainConfig
from fastdiff.sampling.settings import Settings


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
        teacher = teacher_sampling(config, base.family)
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


def teacher_sampling(config: TrainConfig, family: Family) -> Settings:
    """How the teacher makes its samples: as the family is usually sampled, but for the config's own steps and guidance."""
    chosen = {"num_steps": config.teacher_steps, "guidance": config.teacher_guidance or config.guidance}
    return replace(Settings.usual(family), **{name: value for name, value in chosen.items() if value is not None})
