"""What trains: the parameters of one role with their optimiser, average and gradient scale."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import processes
from fastdiff.models.ema import EMA


class Player:
    """`config` is a TrainConfig; `averaged` players have an EMA where it asks for one."""

    def __init__(
        self,
        net: nn.Module,
        config: Any,
        device: torch.device,
        *,
        lr: float,
        betas: tuple[float, float],
        averaged: bool,
        fp16: bool,
    ) -> None:
        self.params, self.lr, self.config = [p for p in net.parameters() if p.requires_grad], lr, config
        self.optimizer = torch.optim.AdamW(
            self.params, lr=lr, betas=betas, weight_decay=config.weight_decay, fused=device.type != "mps"
        )
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

    def backward(self, loss: Tensor) -> None:
        """Gradients of this player's parameters alone."""
        self.scaler.scale(loss).backward(inputs=self.params)

    def synchronise(self, accelerator: Any) -> None:
        """The mean of all processes' gradients."""
        if processes.count() > 1:
            flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in self.params]), "mean")
            for p, g in zip(self.params, flat.split([p.numel() for p in self.params]), strict=True):
                p.grad.copy_(g.view_as(p))

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before."""
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.params, self.config.max_grad_norm)

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
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])


def fits(params: Iterable[Tensor], saved: Iterable[Tensor]) -> bool:
    return [p.shape for p in params] == [p.shape for p in saved]
