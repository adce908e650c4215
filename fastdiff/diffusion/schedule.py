"""The noise schedule: x_t = alpha_t x0 + sigma_t eps, and every conversion between x0, eps and v.

Shapes: B batch, C channels, h w latent. Timesteps are integer indices 0..T-1, never floats.
All of it runs in fp32: at t = 999 of Stable Diffusion's schedule an error of eps is multiplied by 14.6 in x0.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction", "sample"]


class Prediction(NamedTuple):
    """One network answer in both coordinates; each (B, C, h, w), fp32."""

    x0: Tensor
    eps: Tensor

    def guide(self, uncond: "Prediction", guidance: float | Tensor) -> "Prediction":
        """Classifier-free guidance u + w (c - u) (Ho & Salimans 2022, eq. 6, with their w + 1 as w).

        x0 is linear in eps at a fixed (x_t, t), so both coordinates are guided alike and stay consistent.
        """
        w = per_sample(torch.as_tensor(guidance, device=self.x0.device), self.x0)
        return Prediction(uncond.x0 + w * (self.x0 - uncond.x0), uncond.eps + w * (self.eps - uncond.eps))


def per_sample(value: Tensor, like: Tensor) -> Tensor:
    """A scalar or (B,) value, shaped to multiply `like` (B, ...)."""
    return value.reshape(-1, *(1,) * (like.ndim - 1)) if value.ndim else value


class NoiseSchedule(nn.Module):
    """alpha_t and sigma_t as (T,) fp32 buffers; alpha^2 + sigma^2 = 1, but for `karras`."""

    alpha: Tensor
    sigma: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - alphas_cumprod).sqrt().float(), persistent=False)

    @classmethod
    def karras(cls, steps: int = 1000, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> "NoiseSchedule":
        """Variance-exploding levels, alpha = 1 and sigma rising from sigma_min to sigma_max (Karras 2022, eq. 5).

        For models in pixels, whose timestep is an index into these; checkpoints have none.
        """
        ramp, low, high = torch.linspace(0, 1, steps, dtype=torch.float64), sigma_min ** (1 / rho), sigma_max ** (1 / rho)
        schedule = cls(torch.ones(steps))
        schedule.sigma = ((low + ramp * (high - low)) ** rho).float()
        return schedule

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "NoiseSchedule":
        """From a diffusers scheduler config; sigma-space (EDM) and flow schedules raise ValueError.

        `rescale_betas_zero_snr` applies Lin et al. 2024, algorithm 1.
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
        return self.alpha[-1].item() == 0

    def coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, shaped to multiply `like`; t is a scalar or (B,)."""
        t = t.to(self.alpha.device)
        return per_sample(self.alpha[t], like), per_sample(self.sigma[t], like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps, fp32."""
        alpha, sigma = self.coefficients(t, x0)
        return alpha * x0.float() + sigma * eps.float()

    def predict(self, out: Tensor, x_t: Tensor, t: Tensor, kind: PredictionType) -> Prediction:
        """Read a network's raw output (B, C, h, w) as x0 and eps.

        epsilon: eps = out; v (Salimans & Ho 2022): v = alpha eps - sigma x0; sample: x0 = out.
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
        """What a network of that kind says where it means p: the inverse of `predict`, and its training target; fp32."""
        if kind == "epsilon":
            return p.eps.float()
        if kind == "sample":
            return p.x0.float()
        if kind != "v_prediction":
            raise ValueError(f"prediction type {kind!r} is not supported: epsilon, v_prediction or sample")
        alpha, sigma = self.coefficients(t, p.x0)
        return alpha * p.eps.float() - sigma * p.x0.float()

    def snr(self, t: Tensor) -> Tensor:
        """Signal to noise alpha^2 / sigma^2."""
        t = t.to(self.alpha.device)
        return (self.alpha[t] / self.sigma[t]).square()

    def noise_scale(self, t: Tensor) -> Tensor:
        """sigma / alpha: the noise on x0 as variance-exploding models count it (Karras 2022); infinite where alpha = 0."""
        t = t.to(self.alpha.device)
        return self.sigma[t] / self.alpha[t]

    def boundary(self, t: Tensor, like: Tensor, sigma_data: float = 0.5, scaling: float = 10.0) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of the consistency function f = c_skip x_t + c_out x0 (Luo 2023, sec. 4.1; LCMScheduler's form)."""
        tau = scaling * t.to(like.device).float()
        c_skip = sigma_data**2 / (tau**2 + sigma_data**2)
        c_out = tau / (tau**2 + sigma_data**2).sqrt()
        return per_sample(c_skip, like), per_sample(c_out, like)

    def ddim_grid(self, n: int = 50) -> Tensor:
        """Ascending (n,) timesteps k - 1, 2k - 1, ..., T - 1 with k = T // n: the distillation grid of LCM."""
        skip = len(self) // n
        return torch.arange(1, n + 1) * skip - 1

    def grid(
        self, num_steps: int, spacing: Literal["trailing", "leading", "linspace", "lcm"] = "trailing", offset: int = 1
    ) -> Tensor:
        """Descending (num_steps,) sampling timesteps, as diffusers' schedulers of that spacing compute them.

        `offset` is the scheduler's `steps_offset` (leading only). "lcm" takes evenly spread members of the
        50-step distillation grid, the only timesteps a consistency model was trained on; more than 50 raise ValueError.
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
