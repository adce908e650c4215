"""The options of methods that train a student and a fake score: `dmd`, `tdm` and `sid`."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range


@dataclass
class StudentAndFakeConfig(TrainConfig):
    """The options of methods that match distributions: their roles, and who trains when."""

    PANEL: ClassVar[str] = "Student and fake score"

    num_steps: Annotated[int, "sampling steps of the student", Range(1, 25)] = 1
    init: Annotated[str | None, "a few-step LoRA for this family that the student starts from; best one for as many steps"] = None
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "scale of the adapters is alpha / rank", Range(above=0)] = 64
    lora_layers: Annotated[Literal["all", "attention"], "layers that get an adapter; attention is faster and smaller"] = "all"
    guidance: Annotated[float, "guidance w of the teacher, u + w (c - u)", Range(1)] = 3.5
    fake_lr: Annotated[float | None, "learning rate of the fake score; default --lr", Range(above=0)] = None
    fake_steps_per_gen: Annotated[
        int, "updates of the fake score per update of the student, in matching; --steps counts the former", Range(1)
    ] = 1
    align_fake: Annotated[
        float,
        "share by which each update of the student pulls the fake score's weights to the student's (SenseFlow); the fake score "
        "then also begins matching as the student",
        Range(0, 1),
    ] = 0.0
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000

    @property
    def student_whole(self) -> bool:
        """Whether all weights of the student train, rather than an adapter."""
        return False
