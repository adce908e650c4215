"""The options of `sdxs`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import Presets
from fastdiff.options import segmented
from fastdiff.options.segmented import SegmentedConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

CARD = dict(segmented.CARD, fake_lr=1e-5, max_grad_norm=10.0, match_steps=1000)
PRESETS = Presets(
    # At 1 the gradient of feature matching is no stronger than that of the scores, which alone over-saturate.
    emoji=dict(segmented.EMOJI, t_gen=749, lr=7e-4, steps=800, match_steps=100, lambda_fm_end=10.0),
    sd15=dict(**CARD, guidance=7.5),  # table 3
    sd21=dict(**CARD, guidance=7.5),
    sdxl=dict(CARD, batch_size=1, grad_accum=32, guidance=7.5),
)
EXAMPLES = """fastdiff sdxs
fastdiff sdxs --base sd21 --init runs/prune-sd21/model --prompts prompts.txt
fastdiff sdxs --base sd21 --init runs/sdxs-sd21/model --style-lora anime.safetensors"""


@dataclass
class Config(SegmentedConfig):
    PANEL: ClassVar[str] = "One step"
    ESSENTIALS: ClassVar[str] = "base init prompts style_lora output steps match_steps vae batch_size max_time"

    student: Annotated[Literal["full", "lora"], "what trains of the student: all weights, or a LoRA"] = "full"
    style_lora: Annotated[
        str | None, "FILE[=WEIGHT]: a style LoRA of the teacher; the style becomes a LoRA of the one-step --init"
    ] = None
    style_pairs: Annotated[bool, "also sample the pairs with the style; without it use a lower --lambda-fm-start"] = True
    gan_steps: Annotated[int, "steps at the end against a discriminator, with a LoRA of --gan-rank", Range(0)] = 0
    gan_rank: Annotated[int, "rank of that LoRA, which is folded into full weights", Range(1)] = 4
    gan_lr: Annotated[float | None, "learning rate of the discriminator steps; default --lr", Range(above=0)] = None
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match_steps + self.gan_steps > self.steps:
            raise UsageError(f"`steps={self.steps}`: less than `match_steps` and `gan_steps` together")
        if self.shard and self.gan_steps and self.student == "full" and not self.style_lora:
            raise UsageError("`shard`: no LoRA goes onto split weights", "leave out `gan_steps`, or `student=lora`")
        if self.style_lora and not self.init:
            raise UsageError("`style_lora`: is for a student of one step", "give its checkpoint as `init`")

    @property
    def trains_whole(self) -> str | None:
        return "`student=full`" if self.student == "full" and not self.style_lora else super().trains_whole
