"""How far apart two sets of pictures are, from a row of features each, and how sure that is. N pictures, D features."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

BOOTSTRAPS = 200
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # Jayasumana 2024, section 4
KID_SUBSETS, KID_SUBSET = 100, 1000  # Binkowski 2018, and torch-fidelity's defaults


@dataclass(eq=False)
class Moments:
    """Mean (D,) and covariance (D, D) of features, fp64."""

    mean: Tensor
    cov: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        return cls(features.double().mean(0), features.double().T.cov())

    @cached_property
    def root(self) -> Tensor:
        """cov^1/2."""
        values, vectors = torch.linalg.eigh(self.cov)
        return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(features: Tensor, reference: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_b^1/2 C_a C_b^1/2)^1/2), the FID formula (Heusel 2017, eq. 6); features (N, D).

    The reference's root is taken once, and of few features the eigenvalues are those of an N x N matrix: a bootstrap of
    Inception's 2048 features is affordable on a CPU.
    """
    x = features.double()
    mean = x.mean(0)
    x = (x - mean) / (len(x) - 1) ** 0.5
    y = x @ reference.root
    cross = torch.linalg.eigvalsh(y @ y.T if len(y) < y.shape[1] else y.T @ y).clamp(min=0).sqrt().sum()
    return ((mean - reference.mean).square().sum() + x.square().sum() + reference.cov.trace() - 2 * cross).item()


def kid(a: Tensor, b: Tensor) -> tuple[float, float]:
    """KID (Binkowski 2018) by torch-fidelity: mean and standard deviation over subsets, of half the pictures where few."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(a) // 2, len(b) // 2)
    options = dict(kid_subsets=KID_SUBSETS, kid_subset_size=size, kid_kernel="poly", rng_seed=2020, verbose=False)
    options |= dict(kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    figures = kid_features_to_metric(a, b, **options)
    return float(figures[KEY_METRIC_KID_MEAN]), float(figures[KEY_METRIC_KID_STD])


def cmmd(a: Tensor, b: Tensor) -> float:
    """1000 MMD^2 of normalised CLIP embeddings under a Gaussian of width 10, biased (Jayasumana 2024, eq. 4)."""
    from torch_fidelity.metric_kid import kernel_rbf, mmd2

    x, y = a.double().numpy(), b.double().numpy()
    k = lambda p, q: kernel_rbf(p, q, kid_kernel_rbf_sigma=CMMD_SIGMA)
    n = min(len(x), len(y))  # the library's form wants sets of one size
    x, y = x[:n], y[:n]
    return CMMD_SCALE * float(mmd2(k(x, x), k(x, y), k(y, y), unit_diagonal=True, mmd_est="biased"))


class Sized(Protocol):
    def __len__(self) -> int: ...


R = TypeVar("R", bound=Sized)
Statistic = Callable[[R, Tensor], float]  # (row, picture indices) -> figure


def resamples(n: int, draws: int, seed: int = 0) -> list[Tensor]:
    """All n indices, then `draws` sets of n drawn with replacement: the same for every row that is compared."""
    g = torch.Generator().manual_seed(seed)
    return [torch.arange(n), *(torch.randint(n, (n,), generator=g) for _ in range(draws))]


def redrawn(row: R, statistic: Statistic, n: int, draws: int) -> Tensor:
    """The figure of a row's first n pictures, then of `draws` sets of them drawn with replacement: (1 + draws,), fp64."""
    return torch.tensor([statistic(row, i) for i in resamples(n, draws)], dtype=torch.float64)


def quantiles(values: Tensor) -> list[float]:
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


def band_of(figures: Tensor) -> list[float]:
    """95 % band of `redrawn` figures, around the first, which is the figure itself.

    A set drawn with replacement has fewer distinct pictures, which alone raises a Frechet distance: the spread of the draws
    is used, and not where they lie.
    """
    return [(figures[0] + q).item() for q in quantiles(figures[1:] - figures[1:].mean())]


def band(row: R, statistic: Statistic, draws: int = BOOTSTRAPS) -> list[float]:
    """95 % bootstrap band of a figure over pictures, around the figure itself."""
    return band_of(redrawn(row, statistic, len(row), draws))


def gap_of(student: Tensor, teacher: Tensor, best: Tensor) -> dict[str, Any]:
    """`gap_closed` of the `redrawn` figures of three rows."""
    gap = (teacher - student) / (teacher - best)
    better = (teacher - student) * (1 if teacher[0] > best[0] else -1)
    none = [None, None]
    (low, high), (gain_low, gain_high) = (quantiles(gap[1:]), quantiles(better[1:])) if len(gap) > 1 else (none, none)
    return {
        "gap_closed": gap[0].item(),
        "low": low,
        "high": high,
        "teacher": teacher[0].item(),
        "student": student[0].item(),
        "teacher_50": best[0].item(),
        "gain": better[0].item(),  # in the metric's own units, positive = the student is better
        "gain_low": gain_low,
        "gain_high": gain_high,
    }


def gap_closed(student: R, teacher: R, best: R, statistic: Statistic, *, draws: int = BOOTSTRAPS) -> dict[str, Any]:
    """(m(T, n) - m(S, n)) / (m(T, n) - m(T, 50)) with a 95 % bootstrap band over prompts, all three rows redrawn alike.

    Without draws the band's ends are None.
    """
    n = min(len(row) for row in (student, teacher, best))
    return gap_of(*(redrawn(row, statistic, n, draws) for row in (student, teacher, best)))
