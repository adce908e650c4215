"""What is looked at of every picture, and the figures that come of it.

A lens turns pictures into rows of numbers, one a picture; a figure is a function of such rows. So every figure has a bootstrap
band over pictures, and pictures need not be kept. N pictures, B of a batch, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import fingerprint
from fastdiff.data import emoji
from fastdiff.quality import emoji as judge
from fastdiff.quality.distances import BOOTSTRAPS, Moments, band, cmmd, frechet, kid
from fastdiff.quality.drift import drift
from fastdiff.quality.networks import Clip, Inception, patch, resized
from fastdiff.sampling.sampler import Settings

Seen = dict[str, Tensor]  # each (N, ...)
COSTLY_DRAWS, COSTLY_PICTURES = 20, 10_000  # where a figure takes seconds: fewer bootstraps, above that many pictures none


class Lens(Protocol):
    key: str  # two lenses of one key see the same
    side_px: int | None  # of the pictures that it wants from files; None: the evaluation's

    def see(self, pictures: Tensor, rows: slice | None) -> Seen:
        """Of pictures (B, 3, H, W) uint8, which are those `rows` of the prompts; None: they have no prompts."""


class Embedded:
    """The feature network of `emoji`: its embedding, and of captions that it knows whether they were drawn."""

    side_px = None

    def __init__(self, lines: Sequence[str], *, styles: bool = False) -> None:
        """`styles`: also how far it is from the emoji that the prompt names, in each drawing style; NaN where it names none."""
        self.known, self.named = judge.Prompts.of(lines), judge.named_pictures(lines) if styles else None
        self.key = "embedded with styles" if styles else "embedded"

    def see(self, pictures: Tensor, rows: slice | None) -> Seen:
        pixels = pictures.float() / 127.5 - 1
        seen = {"embedded": judge.embed(pixels)}
        if self.known and rows is not None:
            asked = self.known[rows]
            seen |= {"hits": judge.recognised(seen["embedded"], asked), "background": judge.backgrounds(pixels, asked)}
        if self.named is not None and rows is not None:
            named = self.named[rows]
            seen["style"] = torch.full((len(pixels), len(emoji.STYLES)), torch.nan)
            seen["style"][named >= 0] = judge.style_distances(pixels[named >= 0], named[named >= 0])
        return seen


class Whole:
    """Inception's features of the picture, resized to `side_px` first where that is said."""

    def __init__(self, net: Inception, device: torch.device, side_px: int | None) -> None:
        self.net, self.device, self.side_px = net.to(device), device, side_px
        self.key = f"inception {fingerprint(net)} {side_px}"

    def see(self, pictures: Tensor, rows: slice | None) -> Seen:
        return {"inception": self.net(resized(pictures, self.side_px).to(self.device)).cpu()}


class Centre(Whole):
    """Inception's features of the picture's centre at native size."""

    def __init__(self, net: Inception, device: torch.device) -> None:
        super().__init__(net, device, None)
        self.key += " centre"

    def see(self, pictures: Tensor, rows: slice | None) -> Seen:
        return {"patch": self.net(patch(pictures).to(self.device)).cpu()}


class ClipScore:
    """CLIP's embedding of the picture, and 100 times its cosine with the prompt's."""

    side_px = None

    def __init__(self, net: Clip, device: torch.device, lines: Sequence[str]) -> None:
        self.net, self.key = net.to(device), f"clip {net.spec}"
        rows = {line: i for i, line in enumerate(dict.fromkeys(lines))}
        each = list(rows)
        with torch.no_grad():
            found = torch.cat([net.texts(each[i : i + 64]).cpu() for i in range(0, len(each), 64)])
        self.texts = found[[rows[line] for line in lines]]

    def see(self, pictures: Tensor, rows: slice | None) -> Seen:
        found = self.net.pictures(pictures).cpu()
        return {"clip": found} | ({} if rows is None else {"clip_score": 100 * (found * self.texts[rows]).sum(1)})


@dataclass
class Shown:
    """One judged way of sampling: what the lenses saw of its pictures."""

    model: str
    settings: Settings
    seen: Seen
    kept: Tensor  # (K, 3, H, W) uint8, the first pictures

    def __len__(self) -> int:
        return len(self.seen["departures"])

    @property
    def calls(self) -> int:
        return self.settings.calls

    @property
    def title(self) -> str:
        return title(self.model, self.settings)


def title(model: str, settings: Settings) -> str:
    """A row's name, no other row's: the teacher is sampled in as many steps guided and not."""
    guided = f", guidance {settings.guidance:g}" if settings.guided else ""
    return f"{model}, {settings.num_steps} steps{guided} ({settings.scheduler})"


@dataclass
class Against:
    """What figures are measured against: the reference's features, and the teacher's pictures of the same seeds."""

    features: Seen
    teacher: Shown
    told: Mapping[str, Moments] = field(default_factory=dict)  # moments that are known without features

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return {name: Moments.of(x) for name, x in self.features.items() if x.ndim == 2} | dict(self.told)


@dataclass(frozen=True)
class Figure:
    """A number of a row: `of(row, picture indices, against)`, which needs `needs` among what was seen of it."""

    name: str
    label: str
    needs: str
    of: Callable[[Shown, Tensor, Against], float]
    better: Literal["lower", "higher"]
    costly: bool = False
    reference: Literal["moments", "features"] | None = None  # what of the reference it needs too
    per_picture: bool = True  # redrawn over pictures

    def known(self, row: Shown, against: Against) -> bool:
        there = {"moments": against.features.keys() | against.told.keys(), "features": against.features.keys()}
        return self.needs in row.seen and (self.reference is None or self.needs in there[self.reference])

    def draws(self, n: int) -> int:
        if not self.per_picture:
            return 0
        return BOOTSTRAPS if not self.costly else COSTLY_DRAWS if n <= COSTLY_PICTURES else 0


def mean(name: str) -> Callable[[Shown, Tensor, Against], float]:
    return lambda row, i, against: row.seen[name][i].nanmean().item()


def distance(name: str) -> Callable[[Shown, Tensor, Against], float]:
    return lambda row, i, against: frechet(row.seen[name][i], against.moments[name])


FIGURES = [
    Figure("retrieval", "recognised", "hits", mean("hits"), "higher"),
    Figure("background", "background", "background", mean("background"), "higher"),
    Figure("frechet", "Frechet", "embedded", distance("embedded"), "lower", reference="moments"),
    Figure("fid", "FID", "inception", distance("inception"), "lower", costly=True, reference="moments"),
    Figure("patch_fid", "patch FID", "patch", distance("patch"), "lower", costly=True, reference="moments"),
    Figure("kid", "KID", "inception", lambda r, i, a: kid(r.seen["inception"][i], a.features["inception"])[0], "lower",
           costly=True, reference="features"),
    Figure("cmmd", "CMMD", "clip", lambda r, i, a: cmmd(r.seen["clip"][i], a.features["clip"]), "lower",
           costly=True, reference="features"),
    Figure("clip_score", "CLIP", "clip_score", mean("clip_score"), "higher"),
    Figure("same_noise", "to teacher", "same_noise", mean("same_noise"), "lower"),
    Figure("diversity", "diversity", "diversity", lambda r, i, a: r.seen["diversity"].mean().item(), "higher",
           per_picture=False),
    Figure("drift", "drift", "departures",
           lambda r, i, a: drift(a.teacher.seen["departures"][i], r.seen["departures"][i])["drift"], "lower"),
]  # fmt: skip
JUDGING = ("retrieval", "frechet", "fid", "clip_score")  # whose gap to the teacher is told


def measured(row: Shown, against: Against) -> dict[str, Any]:
    """Every figure that the row has, and `band`, {figure: [low, high]}: where 95 % of redrawn sets of pictures lie."""
    told: dict[str, Any] = {}
    bands: dict[str, list[float]] = {}
    everything = torch.arange(len(row))
    for figure in (f for f in FIGURES if f.known(row, against)):
        told[figure.name] = figure.of(row, everything, against)
        if figure.name == "kid":  # over subsets without replacement: a picture drawn twice would look alike to itself
            value, spread = kid(row.seen["inception"], against.features["inception"])
            bands["kid"] = [value - 1.96 * spread, value + 1.96 * spread]
        elif draws := figure.draws(len(row)):
            bands[figure.name] = band(row, lambda r, i, f=figure: f.of(r, i, against), draws)
    if "drift" in told:
        told |= drift(against.teacher.seen["departures"][: len(row)], row.seen["departures"])
    return {**told, "band": bands}
