"""The options of `train-lcm-lora`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import Presets
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# guidance is w of u + w (c - u), so the official scripts' w of [5, 15] and [3, 15] is one more here.
# fmt: off
PRESETS = Presets(
    # Measured: its best guidance is 3, and in so few steps a teacher step of five grid points teaches most. The random target and
    # the weighting are what two and four calls took on prompts that it never saw (examples/emoji/README.md).
    emoji=dict(
        lora_rank=32, lora_alpha=32, lr=1e-3, lr_schedule="cosine", warmup=20, ema=0.98, batch_size=24, steps=600,
        guidance_min=3.0, guidance_max=3.0, skip=5, target="random", weighting="inverse-step",
    ),
    # lr, guidance and 12 images a step: diffusers' LCM scripts and READMEs; here in parts, for small cards.
    sd15=dict(lr=1e-4, batch_size=4, grad_accum=3, gradient_checkpointing=True, guidance_min=6.0, guidance_max=16.0),
    sd21=dict(lr=1e-4, batch_size=4, grad_accum=3, gradient_checkpointing=True, guidance_min=6.0, guidance_max=16.0),
    sdxl=dict(lr=1e-4, batch_size=2, grad_accum=6, gradient_checkpointing=True, guidance_min=4.0, guidance_max=16.0),
)
# fmt: on
EXAMPLES = """fastdiff train-lcm-lora
fastdiff train-lcm-lora --base sdxl
fastdiff train-lcm-lora --base my.safetensors --base-config folder --data pictures/"""


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Consistency distillation"
    ESSENTIALS: ClassVar[str] = "base data prompts output steps num_steps lora_rank batch_size max_time resolution"

    lora_rank: Annotated[int, "rank of the adapter", Range(1)] = 64
    lora_alpha: Annotated[float, "scale of the adapter is alpha / rank", Range(above=0)] = 64
    full: Annotated[bool, "train all weights, with a guidance embedding and an averaged target"] = False
    init: Annotated[
        str | None,
        "what the student starts from: a few-step LoRA, or with --full also a whole checkpoint, as an LCM; default: the base",
    ] = None
    finetune: Annotated[bool, "consistency fine-tuning (LCF): noised data instead of a teacher"] = False
    target: Annotated[
        Literal["zero", "edge", "random"],
        "where the student jumps to: zero noise (LCM), the edge of the phase (PCM), a random level (TCD)",
    ] = "zero"
    phases: Annotated[int | None, "number of phases for --target edge; default: --num-steps", Range(1)] = None
    guidance_min: Annotated[float, "lowest teacher guidance w, u + w (c - u)", Range(0)] = 6.0
    guidance_max: Annotated[float, "highest teacher guidance; each sample draws its own", Range(0)] = 16.0
    grid_steps: Annotated[int, "DDIM steps of the distillation grid", Range(1, 1000)] = 50
    skip: Annotated[int, "grid points that one teacher step crosses; more learns faster but from coarser steps", Range(1)] = 1
    loss: Annotated[Literal["huber", "l2"], "distance between the two jumps"] = "huber"
    huber_c: Annotated[float, "distance at which the Huber loss turns from square to linear", Range(above=0)] = 0.001
    weighting: Annotated[
        Literal["none", "inverse-step"], "inverse-step: weigh each pair by 1 / (its step in noise scale), for detail (iCT)"
    ] = "none"
    target_ema: Annotated[float, "decay of the averaged target of --full", Range(0, below=1)] = 0.95
    num_steps: Annotated[int, "sampling steps that the file's recipe asks for", Range(1, 50)] = 4
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance_min > self.guidance_max:
            raise UsageError(f"`guidance_min={self.guidance_min:g}`: must be at most `guidance_max={self.guidance_max:g}`")
        if self.skip > self.grid_steps:
            raise UsageError(f"`skip={self.skip}`: must be at most `grid_steps={self.grid_steps}`")

    @property
    def trains_whole(self) -> str | None:
        return "`full`" if self.full else None
