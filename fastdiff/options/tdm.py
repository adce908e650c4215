"""The options of `tdm`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import Presets
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range

# fmt: off
CARD = dict(
    lr=2e-5, fake_lr=1e-4, batch_size=2, grad_accum=4, gradient_checkpointing=True, steps=2000, warmup=50, ema=0.99,
    eval_every=200, keep="best", patience=5,
)
PRESETS = Presets(
    emoji=dict(lr=2e-4, fake_lr=1e-3, lora_layers="attention", lora_rank=32, lora_alpha=32, ema=0.98, batch_size=24, steps=600,
               guidance=3.0, warmup=20, eval_every=100),
    sd15=dict(CARD, guidance=3.5),
    sd21=dict(CARD, guidance=3.5),
    sdxl=dict(CARD, batch_size=1, grad_accum=8, guidance=7.5, offload=True),
)
# fmt: on
EXAMPLES = """fastdiff tdm
fastdiff tdm --base sdxl --prompts prompts.txt
fastdiff tdm --base sd15 --num-steps 2 --init tdm.safetensors"""


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Trajectory distribution matching"
    ESSENTIALS: ClassVar[str] = "base num_steps any_steps prompts output steps guidance init batch_size max_time"

    data: Annotated[str | None, "teacher: prompts alone are used, no pictures"] = "teacher"
    num_steps: Annotated[int, "sampling steps of the student", Range(1, 50)] = 4
    any_steps: Annotated[bool, "train for 1, 2, 4, ... up to --num-steps sampling steps in one"] = False
    init: Annotated[str | None, "a few-step LoRA of the same base that the student starts from"] = None
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "scale of the adapters is alpha / rank", Range(above=0)] = 64
    lora_layers: Annotated[Literal["all", "attention"], "layers that get an adapter; attention is faster and smaller"] = "all"
    guidance: Annotated[float, "guidance w of the teacher, u + w (c - u)", Range(1)] = 3.5
    noise_guidance: Annotated[
        float | None, "guidance at the highest noise level, from where it goes evenly to --guidance at the lowest", Range(1)
    ] = None
    match: Annotated[
        Literal["segment", "above"], "noise levels at which a step is matched: those that it crosses, or all above its end"
    ] = "segment"
    random_ends: Annotated[bool, "match a step at a random point of it, in place of its end"] = False
    moved: Annotated[
        Literal["x0", "point"], "what the gradient moves: the x0 of a step (as published), or the point where the step ends"
    ] = "point"
    distance: Annotated[Literal["squared", "huber"], "distance of the student to its target"] = "squared"
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"],
        "weighting of the gradient: DMD's algorithm 2, DMD's equation 8, Diff-Instruct, SDS",
    ] = "dmd"
    importance_weights: Annotated[bool, "weigh the fake score's loss by how likely its noise is"] = True
    fake_steps_per_gen: Annotated[
        int, "updates of the fake score per update of the student; --steps counts the former", Range(1)
    ] = 1
    align_fake: Annotated[
        float,
        "share by which each update of the student pulls the fake score's weights to the student's (SenseFlow)",
        Range(0, 1),
    ] = 0.0
    fake_lr: Annotated[float | None, "learning rate of the fake score; default --lr", Range(above=0)] = None
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000
