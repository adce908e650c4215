"""Keeps what a step does not use in CPU memory: optimiser states and averages between updates, the VAE between pictures."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Parking:
    """CPU memory for tensors of a device. Values come back bit by bit.

    On CUDA the places are pinned, so that copies run in the background, in the order of the device's other work. `settle` waits
    for them: call it before the CPU reads parked values. What is parked once in a while needs no `pinned` places.
    """

    def __init__(self, device: torch.device, *, pinned: bool = True) -> None:
        self.device, self.pinned = device, pinned and device.type == "cuda"
        self.places: dict[Tensor, Tensor] = {}  # parked tensor -> its place
        self.parked = False

    @torch.no_grad()
    def park(self, tensors: Iterable[Tensor]) -> None:
        """Move tensors to the CPU. Each stays the same object. Scalars stay where they are: kernels read them there."""
        known, self.places, self.parked = self.places, {}, True
        for tensor in tensors:
            if tensor.ndim and tensor not in self.places:
                place = known.get(tensor)
                if place is None or place.shape != tensor.shape:
                    place = self.place_for(tensor)
                self.places[tensor] = place.copy_(tensor, non_blocking=True)
                tensor.data = place  # the device's memory is free for work that is queued behind the copy

    def place_for(self, tensor: Tensor) -> Tensor:
        """Return CPU memory for the values of a tensor."""
        return torch.empty_like(tensor, device="cpu", pin_memory=self.pinned)

    @torch.no_grad()
    def fetch(self) -> None:
        """Move all parked tensors back to the device."""
        if self.parked:
            for tensor, place in self.places.items():
                tensor.data = place.to(self.device, non_blocking=True, copy=True)
        self.parked = False

    def settle(self) -> None:
        """Wait until the places hold the values of what was parked."""
        if self.pinned and self.parked:
            torch.cuda.current_stream(self.device).synchronize()


def set_aside(idle: Iterable[nn.Module], used: Iterable[nn.Module]) -> None:
    """Move networks to CPU memory, except parts of those in use. Whoever needs one again moves it back."""
    busy = {part for net in used for part in net.modules()}
    for net in idle:
        if net not in busy:
            net.to("cpu")
