"""The metrics that the closing table of training, `eval_every` and `evaluate` share. Add a metric to METRICS.

A feature extractor (features.py) turns pictures into numbers, one row per picture, and a metric is a function of these rows. So
pictures need not be kept, and a metric can have a bootstrap band over pictures. N pictures, D features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.quality.distances import BOOTSTRAPS, NEIGHBOURS, Better, Moments, band_of, cmmd, frechet, inside, kid, redrawn
from fastdiff.quality.drift import drift
from fastdiff.sampling.settings import Settings, listed

Features = dict[str, Tensor]  # each (N, ...)
COSTLY_DRAWS, COSTLY_PICTURES = 20, 10_000  # bootstraps of a metric that takes seconds; above so many pictures there are none
SEEN_BY = ("embedded", "inception")  # features in whose space neighbours are counted: the first that is there
NEAR = 2500  # pictures a row up to which neighbours are quickly counted
ENOUGH = 300  # pictures per row: with fewer a Frechet distance is not reliable


@dataclass(eq=False)
class Row:
    """One model with one way of sampling: the features of all its pictures, and the first pictures themselves."""

    model: str
    settings: Settings
    features: Features
    samples: int
    pictures: Tensor | None = None  # (K, 3, H, W) uint8, the first ones

    def __len__(self) -> int:
        return self.samples

    def part(self, rows: Tensor) -> "Row":
        """Return the row of some of the pictures, given by their indices (n,); those beyond the last picture are left out."""
        rows = rows[rows < len(self)]
        there = {k: v[rows] for k, v in self.features.items() if len(v) == len(self)}
        return Row(self.model, self.settings, there, len(rows))

    @property
    def calls(self) -> int:
        return self.settings.calls

    @property
    def title(self) -> str:
        return title(self.model, self.settings)

    @property
    def described(self) -> dict[str, Any]:
        """The model and the settings, as keys of the row in JSON."""
        s = self.settings
        way = dict(model=self.model, solver=s.scheduler, spacing=s.spacing, num_steps=s.num_steps, guidance=s.guidance)
        one_by_one = dict(timesteps=s.timesteps and list(s.timesteps), step_guidance=s.step_guidance and list(s.step_guidance))
        return {**way, "guidance_rescale": s.guidance_rescale, "eta": s.eta, **one_by_one, "calls": self.calls}


def title(model: str, settings: Settings) -> str:
    """A unique name of a row: it has all that the ways differ in, in which one model is sampled with equal steps."""
    s = settings
    guided = f", guidance {listed(s.step_guidance or [s.guidance])}" if s.guided else ""
    guided += f" rescaled {s.guidance_rescale:g}" if s.guided and s.guidance_rescale else ""
    at = f" at {listed(s.timesteps)}" if s.timesteps else ""
    spacing = f" {s.spacing}" if s.spacing not in {None, SOLVERS[s.scheduler].spacing} else ""
    random = f", eta {s.eta:g}" if s.eta else ""
    steps = f"{s.num_steps} step{'s' * (s.num_steps != 1)}"
    return f"{model}, {steps}{guided}{at} ({s.scheduler}{spacing}{random})"


@dataclass(eq=False)
class Against:
    """What rows are measured against: features of the reference, and the teacher's row of the same prompts and seeds."""

    features: Features
    teacher: Row
    figures: dict[tuple[Row, str, int], Tensor] = field(default_factory=dict)  # bootstraps, kept for bands and gaps
    balls: dict[tuple[Row, str], Tensor] = field(default_factory=dict)  # what `inside` gave for a row

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """{feature: mean and covariance over the reference}."""
        return {name: Moments.of(x) for name, x in self.features.items() if x.ndim == 2}

    def inside(self, row: Row) -> Tensor:
        """Whether each picture of a row (n,) lies in the ball of each of the first n reference pictures (n, n): see `inside`."""
        name = next(name for name in SEEN_BY if name in row.features)
        if (row, name) not in self.balls:
            self.balls[row, name] = inside(row.features[name], self.features[name][: len(row)])
        return self.balls[row, name]


@dataclass(frozen=True)
class Metric:
    """A metric: `of(row, picture indices, against)` computes its figure from the feature that it `needs`."""

    name: str  # the key in JSON
    label: str  # the heading of its column
    needs: str  # a feature, or several of which one is enough: "embedded|inception"
    of: Callable[[Row, Tensor, Against], float]
    better: Better
    reference: Literal["reference", "teacher"] | None = None  # what the row is compared with, in the same feature
    judges: bool = False  # whether the gap that a student closes is measured with it
    enough: int = 2  # pictures per row that make the figure reliable
    costly_above: int | None = None  # pictures a row above which a figure takes seconds
    share: bool = False  # whether it lies between 0 and 1
    own_band: Callable[[Row, Against], list[float]] | None = None  # a band of its own, where a bootstrap would be wrong
    parts: Callable[[Row, Against], dict[str, float]] | None = None  # the figures that it is the sum of

    def computable(self, row: Row, against: Against) -> bool:
        """Whether the features that it needs are there, so that it can be computed and bootstrapped."""
        of = {None: row.features, "reference": against.features, "teacher": against.teacher.features}[self.reference]
        return any(name in row.features and name in of for name in self.needs.split("|"))

    def value(self, row: Row, against: Against) -> float:
        """The figure over all pictures of the row."""
        return self.of(row, torch.arange(len(row)), against)

    def draws(self, row: Row, n: int) -> int:
        """The number of bootstrap sets of the row's first n pictures. None where a feature is not one of each picture."""
        if any(len(row.features[name]) != len(row) for name in self.needs.split("|") if name in row.features):
            return 0
        if self.costly_above is None or n <= self.costly_above:
            return BOOTSTRAPS
        return COSTLY_DRAWS if n <= COSTLY_PICTURES else 0

    def redrawn(self, row: Row, against: Against, n: int | None = None) -> Tensor:
        """The figure of the row's first n pictures, then of bootstrap sets of them: (1 + draws,)."""
        n = n or len(row)
        key = (row, self.name, n)
        if key not in against.figures:
            against.figures[key] = redrawn(row, lambda r, i: self.of(r, i, against), n, self.draws(row, n))
        return against.figures[key]

    def band(self, row: Row, against: Against) -> list[float] | None:
        """The 95 % band [low, high]; None where there is none."""
        if not self.computable(row, against):
            return None
        if self.own_band is not None:
            return self.own_band(row, against)
        if not self.draws(row, len(row)):
            return None
        ends = band_of(self.redrawn(row, against))
        return [min(1.0, max(0.0, end)) for end in ends] if self.share else ends


def mean(name: str) -> Callable[[Row, Tensor, Against], float]:
    """A metric's function: the mean of a feature (N,) over pictures, without NaN; of all of it, where it is of other pictures."""

    def of(row: Row, i: Tensor, against: Against) -> float:
        feature = row.features[name]
        return (feature[i] if len(feature) == len(row) else feature).nanmean().item()

    return of


def distance(name: str) -> Callable[[Row, Tensor, Against], float]:
    """A metric's function: the Frechet distance of a feature (N, D) to the reference."""
    return lambda row, i, against: frechet(row.features[name][i], against.moments[name])


def kid_band(row: Row, against: Against) -> list[float]:
    """KID's 95 % band from its subsets, drawn without replacement: a picture that is drawn twice would lower the distance."""
    value, spread = kid(row.features["inception"], against.features["inception"])
    return [value - 1.96 * spread, value + 1.96 * spread]


def drift_parts(row: Row, against: Against) -> dict[str, float]:
    """`drift` and the figures that it is the sum of."""
    return drift(against.teacher.features["departures"][: len(row)], row.features["departures"])


def coverage(row: Row, i: Tensor, against: Against) -> float:
    """The part of the reference pictures that have a picture of the row in their ball (Naeem 2020, equation 6).

    A student that draws the same picture for every noise is recognised well, and covers little.
    """
    drawn = torch.zeros(len(row))
    drawn[i] = 1
    return (against.inside(row).float() @ drawn > 0).float().mean().item()


def density(row: Row, i: Tensor, against: Against) -> float:
    """In how many balls of reference pictures a picture of the row lies, over the number to be expected (Naeem, equation 5)."""
    return against.inside(row).sum(0)[i].float().mean().item() / NEIGHBOURS


METRICS = [
    Metric("retrieval", "recognised", "hits", mean("hits"), "higher", judges=True, share=True),
    Metric("background", "background", "background", mean("background"), "higher", share=True),
    Metric("frechet", "Frechet", "embedded", distance("embedded"), "lower", "reference", judges=True, enough=ENOUGH),
    Metric("fid", "FID", "inception", distance("inception"), "lower", "reference", judges=True, enough=ENOUGH, costly_above=0),
    Metric("patch_fid", "patch FID", "patch", distance("patch"), "lower", "reference", enough=ENOUGH, costly_above=0),
    Metric("kid", "KID", "inception", lambda r, i, a: kid(r.features["inception"][i], a.features["inception"])[0], "lower",
           "reference", costly_above=0, own_band=kid_band),
    Metric("cmmd", "CMMD", "clip", lambda r, i, a: cmmd(r.features["clip"][i], a.features["clip"]), "lower",
           "reference", costly_above=0),
    Metric("clip_score", "CLIP", "clip_score", mean("clip_score"), "higher", judges=True),
    Metric("coverage", "coverage", "|".join(SEEN_BY), coverage, "higher", "reference", enough=ENOUGH,
           costly_above=NEAR, share=True),
    Metric("density", "density", "|".join(SEEN_BY), density, "higher", "reference", enough=ENOUGH,
           costly_above=NEAR),
    Metric("same_noise", "to teacher", "same_noise", mean("same_noise"), "lower"),
    Metric("diversity", "diversity", "diversity", mean("diversity"), "higher"),
    Metric("drift", "drift", "departures",
           lambda r, i, a: drift(a.teacher.features["departures"][i], r.features["departures"][i])["drift"], "lower",
           "teacher", parts=drift_parts),
]  # fmt: skip


def judging(row: Row, against: Against) -> list[Metric]:
    """The metrics with which a student's gap to the teacher is measured, as far as the row has them."""
    return [metric for metric in METRICS if metric.judges and metric.computable(row, against)]


def too_few(row: Row, against: Against) -> list[Metric]:
    """The row's metrics that are not reliable, because it has too few pictures."""
    return [metric for metric in METRICS if len(row) < metric.enough and metric.computable(row, against)]


def present(rows: Sequence[Mapping[str, Any]]) -> list[Metric]:
    """The metrics that at least one of the measured rows has: the columns of a table."""
    return [metric for metric in METRICS if any(row.get(metric.name) is not None for row in rows)]


def measured(row: Row, against: Against, *, bands: bool = True) -> dict[str, Any]:
    """{metric: figure} of every metric that the row has, and unless `bands` is false `band`, {metric: [low, high]}."""
    figures: dict[str, Any] = {}
    ends: dict[str, list[float]] = {}
    for metric in (m for m in METRICS if m.computable(row, against)):
        value = metric.value(row, against)
        if math.isnan(value):  # for example the diversity of pictures that all have prompts of their own
            continue
        figures[metric.name] = value
        if bands and (low_high := metric.band(row, against)) is not None:
            ends[metric.name] = low_high
        if metric.parts is not None:
            figures |= metric.parts(row, against)
    return {**figures, "band": ends} if bands else figures
