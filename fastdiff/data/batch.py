"""Training data of a method: latents and conditions, encoded once. B batch, N items, K captions per item, M texts."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdiff.data.store import Stored
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Cond
from fastdiff.runtime import console


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. A copy to CUDA goes through pinned memory, so that it does not wait for the device's work.

    Pinned memory keeps the strides of a tensor, so one row that stands for many is written out first.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """The data of one optimiser step."""

    latents: Tensor  # (B, C, h, w), scaled; NaN if the data set has prompts only
    cond: Cond  # B rows
    uncond: Cond  # B rows
    noise: Tensor | None = None  # (B, C, h, w): the start noise of the teacher's samples `latents`
    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1]: the decoded `latents`
    items: list[str] | None = None  # B names of the items in the data set

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch with all tensors on a device."""
        move = lambda v: moved(v, torch.device(device))  # noqa: E731
        noise, pixels = (None if v is None else move(v) for v in (self.noise, self.pixels))
        return Batch(move(self.latents), self.cond.map(move), self.uncond.map(move), noise, pixels, self.items)

    def mixed(self, share: float, generator: torch.Generator, first: int = 0) -> "Batch":
        """Return the batch with other prompts for a share of its rows from `first` on.

        The embedding c of a row becomes c + w (a - b), with a and b those of two other rows and w uniform in [0, 1]. A student
        that equals its teacher there too keeps more of what the prompts do not name.
        """
        n = len(self.latents)
        a, b = (self.cond[torch.randperm(n, generator=generator)] for _ in range(2))
        w = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < share)
        w[:first] = 0

        def between(name: str) -> Tensor | None:
            c, plus, minus = (vars(cond)[name] for cond in (self.cond, a, b))
            return None if c is None else c + w.view(n, *[1] * (c.ndim - 1)).to(c.dtype) * (plus - minus)

        return replace(self, cond=replace(self.cond, tokens=between("tokens"), pooled=between("pooled")))


@dataclass
class Encoded:
    """A whole data set in latent space, with items of one size.

    The items of a step depend only on the generator that `batch` gets, made from (seed, rank, step). So a resumed run sees
    the same items as an uninterrupted one.
    """

    moments: Tensor | Stored  # (N, 2 C, h, w) posterior mean and standard deviation of scaled latents
    texts: Cond  # M rows, each distinct caption once; the fields may be Stored
    captions: Tensor  # (N, K) rows of `texts`
    weights: Tensor  # (K,) relative frequency of each of an item's captions
    uncond: Cond  # one row
    time_ids: Tensor | None = None  # (N, 6) SDXL
    empty_prompts: float = 0.0  # share of items that get `uncond` as their condition, in 0..1
    noise: Tensor | None = None  # (N, C, h, w): the start noise of each latent
    pixels: Tensor | None = None  # (N, 3, H, W) uint8: the decoded latents
    controls: Tensor | None = None  # (N, 1 or 3, H, W) uint8: the control picture of each item
    names: list[str] | None = None  # N names that tell where each item comes from
    views: int = 1  # number of adjacent items that show one picture: its crops and mirror images
    identity: str | None = None  # changes with the pictures, captions or prompts; None where they cannot change

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def latents(self) -> Tensor:
        """The mean latents (N, C, h, w) of all items, fp32."""
        return self.moments[:].chunk(2, 1)[0].float()

    def rows(self, items: slice) -> "Encoded":
        """Return a part of the items; the texts of all items are kept."""
        own = ("moments", "captions", "time_ids", "noise", "pixels", "controls", "names")
        there = {k: v for k, v in vars(self).items() if k in own and v is not None}
        return replace(self, **{k: v.rows(items) if isinstance(v, Stored) else v[items] for k, v in there.items()})

    def split(self, n: int) -> tuple["Encoded", "Encoded"]:
        """Split off the last n items, at most a quarter, for evaluation. Returns (training items, evaluation items)."""
        kept = len(self) - max(1, min(n, len(self) // 4))
        kept -= kept % self.views  # crops of one picture stay on one side
        return self.rows(slice(kept)), self.rows(slice(kept, None))

    def batch(self, size: int, generator: torch.Generator, shared: torch.Generator | None = None) -> Batch:
        """Draw `size` random items by `generator`. `shared` is not used here: see `Buckets.batch`."""
        items = torch.randint(len(self), (size,), generator=generator)
        column = torch.multinomial(self.weights, size, replacement=True, generator=generator)
        cond = self.texts[self.captions[items, column]]
        uncond = self.uncond.expand(size)
        if self.time_ids is not None:
            cond, uncond = (Cond(c.tokens, c.pooled, self.time_ids[items]) for c in (cond, uncond))
        if self.empty_prompts:
            drop = torch.rand(size, generator=generator) < self.empty_prompts
            kept = torch.where(drop, size, 0) + torch.arange(size)
            cond = Cond.cat([cond, uncond])[kept]
        if self.controls is not None:
            cond = cond.with_control((self.controls[items].float() / 255).expand(-1, 3, -1, -1))
        noise = None if self.noise is None else self.noise[items].float()
        pixels = None if self.pixels is None else self.pixels[items].float() / 127.5 - 1
        names = [self.names[i] if self.names else str(i) for i in items.tolist()]
        return Batch(autoencoder.draw(self.moments[items].float(), generator), cond, uncond, noise, pixels, names)

    def state_dict(self) -> dict[str, Any]:
        """Return which data these are: the next items depend on the step alone. A data set with a position would store it too."""
        return {"identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn where a run goes on that was begun with other data."""
        if state.get("identity", self.identity) != self.identity:
            console.warn(
                "the pictures, captions or prompts have changed since the state of this run was saved; it goes on with what is "
                "there now (`resume=never` begins anew)"
            )


@dataclass
class Buckets:
    """A data set with items of several sizes. Each batch has one size, drawn in proportion to its number of items."""

    groups: list[Encoded]  # one for each size, the most items first

    def __len__(self) -> int:
        return sum(len(group) for group in self.groups)

    @property
    def empty_prompts(self) -> float:
        return self.groups[0].empty_prompts

    @empty_prompts.setter
    def empty_prompts(self, share: float) -> None:
        for group in self.groups:
            group.empty_prompts = share

    def split(self, n: int) -> tuple["Buckets", Encoded]:
        """Split like `Encoded.split`; all evaluation items have the most frequent size."""
        first, kept = self.groups[0].split(n)
        return Buckets([first, *self.groups[1:]]), kept

    def batch(self, size: int, generator: torch.Generator, shared: torch.Generator | None = None) -> Batch:
        """Draw items of one picture size, chosen by `shared`: if equal on all processes, none waits for larger pictures."""
        lengths = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(lengths, 1, generator=shared or generator))]
        return group.batch(size, generator)

    def state_dict(self) -> dict[str, Any]:
        return self.groups[0].state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups[0].load_state_dict(state)


Data = Encoded | Buckets
