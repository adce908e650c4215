"""The optimisers that a player can train with: AdamW, AdamW with 8-bit moments, Adafactor, and Muon."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.runtime.errors import UsageError
from fastdiff.training.muon import Muon

SMALL = 4096  # bitsandbytes keeps the moments of smaller parameters in 32 bits
BLOCK = 256  # 8-bit moments that share one 32-bit scale


def check(config: Any, device: torch.device) -> None:
    """Raise UsageError, before anything is loaded, where the config's optimiser cannot run here."""
    if config.optimizer != "adamw8bit":
        return
    if not find_spec("bitsandbytes"):
        raise UsageError("`optimizer=adamw8bit`: bitsandbytes is not installed", 'pip install "fastdiff[8bit]"')
    if device.type not in {"cuda", "cpu"}:
        raise UsageError(f"`optimizer=adamw8bit`: does not run on {device.type}", "use `optimizer=adafactor`")


def opened(
    config: Any, params: list[nn.Parameter], device: torch.device, *, lr: float, betas: tuple[float, float], mixed: bool
) -> torch.optim.Optimizer:
    """Make the config's optimiser for some parameters. `mixed`: only some of them are split over processes.

    All take the same learning rates: Adafactor's is not scaled by the size of a weight (Shazeer 2018, section 8), since weights
    of an adapter start at zero. Adafactor has no first moment, so it has no use for `betas`.
    """
    decay = config.weight_decay
    if config.optimizer == "adafactor":
        # Its step is lr * max(eps, RMS of the weight): with eps = 1 it is lr for all usual weights, whose RMS is below 1.
        return torch.optim.Adafactor(params, lr=lr, eps=(None, 1.0), weight_decay=decay, foreach=False)
    if config.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=lr, betas=betas, weight_decay=decay)
    if config.optimizer == "muon":
        return Muon(params, lr=lr, betas=betas, weight_decay=decay, fused=device.type != "mps")
    # No fused kernel takes split and whole parameters together.
    fast = dict(foreach=False) if mixed else dict(fused=device.type != "mps")
    return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=decay, **fast)


def moment_bytes(kind: str, p: Tensor) -> int:
    """Size in bytes of an optimiser's moments for one parameter."""
    if kind == "adafactor":  # a mean for each row and each column of the last two dimensions
        entries = p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.ndim > 1 else p.numel()
        return entries * p.element_size()
    if kind == "adamw8bit":
        return 2 * (p.numel() + 4 * -(-p.numel() // BLOCK)) if p.numel() >= SMALL else 8 * p.numel()
    moments = 1 if kind == "muon" and p.ndim > 1 else 2
    return moments * p.element_size() * p.numel()
