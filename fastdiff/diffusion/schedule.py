"""The noise schedule: x_t = alpha_t x0 + sigma_t eps, and every conversion between x0, eps and v.

Shapes: B batch, C channels, h w latent. Timesteps are integer indices 0..T-1, never floats.
Everything is computed in fp32: at t = 999 of Stable Diffusion's schedule an error in eps becomes 14.6 times as large in x0.
"""

from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.diffusion.guidance import guide

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Prediction(NamedTuple):
    """A network's prediction, expressed both as the clean sample x0 and as the noise eps; each (B, C, h, w) in fp32."""

    x0: Tensor
    eps: Tensor

    def guide(self, uncond: "Prediction", guidance: float | Tensor) -> "Prediction":
        """Classifier-free guidance u + w (c - u), where this prediction is c and `guidance`, a scalar or (B,), is w.

        The formula is in diffusion/guidance.py.
        """
        w = per_sample(guidance, self.x0) if isinstance(guidance, Tensor) else guidance
        return Prediction(guide(self.x0, uncond.x0, w), guide(self.eps, uncond.eps, w))


def timesteps_from(start: int, num_steps: int) -> tuple[int, ...]:
    """Descending timesteps: `start`, and the others evenly below it. From T - 1 they are those of "trailing" spacing.

    ValueError where fewer than `num_steps` timesteps lie between 0 and `start`.
    """
    if not 1 <= num_steps <= start + 1:
        raise ValueError(f"start {start}: it has room for 1 to {start + 1} steps, not for {num_steps}")
    return tuple(round((start + 1) * (num_steps - k) / num_steps) - 1 for k in range(num_steps))


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """Reshape a scalar or (B,) `value` so that it broadcasts over `like` (B, ...)."""
    return value.reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim else value


class NoiseSchedule(nn.Module):
    """The noise levels alpha_t and sigma_t of T timesteps, as fp32 buffers (T,); x_t = alpha_t x0 + sigma_t eps.

    alpha^2 + sigma^2 = 1, except for schedules made by `karras`. `alphas_cumprod` (T,) holds alpha^2.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt().float(), persistent=False)

    @classmethod
    def karras(cls, steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> "NoiseSchedule":
        """A variance-exploding schedule: alpha = 1, and sigma rises from `sigma_min` to `sigma_max` (Karras 2022, eq. 5).

        It serves pixel models of your own, which take the index of a level as the timestep. Stable Diffusion never uses it.
        """
        ramp, low, high = torch.linspace(0, 1, steps, dtype=torch.float64), sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        schedule = cls(torch.ones(steps))
        schedule.sigma = ((low + ramp * (high - low)) ** rho).float()
        return schedule

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """Build the schedule that a diffusers scheduler config describes.

        `rescale_betas_zero_snr` applies Lin et al. 2024, algorithm 1. ValueError for EDM and flow matching schedulers, and for
        beta schedules other than linear and scaled_linear.
        """
        name = config.get("_class_name", "")
        if "Flow" in name or "EDM" in name or config.get("sigma_data") is not None:
            raise ValueError(f"scheduler {name or config}: EDM and flow-matching checkpoints have no alpha/sigma schedule")
        steps = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
        else:
            raise ValueError(f"beta_schedule {kind!r} is not supported: linear or scaled_linear")
        if config.get("rescale_betas_zero_snr"):
            root = torch.cumprod(1 - betas, 0).sqrt()
            rescaled = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
            betas = 1 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])
        return cls(torch.cumprod(1 - betas, 0))

    def __len__(self) -> int:
        return len(self.alpha)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise (alpha = 0)."""
        return self.alpha[-1].item() == 0

    def off_zero(self) -> "NoiseSchedule":
        """Return the schedule, or a copy whose last alpha is 2^-12 where it is 0: with it log SNR is finite.

        diffusers' Euler and DPM-Solver++ do so. DPM-Solver++ would have no second-order term after an infinite step in log SNR.
        """
        if not self.zero_terminal_snr:
            return self
        copy = deepcopy(self)
        copy.alpha[-1], copy.sigma[-1] = 2**-12, (1 - 2**-24) ** 0.5
        return copy

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at timesteps `t` (scalar or (B,)), shaped to broadcast over `like` (B, ...)."""
        return per_sample(self.at(self.alpha, t), like), per_sample(self.at(self.sigma, t), like)

    def at(self, levels: Tensor, t: Tensor) -> Tensor:
        """The values of `levels` (T,) at timesteps `t`, in the shape of `t`.

        `levels[t]` would read a `t` without dimensions back from the device, and wait for the device's work.
        """
        t = t.to(levels.device)
        return levels[t.reshape(-1)].reshape(t.shape)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noised sample x_t = alpha_t x0 + sigma_t eps in fp32; `x0` and `eps` are (B, C, h, w), `t` is a scalar or (B,)."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0.float() + sigma * eps.float()

    def predict(self, out: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Prediction:
        """Convert a network's raw output `out` (B, C, h, w) at `x_t` and `t` into x0 and eps.

        `kind` says what the network outputs: epsilon is eps, sample is x0, v_prediction is v = alpha eps - sigma x0
        (Salimans & Ho 2022). ValueError for any other.
        """
        out, x_t = out.float(), x_t.float()
        alpha, sigma = self.coefficients(t, x_t)
        if kind == "epsilon":
            return Prediction((x_t - sigma * out) / alpha, out)
        if kind == "v_prediction":
            return Prediction(alpha * x_t - sigma * out, alpha * out + sigma * x_t)
        if kind == "sample":
            return Prediction(out, (x_t - alpha * out) / sigma)
        raise ValueError(f"prediction type {kind!r} is not supported: epsilon, v_prediction or sample")

    def output(self, p: Prediction, t: Tensor, kind: PredictionType) -> Tensor:
        """The raw output (B, C, h, w), in fp32, by which a network of this `kind` expresses prediction `p`: `predict` reversed.

        For the true x0 and eps, it is the network's training target. ValueError for an unknown kind.
        """
        if kind == "epsilon":
            return p.eps.float()
        if kind == "sample":
            return p.x0.float()
        if kind != "v_prediction":
            raise ValueError(f"prediction type {kind!r} is not supported: epsilon, v_prediction or sample")
        alpha, sigma = self.coefficients(t, p.x0)
        return alpha * p.eps.float() - sigma * p.x0.float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio alpha^2 / sigma^2 at timesteps `t`, in the shape of `t`."""
        return (self.at(self.alpha, t) / self.at(self.sigma, t)).square()

    def noise_scale(self, t: Tensor) -> Tensor:
        """Noise level sigma / alpha at timesteps `t`, in the unit of Karras 2022; infinite where alpha = 0.

        A negative timestep is the clean sample, as in `samplers.jump`: its noise level is 0.
        """
        at = t.clamp(min=0)
        return torch.where(t.to(self.sigma.device) < 0, 0.0, self.at(self.sigma, at) / self.at(self.alpha, at))

    def boundary(self, t: Tensor, like: Tensor, sigma_data: float = 0.5, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
        """Coefficients (c_skip, c_out) of the consistency function f = c_skip x_t + c_out x0, shaped to broadcast over `like`.

        Luo 2023, section 4.1, computed as diffusers' LCMScheduler does. At t = 0 they are (1, 0), so that f is x_t itself.
        """
        tau = scaling * t.to(like.device).float()
        c_skip = sigma_data**2 / (tau**2 + sigma_data**2)
        c_out = tau / (tau**2 + sigma_data**2).sqrt()
        return per_sample(c_skip, like), per_sample(c_out, like)

    def ddim_grid(self, n: int = 50) -> Tensor:
        """LCM's distillation grid: ascending timesteps (n,) k - 1, 2k - 1, ..., nk - 1 with k = T // n."""
        skip = len(self) // n
        return torch.arange(1, n + 1) * skip - 1

    def grid(
        self, num_steps: int, spacing: Literal["trailing", "leading", "linspace", "lcm"] = "trailing", offset: int = 1
    ) -> Tensor:
        """Descending sampling timesteps (num_steps,), as diffusers' schedulers compute them for the `spacing`.

        `offset` is the scheduler's `steps_offset`, used by "leading" alone. "lcm" takes evenly spread members of the 50-step
        distillation grid, because a consistency model was trained on no other timesteps. ValueError for an unknown spacing, for
        `num_steps` outside 1..T, and above 50 with "lcm".
        """
        total = len(self)
        if not 1 <= num_steps <= total:
            raise ValueError(f"`num_steps` must be between 1 and {total}, not {num_steps}")
        if spacing == "trailing":
            steps = torch.arange(total, 0, -total / num_steps, dtype=torch.float64)[:num_steps].round() - 1
        elif spacing == "leading":
            steps = (torch.arange(num_steps, dtype=torch.float64) * (total // num_steps)).round().flip(0) + offset
        elif spacing == "linspace":
            steps = torch.linspace(0, total - 1, num_steps, dtype=torch.float64).round().flip(0)
        elif spacing == "lcm":
            origin = self.ddim_grid(50).flip(0)
            if num_steps > len(origin):
                raise ValueError(f"`num_steps` must be at most {len(origin)} for a consistency model, not {num_steps}")
            steps = origin[(torch.arange(num_steps, dtype=torch.float64) * len(origin) / num_steps).floor().long()]
        else:
            raise ValueError(f"timestep spacing {spacing!r} is not supported: trailing, leading, linspace or lcm")
        return steps.long().clamp(0, total - 1)
