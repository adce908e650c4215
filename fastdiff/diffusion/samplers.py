"""Samplers as plain functions: (denoise, x, grid, noise) -> x0.

`denoise(x_t, t)` is any callable that returns a Prediction. `x` is the initial noise (B, C, h, w). `noise()` draws fresh
standard normal noise of that shape; only the stochastic samplers call it. The result is the sample x0 (B, C, h, w).
Each sampler gives the same result as the diffusers scheduler that it names (tests/test_samplers.py checks this).
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
    """The timesteps of one sampling run, and the settings of the checkpoint's scheduler that affect its first and last step."""

    schedule: NoiseSchedule
    t: Tensor  # (n,) descending
    final_index: int | None = 0  # timestep where the last DDIM step ends (set_alpha_to_one=False); None: on x0
    start_scale: bool = False  # whether Euler scales the first noise, as its scheduler does on trailing and linspace grids
    eta: float = 0.0  # TCD's gamma: 0 is deterministic, 1 is LCM
    explicit: bool = False  # whether the timesteps are not those of a DDIM spacing: DDIM then steps from each to the next

    def __len__(self) -> int:
        return len(self.t)


def jump(schedule: NoiseSchedule, p: Prediction, s: Tensor | int | None) -> Tensor:
    """The deterministic DDIM step to timestep `s`: x_s = alpha_s x0 + sigma_s eps (Song 2020, eq. 12, eta 0).

    `s` is a scalar or (B,). Where it is None or negative, the result is x0. Returns (B, C, h, w).
    """
    if s is None:
        return p.x0
    s = torch.as_tensor(s, device=p.x0.device)
    return torch.where(per_sample(s < 0, p.x0), p.x0, schedule.add_noise(p.x0, p.eps, s.clamp(min=0)))


def ddim(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DDIMScheduler with eta 0, which steps by T // n: with some n that is not exactly the grid's next timestep.

    DDIMScheduler takes no explicit timesteps. On an explicit grid every step ends on the grid's next timestep, as with
    EulerDiscreteScheduler, whose step equals DDIM's.
    """
    skip = len(grid.schedule) // len(grid)
    ends = [*grid.t[1:].tolist(), -1] if grid.explicit else [int(t) - skip for t in grid.t]
    for t, s in zip(grid.t, ends, strict=True):
        x = jump(grid.schedule, denoise(x, t), s if s >= 0 else grid.final_index)
    return x


def euler(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """EulerDiscreteScheduler, which ends on x0.

    An Euler step of x / alpha over sigma / alpha is the same as a DDIM step to the next timestep of the grid.
    """
    if grid.start_scale:
        x = x * grid.schedule.sigma[grid.t[0]]
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        x = jump(grid.schedule, denoise(x, t), s)
    return x


# (x, t, s, h, d) -> the next x: from timestep t to s, with the step h in log SNR and the extrapolated x0 `d`
Update = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def multistep(denoise: Denoise, x: Tensor, grid: Grid, update: Update) -> Tensor:
    """The second-order midpoint scheme of DPM-Solver++ (Lu 2022, algorithm 2). The last step is first order."""
    schedule = grid.schedule
    log_snr = (schedule.alpha.double().log() - schedule.sigma.double().log()).float()
    last: tuple[Tensor, Tensor] | None = None  # x0 and h of the step before
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        x0 = denoise(x, t).x0
        if s is None:
            return x0
        h = log_snr[s] - log_snr[t]
        x = update(x, t, s, h, x0 if last is None else x0 + 0.5 * (h / last[1]) * (x0 - last[0]))
        last = x0, h
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPMSolverMultistepScheduler: "dpmsolver++", order 2, midpoint (Lu 2022, algorithm 2)."""
    alpha, sigma = grid.schedule.alpha, grid.schedule.sigma
    return multistep(denoise, x, grid, lambda x, t, s, h, d: sigma[s] / sigma[t] * x - alpha[s] * torch.expm1(-h) * d)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """DPMSolverMultistepScheduler: "sde-dpmsolver++", order 2, midpoint (Lu 2022): DPM++ 2M with fresh noise."""
    alpha, sigma = grid.schedule.alpha, grid.schedule.sigma

    def update(x: Tensor, t: Tensor, s: Tensor, h: Tensor, d: Tensor) -> Tensor:
        fresh = -torch.expm1(-2 * h)
        x = sigma[s] / sigma[t] * torch.exp(-h) * x + alpha[s] * fresh * d
        return x + sigma[s] * fresh.sqrt() * noise()

    return multistep(denoise, x, grid, update)


def lcm(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """LCMScheduler: apply the consistency function, then add fresh noise up to the next timestep (Luo 2023, algorithm 3)."""
    for t, s in zip(grid.t, [*grid.t[1:], None], strict=True):
        c_skip, c_out = grid.schedule.boundary(t, x)
        x0 = c_skip * x + c_out * denoise(x, t).x0
        x = x0 if s is None else grid.schedule.add_noise(x0, noise(), s)
    return x


@torch.no_grad()
def simulate(denoise: Denoise, noise: Tensor, schedule: NoiseSchedule, timesteps: Tensor, k: int) -> Tensor:
    """Run the first `k` steps of a few-step generator and return its input (B, C, h, w) at timesteps[k].

    It starts from pure `noise` (B, C, h, w); each predicted x0 gets fresh noise up to the next of the descending `timesteps`
    (n,). Training on these inputs matches what the generator meets when it samples (Yin 2024, DMD2, section 4.5).
    """
    x = noise
    for t, s in zip(timesteps[:k], timesteps[1 : k + 1], strict=True):
        x = schedule.add_noise(denoise(x, t).x0, torch.randn_like(x), s)
    return x


def tcd(denoise: Denoise, x: Tensor, grid: Grid, noise: Noise) -> Tensor:
    """TCDScheduler: jump to timestep (1 - gamma) s, then add noise from there up to s (Zheng 2024, algorithm 4).

    gamma is `grid.eta`. The last step ends on timestep 0, not on x0.
    """
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
    """A sampler, and the names that go with it."""

    run: Callable[[Denoise, Tensor, Grid, Noise], Tensor]
    stock: str  # the diffusers scheduler that gives the same result
    spacing: str  # the timestep spacing that it works best with, as in NoiseSchedule.grid
    stochastic: bool = False  # whether it draws noise between steps
    off_zero: bool = False  # whether it walks on `NoiseSchedule.off_zero`
    takes_eta: bool = False  # whether eta changes it


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "DDIMScheduler", "trailing"),
    "euler": Solver(euler, "EulerDiscreteScheduler", "trailing", off_zero=True),
    "dpm++": Solver(dpmpp_2m, "DPMSolverMultistepScheduler", "trailing", off_zero=True),
    "dpm++sde": Solver(dpmpp_2m_sde, "DPMSolverMultistepScheduler", "trailing", stochastic=True, off_zero=True),
    "lcm": Solver(lcm, "LCMScheduler", "lcm", stochastic=True),
    "tcd": Solver(tcd, "TCDScheduler", "lcm", stochastic=True, takes_eta=True),
}
