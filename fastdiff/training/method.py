"""What a method is: its options, its phases, and a generator of {player: losses}."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch
from fastdiff.models.denoiser import Denoiser
from fastdiff.training.run import Run

Losses = dict[str, Tensor]  # named, already weighted, scalar
Turn = dict[str, Losses]  # of each player that is updated now; none sees another's update of the same turn


@dataclass
class Phase:
    """A part of a run, with players and optimisers of its own."""

    name: str
    steps: int
    exports: bool = True  # at its end there is something to write
    start: int = 0  # its first step
    settled: bool = False  # its length has been measured, or it has ended


class Method(Protocol):
    """One paper. `losses` is its algorithm; it moves no devices, saves nothing and knows no optimiser.

    Besides these it may have `rates` {player: learning rate} and `betas` {player: of Adam} where they are not the usual,
    `baseline` "student" where the closing figures start from the student before training and not from the teacher in as many
    calls, `title` for the card and `facts` for the metrics,
    `prepare(batch)` to measure something of the data before the first step, `figures` {name: scalar tensor} to log beside the
    losses, and `extra_state` {name: object with a state_dict} that a resumed run needs. A method of several `phases` is told
    by `enter(phase)` which one begins, and sets its players then; a resumed run enters the phase that it was in.
    """

    players: dict[str, nn.Module]  # what trains, one optimiser each; the first is the student's, which alone is averaged
    student: Denoiser  # what is sampled and exported
    teacher: Denoiser
    base_model: Checkpoint
    recipe: Recipe
    parent: str  # hash of the base network

    def losses(self, batch: Batch, step: int) -> Iterator[Turn]: ...
    def updated(self, step: int) -> None: ...  # after every optimiser step
    def export(self, run: Run) -> None: ...
