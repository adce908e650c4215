"""The options of `dmd`, and their presets."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import LAST_TIMESTEP, Presets
from fastdiff.options.student_and_fake import StudentAndFakeConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# Rows are families; a row family:recipe lies over its family's.
# fmt: off
DMD2 = dict(lambda_reg=0.0, fake_steps_per_gen=5, num_steps=4, fake_noise="fresh")  # DMD2 sections 4.2, 4.5
PAPER = dict(weight_decay=0.01, max_grad_norm=10.0, warmup=500)  # DMD appendix B, DMD2 scripts
CARD = dict(lr=5e-5, batch_size=2, grad_accum=4, gradient_checkpointing=True, steps=4000)  # lr: DMD2's LoRA; ours: for one card
WATCHED = dict(eval_every=200, keep="best", patience=5)  # over-saturation after some hundreds of steps is the known failure
PRESETS = Presets(
    # Measured (examples/emoji/README.md). At t = 749 an error of eps is multiplied by 4, not by 14.6 as at 999, and training
    # is steady; above 0.6 the guided scores over-saturate; attention alone makes the step cheaper than three networks.
    emoji=dict(
        data="teacher", pairs=2160, teacher_steps=8, t_gen=749, t_max=0.6, lambda_reg=1.0, reg_batch=8, lora_layers="attention",
        lora_rank=16, lora_alpha=16, lr=7e-4, fake_lr=1e-3, lr_schedule="cosine", warmup=20, ema=0.98, batch_size=24, steps=400,
        guidance=3.0, max_grad_norm=10.0, eval_every=100,
    ),
    sd15=dict(**PAPER, **CARD, **WATCHED, guidance=3.0, pairs=2048),  # guidance: DMD section 4.3
    sd21=dict(**PAPER, **CARD, **WATCHED, guidance=3.0, pairs=2048),
    sdxl=dict(PAPER, **{**CARD, **WATCHED, "batch_size": 1, "grad_accum": 8}, recipe="dmd2", guidance=8.0, pairs=1024),
    variants={
        "dmd2": Presets(
            # Its bottleneck is one latent position: a discriminator stays at a half there, so no GAN and no samples for one.
            emoji=dict(DMD2, t_gen=None, guidance=2.0, fake_steps_per_gen=2, lr=3e-4, steps=950),
            sd15=dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3),  # its 1.75 gives the best FID, and poor pictures
            sd21=dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3),
            sdxl=dict(DMD2, gan_weight=5e-3, offload=True),  # for 16 GiB; over 8 micro-batches the copies cost little
        ),
    },
)
# fmt: on
EXAMPLES = """fastdiff dmd
fastdiff dmd --base sd15 --prompts prompts.txt
fastdiff dmd --base sdxl --recipe dmd2 --num-steps 4 --data pictures/
fastdiff dmd --base sdxl --recipe dmd2 --init lcm.safetensors
fastdiff dmd --base sdxl --recipe dmd2 --num-steps 1 --t-gen 399 --reg-steps 2000"""


@dataclass
class Config(StudentAndFakeConfig):
    PANEL: ClassVar[str] = "Distribution matching"
    ESSENTIALS: ClassVar[str] = "base recipe num_steps data prompts output steps init batch_size max_time"
    VARIANT: ClassVar[str] = "recipe"  # its value picks a second row of PRESETS

    recipe: Annotated[Literal["dmd", "dmd2"], "dmd: one step, with regression; dmd2: few steps, two time scales, GAN"] = "dmd"
    student: Annotated[Literal["lora", "full"], "what trains into the few-step model: a LoRA, or all weights"] = "lora"
    fake: Annotated[Literal["lora", "full"], "what learns the student's distribution (fake score): a LoRA, or all weights"] = (
        "lora"
    )
    num_steps: Annotated[int, "sampling steps of the student", Range(1, 8)] = 1
    t_gen: Annotated[
        int | None,
        "timestep of the first sampling step, the others lie evenly below; default: the last; DMD2 uses 399 for one step of SDXL",
        Range(0, LAST_TIMESTEP),
    ] = None
    guidance: Annotated[float, "guidance w of the teacher, u + w (c - u), in scores and samples", Range(1)] = 3.0
    score_guidance: Annotated[
        Literal["constant", "fitted"],
        "guidance of the scores: --guidance everywhere, or fitted to the teacher's samples at each noise level",
    ] = "constant"
    t_min: Annotated[float, "lowest noise level of the scores, as a part of the timesteps", Range(0, 1)] = 0.02
    t_max: Annotated[float, "highest noise level of the scores", Range(0, 1)] = 0.98
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"],
        "weighting of the gradient: DMD's algorithm 2, DMD's equation 8, Diff-Instruct, SDS",
    ] = "dmd"
    fake_noise: Annotated[
        Literal["same", "fresh"],
        "noise on which the fake score learns: that of the gradient, which saves a call, or its own at any level (as published)",
    ] = "same"
    fake_precision: Annotated[
        Literal["run", "fp32"],
        "precision in which the fake score computes: that of the run, or fp32 (as published), with --fake full",
    ] = "run"
    lambda_reg: Annotated[float, "weight of the regression to the teacher's picture from the same noise; 0 = none", Range(0)] = (
        0.25
    )
    reg_batch: Annotated[int | None, "pairs of a batch in the regression; default: half the batch", Range(1)] = None
    reg_steps: Annotated[int, "steps at the start with the regression alone", Range(0)] = 0
    reg_crop: Annotated[
        int, "side of the crop that the regression decodes, in latent pixels; less takes less memory", Range(4)
    ] = 64
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 for LPIPS, or embedded (the default for emoji)"] = None
    gan_weight: Annotated[float, "weight of the GAN term for the student; 0 = none", Range(0)] = 0.0
    gan_weight_fake: Annotated[float, "weight of the GAN term for the discriminator", Range(0)] = 1e-2
    gan_features: Annotated[Literal["fake", "teacher"], "network whose bottleneck the discriminator sees"] = "fake"
    gan_width: Annotated[
        int | None,
        "channels of the discriminator; default: those of the features (DMD2); 256 save 1.4 GiB on SDXL",
        Range(8),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise UsageError(f"`t_min={self.t_min:g}`: must be at most `t_max={self.t_max:g}`")
        if self.t_gen is not None and self.t_gen < 2 * self.num_steps - 1:  # at timestep 0 an LCM step leaves its input as it is
            raise UsageError(f"`t_gen={self.t_gen}`: must be at least {2 * self.num_steps - 1} for {self.num_steps} steps")
        if self.reg_steps >= self.steps:
            raise UsageError(
                f"`reg_steps={self.reg_steps}`: leaves none of the `steps={self.steps}` to match distributions",
                "give more `steps`",
            )
        if self.fake_precision == "fp32" and self.fake == "lora":
            raise UsageError(
                "`fake_precision=fp32`: a fake score that is a LoRA computes with the base's network, in the run's precision",
                "use `fake=full`, or `precision=fp32` for the whole run",
            )
        if self.align_fake and self.student != self.fake:
            raise UsageError(
                f"`align_fake={self.align_fake:g}`: a LoRA and whole weights cannot be aligned",
                "let `student` and `fake` be both lora, or both full",
            )

    @property
    def student_whole(self) -> bool:
        return self.student == "full"

    @property
    def trains_whole(self) -> str | None:
        return "`student=full`" if self.student == "full" else "`fake=full`" if self.fake == "full" else None

    @property
    def regresses(self) -> bool:
        return self.lambda_reg > 0 or self.reg_steps > 0
