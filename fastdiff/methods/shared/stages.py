"""The phases of a chain of stages a:b. Each stage teaches a student of b steps what a teacher does in a steps."""

from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.options.lightning import Config, Kind, read_chain
from fastdiff.training.method import Phase


@dataclass(frozen=True)
class Part(Phase):
    """A phase of a stage."""

    stage: int = 0
    kind: Kind = "mse"
    a: int = 0  # sampling steps of the stage's teacher
    b: int = 0  # sampling steps of the stage's student

    @property
    def places(self) -> int:
        """In how many evenly spaced places of (0, 1] the student trains; 1 is the last timestep.

        Students of two steps and one train in quarters (SDXL-Lightning, section 3.7).
        """
        return 4 if self.b <= 2 else self.b


def timesteps(schedule: NoiseSchedule, place: Tensor) -> Tensor:
    """Convert places (B,) to timesteps; 0 and below become -1, the clean latent. Places k / n give trailing spacing."""
    return (place.clamp(min=0) * len(schedule)).round().long() - 1


def plan(config: Config) -> list[Part]:
    """Return the phases of all stages with their steps. UsageError where `stages` or `phases` of the config is no chain."""
    return [
        Part(row.name, row.steps, row.exports, stage=row.stage, kind=row.kind, a=row.a, b=row.b) for row in read_chain(config)
    ]
