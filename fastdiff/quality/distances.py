"""Distances between two sets of pictures, computed from one row of features per picture, with bootstrap bands.

Shapes: N pictures, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Better = Literal["lower", "higher"]
BOOTSTRAPS = 200
NEIGHBOURS = 5  # k of coverage and density (Naeem 2020, section 4)
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana 2024, section 4
KID_SUBSETS, KID_SUBSET = 100, 1000  # Binkowski 2018, and torch-fidelity's defaults


@dataclass(eq=False)
class Moments:
    """The mean (D,) and the covariance (D, D) of a set of features, in fp64."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        return cls(features.double().mean(0), features.double().T.cov())

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance (D, D)."""
        values, vectors = torch.linalg.eigh(self.cov)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(features: Tensor, reference: Moments) -> float:
    """Frechet distance of features (N, D) to a reference, the formula of FID (Heusel 2017, eq. 6).

    It is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2). The reference's square root is computed once, and where
    N < D the eigenvalues come from an N x N matrix. This makes a bootstrap of Inception's 2048 features affordable on a CPU.
    """
    x = features.double()
    mean = x.mean(0)
    x = (x - mean) / (len(x) - 1) ** 0.5
    y = x @ reference.root
    cross = torch.linalg.eigvalsh(y @ y.T if len(y) < y.shape[1] else y.T @ y).clamp(min=0).sqrt().sum()
    return ((mean - reference.mean).square().sum() + x.square().sum() + reference.cov.trace() - 2 * cross).item()


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID (Binkowski 2018) of features (N, D), computed by torch-fidelity: mean and standard deviation over random subsets.

    A subset holds 1000 pictures, or half of the smaller set where that is fewer.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(a) // 2, len(b) // 2)
    options = dict(kid_subsets=KID_SUBSETS, kid_subset_size=size, kid_kernel="poly", rng_seed=2020, verbose=False)
    options |= dict(kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    figures = kid_features_to_metric(a, b, **options)
    return float(figures[KEY_METRIC_KID_MEAN]), float(figures[KEY_METRIC_KID_STD])


def cmmd(a: Tensor, b: Tensor) -> float:
    """CMMD of normalised CLIP embeddings (N, D): 1000 MMD^2, biased, Gaussian kernel of width 10 (Jayasumana 2024, eq. 4)."""
    from torch_fidelity.metric_kid import kernel_rbf, mmd2

    x, y = a.double().numpy(), b.double().numpy()
    k = lambda p, q: kernel_rbf(p, q, kid_kernel_rbf_sigma=CMMD_SIGMA)
    n = min(len(x), len(y))  # torch-fidelity's formula needs two sets of the same size
    x, y = x[:n], y[:n]
    return CMMD_SCALE * float(mmd2(k(x, x), k(x, y), k(y, y), unit_diagonal=True, mmd_est="biased"))


def inside(features: Tensor, reference: Tensor) -> Tensor:
    """Whether each picture (N, D) lies in the ball of each reference picture (M, D): (M, N) bool.

    The ball of a reference picture reaches to the k-th nearest other reference picture (Naeem 2020, section 3.2), k = NEIGHBOURS.
    """
    real, drawn = reference.float(), features.float()
    k = min(NEIGHBOURS, len(real) - 1)
    parts = []
    for part in real.split(1000):  # the distances of all at once would take gigabytes
        radius = torch.cdist(part, real).kthvalue(k + 1, dim=1).values  # the nearest of all is the picture itself
        parts.append(torch.cdist(part, drawn) < radius[:, None])
    return torch.cat(parts)


class Sized(Protocol):
    def __len__(self) -> int: ...


R = TypeVar("R", bound=Sized)
Statistic = Callable[[R, Tensor], float]  # (row, picture indices) -> figure


def resamples(n: int, draws: int, seed: int = 0) -> list[Tensor]:
    """Picture indices (n,): first all of them in order, then `draws` sets drawn with replacement.

    One seed gives the same sets every time, so rows that are compared are redrawn alike.
    """
    g = torch.Generator().manual_seed(seed)
    return [torch.arange(n), *(torch.randint(n, (n,), generator=g) for _ in range(draws))]


def redrawn(row: R, statistic: Statistic, n: int, draws: int) -> Tensor:
    """A figure of a row's first n pictures, then of `draws` bootstrap sets of them: (1 + draws,), fp64."""
    return torch.tensor([statistic(row, i) for i in resamples(n, draws)], dtype=torch.float64)


def quantiles(values: Tensor) -> list[float]:
    """The 2.5 % and the 97.5 % quantile: the two ends of a 95 % band."""
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def band_of(figures: Tensor) -> list[float]:
    """The 95 % band [low, high] of `redrawn` figures, centred on the first, which is the figure itself.

    Only the spread of the draws is used, not their level: a set drawn with replacement has fewer distinct pictures, and this
    alone raises a Frechet distance.
    """
    return [(figures[0] + q).item() for q in quantiles(figures[1:] - figures[1:].mean())]


def band(row: R, statistic: Statistic, draws: int = BOOTSTRAPS) -> list[float]:
    """The 95 % bootstrap band [low, high] of a figure over all pictures of a row, centred on the figure itself."""
    return band_of(redrawn(row, statistic, len(row), draws))


def verdict(low: float | None, high: float | None) -> str:
    """What a 95 % band of a gain says."""
    if low is None or high is None:
        return ""
    return "ahead" if low > 0 else "behind" if high < 0 else "no clear difference"


def gap_of(student: Tensor, teacher: Tensor, best: Tensor, better: Better) -> dict[str, Any]:
    """`gap_closed` from the `redrawn` figures (1 + draws,) of three rows; `better` is the metric's direction."""
    gap = (teacher - student) / (teacher - best)
    gain = (teacher - student) * (1 if better == "lower" else -1)
    none: list[float | None] = [None, None]
    (low, high), (gain_low, gain_high) = (quantiles(gap[1:]), quantiles(gain[1:])) if len(gap) > 1 else (none, none)
    if not gap[1:].isfinite().all():  # in some draws there is no gap to close
        low, high = none
    return {
        "gap_closed": gap[0].item(),
        "low": low,
        "high": high,
        "teacher": teacher[0].item(),
        "student": student[0].item(),
        "teacher_50": best[0].item(),
        "gain": gain[0].item(),  # in the metric's own units; positive where the student is better
        "gain_low": gain_low,
        "gain_high": gain_high,
        "verdict": verdict(gain_low, gain_high),
    }


def gap_closed(
    student: R, teacher: R, best: R, statistic: Statistic, better: Better = "lower", *, draws: int = BOOTSTRAPS
) -> dict[str, Any]:
    """The part of a teacher's gap that a student closes: (m(teacher) - m(student)) / (m(teacher) - m(best)).

    `teacher` has as few steps as the student, `best` is the teacher with many. The result has the 95 % bootstrap band over
    pictures, for which all three rows are redrawn alike. Without draws the ends of the band are None.
    """
    n = min(len(row) for row in (student, teacher, best))
    return gap_of(*(redrawn(row, statistic, n, draws) for row in (student, teacher, best)), better)
