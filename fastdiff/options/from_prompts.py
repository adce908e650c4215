"""The options that `tdm` and `sid` share: student and fake score are two LoRAs of the base, and prompts are all the data."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.options.student_and_fake import StudentAndFakeConfig
from fastdiff.runtime.errors import UsageError, as_field


@dataclass
class FromPromptsConfig(StudentAndFakeConfig):
    """The options of methods that match distributions from prompts alone."""

    WITHOUT: ClassVar[tuple[str, ...]] = ("pairs", "max_images", "buckets", "random_crops", "flip")  # of training pictures

    data: Annotated[Literal["teacher"], "prompts alone are used: those of the teacher, or --prompts; no pictures are drawn"] = (  # type: ignore[assignment]
        "teacher"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.WITHOUT:
            value, default = vars(self)[name], type(self).__dataclass_fields__[name].default
            if value != default:
                raise UsageError(
                    f"{as_field(name, value)}: no pictures are trained on here", "leave it out; `prompts` is the data"
                )
