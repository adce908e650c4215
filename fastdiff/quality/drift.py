"""Drift: how far a student's colours, contrast and sharpness have moved from the teacher's.

Over-training spoils these first. No judging network is needed, so drift works on any base.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import rng
from fastdiff.sampling.sampler import Sampler, at_once
from fastdiff.sampling.settings import Settings


def departures(latents: Tensor, pixels: Tensor) -> Tensor:
    """Drift's statistics of each picture (N, 2 C + 4), from latents (N, C, h, w) and pixels (N, 3, H, W) in [-1, 1].

    The columns are the mean and the mean square of every latent channel, then the picture's contrast (standard deviation),
    saturation (distance from grey), sharpness (gradients) and brightness (mean). `drift` needs only their means over pictures.
    """
    z, p = latents.flatten(2).double(), pixels.double()
    contrast, saturation = p.flatten(1).std(1), (p.amax(1) - p.amin(1)).mean((1, 2))
    sharpness = p.diff(dim=-1).abs().mean((1, 2, 3)) + p.diff(dim=-2).abs().mean((1, 2, 3))
    picture = torch.stack([contrast, saturation, sharpness, p.mean((1, 2, 3))], 1)
    return torch.cat([z.mean(2), z.square().mean(2), picture], 1)


def drift(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """How far the student's `departures` are from the teacher's, of the same prompts and seeds.

    `drift_mean` is the shift of the latents' mean in the teacher's standard deviations, and `drift_spread` the |log| ratio of
    the standard deviations, each averaged over channels. `contrast`, `saturation` and `sharpness` are ratios, student over
    teacher. `drift` is the sum of the two and of the |log| of the three ratios. `brightness` is a difference on a scale of -1
    to 1; it is not in the sum, because the latents' mean contains it already.
    """
    t, s = teacher.mean(0), student.mean(0)
    c = (len(t) - 4) // 2
    spread = lambda x: (x[c : 2 * c] - x[:c].square()).clamp(min=1e-12).sqrt()
    shifts = {
        "drift_mean": ((s[:c] - t[:c]).abs() / spread(t)).mean().item(),
        "drift_spread": (spread(s) / spread(t)).log().abs().mean().item(),
    }
    ratios = dict(zip(("contrast", "saturation", "sharpness"), (s / t)[2 * c : 2 * c + 3].tolist(), strict=True))
    total = sum(shifts.values()) + sum(abs(math.log(max(r, 1e-12))) for r in ratios.values())
    return {"drift": total, **shifts, **ratios, "brightness": (s[-1] - t[-1]).item()}


class Drift:
    """Measures a student's drift during training, always on the same few prompts and seeds."""

    def __init__(self, base: Checkpoint, prompts: Sequence[str], resolution_px: int, device: torch.device | str) -> None:
        self.cond, self.uncond = text.encode_unique(base, prompts, device), text.unconditional(base, device=device)
        self.base, self.resolution_px, self.device = base, resolution_px, device
        self.seeds = [rng.DRIFT(i) for i in range(len(prompts))]
        self.teacher: Tensor | None = None

    def of(self, net: Denoiser, settings: Settings) -> Tensor:
        """The `departures` (N, 2 C + 4) of the pictures that a network draws with these settings."""
        sampler = Sampler.of_networks(self.base, net, self.base.vae, device=self.device)
        n = at_once(self.resolution_px // autoencoder.factor(sampler.vae), training=True)
        parts = [
            sampler.pictures(self.cond[i : i + n], self.uncond, self.seeds[i : i + n], settings, self.resolution_px)
            for i in range(0, len(self.seeds), n)
        ]
        return torch.cat([departures(z, p) for z, p in parts])

    def measure(self, teacher: tuple[Denoiser, Settings], student: tuple[Denoiser, Settings]) -> dict[str, float]:
        """The figures of `drift`. The teacher is sampled at the first call only."""
        self.teacher = self.of(*teacher) if self.teacher is None else self.teacher
        return drift(self.teacher, self.of(*student))
