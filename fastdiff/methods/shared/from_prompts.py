"""Methods that match distributions from prompts alone, with student and fake score as two adapters of the base's network."""

from typing import Any

from torch import nn

from fastdiff import lora
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.open import Needs
from fastdiff.methods.shared.scores import Scores, align, start_from
from fastdiff.options.from_prompts import FromPromptsConfig
from fastdiff.training.method import Now, Phase, Trains


class FromPrompts(Scores):
    """Roles, players and data of such methods. Players: `student`, and `fake`, the fake score."""

    config: FromPromptsConfig

    _betas = (0.9, 0.999)  # AdamW's, of both players

    def __init__(self, base: Checkpoint, config: Any) -> None:
        super().__init__(base, config)
        self.student, students = self.trained("student")
        self.fake, fakes = self.trained("fake")
        if config.init:
            start_from(self.student, lora.load(config.init, allow_pickle=config.allow_pickle))
        if config.align_fake:
            align(self.fake, self.student, 1.0)
        self.trains = {
            "student": Trains(students, betas=self._betas, averaged=True),
            "fake": Trains(fakes, config.fake_lr, self._betas),
        }

    @classmethod
    def check(cls, config: Any) -> Any:
        """Read the LoRA of `init` now, so that a wrong file fails before anything else."""
        if config.init:
            lora.load(config.init, allow_pickle=config.allow_pickle)
        return config

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return "prompts"

    @classmethod
    def cycle(cls, config: Any) -> int:
        return config.fake_steps_per_gen

    def players(self, phase: Phase) -> dict[str, Trains]:
        return self.trains

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.fake]

    def after_update(self, now: Now) -> None:
        """Pull the fake score towards the student after each of the student's updates, for `align_fake`."""
        if self.config.align_fake and "fake" in self.players(now.phase) and self._student_trains(now):
            align(self.fake, self.student, self.config.align_fake)

    def _student_trains(self, now: Now) -> bool:
        return now.step % self.config.fake_steps_per_gen == 0
