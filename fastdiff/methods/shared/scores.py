"""Two scores whose difference shows in which direction a student's samples are wrong (DMD, Yin 2023; Diff-Instruct, Luo 2023).

    x_t  = alpha_t x + sigma_t eps             one t, one eps, for both
    real = teacher(x_t, t; c, empty; w)        guided, frozen
    fake = fake_score(x_t, t; c)               trained online on the student's samples, not guided
    g    = weight (fake.x0 - real.x0)          the gradient that methods apply to x

The student may be another network than the teacher and the fake score.
"""

from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.schedule import Prediction
from fastdiff.lora import adapters, apply
from fastdiff.lora.file import Lora
from fastdiff.models.denoiser import Denoiser
from fastdiff.training.method import Losses, Method, equation


class Scores(Method):
    """The common part of methods that match distributions. Their configs have `guidance` and `weighting`."""

    fake: Denoiser  # the fake score

    def __init__(self, base: Checkpoint, config: Any) -> None:
        super().__init__(base, config)
        self.guidance: float | Tensor = config.guidance  # of the teacher; a Tensor (T,) has one for each timestep

    @equation("DMD, section 3.2")
    def noised(self, x: Tensor, low: float, high: float) -> Noised:
        """Add noise to samples x (B, C, h, w), at timesteps drawn between the fractions `low` and `high` of T, both included."""
        first, last = (round(part * len(self.schedule)) for part in (low, high))
        t = torch.randint(first, min(last, len(self.schedule) - 1) + 1, (len(x),), device=x.device)
        eps = torch.randn_like(x)
        return Noised(x, eps, t, self.schedule.add_noise(x, eps, t))

    @equation("DMD, section 3.2")
    @torch.no_grad()
    def real_score(self, seen: Noised, batch: Batch) -> Prediction:
        """Predict with the guided teacher. Called before there is a graph of another role, it adds nothing to their memory."""
        return self.teacher.guided(seen.x_t, seen.t, batch.cond, batch.uncond, self._guidance_at(seen.t))

    def _guidance_at(self, t: Tensor) -> float | Tensor:
        """Return the guidance of the teacher at timesteps t (B,): one number, or one for each row."""
        return self.guidance[t] if isinstance(self.guidance, Tensor) else self.guidance

    @equation("DMD, equation 7 and algorithm 2")
    def gradient(self, seen: Noised, real: Prediction, fake: Prediction) -> Tensor:
        """Compute g (B, C, h, w) from the two scores of x, and log the statistics of x and of both."""
        for name, x0 in (("x", seen.x), ("real", real.x0), ("fake", fake.x0.detach())):
            self.log(**{f"{name}_mean": x0.mean(), f"{name}_std": x0.std()})
        self.log(difference=(fake.x0.detach() - real.x0).abs().mean())
        return losses.score_difference(self.schedule, seen, real, fake, self.config.weighting)

    @equation("DMD, equation 6")
    def denoising(self, seen: Noised, fake: Prediction) -> Losses:
        """Compute the fake score's own training loss on the student's samples."""
        return {"denoising": losses.denoising(self.schedule, self.fake.kind, fake, seen.x, seen.eps, seen.t)}


@torch.no_grad()
def align(fake: Denoiser, student: Denoiser, share: float) -> None:
    """Move the fake score's weights a `share` of the way to the student's, for implicit distribution alignment (SenseFlow).

    With a share of 1 adapters become equal; a smaller one takes for granted that they began as equal ones.
    """
    mine, goal = (
        list(role.net.parameters()) if role.adapter is None else adapters.parameters(role.net, role.adapter)
        for role in (fake, student)
    )
    torch._foreach_lerp_([p.data for p in mine], [p.data for p in goal], share)


def start_from(role: Denoiser, start: Lora) -> None:
    """Initialise a role with a LoRA: copied into the role's adapter, or folded into its weights if it has no adapter."""
    if role.adapter is None:
        apply.fold(role.net, [(start, 1.0)])
    else:
        adapters.start_from(role.net, start, role.adapter)


@torch.no_grad()
def fitted_guidance(teacher: Denoiser, batch: Batch, levels: int = 8) -> Tensor:
    """Fit a guidance w for each timestep, (T,), with which u + w (c - u) best denoises the samples of a batch. [Ours]

    w = E<x0 - u, c - u> / E|c - u|^2, measured at `levels` timesteps and interpolated. At high noise a guided network overshoots
    the pictures that its sampler draws, so a student that is matched to it over-saturates. With this w the student is matched to
    the distribution of the samples.
    """
    total, x0 = len(teacher.schedule), batch.latents
    at = (torch.linspace(0.1414, 0.99, levels).square() * total).long()  # 0.02 T to 0.98 T, denser at low t, where w changes
    fitted = []
    for t in at:
        x_t = teacher.schedule.add_noise(x0, torch.randn_like(x0), t)
        chunks = zip(*(part.split(16) for part in (x_t, torch.arange(len(x0)))), strict=True)
        sums = torch.zeros(2, dtype=torch.float64)
        for noisy, rows in chunks:
            c, u = (teacher(noisy, t, cond[rows]).x0 for cond in (batch.cond, batch.uncond))
            difference = c - u
            sums += torch.stack([((x0[rows] - u) * difference).sum(), difference.square().sum()]).double().cpu()
        fitted.append(sums[0] / sums[1])
    w, every = torch.stack(fitted).float(), torch.arange(total)
    right = torch.searchsorted(at, every).clamp(1, levels - 1)
    part = ((every - at[right - 1]) / (at[right] - at[right - 1])).clamp(0, 1)
    return torch.lerp(w[right - 1], w[right], part).to(x0.device)
