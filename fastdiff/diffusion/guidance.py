"""Classifier-free guidance (Ho & Salimans 2022, eq. 6, whose w is ours less 1): u + w (c - u).

c is the network's answer with the prompt, u the answer without it. At a fixed (x_t, t) x0, eps and v are linear in each other, so
guiding any of them guides all. Rescaling is not linear: it acts on the network's own output (Lin et al. 2024, section 3.4).
"""

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """u + w (c - u) for answers (B, C, h, w) and a guidance `w` that broadcasts over them: a scalar or (B, 1, 1, 1)."""
    return uncond + w * (cond - uncond)


def guide_fused(cond: Tensor, uncond: Tensor, w: float | Tensor) -> Tensor:
    """The same in one kernel, for a scalar `w`; it may differ from `guide` in the last bit."""
    return torch.lerp(uncond, cond, w)


def rescale(guided: Tensor, cond: Tensor, phi: float) -> Tensor:
    """Pull the spread of guided outputs (B, C, h, w) a part `phi` of the way to that of the outputs `cond` with the prompt.

        phi std(c) / std(g) g + (1 - phi) g          Lin et al. 2024, equations 15 and 16; std over all but the batch

    Against over-exposure by guidance, which a zero-terminal-SNR base shows most. It equals diffusers' `guidance_rescale`.
    """
    over = tuple(range(1, guided.ndim))
    return guided * (phi * (cond.std(over, keepdim=True) / guided.std(over, keepdim=True)) + (1 - phi))
