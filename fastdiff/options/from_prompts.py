"""The options that `tdm` and `sid` share: student and fake score are two LoRAs of the base, and prompts are all the data."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.options.student_and_fake import StudentAndFakeConfig


@dataclass
class FromPromptsConfig(StudentAndFakeConfig):
    """The options of methods that match distributions from prompts alone."""

    OF_PICTURES: ClassVar[tuple[str, ...]] = ("max_images", "buckets", "random_crops", "flip", "background", "min_size")
    WITHOUT: ClassVar[tuple[str, ...]] = ("pairs", "caption_column", *OF_PICTURES)

    data: Annotated[Literal["teacher"], "prompts alone are used: those of the teacher, or --prompts; no pictures are drawn"] = (  # type: ignore[assignment]
        "teacher"
    )
