"""Losses, each a scalar from tensors; fp32 inside. Shapes: B batch, C channels, h w latent."""

from torch import Tensor


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of weight (sqrt(d^2 + c^2) - c) over all elements (Song & Dhariwal 2023, eq. 15; elementwise, as LCM trains)."""
    d = a.float() - b.float()
    return (weight * ((d.square() + c * c).sqrt() - c)).mean()


def squared(a: Tensor, b: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """Mean of weight d^2 over all elements."""
    return (weight * (a.float() - b.float()).square()).mean()


CONSISTENCY = {"huber": pseudo_huber, "l2": lambda a, b, c, weight: squared(a, b, weight)}
