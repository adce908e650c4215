"""Loss functions and the terms they are made of, computed in fp32.

Shapes: B batch, C channels, H W pixels, h w latent.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.diffusion.dmd_gradient import Noised as Noised
from fastdiff.diffusion.dmd_gradient import diffused_on as diffused_on
from fastdiff.diffusion.dmd_gradient import score_difference as score_difference
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, PredictionType


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001, weight: Tensor | float = 1.0) -> Tensor:
    """Pseudo-Huber loss: the mean over all elements of weight (sqrt(d^2 + c^2) - c), where d = a - b.

    `a`, `b` and `weight` have any shapes that broadcast together; the result is a scalar. Song & Dhariwal 2023, eq. 15, but
    for each element instead of each sample, as LCM's training code has it.
    """
    d = a.float() - b.float()
    return (weight * ((d.square() + c * c).sqrt() - c)).mean()


def squared(a: Tensor, b: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Weighted squared error: the mean over all elements of weight (a - b)^2, a scalar. The shapes must broadcast."""
    return (weight * (a.float() - b.float()).square()).mean()


# The distances between two predictions that consistency methods train with, by the name of the option.
CONSISTENCY = {"huber": pseudo_huber, "l2": lambda a, b, c, weight: squared(a, b, weight)}


def denoising(schedule: NoiseSchedule, kind: PredictionType, p: Prediction, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of a prediction `p`, in the quantity (eps, v or x0) that a network of this `kind` outputs.

    This is the loss that diffusion models are pretrained with (Ho 2020, eq. 14). `x0` and `eps`, both (B, C, h, w), are the true
    sample and noise at timesteps `t` (B,).
    """
    return squared(schedule.output(p, t, kind), schedule.output(Prediction(x0, eps), t, kind))


def along(x: Tensor, g: Tensor) -> Tensor:
    """A loss whose gradient with respect to `x` is g / numel(x), for `x` and `g` of the same shape.

    It is 1/2 mean (x - stop(x - g))^2 (Yin 2023, algorithm 2). The value, 1/2 mean g^2, is no measure of quality.
    """
    return 0.5 * squared(x, (x.float() - g).detach())


def gan_fake(logits: Tensor) -> Tensor:
    """Discriminator loss on generated samples: the mean of softplus(D) (Goodfellow 2014). `logits` have any shape."""
    return F.softplus(logits.float()).mean()


def gan_real(logits: Tensor) -> Tensor:
    """Discriminator loss on real samples: the mean of softplus(-D). `logits` have any shape.

    On generated samples it is the generator's non-saturating loss (Goodfellow 2014).
    """
    return F.softplus(-logits.float()).mean()


def ssim(a: Tensor, b: Tensor, *, span: float = 1.0, window: int = 11, spread: float = 1.5) -> Tensor:
    """Structural similarity (B,) of two images (B, C, H, W), averaged over channels and positions (Wang 2004, eq. 13).

    `span` is the range of the values (maximum less minimum), `window` the side of the Gaussian window in px and `spread` its
    standard deviation in px. The window never leaves the image; on an image smaller than the window, it shrinks to fit.
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
    similarity = (2 * m_a * m_b + c_1) * (2 * v_ab + c_2) / ((m_a**2 + m_b**2 + c_1) * (v_a + v_b + c_2))
    return similarity.reshape(len(a), -1).mean(1)


def features(mine: list[Tensor], goals: list[Tensor], *, normalised: bool = True) -> Tensor:
    """Feature distillation loss: the sum over feature maps of the mean squared error (Kim 2023, BK-SDM, eq. 3), a scalar.

    `mine` and `goals` are lists of maps of pairwise equal shapes; ValueError where their lengths differ. [Ours.] With
    `normalised`, each error is divided by the variance of the goal. In the raw sum, the map with the largest values outweighs
    all others.
    """

    def distance(mine: Tensor, goal: Tensor) -> Tensor:
        error = squared(mine, goal)
        return error / goal.float().var().clamp(min=1e-6) if normalised else error

    return sum((distance(f, goal) for f, goal in zip(mine, goals, strict=True)), torch.zeros(()))


def structure(a: Tensor, b: Tensor, c: float = 1e-6) -> Tensor:
    """Similarity (B,) of two feature maps (B, C, H, W), averaged over channels (Ding 2020, DISTS, eq. 3 and 4).

    It is SSIM with one window as large as the map; per channel, half of each of these two terms, of means m and variances v:

        (2 m_a m_b + c) / (m_a^2 + m_b^2 + c)    and    (2 cov + c) / (v_a + v_b + c)

    The result is 1 where a equals b. Value and gradient are finite on constant maps.
    """
    a, b = a.float(), b.float()
    m_a, m_b = a.mean((2, 3)), b.mean((2, 3))
    # Variances from centred values: E[xy] - E[x]E[y] would lose too many digits.
    d_a, d_b = a - m_a[..., None, None], b - m_b[..., None, None]
    v_a, v_b, cov = (x.mean((2, 3)) for x in (d_a.square(), d_b.square(), d_a * d_b))
    luminance = (2 * m_a * m_b + c) / (m_a.square() + m_b.square() + c)
    return (0.5 * luminance + 0.5 * (2 * cov + c) / (v_a + v_b + c)).mean(1)
