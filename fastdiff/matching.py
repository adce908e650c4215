"""Two scores that say of a student's samples in which direction they are wrong (DMD, Yin 2023; Diff-Instruct, Luo 2023).

    x_t  = alpha_t x + sigma_t eps             one t, one eps, for both
    real = teacher(x_t, t; c, empty; w)        guided, frozen
    fake = fake_score(x_t, t; c)               trained online on the student's samples, not guided
    g    = weight (fake.x0 - real.x0)          what methods push the student along

The roles are adapters on one network, or copies; the student's network may be another one altogether.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import losses
from fastdiff.data import Batch
from fastdiff.io import fitting
from fastdiff.io.checkpoint import Checkpoint
from fastdiff.io.lora import Lora
from fastdiff.losses import Noised
from fastdiff.models import adapters
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.schedule import Prediction
from fastdiff.trainer import Losses


class Scores:
    """What methods of distribution matching have in common; the config names guidance, weighting and the adapters' size."""

    fake: Denoiser
    controlnet: nn.Module | None = None  # worn by teacher and online model alike

    def __init__(self, base: Checkpoint, config: Any) -> None:
        self.base_model, self.config, self.schedule = base, config, base.schedule()
        self.teacher = self.role(None)
        self.guidance: float | Tensor = config.guidance  # or one for each timestep, (T,)
        self.figures: dict[str, Tensor] = {}

    def role(self, adapter: str | None, net: nn.Module | None = None) -> Denoiser:
        base = self.base_model
        return Denoiser(base.unet if net is None else net, self.schedule, base.prediction_type, adapter, self.controlnet)

    def copied(self) -> nn.Module:
        """All of the base's network, to train; without the adapters that it may have by now."""
        net = self.base_model.unet
        return adapters.plain(net) if adapters.is_adapted(net) else trainable_copy(net)

    def trained(self, name: str, net: nn.Module | None = None) -> tuple[Denoiser, list[nn.Parameter]]:
        """A role with what trains of it: all of a network of its own, or without one an adapter on the shared one."""
        if net is None:
            return self.role(name), self.adapter(self.base_model.unet, name)
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        return self.role(None, net), list(net.parameters())

    def adapter(self, net: nn.Module, name: str) -> list[nn.Parameter]:
        """A fresh adapter on a network, of the config's size."""
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        layers = adapters.TARGETS if self.config.lora_layers == "all" else adapters.ATTENTION
        return adapters.attach(net, self.config.lora_rank, self.config.lora_alpha, name, layers)

    def noised(self, x: Tensor, low: float, high: float) -> Noised:
        """Samples at noise levels drawn between these parts of the timesteps, both ends included (DMD, section 3.2)."""
        first, last = (round(part * len(self.schedule)) for part in (low, high))
        t = torch.randint(first, min(last, len(self.schedule) - 1) + 1, (len(x),), device=x.device)
        eps = torch.randn_like(x)
        return Noised(x, eps, t, self.schedule.add_noise(x, eps, t))

    def gradient(self, seen: Noised, fake: Prediction, batch: Batch) -> Tensor:
        """g against the guided teacher."""
        w = self.guidance[seen.t] if isinstance(self.guidance, Tensor) else self.guidance
        with torch.no_grad():
            real = self.teacher.guided(seen.x_t, seen.t, batch.cond, batch.uncond, w)
        told = {"x": seen.x, "real": real.x0, "fake": fake.x0.detach()}
        self.figures |= {f"{k}_{name}": getattr(v, name)() for k, v in told.items() for name in ("mean", "std")}
        self.figures["difference"] = (told["fake"] - real.x0).abs().mean()
        return losses.score_difference(self.schedule, seen, real, fake, self.config.weighting)

    def denoising(self, seen: Noised, fake: Prediction) -> Losses:
        """The fake score's own training loss on the student's samples (DMD, eq. 6)."""
        return {"denoising": losses.denoising(self.schedule, self.fake.kind, fake, seen.x, seen.eps, seen.t)}


def start_from(role: Denoiser, start: Lora) -> None:
    """Give a role what a LoRA of its network does, in its adapter or folded into its weights."""
    if role.adapter is None:
        fitting.fold(role.net, [(start, 1.0)])
    else:
        adapters.start_from(role.net, start, role.adapter)
