"""How far a student's pictures are from the teacher's in what over-training spoils first; no network judges, any base."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.sampling.sampler import Sampler, at_once
from fastdiff.sampling.settings import Settings

REFERENCE_SEED = 1_000_000  # the drift's and the reference's samples; judged rows start at 0: they never share noise


def departures(latents: Tensor, pixels: Tensor) -> Tensor:
    """What is looked at of each picture, as a row whose mean over pictures tells all of it: (N, 2 C + 4).

    Mean and mean square of every latent channel; contrast, saturation, sharpness and brightness of the picture: its spread,
    its distance from grey, its gradients and its mean. latents (N, C, h, w); pixels (N, 3, H, W) in [-1, 1].
    """
    z, p = latents.flatten(2).double(), pixels.double()
    contrast, saturation = p.flatten(1).std(1), (p.amax(1) - p.amin(1)).mean((1, 2))
    sharpness = p.diff(dim=-1).abs().mean((1, 2, 3)) + p.diff(dim=-2).abs().mean((1, 2, 3))
    picture = torch.stack([contrast, saturation, sharpness, p.mean((1, 2, 3))], 1)
    return torch.cat([z.mean(2), z.square().mean(2), picture], 1)


def drift(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """Of the `departures` of the same prompts and seeds: how far they went apart.

    `drift_mean` and `drift_spread`, the shift of the latents' mean in the teacher's standard deviations and |log| of the ratio
    of their spreads, over channels; `contrast`, `saturation` and `sharpness`, ratios of the pictures'; `drift`, the sum of all
    these departures. `brightness` is a difference, of a range of 2; the latents' mean has it already.
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
    """The drift of a student that is being trained, of a few prompts and seeds that stay the same."""

    def __init__(self, base: Checkpoint, prompts: Sequence[str], resolution_px: int, device: torch.device | str) -> None:
        self.cond, self.uncond = text.encode_unique(base, prompts, device), text.unconditional(base, device=device)
        self.base, self.resolution_px, self.device = base, resolution_px, device
        self.seeds = [REFERENCE_SEED + i for i in range(len(prompts))]
        self.teacher: Tensor | None = None

    def of(self, net: Denoiser, settings: Settings) -> Tensor:
        """The departures of what a network draws."""
        sampler = Sampler.of_networks(self.base, net, self.base.vae, device=self.device)
        n = at_once(self.resolution_px // autoencoder.factor(sampler.vae))
        parts = [
            sampler.pictures(self.cond[i : i + n], self.uncond, self.seeds[i : i + n], settings, self.resolution_px)
            for i in range(0, len(self.seeds), n)
        ]
        return torch.cat([departures(z, p) for z, p in parts])

    def measure(self, teacher: tuple[Denoiser, Settings], student: tuple[Denoiser, Settings]) -> dict[str, float]:
        """The figures; the teacher is sampled at the first call."""
        self.teacher = self.of(*teacher) if self.teacher is None else self.teacher
        return drift(self.teacher, self.of(*student))
