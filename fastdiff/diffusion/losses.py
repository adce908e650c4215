"""Losses, each a scalar from tensors; fp32 inside. Shapes: B batch, C channels, h w latent."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, PredictionType, per_sample

Weighting = Literal["dmd", "eq8", "none", "sigma2"]


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of weight (sqrt(d^2 + c^2) - c) over all elements (Song & Dhariwal 2023, eq. 15; elementwise, as LCM trains)."""
    d = a.float() - b.float()
    return (weight * ((d.square() + c * c).sqrt() - c)).mean()


def squared(a: Tensor, b: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of weight d^2 over all elements."""
    return (weight * (a.float() - b.float()).square()).mean()


CONSISTENCY = {"huber": pseudo_huber, "l2": lambda a, b, c, weight: squared(a, b, weight)}


def denoising(schedule: NoiseSchedule, kind: PredictionType, p: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Mean squared error in what the network itself predicts (Ho 2020, eq. 14): the loss that it was trained with."""
    return squared(schedule.output(p, t, kind), schedule.output(Prediction(x0, eps), t, kind))


class Noised(NamedTuple):
    """Samples x (B, C, h, w) at noise levels t (B,): x_t = alpha_t x + sigma_t eps."""

    x: Tensor
    eps: Tensor
    t: Tensor
    x_t: Tensor


@torch.no_grad()
def score_difference(
    schedule: NoiseSchedule, seen: Noised, real: Prediction, fake: Prediction, weighting: Weighting = "dmd"
) -> Tensor:
    """The direction g (B, C, h, w) in which samples x are too much like the fake and too little like the real distribution,

    from what any two denoisers say of the same x_t and t; no gradients.

        dmd     (m_fake - m_real) / mean|x - m_real|    per sample, m = x0 prediction (Yin 2023, algorithm 2)
        eq8     alpha_t times that                      the paper's equation 8
        none    m_fake - m_real                         Diff-Instruct (Luo 2023)
        sigma2  sigma_t^2 (eps_real - eps_fake)         score distillation's weight (Wang 2023)

    m_fake - m_real = sigma_t / alpha_t (eps_real - eps_fake): the difference of scores, up to weight.
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


def along(x: Tensor, g: Tensor) -> Tensor:
    """A loss whose gradient at x is g / numel(x): 1/2 mean (x - stop(x - g))^2 (Yin 2023, algorithm 2). Its value says little."""
    return 0.5 * squared(x, (x.float() - g).detach())


def gan_fake(logits: Tensor) -> Tensor:
    """softplus(D): what a discriminator loses on generated samples (Goodfellow 2014, non-saturating pair)."""
    return F.softplus(logits.float()).mean()


def gan_real(logits: Tensor) -> Tensor:
    """softplus(-D): what a discriminator loses on real samples, and a generator on its own."""
    return F.softplus(-logits.float()).mean()


def ssim(a: Tensor, b: Tensor, *, span: float = 1.0, window: int = 11, spread: float = 1.5) -> Tensor:
    """Structural similarity (B,) of (B, C, H, W), mean over channels and places (Wang 2004, eq. 13); values lie within `span`.

    Gaussian window of 11 places and 1.5 spread, over the places where it lies inside; on smaller maps the largest that does.
    """
    side = min(window, *a.shape[-2:])
    g = torch.exp(-((torch.arange(side, device=a.device) - (side - 1) / 2) ** 2) / (2 * spread**2))
    kernel = torch.outer(g / g.sum(), g / g.sum())[None, None]

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x.flatten(0, 1)[:, None], kernel)

    a, b = a.float(), b.float()
    m_a, m_b = mean(a), mean(b)
    v_a, v_b, v_ab = mean(a * a) - m_a * m_a, mean(b * b) - m_b * m_b, mean(a * b) - m_a * m_b
    c_1, c_2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    found = (2 * m_a * m_b + c_1) * (2 * v_ab + c_2) / ((m_a**2 + m_b**2 + c_1) * (v_a + v_b + c_2))
    return found.reshape(len(a), -1).mean(1)


def features(mine: list[Tensor], goals: list[Tensor], *, normalised: bool = True) -> Tensor:
    """Sum over feature maps of the mean squared distance (Kim 2023, BK-SDM, eq. 3).

    [Ours.] In units of the goal's variance every map counts alike; in the raw sum the widest outweighs all.
    """
    unit = (lambda goal: goal.float().var().clamp(min=1e-6)) if normalised else lambda goal: 1.0
    return sum(squared(f, goal) / unit(goal) for f, goal in zip(mine, goals, strict=True))


def structure(a: Tensor, b: Tensor, c: float = 1e-6) -> Tensor:
    """How alike feature maps (B, C, H, W) are, (B,): SSIM over whole maps, mean over channels (Ding 2020, DISTS, eq. 3 and 4).

        (2 m_a m_b + c) / (m_a^2 + m_b^2 + c)    and    (2 cov + c) / (v_a + v_b + c),    half each

    1 where a is b; finite, with its gradient, on constant maps. Moments are central: E[xy] - E[x]E[y] cancels too much.
    """
    a, b = a.float(), b.float()
    m_a, m_b = a.mean((2, 3)), b.mean((2, 3))
    d_a, d_b = a - m_a[..., None, None], b - m_b[..., None, None]
    v_a, v_b, cov = (x.mean((2, 3)) for x in (d_a.square(), d_b.square(), d_a * d_b))
    luminance = (2 * m_a * m_b + c) / (m_a.square() + m_b.square() + c)
    return (0.5 * luminance + 0.5 * (2 * cov + c) / (v_a + v_b + c)).mean(1)
