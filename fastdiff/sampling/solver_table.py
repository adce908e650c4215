"""A sampler as a table of numbers: what each call of the network sees, as sums of noise and earlier answers.

    x_k = sum_j c[k, j] h_j          h = start noise, answer 0, (fresh noise), answer 1, ...;   the last row gives x0

Every solver and every prediction type is linear in these, so the numbers are found by running the solver itself once, on one
position whose channels are the h_j: the formulas stay in `solvers.py`. A walk is then one product and one call a step, reads
nothing back from the device, and can be captured whole.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.diffusion.schedule import PredictionType
from fastdiff.diffusion.solvers import SOLVERS, Grid


@dataclass(frozen=True)
class Table:
    """One walk of n calls over K columns."""

    t: Tensor  # (n,) the timesteps
    rows: Tensor  # (n + 1, K) fp32
    fresh: tuple[bool, ...]  # of each column in order of time: fresh noise, else the next call's answer

    def __len__(self) -> int:
        return len(self.t)

    @property
    def draws(self) -> int:
        """How often noise is drawn, the start included."""
        return sum(self.fresh)

    def to(self, device: torch.device | str) -> "Table":
        return Table(self.t.to(device), self.rows.to(device), self.fresh)


@torch.no_grad()
def table(scheduler: str, grid: Grid, kind: PredictionType) -> Table:
    """The numbers of a solver of that name on that grid, for a network that outputs `kind`."""
    schedule, columns = deepcopy(grid.schedule).cpu(), 2 * len(grid) + 1
    t, seen, fresh = [], [], []

    def column(is_fresh: bool) -> Tensor:
        fresh.append(is_fresh)
        return torch.eye(columns)[len(fresh) - 1].reshape(1, -1, 1, 1)

    def denoise(x: Tensor, at: Tensor):
        seen.append(x.flatten())
        t.append(int(at))
        return schedule.predict(column(False), x, torch.as_tensor(at).cpu(), kind)

    grid = Grid(schedule, grid.t.cpu(), grid.final_index, grid.start_scale, grid.eta)
    last = SOLVERS[scheduler].run(denoise, column(True), grid, lambda: column(True))
    return Table(torch.tensor(t), torch.stack([*seen, last.flatten()])[:, : len(fresh)], tuple(fresh))
