"""The roles, players and turns of methods that train a student against a fake score: DMD, TDM, SiD."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastdiff.methods.shared.scores import Scores, align, start_from
from fastdiff.methods.shared.start import StartsFromLora
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.student_and_fake import StudentAndFakeConfig
from fastdiff.training.method import Now, Phase, Trains, planned


class StudentAndFake(StartsFromLora, Scores):
    """A student, and a fake score that learns the student's samples. Both are players, by the names `student` and `fake`.

    A subclass makes both roles, sets `trains`, and then calls `_begin`. In the first phase, `_alone`, the student may train
    alone. Then it is matched, and `fake_steps_per_gen` says how often.
    """

    _alone = "alone"  # the name of the phase in which the student trains alone

    config: StudentAndFakeConfig
    student: Denoiser
    trains: dict[str, Trains]

    @classmethod
    def cycle(cls, config: Any) -> int:
        return config.fake_steps_per_gen

    def phases(self) -> list[Phase]:
        if not (alone := self._steps_alone()):
            return [Phase("", self.config.steps)]
        return planned(**{self._alone: alone, "match": self.config.steps - alone})

    def players(self, phase: Phase) -> dict[str, Trains]:
        """Return who trains in a phase. The fake score rests while the student trains alone.

        With `align_fake` it begins to match as the student.
        """
        if phase.name == self._alone:
            return {"student": self.trains["student"]}
        if self.config.align_fake:
            align(self.fake, self.student, 1.0)
        return self.trains

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.fake]

    def after_update(self, now: Now) -> None:
        """Pull the fake score towards the student after each of the student's updates, for `align_fake`."""
        if self.config.align_fake and now.phase.name != self._alone and self._student_trains(now):
            align(self.fake, self.student, self.config.align_fake)

    def _begin(self) -> None:
        """Let the student start from the LoRA of `init`."""
        if start := self._start(self.config):
            start_from(self.student, start.of_unet())

    @classmethod
    def _start_layers(cls, config: Any) -> Sequence[str] | None:
        return None if config.student_whole else super()._start_layers(config)

    def _steps_alone(self) -> int:
        """Return the number of steps at the start in which the student trains alone."""
        return 0

    def _student_trains(self, now: Now) -> bool:
        return now.phase.name == self._alone or now.done % self.config.fake_steps_per_gen == 0
