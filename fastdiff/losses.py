"""Losses, each a scalar from tensors; fp32 inside. Shapes: B batch, C channels, h w latent."""

from torch import Tensor


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c over all elements (Song & Dhariwal 2023, eq. 15; elementwise, as LCM trains)."""
    d = a.float() - b.float()
    return ((d.square() + c * c).sqrt() - c).mean()


def squared(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all elements."""
    return (a.float() - b.float()).square().mean()


CONSISTENCY = {"huber": pseudo_huber, "l2": lambda a, b, c=0.0: squared(a, b)}
