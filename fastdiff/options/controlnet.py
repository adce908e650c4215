"""The options of `distill-controlnet`, and their presets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from fastdiff.checkpoints.family import SHIPPED, Presets
from fastdiff.options import segmented
from fastdiff.options.segmented import SegmentedConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

if TYPE_CHECKING:
    from fastdiff.checkpoints.checkpoint import Checkpoint

CARD = dict(segmented.CARD, match_steps=0)
PRESETS = Presets(
    emoji=dict(segmented.EMOJI, controlnet=SHIPPED.name, lr=5e-4, steps=300, match_steps=0),
    sd15=dict(**CARD, guidance=7.5),
    sd21=dict(**CARD, guidance=7.5),
    sdxl=dict(CARD, batch_size=1, grad_accum=32, guidance=7.5),
)
EXAMPLES = """fastdiff distill-controlnet --init runs/prune-emoji/model
fastdiff distill-controlnet --base sd21 --controlnet owner/canny --init runs/prune-sd21/model --prompts prompts.txt
fastdiff distill-controlnet --base sd21 --controlnet owner/canny --init runs/sdxs-sd21/model --one-step"""


@dataclass
class Config(SegmentedConfig):
    PANEL: ClassVar[str] = "ControlNet"
    ESSENTIALS: ClassVar[str] = "base controlnet control init one_step prompts output steps batch_size max_time"

    controlnet: Annotated[str | None, "ControlNet of the base: a diffusers folder, a hub id, or emoji"] = None
    control: Annotated[str, "extractor that makes control pictures: canny, or MODULE:FUNCTION"] = "canny"
    one_step: Annotated[bool, "train for a one-step --init, whose UNet stays as it is"] = False
    lambda_feat: Annotated[float, "without --one-step: weight of the decoder features; 0 = none", Range(0)] = 1.0
    redraw: Annotated[float, "with --one-step: share of the noise that is replaced by new noise", Range(0, 1)] = 0.0
    proof: Annotated[int, "pictures kept out of training for the closing figures, at most a quarter of all", Range(1, 2000)] = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_every:
            raise UsageError("`eval_every`: has no use for a ControlNet", "`preview_every` shows how it gets on")
        if self.buckets:
            raise UsageError("`buckets`: has no use for a ControlNet here", "control pictures are squares of `resolution`")
        if self.one_step and not self.init:
            raise UsageError("`one_step`: needs the checkpoint that draws in one step", "give it as `init`")
        if self.one_step and self.match_steps > self.steps:
            raise UsageError(f"`match_steps={self.match_steps}`: more than `steps={self.steps}`")
        if self.redraw and not self.one_step:
            raise UsageError(f"`redraw={self.redraw:g}`: is of `one_step`", "several steps start from noised pictures")
        if not self.controlnet:
            raise UsageError("`controlnet`: which one of the base?", "a diffusers folder or a hub id")

    def start(self, base: "Checkpoint") -> "Checkpoint":
        first = super().start(base)
        if self.one_step and first.recipe.num_steps != 1:
            raise UsageError(f"`one_step`: {self.init} does not draw in one step", "`fastdiff sdxs` makes one that does")
        return first
