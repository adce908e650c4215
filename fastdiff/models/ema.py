"""Exponential moving average of the parameters that train, and only those."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """shadow <- decay * shadow + (1 - decay) * parameter, after every optimiser step; fp32.

    The decay is capped at (1 + n) / (10 + n) after n updates, so that a short run forgets its start. `warm=False` keeps
    it constant, which consistency targets want.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, *, warm: bool = True) -> None:
        self.parameters = list(parameters)
        self.decay, self.warm, self.updates = decay, warm, 0
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warm else self.decay
        torch._foreach_lerp_(self.shadow, [p.detach().float() for p in self.parameters], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def swapped(self) -> Iterator[None]:
        """The averages in place of the parameters, for targets, previews and export; put back bit-exactly."""
        kept = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.data for p in self.parameters], self.shadow)
        try:
            yield
        finally:
            torch._foreach_copy_([p.data for p in self.parameters], kept)

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        torch._foreach_copy_(self.shadow, [s.to(self.shadow[0].device) for s in state["shadow"]])
