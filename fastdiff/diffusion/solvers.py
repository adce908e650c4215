"""Samplers as plain functions of a denoiser: (denoise, x, grid, noise) -> x0.

A denoiser is any callable (x_t, t) -> Prediction. `noise()` draws a fresh (B, C, h, w) standard normal; only the
stochastic samplers call it. Each sampler equals the diffusers scheduler it names (tests/test_solvers.py).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, per_sample

Denoise = Callable[[Tensor, Tensor], Prediction]
Noise = Callable[[], Tensor]


@dataclass(frozen=True)
class Grid:
    """The timesteps of one run, with what the checkpoint's scheduler config says about its ends."""

    schedule: NoiseSchedule
    t: Tensor  # (n,) descending
    final_index: int | None = 0  # the last DDIM step lands on this index (set_alpha_to_one false), or on x0 (None)
    start_scale: bool = False  # EulerDiscreteScheduler starts from sigma_T noise on trailing and linspace grids
    eta: float = 0.0  # TCD's gamma

    def __len__(self) -> int:
        return len(self.t)


def jump(schedule: NoiseSchedule, p: Prediction, s: Tensor | int | None) -> Tensor:
    """x_s = alpha_s x0 + sigma_s eps: the DDIM step (Song 2020, eq. 12, eta 0) from any t; s None or -1 lands on x0."""
    if s is None:
        return p.x0
    s = torch.as_tensor(s, device=p.x0.device)
    return torch.where(per_sample(s < 0, p.x0), p.x0, schedule.add_noise(p.x0, p.eps, s.clamp(min=0)))


def ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DDIMScheduler, eta 0. It steps by T // n, which on uneven grids is not quite the next timestep."""
    skip = len(grid.schedule) // len(grid)
    for t in grid.t:
        s = int(t) - skip
        x = jump(grid.schedule, denoise(x, t), s if s >= 0 else grid.final_index)
    return x


def euler(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """EulerDiscreteScheduler: Euler in x / alpha over sigma / alpha is the DDIM step to the next timestep; ends on x0."""
    if grid.start_scale:
        x = x * grid.schedule.sigma[grid.t[0]]
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        x = jump(grid.schedule, denoise(x, t), s)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPMSolverMultistepScheduler, "dpmsolver++" of order 2, midpoint (Lu 2022, alg. 2); the last step is first order."""
    schedule = grid.schedule
    log_snr = (schedule.alpha.double().log() - schedule.sigma.double().log()).float()
    last_x0, last_h = None, None
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        x0 = denoise(x, t).x0
        if s is None:
            return x0
        h = log_snr[s] - log_snr[t]
        d = x0 if last_x0 is None else x0 + 0.5 * (h / last_h) * (x0 - last_x0)
        x = schedule.sigma[s] / schedule.sigma[t] * x - schedule.alpha[s] * torch.expm1(-h) * d
        last_x0, last_h = x0, h
    return x


def lcm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """LCMScheduler: the consistency function, then fresh noise to the next timestep (Luo 2023, alg. 3)."""
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        c_skip, c_out = grid.schedule.boundary(t, x)
        x0 = c_skip * x + c_out * denoise(x, t).x0
        x = x0 if s is None else grid.schedule.add_noise(x0, noise(), s)
    return x


@torch.no_grad()
def simulate(denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, timesteps: Tensor, k: int) -> Tensor:
    """What a few-step generator meets at timesteps[k] when it samples: from pure noise through its own first k steps, each

    x0 noised afresh to the next timestep (Yin 2024, DMD2 section 4.5).
    """
    x = noise
    for t, s in zip(timesteps[:k], timesteps[1 : k + 1], strict=True):
        x = schedule.add_noise(denoise(x, t).x0, torch.randn_like(x), s)
    return x


def tcd(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """TCDScheduler (Zheng 2024, alg. 4): jump to (1 - gamma) s, re-noise from there to s; the last lands on index 0."""
    schedule = grid.schedule
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        target = int((1 - grid.eta) * (0 if s is None else int(s)))
        x = jump(schedule, denoise(x, t), target)
        if grid.eta > 0 and s is not None:
            ratio = (schedule.alpha[s] / schedule.alpha[target]) ** 2
            x = ratio.sqrt() * x + (1 - ratio).sqrt() * noise()
    return x


@dataclass(frozen=True)
class Solver:
    """A sampler, the diffusers scheduler that it equals, and the grid that this one is best used with."""

    run: Callable[[Denoise, Tensor, Grid, Noise], Tensor]
    stock: str
    spacing: str
    stochastic: bool = False


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "DDIMScheduler", "trailing"),
    "euler": Solver(euler, "EulerDiscreteScheduler", "trailing"),
    "dpm++": Solver(dpmpp_2m, "DPMSolverMultistepScheduler", "trailing"),
    "lcm": Solver(lcm, "LCMScheduler", "lcm", stochastic=True),
    "tcd": Solver(tcd, "TCDScheduler", "lcm", stochastic=True),
}
