"""What trains: the parameters of one role with their optimiser, average and gradient scale."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import sharding
from fastdiff.models.ema import EMA
from fastdiff.runtime import processes


class Player:
    """`config` is a TrainConfig; `averaged` players have an EMA where it asks for one."""

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
        mixed = 0 < len(self.split) < len(self.params)  # no fused kernel takes both
        fast = dict(foreach=False) if mixed else dict(fused=device.type != "mps")
        self.optimizer = torch.optim.AdamW(self.params, lr=lr, betas=betas, weight_decay=config.weight_decay, **fast)
        self.ema = EMA(self.params, config.ema) if config.ema and averaged else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.bad_steps = 0  # in a row

    @property
    def state_bytes(self) -> int:
        """Of its saved state: parameters, two moments, and where wanted the average."""
        return sum((3 * p.element_size() + (4 if self.ema else 0)) * p.numel() for p in self.params)

    def set_rate(self, done: int, steps: int) -> None:
        """The learning rate of a step: warm-up, then constant or cosine."""
        rate = self.lr * min(1.0, (done + 1) / max(1, self.config.warmup))
        if self.config.lr_schedule == "cosine":
            rate *= 0.5 + 0.5 * torch.cos(torch.tensor(done / steps * torch.pi)).item()
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor, others: Iterable["Player"]) -> None:
        """Gradients of this player's parameters alone."""
        loss = self.scaler.scale(loss)
        if not self.split:
            loss.backward(inputs=self.params)
            return
        # What a split network computes with are gathered copies, which cannot be named here: the others get theirs back.
        kept = [(p, p.grad) for other in others if other is not self for p in other.params]
        for p, _ in kept:
            p.grad = None
        loss.backward()
        for p, grad in kept:
            p.grad = grad

    def synchronise(self, accelerator: Any) -> None:
        """The mean of all processes' gradients; of split parameters it is made in the backward pass."""
        params = [p for p in self.params if not sharding.is_split(p)]
        if processes.count() > 1 and params:
            flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in params]), "mean")
            for p, g in zip(params, flat.split([p.numel() for p in params]), strict=True):
                p.grad.copy_(g.view_as(p))

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        if not self.split:
            return nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)
        kinds = [[p.grad for p in self.params if sharding.is_split(p) == split and p.grad is not None] for split in (True, False)]
        norms = [nn.utils.get_total_norm(grads) for grads in kinds if grads]
        norm = torch.stack([n.full_tensor() if sharding.is_split(n) else n for n in norms]).norm()
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in kinds:
            for part in sharding.local(grads):
                part.mul_(scale)
        return norm

    def step(self) -> None:
        self.bad_steps = 0
        self.scaler.step(self.optimizer)
        if self.ema:
            self.ema.update()

    def finish(self) -> None:
        """After the step, made or skipped."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def finding_scale(self) -> bool:
        """With fp16 an overflow is how the scale of the loss is found, and no bad step until there is none left to find."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
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
        """A saved optimiser with its moments split as the parameters are."""
        if not self.split:
            return state
        of = lambda v, p: sharding.placed(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
        rows = {i: {k: of(v, self.params[i]) for k, v in row.items()} for i, row in state["state"].items()}
        return {**state, "state": rows}


def fits(params: Iterable[Tensor], saved: Iterable[Tensor]) -> bool:
    return [p.shape for p in params] == [p.shape for p in saved]
