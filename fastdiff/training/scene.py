"""What a run works with, resolved once: base, device, resolution, prompts, VAE, and how the teacher is sampled."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.prompts import training_prompts
from fastdiff.options.train import TrainConfig
from fastdiff.runtime import console
from fastdiff.sampling import assemble
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
    allow_pickle: bool = False  # whether that VAE may be a pickle

    @classmethod
    def of(cls, config: TrainConfig, base: Checkpoint, device: torch.device) -> "Scene":
        """Resolve a config; what it leaves open follows the family of the base."""
        prompts = training_prompts(base.family, config.prompts)
        teacher = teacher_sampling(config, base)
        if base.recipe.few_steps:
            tell_few_steps(base, teacher)
        px = config.resolution or base.resolution_px
        return cls(base, device, px, prompts, teacher, config.seed, config.vae, config.allow_pickle)

    @cached_property
    def vae(self) -> nn.Module:
        """The network that turns latents into pictures: the VAE of `vae_ref`, or the base's own."""
        return open_vae(self.base, self.vae_ref, allow_pickle=self.allow_pickle)

    @property
    def vaes(self) -> list[nn.Module]:
        """The VAEs that are loaded: for pictures, and the base's own."""
        return [held["vae"] for held in (vars(self), vars(self.base)) if "vae" in held]

    @property
    def latent_side(self) -> int:
        """Side of a square latent, in latent positions: h = w."""
        return self.resolution_px // self.base.pixels_per_latent


def open_vae(base: Checkpoint, ref: str | None, *, allow_pickle: bool = False) -> nn.Module:
    """Open the VAE of a reference and check that it fits the base's latents; without a reference, the base's own VAE."""
    other = assemble.open_vae(base, ref, allow_pickle=allow_pickle)
    return base.vae if other is None else other


def teacher_sampling(config: TrainConfig, base: Checkpoint) -> Settings:
    """Return how the teacher is sampled: in the family's usual way, with what the config says of it.

    A few-step base draws by its own recipe, in which the guidance of a method's losses has no place.
    """
    losses_too = None if base.recipe.few_steps else config.guidance
    return Settings.of(
        base.recipe,
        Settings.usual(base.family),
        scheduler=config.teacher_scheduler,
        num_steps=config.teacher_steps,
        guidance=config.teacher_guidance or losses_too,
        guidance_rescale=config.guidance_rescale,
    )


def tell_few_steps(base: Checkpoint, settings: Settings) -> None:
    """Tell in one line how a few-step base is sampled as a teacher."""
    steps = f"{settings.num_steps} step{'s' * (settings.num_steps != 1)} of {settings.scheduler}"
    console.info(f"{base.ref}: a few-step checkpoint; as a teacher it draws in {steps}, guidance {settings.guidance:g}")
