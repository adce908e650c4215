"""The gradient of distribution matching distillation: the difference of two scores at the same noise (Yin 2023, equation 7)."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, per_sample

Weighting = Literal["dmd", "eq8", "none", "sigma2"]


class Noised(NamedTuple):
    """Samples `x` and what noise makes of them, x_t = alpha_t x + sigma_t eps. All are (B, C, h, w), but t is (B,)."""

    x: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor


def diffused_on(schedule: NoiseSchedule, p: Prediction, start: Tensor, t: Tensor, noise: Tensor) -> Noised:
    """Take the point of a deterministic trajectory at timesteps `start`, and add fresh noise up to timesteps `t` >= `start`.

        x_start = alpha_start x0 + sigma_start eps                                                         x0, eps of `p`
        x_t     = r x_start + sqrt(sigma_t^2 - (r sigma_start)^2) noise,    r = alpha_t / alpha_start      Luo 2025 (TDM)

    It is the forward process from `start` to t. `start` and `t` are (B,), `noise` is (B, C, h, w); where `start` is negative the
    point is x0 itself, and x_t is `schedule.add_noise(x0, noise, t)`. The result names x0 as the sample, and as `eps` the whole
    noise in x_t, that of the trajectory and the fresh one together; so x_t = alpha_t x + sigma_t eps holds here too.
    """
    alpha, sigma = schedule.coefficients(t, p.x0)
    kept = alpha * per_sample(schedule.noise_scale(start), p.x0)  # r sigma_start
    eps = (kept * p.eps.float() + (sigma.square() - kept.square()).clamp(min=0).sqrt() * noise) / sigma
    return Noised(p.x0, eps, t, alpha * p.x0.float() + sigma * eps)


@torch.no_grad()
def score_difference(
    schedule: NoiseSchedule, seen: Noised, real: Prediction, fake: Prediction, weighting: Weighting = "dmd"
) -> Tensor:
    """Distribution matching gradient g (B, C, h, w): subtracting it from samples x makes them more like the real distribution.

    `real` and `fake` are the predictions of two denoisers, one of each distribution, for the same x_t and t. The result
    carries no autograd graph. `weighting` chooses the form:

        dmd     (m_fake - m_real) / mean|x - m_real|    per sample, m = x0 prediction (Yin 2023, algorithm 2)
        eq8     alpha_t times that                      Yin 2023, equation 8
        none    m_fake - m_real                         Diff-Instruct (Luo 2023)
        sigma2  sigma_t^2 (eps_real - eps_fake)         the weight of score distillation (Wang 2023)

    All are the difference of the two scores times a weight, since m_fake - m_real = sigma_t / alpha_t (eps_real - eps_fake).
    """
    alpha, sigma = schedule.coefficients(seen.t, seen.x)
    if weighting == "sigma2":
        return sigma.square() * (real.eps - fake.eps)
    difference = fake.x0 - real.x0
    if weighting == "none":
        return difference
    scale = (seen.x.float() - real.x0).abs().flatten(1).mean(1).clamp(min=1e-6)
    g = difference / per_sample(scale, seen.x)
    return g if weighting == "dmd" else alpha * g
