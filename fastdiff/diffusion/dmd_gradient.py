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
