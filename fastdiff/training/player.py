"""A player: the parameters that one role trains, with their optimiser, their average and their loss scale."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import sharding
from fastdiff.models.ema import EMA
from fastdiff.runtime import processes
from fastdiff.training import optimizer
from fastdiff.training.offload import Parking

BUCKET_BYTES = 64 * 2**20  # gradients that are averaged over processes at once


class Player:
    """Trains one role's parameters with the `optimizer` of the TrainConfig. `averaged` players keep an EMA if `ema` is set."""

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
        self.params, self.lr, self.config, self.device = params, lr, config, device
        self.split = [p for p in self.params if sharding.is_split(p)]
        mixed = 0 < len(self.split) < len(self.params)
        self.optimizer = optimizer.opened(config, self.params, device, lr=lr, betas=betas, mixed=mixed)
        self.ema = EMA(self.params, config.ema) if config.ema and averaged else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)
        self.parking = Parking(device) if config.offload else None
        self.park()
        self.bad_steps = 0  # consecutive steps that were skipped

    @property
    def state_bytes(self) -> int:
        """Size of the saved state in bytes: the parameters, the optimiser's moments, and the average if there is one."""
        moments = sum(optimizer.moment_bytes(self.config.optimizer, p) for p in self.params)
        return moments + sum((p.element_size() + (4 if self.ema else 0)) * p.numel() for p in self.params)

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

    def synchronise(self) -> None:
        """Average the gradients over all processes, in place. Those of split parameters were averaged in the backward pass.

        A parameter that got a gradient on some processes only counts as zero on the others. One that got none anywhere stays
        without.
        """
        params = [p for p in self.params if not sharding.is_split(p)]
        if processes.count() == 1 or not params:
            return
        with torch.no_grad():
            reached = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8, device=params[0].device)
            torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
            for p, anywhere in zip(params, reached.tolist(), strict=True):
                if anywhere and p.grad is None:
                    p.grad = torch.zeros_like(p)
            for bucket in buckets([p.grad for p in params if p.grad is not None]):
                average(bucket)

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
        if self.parking:
            self.parking.fetch()
        self.scaler.step(self.optimizer)
        if self.ema:
            self.ema.update()
        self.park()

    def park(self) -> None:
        """With `offload`, move what only an update uses to CPU memory: the optimiser's moments and the averages."""
        if self.parking:
            self.parking.park([*self.moments_held(), *(self.ema.shadow if self.ema else ())])

    def moments_held(self) -> list[Tensor]:
        """The tensors that the optimiser keeps between updates."""
        return [v for row in self.optimizer.state.values() for v in row.values() if isinstance(v, Tensor)]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Keep the optimiser's moments in CPU memory during the `with`: while pictures are drawn, they need the room."""
        if self.device.type != "cuda" or self.parking or self.split:
            yield
            return
        parking = Parking(self.device, pinned=False)
        parking.park(self.moments_held())
        try:
            yield
        finally:
            parking.fetch()

    def finish(self) -> None:
        """Adjust the loss scale and drop the gradients, whether the step was made or skipped."""
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def finding_scale(self) -> bool:
        """Whether fp16 training may still lower its loss scale: an overflow then is no bad step, but how a scale is found."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def state_dict(self) -> dict[str, Any]:
        if self.parking:
            self.parking.settle()
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "kind": self.config.optimizer,
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a saved player. ValueError where the parameters differ in number or shape, or the optimiser is another."""
        if state.get("kind", "adamw") != self.config.optimizer:
            raise ValueError(f"its optimiser was {state.get('kind', 'adamw')}")
        if not fits(self.params, state["params"]):
            raise ValueError(f"{len(state['params'])} parameters in the state, or other shapes")
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(sharding.placed(saved, p))
        if self.parking:
            self.parking.fetch()
        self.optimizer.load_state_dict(self.moments(state["optimizer"]))
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        self.park()

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


def average(bucket: list[Tensor]) -> None:
    """Average tensors of one dtype over all processes, in place and in one exchange. A single one is not copied for it."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        torch.distributed.all_reduce(bucket[0])
        bucket[0].div_(processes.count())
        return
    sizes = [grad.numel() for grad in bucket]
    joined = bucket[0].new_empty(sum(sizes))
    parts = [part.view_as(grad) for part, grad in zip(joined.split(sizes), bucket, strict=True)]
    torch._foreach_copy_(parts, bucket)
    torch.distributed.all_reduce(joined)
    joined /= processes.count()
    torch._foreach_copy_(bucket, parts)


def buckets(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield views of gradients, in groups of one dtype and of at most BUCKET_BYTES. A larger gradient is cut by its rows."""
    bucket: list[Tensor] = []
    for grad in grads:
        rows = grad if grad.ndim else grad[None]
        for part in rows.split(max(1, BUCKET_BYTES * len(rows) // max(1, rows.nbytes))):
            if bucket and (part.dtype != bucket[0].dtype or sum(p.nbytes for p in bucket) + part.nbytes > BUCKET_BYTES):
                yield bucket
                bucket = []
            bucket.append(part)
    if bucket:
        yield bucket
