"""Distribution matching beyond checkpoints: any two denoisers, in pixels or on the plane.

    python examples/dmd_pixel.py plane     a 2-D Gaussian mixture with its exact score; seconds
    python examples/dmd_pixel.py emoji     class-conditional 16 px pictures, EDM's noise levels: teacher and student; minutes

What DMD needs of a model is a `Prediction` (x0, eps) for (x_t, t). `fastdiff.methods.dmd.matching_gradient` does the rest; the two
functions below are the whole of algorithm 1 for a model of your own.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff import losses
from fastdiff.methods.dmd import matching_gradient
from fastdiff.schedule import NoiseSchedule, Prediction

STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


# ---- the plane


class Mixture:
    """Gaussians of one spread: the exact denoiser E[x0 | x_t] of their mixture."""

    def __init__(self, means: Tensor, weights: Tensor, spread: float, schedule: NoiseSchedule) -> None:
        self.means, self.weights, self.spread, self.schedule = means, weights, spread, schedule

    def sample(self, n: int) -> Tensor:
        which = torch.multinomial(self.weights, n, replacement=True)
        return self.means[which] + self.spread * torch.randn(n, 2)

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = self.schedule.coefficients(t, x_t)
        variance = alpha**2 * self.spread**2 + sigma**2  # of x_t given its Gaussian, (B, 1)
        apart = x_t[:, None] - alpha[..., None] * self.means  # (B, K, 2)
        share = (self.weights.log() - apart.square().sum(2) / (2 * variance)).softmax(1)  # (B, K)
        each = self.means + (alpha * self.spread**2 / variance)[..., None] * apart
        x0 = (share[..., None] * each).sum(1)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Exact mean (2,) and covariance (2, 2)."""
        mean = self.weights @ self.means
        apart = self.means - mean
        return mean, (self.weights[:, None] * apart).T @ apart + self.spread**2 * torch.eye(2)


class Plane(nn.Module):
    """A small network on the plane; with a schedule a denoiser of it, without one a generator."""

    def __init__(self, schedule: NoiseSchedule | None = None, width: int = 128) -> None:
        super().__init__()
        self.schedule, ins = schedule, 2 if schedule is None else 2 + 16
        self.layers = nn.Sequential(
            nn.Linear(ins, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor | Prediction:
        if t is None:
            return x + self.layers(x)
        angle = t[:, None] / len(self.schedule) * torch.pi * 2 ** torch.arange(8)
        out = self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))
        return self.schedule.predict(out, x, t, "epsilon")


def match(
    real, schedule: NoiseSchedule, generator: nn.Module, fake: nn.Module | None, *, steps: int, batch: int, fake_steps: int = 3
) -> None:
    """Algorithm 1 of DMD without its regression: train the generator to the distribution that `real` denoises."""
    students = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    critics = torch.optim.AdamW(fake.parameters(), lr=2e-3, betas=(0.5, 0.99)) if fake else None
    decay = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in (students, critics) if o]
    for _ in range(steps):
        for _ in range(fake_steps if critics else 0):
            x = generator(torch.randn(batch, 2)).detach()
            t, eps = torch.randint(len(schedule), (batch,)), torch.randn_like(x)
            loss = losses.denoising(schedule, "epsilon", fake(schedule.add_noise(x, eps, t), t), x, eps, t)
            critics.zero_grad()
            loss.backward()
            critics.step()
        x = generator(torch.randn(batch, 2))
        t = torch.randint(20, 981, (batch,))
        # Without a fake score the sample itself stands for what it is told apart from: mode seeking, and collapse.
        scores = fake or (lambda x_t, t, x=x.detach(): Prediction(x, x_t))
        g, _ = matching_gradient(schedule, real, scores, x.detach(), t)
        students.zero_grad()
        losses.along(x, g).backward()
        students.step()
        for schedule_of in decay:
            schedule_of.step()


def plane(steps: int = 1500, batch: int = 512, *, with_fake: bool = True, seed: int = 0) -> tuple[Mixture, Tensor]:
    """The mixture and 20,000 one-step samples of the student that was matched to it."""
    torch.manual_seed(seed)
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    means = torch.tensor([[1.2, 0.3], [-0.6, 1.0], [-0.3, -0.9]])
    mixture = Mixture(means, torch.tensor([0.5, 0.3, 0.2]), 0.25, schedule)
    generator, fake = Plane(), Plane(schedule) if with_fake else None
    match(mixture, schedule, generator, fake, steps=steps, batch=batch)
    with torch.no_grad():
        return mixture, generator(torch.randn(20_000, 2))
