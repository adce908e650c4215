"""Exponential moving average (EMA) of trainable parameters."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastdiff.models.sharding import local, placed


class EMA:
    """Averages of parameters in fp32. Each `update`: shadow <- decay * shadow + (1 - decay) * parameter.

    After n updates the decay is at most (1 + n) / (10 + n), so that a short run forgets its start. `warm=False` keeps the
    decay constant, as consistency targets need.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, *, warm: bool = True) -> None:
        self.parameters = list(parameters)
        self.decay, self.warm, self.updates = decay, warm, 0
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the parameters; call it after every optimiser step."""
        self.updates += 1
        self.follow()
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(local(self.shadow), [p.detach().float() for p in local(self.parameters)], 1 - decay)

    def follow(self) -> None:
        """Move the averages to the device of the parameters, if the parameters have moved."""
        if self.shadow and self.shadow[0].device != self.parameters[0].device:
            self.shadow = [s.to(p.device) for s, p in zip(self.shadow, self.parameters, strict=True)]

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Put the averages into the parameters during the `with`; afterwards restore the parameters bit by bit."""
        with swapped(self.parameters, self.shadow):
            yield

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        values = [placed(s, mine) for s, mine in zip(state["shadow"], self.shadow, strict=True)]
        torch._foreach_copy_(local(self.shadow), local(values))

    def repoint(self, moved: dict[nn.Parameter, nn.Parameter]) -> None:
        """Follow parameters that have been split over processes; `moved` maps each old parameter to its split one."""
        self.parameters = [moved.get(p, p) for p in self.parameters]
        self.shadow = [placed(s, p) for s, p in zip(self.shadow, self.parameters, strict=True)]


@contextmanager
@torch.no_grad()
def swapped(parameters: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Put `values` into the parameters during the `with`; afterwards restore the parameters bit by bit.

    Autocast casts a parameter once per context and keeps the result, so what it kept is dropped at both ends.
    """
    values = [placed(v, p) for v, p in zip(values, parameters, strict=True)]
    inside = [p.data for p in local([p.detach() for p in parameters])]
    kept = [p.clone() for p in inside]
    torch._foreach_copy_(inside, local(values))
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch._foreach_copy_(inside, kept)
        torch.clear_autocast_cache()
