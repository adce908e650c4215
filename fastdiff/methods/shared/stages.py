"""A chain of stages a:b, each teaching b steps what a do, and its phases: who trains when, and for how many steps."""

from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.options.lightning import Config, Kind, read_chain
from fastdiff.training.method import Phase

QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of T: where students of two steps and one train (SDXL-Lightning, section 3.7)


@dataclass(frozen=True)
class Part(Phase):
    """A phase of a stage."""

    stage: int = 0
    kind: Kind = "mse"
    a: int = 0  # steps of the stage's teacher
    b: int = 0  # and of its student

    @property
    def places(self) -> tuple[float, ...]:
        """Where the student trains, in (0, 1], 1 the last timestep."""
        return QUARTERS if self.b <= 2 else tuple((k + 1) / self.b for k in range(self.b))


def timesteps(schedule: NoiseSchedule, place: Tensor) -> Tensor:
    """Places (B,) as timesteps, 0 and below as -1, clean: with k / n those of trailing spacing."""
    return (place.clamp(min=0) * len(schedule)).round().long() - 1


def plan(config: Config) -> list[Part]:
    """The phases of all stages with their steps; UsageError where `config.stages` or `config.phases` is no chain."""
    return [
        Part(row.name, row.steps, row.exports, stage=row.stage, kind=row.kind, a=row.a, b=row.b) for row in read_chain(config)
    ]
