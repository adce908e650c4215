"""The options of commands that encode prompts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastdiff.checkpoints.text_reading import MAX_TOKENS, MOST_WINDOWS, WINDOW
from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint


@dataclass
class TextConfig(BaseConfig):
    """How prompts and captions are read."""

    PANEL: ClassVar[str] = "Prompts"

    max_tokens: Annotated[
        int,
        "tokens of a prompt or caption that are read, in windows of 75 as other programs do; 75: one window",
        Range(WINDOW, MOST_WINDOWS * WINDOW, multiple_of=WINDOW),
    ] = MAX_TOKENS
    clip_skip: Annotated[
        int | None,
        'last layers of the text encoders to leave out, as diffusers counts: "clip skip 2" of a model page is 1 here for SD1.5 '
        "and 0 for SDXL; default: as the weights say",
        Range(0, 24),
    ] = None

    @property
    def reading(self) -> dict[str, Any]:
        """The arguments of `checkpoint.load` that say how prompts are read."""
        return {"max_tokens": self.max_tokens, "clip_skip": self.clip_skip}

    def open_base(self, dtype: "torch.dtype | None" = None, **how: Any) -> "Checkpoint":
        """The base model as `BaseConfig.open_base` opens it, which reads prompts as these options say."""
        return super().open_base(dtype, **self.reading, **how)
