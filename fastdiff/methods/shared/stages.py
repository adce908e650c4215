"""The phases of a chain of stages a:b. Each stage teaches a student of b steps what a teacher does in a steps."""

from dataclasses import dataclass

from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.options.lightning import Config, Kind, read_chain
from fastdiff.training.method import Phase

# Fractions of T at which students of two steps and one train (SDXL-Lightning, section 3.7).
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Part(Phase):
    """A phase of a stage."""

    stage: int = 0
    kind: Kind = "mse"
    a: int = 0  # sampling steps of the stage's teacher
    b: int = 0  # sampling steps of the stage's student

    @property
    def places(self) -> tuple[float, ...]:
        """The places in (0, 1] at which the student trains; 1 is the last timestep."""
        return QUARTERS if self.b <= 2 else tuple((k + 1) / self.b for k in range(self.b))


def timesteps(schedule: NoiseSchedule, place: Tensor) -> Tensor:
    """Convert places (B,) to timesteps; 0 and below become -1, the clean latent. Places k / n give trailing spacing."""
    return (place.clamp(min=0) * len(schedule)).round().long() - 1


def plan(config: Config) -> list[Part]:
    """Return the phases of all stages with their steps. UsageError where `stages` or `phases` of the config is no chain."""
    return [
        Part(row.name, row.steps, row.exports, stage=row.stage, kind=row.kind, a=row.a, b=row.b) for row in read_chain(config)
    ]
