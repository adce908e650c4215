"""The options of `tdm`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import Presets
from fastdiff.options.from_prompts import FromPromptsConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError, as_field

# fmt: off
CARD = dict(  # the published rate of the student is a fifth of the fake score's
    lr=2e-5, fake_lr=1e-4, batch_size=2, grad_accum=4, gradient_checkpointing=True, steps=2000, warmup=50, ema=0.99,
    eval_every=200, keep="best", patience=5,
)
PRESETS = Presets(
    # Measured (examples/emoji/README.md): ten minutes of one core. All layers and the high rates are what Frechet distance took.
    emoji=dict(
        lora_rank=32, lora_alpha=32, lr=4e-4, fake_lr=2e-3, lr_schedule="cosine", warmup=20, ema=0.99, batch_size=24, steps=450,
        guidance=3.0, eval_every=150,
    ),
    sd15=dict(CARD, guidance=3.5),
    sd21=dict(CARD, guidance=3.5),
    sdxl=dict(CARD, batch_size=1, grad_accum=8, guidance=7.5, offload=True),
)
# fmt: on
EXAMPLES = """fastdiff tdm
fastdiff tdm --base sdxl --prompts prompts.txt
fastdiff tdm --base sd15 --num-steps 2 --init tdm.safetensors"""


@dataclass
class Config(FromPromptsConfig):
    PANEL: ClassVar[str] = "Trajectory distribution matching"
    ESSENTIALS: ClassVar[str] = "base num_steps any_steps prompts output steps guidance init batch_size max_time"

    num_steps: Annotated[int, "sampling steps of the student", Range(1, 25)] = 4
    any_steps: Annotated[
        bool, "train for 1, 2, 4, ... up to --num-steps sampling steps in one LoRA, somewhat less well for each of them"
    ] = False
    follow: Annotated[
        float,
        "share of --steps, at the start, in which the student learns the teacher's own steps by squared error; worth a try where "
        "matching alone is unsteady, no gain on emoji",
        Range(0, below=1),
    ] = 0.0
    follow_steps: Annotated[int, "sampling steps of the teacher in --follow, over all noise levels", Range(1, 1000)] = 16
    noise_guidance: Annotated[
        float | None,
        "guidance at the highest noise level, from where it goes evenly to --guidance at the lowest; for colours that come out "
        "too loud, no gain on emoji",
        Range(1),
    ] = None
    match: Annotated[
        Literal["segment", "above"], "noise levels at which a step is matched: those that it crosses, or all above its end"
    ] = "segment"
    random_ends: Annotated[bool, "match a step at a random point of it, in place of its end"] = False
    moved: Annotated[
        Literal["x0", "point"], "what the gradient moves: the x0 of a step (as published), or the point where the step ends"
    ] = "point"
    distance: Annotated[
        Literal["squared", "huber"], "how the student's loss grows with the difference of the scores; huber: less for large ones"
    ] = "squared"
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"],
        "weighting of the gradient: DMD's algorithm 2, DMD's equation 8, Diff-Instruct, SDS",
    ] = "dmd"
    importance_weights: Annotated[
        bool, "weigh the fake score's loss by how likely its noise is; on latents of SD's size the weights are near 1"
    ] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.any_steps and (self.num_steps < 2 or self.num_steps & (self.num_steps - 1)):
            hint = "the LoRA then draws in 1, 2, 4, ... steps up to that number"
            raise UsageError(f"`num_steps={self.num_steps}`: must be 2, 4, 8 or 16 with `any_steps`", hint)
        if self.follow and not self.follows:
            more = "give more `steps`" if self.steps < 2 else "give more of either"
            raise UsageError(f"{as_field('follow', self.follow)}: is no step of `steps={self.steps}`", more)

    @property
    def follows(self) -> int:
        """The number of steps at the start in which the student learns the teacher's own steps. Matching is never left out."""
        return min(round(self.follow * self.steps), self.steps - 1)
