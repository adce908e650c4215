"""Methods that match distributions from prompts alone, with student and fake score as two adapters of the base's network."""

from typing import Any

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.open import Needs
from fastdiff.methods.shared.student_and_fake import StudentAndFake
from fastdiff.options.from_prompts import FromPromptsConfig
from fastdiff.training.method import Trains


class FromPrompts(StudentAndFake):
    """Roles, players and data of such methods."""

    config: FromPromptsConfig

    _betas = (0.9, 0.999)  # AdamW's, of both players

    def __init__(self, base: Checkpoint, config: Any) -> None:
        super().__init__(base, config)
        self.student, students = self.trained("student")
        self.fake, fakes = self.trained("fake")
        self.trains = {
            "student": Trains(students, betas=self._betas, averaged=True),
            "fake": Trains(fakes, config.fake_lr, self._betas),
        }
        self._begin()

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return "prompts"
