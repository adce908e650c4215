"""The roles, players and turns of methods that train a student against a fake score: DMD, TDM, SiD."""

from typing import Any

from torch import nn

from fastdiff import lora
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.lora import adapters
from fastdiff.methods.shared.scores import Scores, align, start_from
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.student_and_fake import StudentAndFakeConfig
from fastdiff.training.method import Now, Phase, Trains


class StudentAndFake(Scores):
    """A student, and a fake score that learns the student's samples. Both are players, by the names `student` and `fake`.

    A subclass makes both roles, sets `trains`, and then calls `_begin`.
    """

    config: StudentAndFakeConfig
    student: Denoiser
    trains: dict[str, Trains]

    @classmethod
    def check(cls, config: Any) -> Any:
        """Read the LoRA of `init` now, so that a wrong file fails before anything else."""
        if config.init:
            lora.load(config.init, allow_pickle=config.allow_pickle)
        return config

    @classmethod
    def check_base(cls, config: Any, base: Checkpoint) -> None:
        """Refuse a LoRA of `init` that does not fit the base or the adapters."""
        super().check_base(config, base)
        if config.init:
            layers = None if config.student_whole else cls._layers(config)
            adapters.check_start(lora.load(config.init, allow_pickle=config.allow_pickle), base, layers)

    @classmethod
    def cycle(cls, config: Any) -> int:
        return config.fake_steps_per_gen

    def players(self, phase: Phase) -> dict[str, Trains]:
        return self.trains

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.fake]

    def after_update(self, now: Now) -> None:
        """Pull the fake score towards the student after each of the student's updates, for `align_fake`."""
        if self.config.align_fake and self._student_trains(now) and self._fake_trains(now):
            align(self.fake, self.student, self.config.align_fake)

    def _begin(self) -> None:
        """Let the student start from the LoRA of `init`, and the fake score as the student where it is pulled towards it."""
        if self.config.init:
            start_from(self.student, lora.load(self.config.init, allow_pickle=self.config.allow_pickle))
        if self.config.align_fake:
            align(self.fake, self.student, 1.0)

    def _student_trains(self, now: Now) -> bool:
        return now.step % self.config.fake_steps_per_gen == 0

    def _fake_trains(self, now: Now) -> bool:
        return True
