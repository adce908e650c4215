"""A solver as a table of numbers: every input of the network as a weighted sum of noise and earlier network outputs.

    x_k = sum_j c[k, j] h_j          h = start noise, output 0, (fresh noise), output 1, ...;   the last row gives x0

All samplers and prediction types are linear in the h_j. The weights are computed by running the sampler once on a single
position whose channels are the h_j, so the formulas stay in `samplers.py`. A step is then one product and one network call; the
whole walk needs nothing back from the device and can be captured as one CUDA graph.
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastdiff.diffusion.samplers import SOLVERS, Grid
from fastdiff.diffusion.schedule import PredictionType


@dataclass(frozen=True)
class Table:
    """The table of a walk with n network calls and K columns h_j."""

    t: Tensor  # (n,) the timesteps
    rows: Tensor  # (n + 1, K) the weights c, fp32
    fresh: tuple[bool, ...]  # K entries in order of time: True for noise, False for the next network output

    def __len__(self) -> int:
        return len(self.t)

    @property
    def draws(self) -> int:
        """How often noise is drawn, including the start noise."""
        return sum(self.fresh)

    def to(self, device: torch.device | str) -> "Table":
        return Table(self.t.to(device), self.rows.to(device), self.fresh)


@torch.no_grad()
def table(scheduler: str, grid: Grid, kind: PredictionType) -> Table:
    """Compute the table of a solver on a grid of timesteps, for a network of prediction type `kind`."""
    schedule, columns = deepcopy(grid.schedule).cpu(), 2 * len(grid) + 1
    t, seen, fresh = [], [], []

    def column(is_fresh: bool) -> Tensor:
        fresh.append(is_fresh)
        return torch.eye(columns)[len(fresh) - 1].reshape(1, -1, 1, 1)

    def denoise(x: Tensor, at: Tensor):
        seen.append(x.flatten())
        t.append(int(at))
        return schedule.predict(column(False), x, torch.as_tensor(at).cpu(), kind)

    grid = replace(grid, schedule=schedule, t=grid.t.cpu())
    last = SOLVERS[scheduler].run(denoise, column(True), grid, lambda: column(True))
    return Table(torch.tensor(t), torch.stack([*seen, last.flatten()])[:, : len(fresh)], tuple(fresh))
