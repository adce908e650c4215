"""The options of `prune`, and their presets."""

import math
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import Presets
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# Paper: AdamW 5e-5, 256 images a step, 50,000 steps. Ours for one card: smaller batches, a cosine, an average.
LAYOUTS = (  # the names in models/unet.py
    "bk-base", "bk-small", "bk-tiny", "sdxs-512", "sdxs-512-xattn", "ssd-1b", "vega", "koala-1b", "koala-700m",
)  # fmt: skip
# fmt: off
CARD = dict(lr=5e-5, lr_schedule="cosine", warmup=100, ema=0.999, steps=20_000, empty_prompts=0.1, gradient_checkpointing=True)
PRESETS = Presets(
    emoji=dict(
        layout="bk-base", lr=1e-3, lr_schedule="cosine", warmup=20, ema=0.98, batch_size=24, steps=300, empty_prompts=0.1,
        weight_decay=0.0, mix_prompts=0.5,
    ),
    sd15=dict(**CARD, layout="sdxs-512", batch_size=8, grad_accum=4),
    sd21=dict(**CARD, layout="sdxs-512", batch_size=8, grad_accum=4),
    sdxl=dict(**CARD, layout="vega", batch_size=1, grad_accum=16),
)
# fmt: on
EXAMPLES = """fastdiff prune --layout bk-tiny
fastdiff prune --base sd21 --layout sdxs-512 --prompts prompts.txt
fastdiff prune --base sdxl --layout vega --steps 0
fastdiff prune --base my.safetensors --auto --target-speed 2x"""


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Pruning"
    ESSENTIALS: ClassVar[str] = "base layout auto target_speed data prompts output steps batch_size max_time"

    layout: Annotated[str, f"{', '.join(LAYOUTS)}, or FILE.json, the config of a UNet"] = "bk-base"
    steps: Annotated[int, "optimiser steps; 0 = cut without training", Range(0)] = 1000
    lambda_feat: Annotated[float, "weight of the distance between features; 0 = none", Range(0)] = 1.0
    lambda_task: Annotated[float, "weight of the denoising loss; SDXS 0, BK-SDM 1", Range(0)] = 0.0
    feat_norm: Annotated[Literal["variance", "none"], "none: BK-SDM's raw sum, in which the widest block outweighs all"] = (
        "variance"
    )
    auto: Annotated[bool, "choose the blocks by measured cost and worth instead of a --layout"] = False
    target_speed: Annotated[str, "with --auto: how many times faster than the base"] = "2x"
    controlnet: Annotated[list[str], "folder of a ControlNet of the base that is cut the same way; repeatable"] = field(
        default_factory=list
    )
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        speed(self.target_speed)

    @property
    def trains_whole(self) -> str | None:
        return "pruning"


def speed(text: str) -> float:
    """How many times as fast, out of 2x, 1.5x or a plain number above 1; UsageError for anything else."""
    try:
        ratio = float(text.removesuffix("x"))
    except ValueError:
        ratio = 0.0
    if not 1 < ratio < math.inf:
        raise UsageError(f"`target_speed={text}`: not how many times as fast", "write 1.5x, 2x or 3x")
    return ratio
