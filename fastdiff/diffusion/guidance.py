"""Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is ours less 1): u + w (c - u).

c is the network's answer with the prompt, u the answer without it. At a fixed (x_t, t) x0, eps and v are linear in each other, so
guiding any of them guides all.
"""

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """u + w (c - u) for answers (B, C, h, w) and a guidance `w` that broadcasts over them: a scalar or (B, 1, 1, 1)."""
    return uncond + w * (cond - uncond)


def guide_fused(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """The same in one kernel, for a scalar `w`; it may differ from `guide` in the last bit."""
    return torch.lerp(uncond, cond, w)
