"""What a run works with, resolved once: base, device, resolution, prompts, VAE, and how the teacher is sampled."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.prompts import training_prompts
from fastdiff.models import autoencoder
from fastdiff.options.train import TrainConfig
from fastdiff.sampling.settings import Settings


@dataclass
class Scene:
    """Everything that a run resolves from its config before there is a method. Made by `Scene.of`."""

    base: Checkpoint
    device: torch.device
    resolution_px: int
    prompts: list[str]  # those of the config, or those that ship with the family
    teacher: Settings  # how the teacher is sampled, for training data and when it is measured
    seed: int
    vae_ref: str | None = None  # a VAE that replaces the base's for drawing pictures

    @classmethod
    def of(cls, config: TrainConfig, base: Checkpoint, device: torch.device) -> "Scene":
        """Resolve a config; what it leaves open follows the family of the base."""
        prompts = training_prompts(base.family, config.prompts)
        teacher = teacher_sampling(config, base)
        return cls(base, device, config.resolution or base.resolution_px, prompts, teacher, config.seed, config.vae)

    @cached_property
    def vae(self) -> nn.Module:
        """The network that turns latents into pictures: the VAE of `vae_ref`, or the base's own."""
        return open_vae(self.base, self.vae_ref)

    @property
    def vaes(self) -> list[nn.Module]:
        """The VAEs that are loaded: for pictures, and the base's own."""
        return [held["vae"] for held in (vars(self), vars(self.base)) if "vae" in held]

    @property
    def latent_side(self) -> int:
        """Side of a square latent, in latent positions: h = w."""
        return self.resolution_px // self.base.pixels_per_latent


def open_vae(base: Checkpoint, ref: str | None) -> nn.Module:
    """Open the VAE of a reference and check that it fits the base's latents; without a reference, the base's own VAE."""
    return autoencoder.load(ref, latent_channels=base.unet_config["in_channels"]) if ref else base.vae


def teacher_sampling(config: TrainConfig, base: Checkpoint) -> Settings:
    """Return how the teacher is sampled: in its usual way, with the config's own steps and guidance if it has them."""
    usual, guidance = Settings.of_base(base), config.teacher_guidance or config.guidance
    return replace(
        usual,
        num_steps=usual.num_steps if config.teacher_steps is None else config.teacher_steps,
        guidance=usual.guidance if guidance is None else guidance,
    )
