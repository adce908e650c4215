"""A player: the parameters that one role trains, with their optimiser, their average and their loss scale."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import sharding
from fastdiff.models.ema import EMA
from fastdiff.runtime import processes


class Player:
    """Trains one role's parameters with AdamW. `averaged` players keep an EMA of them if `ema` of the TrainConfig is set."""

    def __init__(
        self,
        params: list[nn.Parameter],
        config: Any,
        device: torch.device,
        *,
        lr: float,
        betas: tuple[float, float],
        averaged: bool,
        fp16: bool,
    ) -> None:
        self.params, self.lr, self.config = params, lr, config
        self.split = [p for p in self.params if sharding.is_split(p)]
        mixed = 0 < len(self.split) < len(self.params)  # no fused kernel takes split and whole parameters together
        fast = dict(foreach=False) if mixed else dict(fused=device.type != "mps")
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=betas, weight_decay=config.weight_decay, **fast)
        self.ema = EMA(self.params, config.ema) if config.ema and averaged else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.bad_steps = 0  # consecutive steps that were skipped

    @property
    def state_bytes(self) -> int:
        """Size of the saved state in bytes: the parameters, AdamW's two moments, and the average if there is one."""
        return sum((3 * p.element_size() + (4 if self.ema else 0)) * p.numel() for p in self.params)

    def set_rate(self, done: int, steps: int) -> None:
        """Set the learning rate for step `done` of `steps`: linear warm-up, then constant or a cosine to zero."""
        rate = self.lr * min(1.0, (done + 1) / max(1, self.config.warmup))
        if self.config.lr_schedule == "cosine":
            rate *= 0.5 + 0.5 * math.cos(done / steps * math.pi)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, others: Iterable["Player"]) -> None:
        """Add the gradients of a loss to this player's parameters, and to no other player's."""
        loss = self.scaler.scale(loss)
        if not self.split:
            loss.backward(inputs=self.params)
            return
        # A split network computes with gathered copies of its parameters, which `inputs` cannot name. The backward pass then
        # reaches every player, so the gradients of the others are put aside and restored.
        saved = [(p, p.grad) for other in others if other is not self for p in other.params]
        for p, _ in saved:
            p.grad = None
        loss.backward()
        for p, grad in saved:
            p.grad = grad

    def synchronise(self, accelerator: Any) -> None:
        """Average the gradients over all processes. Those of split parameters were averaged in the backward pass."""
        params = [p for p in self.params if not sharding.is_split(p)]
        if processes.count() > 1 and params:
            grads = [p.grad for p in params if p.grad is not None]
            assert len(grads) == len(params), "a parameter without a gradient"
            flat = accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
            for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(mean.view_as(grad))

    def clip(self) -> Tensor:
        """Clip the gradients to norm `max_grad_norm`; return their norm before that, a scalar."""
        self.scaler.unscale_(self.optimizer)
        if not self.split:
            return nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)
        kinds = [[p.grad for p in self.params if sharding.is_split(p) == split and p.grad is not None] for split in (True, False)]
        norms = [nn.utils.get_total_norm(grads) for grads in kinds if grads]
        # A split norm is a DTensor; its class is not imported here, because that takes seconds (see `is_split`).
        norm = torch.stack([n.full_tensor() if sharding.is_split(n) else n for n in norms]).norm()  # type: ignore[attr-defined]
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in kinds:
            for part in sharding.local(grads):
                part.mul_(scale)
        return norm

    def step(self) -> None:
        """Update the parameters and their average from the gradients."""
        self.bad_steps = 0
        self.scaler.step(self.optimizer)
        if self.ema:
            self.ema.update()

    def finish(self) -> None:
        """Adjust the loss scale and drop the gradients, whether the step was made or skipped."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def finding_scale(self) -> bool:
        """Whether fp16 training may still lower its loss scale: an overflow then is no bad step, but how a scale is found."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved player. ValueError where the parameters of the state differ in number or shape."""
        if not fits(self.params, state["params"]):
            raise ValueError(f"{len(state['params'])} parameters in the state, or other shapes")
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(sharding.placed(saved, p))
        self.optimizer.load_state_dict(self.moments(state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])

    def moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """Split the moments of a saved optimiser over the processes, in the way that the parameters are split."""
        if not self.split:
            return state
        place = lambda v, p: sharding.placed(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
        rows = {i: {k: place(v, self.params[i]) for k, v in row.items()} for i, row in state["state"].items()}
        return {**state, "state": rows}


def fits(params: Iterable[Tensor], saved: Iterable[Tensor]) -> bool:
    """Whether saved parameters have the same number and shapes as these."""
    return [p.shape for p in params] == [p.shape for p in saved]
