"""Muon (Jordan 2024): the update of a weight matrix is its momentum, with all singular values brought near 1.

Liu et al. 2025 ("Muon is scalable for LLM training") scale it so that it takes AdamW's learning rates and weight decay:
W <- W - lr (0.2 sqrt(max(rows, columns)) orthogonal(M) + decay W). A convolution's weight counts as the matrix (out, in * k * k).
Biases, norms and other parameters of one dimension train with AdamW, in the same optimiser.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# A polynomial of odd degree that takes singular values from (0, 1] to about (0.7, 1.2) in five rounds.
A, B, C = 3.4445, -4.7750, 2.0315
ROUNDS = 5
MOMENTUM = 0.95
RMS = 0.2  # of an update of AdamW, in learning rates


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring all singular values of matrices (N, rows, columns) near 1, by Newton and Schulz's iteration; in bf16 on CUDA."""
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = A * x + (B * square + C * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, AdamW for the rest. `betas` are AdamW's."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float, fused: bool
    ) -> None:
        params = list(params)
        matrices, others = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
        groups = [dict(params=matrices, muon=True), dict(params=others, muon=False)]
        super().__init__(
            [group for group in groups if group["params"]], dict(lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # the trainer gives no closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self.by_muon if group["muon"] else self.by_adamw)(group, params)

    def by_muon(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        """Update matrices; those of one shape are made orthogonal together, in one call for many small ones."""
        alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for p in params:
            assert p.grad is not None
            state = self.state[p]
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            alike[len(p), p.numel() // len(p)].append((p, p.grad.lerp(state["momentum"], MOMENTUM).flatten(1)))
        for (rows, columns), pairs in alike.items():
            rate = group["lr"] * RMS * max(rows, columns) ** 0.5
            for (p, _), update in zip(pairs, orthogonal(torch.stack([matrix for _, matrix in pairs])), strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update.view_as(p), alpha=-rate)

    def by_adamw(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        """Update all other parameters by torch's own AdamW."""
        for p in params:
            if not self.state[p]:
                zero = torch.zeros((), dtype=torch.float32, device=p.device)
                self.state[p].update(step=zero, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        grads = [p.grad for p in params if p.grad is not None]
        means, squares, steps = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "step"))
        first, second = group["betas"]
        how = dict(amsgrad=False, maximize=False, beta1=first, beta2=second, eps=1e-8, weight_decay=group["weight_decay"])
        if params:
            adamw(list[Tensor](params), grads, means, squares, [], steps, fused=group["fused"], lr=group["lr"], **how)
