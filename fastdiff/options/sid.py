"""The options of `sid`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from fastdiff.checkpoints.family import LAST_TIMESTEP, Presets
from fastdiff.options.from_prompts import FromPromptsConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# fmt: off
CARD = dict(  # the published rates are 1e-6 for whole networks and batches of 512
    lr=2e-5, fake_lr=1e-4, batch_size=1, grad_accum=8, gradient_checkpointing=True, steps=4000, warmup=50, ema=0.99,
    max_grad_norm=10.0, eval_every=200, keep="best", patience=5,
)
PRESETS = Presets(
    emoji=dict(
        t_first=749, t_max=0.6, lora_layers="attention", lora_rank=16, lora_alpha=16, lr=3e-4, fake_lr=1e-3, lr_schedule="cosine",
        warmup=20, ema=0.98, batch_size=24, steps=400, guidance=3.0, max_grad_norm=10.0, eval_every=100,
    ),
    sd15=dict(CARD, guidance=2.0, fake_guidance=2.0),
    sd21=dict(CARD, guidance=2.0, fake_guidance=2.0),
    sdxl=dict(CARD, guidance=4.0, fake_guidance=2.0, offload=True),
)
# fmt: on
EXAMPLES = """fastdiff sid
fastdiff sid --base sd15 --prompts prompts.txt
fastdiff sid --base sd21 --num-steps 4 --guidance 4.5 --fake-guidance 4.5"""


@dataclass
class Config(FromPromptsConfig):
    PANEL: ClassVar[str] = "Score identity"
    ESSENTIALS: ClassVar[str] = "base num_steps guidance fake_guidance prompts output steps init batch_size max_time"

    t_first: Annotated[
        int, "timestep of the student's first call; the others lie evenly below it; the default is SiD's", Range(0, LAST_TIMESTEP)
    ] = 625
    guidance: Annotated[float, "guidance w of the teacher, u + w (c - u)", Range(1)] = 1.5
    fake_guidance: Annotated[
        float, "guidance of the fake score, in the student's loss and in its own (long-short guidance)", Range(1)
    ] = 1.0
    identity: Annotated[
        float, "a in the loss: how much of the squared difference of the scores is subtracted; 1 to 1.2 as published", Range(0)
    ] = 1.0
    t_min: Annotated[float, "lowest noise level of the scores, as a part of the timesteps", Range(0, 1)] = 0.02
    t_max: Annotated[float, "highest noise level of the scores", Range(0, 1)] = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_first < 2 * self.num_steps - 1:  # at timestep 0 an LCM step leaves its input as it is
            raise UsageError(f"`t_first={self.t_first}`: must be at least {2 * self.num_steps - 1} for {self.num_steps} steps")
        if self.t_min > self.t_max:
            raise UsageError(f"`t_min={self.t_min:g}`: must be at most `t_max={self.t_max:g}`")
