"""What a method trains on: latents and conditions, encoded once. B batch, N items, K captions an item, M texts."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff.data.store import Stored
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Cond


@dataclass(frozen=True)
class Batch:
    """One optimiser step's worth of data."""

    latents: Tensor  # (B, C, h, w), scaled; NaN where only prompts were asked for
    cond: Cond  # B rows
    uncond: Cond  # B rows
    noise: Tensor | None = None  # (B, C, h, w) that the teacher's sampler turned into `latents`
    pixels: Tensor | None = None  # (B, 3, H, W) in [-1, 1], the VAE's picture of `latents`
    items: list[str] | None = None  # B, which of the data set they are

    def to(self, device: torch.device | str) -> "Batch":
        move = lambda v: v.to(device)  # noqa: E731
        noise, pixels = (None if v is None else move(v) for v in (self.noise, self.pixels))
        return Batch(move(self.latents), self.cond.map(move), self.uncond.map(move), noise, pixels, self.items)


@dataclass
class Encoded:
    """A whole data set in latent space, of one size.

    Which items a step sees depends on (seed, rank, step) alone, so a resumed run sees what an uninterrupted one would.
    """

    moments: Tensor | Stored  # (N, 2 C, h, w) posterior mean and standard deviation of scaled latents
    texts: Cond  # M rows, each distinct caption once; they may be Stored, too
    captions: Tensor  # (N, K) rows of `texts`
    weights: Tensor  # (K,) how often each of an item's captions is drawn
    uncond: Cond  # one row
    time_ids: Tensor | None = None  # (N, 6) SDXL
    empty_prompts: float = 0.0  # share of items trained with the unconditional branch as their condition
    noise: Tensor | None = None  # (N, C, h, w) that each latent was sampled from
    pixels: Tensor | None = None  # (N, 3, H, W) uint8, the VAE's picture of each latent
    controls: Tensor | None = None  # (N, 1 or 3, H, W) uint8, what a ControlNet is shown of it
    names: list[str] | None = None  # N, where each item comes from
    views: int = 1  # items of one picture, side by side: its crops and mirror images

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def latents(self) -> Tensor:
        """(N, C, h, w), the middle of each posterior; fp32."""
        return self.moments[:].chunk(2, 1)[0].float()

    def rows(self, items: slice) -> "Encoded":
        """A part of the items, with the texts of all."""
        own = ("moments", "captions", "time_ids", "noise", "pixels", "controls", "names")
        there = {k: v for k, v in vars(self).items() if k in own and v is not None}
        return replace(self, **{k: v.rows(items) if isinstance(v, Stored) else v[items] for k, v in there.items()})

    def split(self, n: int) -> tuple["Encoded", "Encoded"]:
        """All but the last n items, at most a quarter of them, and those: to be judged on what was not trained on."""
        kept = len(self) - max(1, min(n, len(self) // 4))
        kept -= kept % self.views  # no picture is on both sides
        return self.rows(slice(kept)), self.rows(slice(kept, None))

    def batch(self, size: int, generator: torch.Generator, shared: torch.Generator | None = None) -> Batch:
        """Items drawn by `generator`; `shared`, the same on every process, has no say where all are of one size."""
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

    def state_dict(self) -> dict[str, int]:
        """Nothing: which items come next depends on the step alone. A stream of its own position would keep that here."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


@dataclass
class Buckets:
    """A data set of several sizes: a batch is of one of them, drawn in proportion to its items."""

    groups: list[Encoded]  # the largest first

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
        """As `Encoded.split`; what is kept is of one size, the most frequent."""
        first, kept = self.groups[0].split(n)
        return Buckets([first, *self.groups[1:]]), kept

    def batch(self, size: int, generator: torch.Generator, shared: torch.Generator | None = None) -> Batch:
        """`shared` chooses the size: with one that is the same on every process, no process waits for a larger picture."""
        lengths = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(lengths, 1, generator=shared or generator))]
        return group.batch(size, generator)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None: ...


Data = Encoded | Buckets
