"""The metrics: one table for the closing table of a training run, `eval_every` and `evaluate`. Add a metric here.

A feature extractor (features.py) turns pictures into numbers, one row a picture; a metric is a function of such rows. So every
metric has a bootstrap band over pictures, and the pictures need not be kept. N pictures, D features.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.quality.distances import BOOTSTRAPS, Moments, band_of, cmmd, frechet, kid, redrawn
from fastdiff.quality.drift import drift
from fastdiff.sampling.settings import Settings

Features = dict[str, Tensor]  # each (N, ...)
COSTLY_DRAWS, COSTLY_PICTURES = 20, 10_000  # where a figure takes seconds: fewer bootstraps, above that many pictures none
ENOUGH = 300  # pictures a row, for a Frechet distance to mean anything


@dataclass(eq=False)
class Row:
    """One judged way of sampling: numbers of each of its pictures, and the first pictures themselves."""

    model: str
    settings: Settings
    features: Features
    samples: int
    pictures: Tensor | None = None  # (K, 3, H, W) uint8, the first ones
    known: Mapping[str, float] = field(default_factory=dict)  # figures that were measured when the pictures were there

    def __len__(self) -> int:
        return self.samples

    @property
    def calls(self) -> int:
        return self.settings.calls

    @property
    def title(self) -> str:
        return title(self.model, self.settings)

    @property
    def described(self) -> dict[str, Any]:
        """What was drawn and how."""
        s = self.settings
        way = dict(model=self.model, solver=s.scheduler, spacing=s.spacing, num_steps=s.num_steps, guidance=s.guidance)
        return {**way, "calls": self.calls}


def title(model: str, settings: Settings) -> str:
    """A row's name, no other row's: the teacher is sampled in as many steps guided and not."""
    guided = f", guidance {settings.guidance:g}" if settings.guided else ""
    return f"{model}, {settings.num_steps} steps{guided} ({settings.scheduler})"


@dataclass(eq=False)
class Against:
    """What rows are measured against: the reference's features, and the teacher's row of the same prompts and seeds."""

    features: Features
    teacher: Row
    known: Mapping[str, Moments] = field(default_factory=dict)  # moments that are known without features
    figures: dict[tuple[Row, str, int], Tensor] = field(default_factory=dict)  # redrawn once, for bands and gaps alike

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return {name: Moments.of(x) for name, x in self.features.items() if x.ndim == 2} | dict(self.known)


@dataclass(frozen=True)
class Metric:
    """A figure of a row: `of(row, picture indices, against)`, a function of the feature that it `needs`."""

    name: str  # the key in JSON
    label: str  # the head of its column
    needs: str
    of: Callable[[Row, Tensor, Against], float]
    better: Literal["lower", "higher"]
    reference: Literal["moments", "features", "teacher"] | None = None  # where that feature must be known, too
    judges: bool = False  # a student's gap to the teacher is measured in it
    enough: int = 2  # pictures a row, for the figure to mean anything
    costly: bool = False
    per_picture: bool = True  # it can be redrawn over pictures
    own_band: Callable[[Row, Against], list[float]] | None = None  # where redrawing pictures would be wrong
    parts: Callable[[Row, Against], dict[str, float]] | None = None  # what it is made of

    def computable(self, row: Row, against: Against) -> bool:
        """Whether it can be computed from features, and so be redrawn."""
        there = {
            None: {self.needs},
            "moments": against.features.keys() | against.known.keys(),
            "features": against.features.keys(),
            "teacher": against.teacher.features.keys(),
        }
        return self.needs in row.features and self.needs in there[self.reference]

    def known(self, row: Row, against: Against) -> bool:
        return self.name in row.known or self.computable(row, against)

    def value(self, row: Row, against: Against) -> float:
        return row.known[self.name] if self.name in row.known else self.of(row, torch.arange(len(row)), against)

    def draws(self, n: int) -> int:
        """How often n pictures are redrawn."""
        if not self.per_picture:
            return 0
        return BOOTSTRAPS if not self.costly else COSTLY_DRAWS if n <= COSTLY_PICTURES else 0

    def redrawn(self, row: Row, against: Against, n: int | None = None) -> Tensor:
        """The figure of the row's first n pictures and of sets redrawn of them: (1 + draws,)."""
        n = n or len(row)
        key = (row, self.name, n)
        if key not in against.figures:
            against.figures[key] = redrawn(row, lambda r, i: self.of(r, i, against), n, self.draws(n))
        return against.figures[key]

    def band(self, row: Row, against: Against) -> list[float] | None:
        """[low, high], where 95 % of redrawn sets of pictures lie."""
        if self.name in row.known or not self.computable(row, against):
            return None
        if self.own_band is not None:
            return self.own_band(row, against)
        return band_of(self.redrawn(row, against)) if self.draws(len(row)) else None


def mean(name: str) -> Callable[[Row, Tensor, Against], float]:
    return lambda row, i, against: row.features[name][i].nanmean().item()


def distance(name: str) -> Callable[[Row, Tensor, Against], float]:
    return lambda row, i, against: frechet(row.features[name][i], against.moments[name])


def kid_band(row: Row, against: Against) -> list[float]:
    """Over subsets without replacement: a picture drawn twice would look alike to itself."""
    value, spread = kid(row.features["inception"], against.features["inception"])
    return [value - 1.96 * spread, value + 1.96 * spread]


def drift_parts(row: Row, against: Against) -> dict[str, float]:
    return drift(against.teacher.features["departures"][: len(row)], row.features["departures"])


METRICS = [
    Metric("retrieval", "recognised", "hits", mean("hits"), "higher", judges=True),
    Metric("background", "background", "background", mean("background"), "higher"),
    Metric("frechet", "Frechet", "embedded", distance("embedded"), "lower", "moments", judges=True, enough=ENOUGH),
    Metric("fid", "FID", "inception", distance("inception"), "lower", "moments", judges=True, enough=ENOUGH, costly=True),
    Metric("patch_fid", "patch FID", "patch", distance("patch"), "lower", "moments", enough=ENOUGH, costly=True),
    Metric("kid", "KID", "inception", lambda r, i, a: kid(r.features["inception"][i], a.features["inception"])[0], "lower",
           "features", costly=True, own_band=kid_band),
    Metric("cmmd", "CMMD", "clip", lambda r, i, a: cmmd(r.features["clip"][i], a.features["clip"]), "lower",
           "features", costly=True),
    Metric("clip_score", "CLIP", "clip_score", mean("clip_score"), "higher", judges=True),
    Metric("same_noise", "to teacher", "same_noise", mean("same_noise"), "lower"),
    Metric("diversity", "diversity", "diversity", lambda r, i, a: r.features["diversity"].mean().item(), "higher",
           per_picture=False),
    Metric("drift", "drift", "departures",
           lambda r, i, a: drift(a.teacher.features["departures"][i], r.features["departures"][i])["drift"], "lower",
           "teacher", parts=drift_parts),
]  # fmt: skip


def judging(row: Row, against: Against) -> list[Metric]:
    """Those in which a student's gap to the teacher is measured."""
    return [metric for metric in METRICS if metric.judges and metric.computable(row, against)]


def too_few(row: Row, against: Against) -> list[Metric]:
    """Those that mean nothing for so few pictures."""
    return [metric for metric in METRICS if len(row) < metric.enough and metric.known(row, against)]


def present(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The columns of a table: metrics that one of the measured rows has."""
    return [metric for metric in METRICS if any(row.get(metric.name) is not None for row in rows)]


def measured(row: Row, against: Against, *, bands: bool = True) -> dict[str, Any]:
    """{metric: figure} of every metric that the row has, and `band`, {metric: [low, high]}."""
    figures: dict[str, Any] = {}
    ends: dict[str, list[float]] = {}
    for metric in (m for m in METRICS if m.known(row, against)):
        figures[metric.name] = metric.value(row, against)
        if bands and (low_high := metric.band(row, against)) is not None:
            ends[metric.name] = low_high
        if metric.parts is not None:
            figures |= metric.parts(row, against)
    return {**figures, "band": ends} if bands else figures
