"""The options that `sdxs` and `distill-controlnet` share, and the rows that their presets begin with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import LAST_TIMESTEP
from fastdiff.options.start import checked_start, open_start
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint

# Presets of these methods begin with these rows. The paper: batches of 1024 to 2048, no schedules named. These rows fit one card.
# fmt: off
CARD = dict(lr=1e-5, batch_size=4, grad_accum=8, warmup=100, gradient_checkpointing=True, steps=10_000, pairs=4096, ema=0.999)
EMOJI = dict(
    pairs=2160, teacher_steps=8, fake_lr=1e-3, lr_schedule="cosine", warmup=20, ema=0.98, batch_size=24, alpha_start=0.6,
    alpha_end=0.6, lora_layers="attention", lora_rank=16, lora_alpha=16, guidance=3.0, max_grad_norm=10.0,
)
# fmt: on


@dataclass
class SegmentedConfig(TrainConfig):
    """The options that `sdxs` and `distill-controlnet` share."""

    PANEL: ClassVar[str] = "Features and scores"

    init: Annotated[str | None, "checkpoint that the student starts from, pruned or already one-step; default: the base"] = None
    t_gen: Annotated[
        int | None,
        "timestep at which the student is called; default: as --init was trained, else the last",
        Range(0, LAST_TIMESTEP),
    ] = None
    match_steps: Annotated[int, "steps at the start with feature matching alone", Range(0)] = 1000
    data: Annotated[str | None, "teacher gives the pairs of noise and picture that these losses need"] = "teacher"
    fake: Annotated[Literal["lora", "full"], "the online model, which learns the student's distribution"] = "lora"
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "scale of the adapters is alpha / rank", Range(above=0)] = 64
    lora_layers: Annotated[Literal["all", "attention"], "layers that get an adapter; attention is faster and smaller"] = "all"
    guidance: Annotated[float, "guidance w of the teacher, u + w (c - u), in scores and samples", Range(1)] = 7.5
    t_min: Annotated[float, "lowest noise level of the scores, as a part of the timesteps", Range(0, 1)] = 0.02
    alpha_start: Annotated[float, "highest noise level of the scores at the start", Range(0, 1)] = 0.98
    alpha_end: Annotated[float, "highest noise level of the scores at the end", Range(0, 1)] = 0.5
    lambda_fm_start: Annotated[float, "weight of feature matching beside the scores at the start", Range(0)] = 10.0
    lambda_fm_end: Annotated[float, "weight of feature matching at the end", Range(0)] = 1.0
    fm_encoder: Annotated[
        Literal["unet", "vgg", "dinov2", "embedded"], "network whose features are matched; unet needs no decoder"
    ] = "unet"
    fm_weights: Annotated[str | None, "vgg: torchvision's VGG-16 file; dinov2: a folder or hub id"] = None
    fm_t_max: Annotated[float, "for unet: highest noise level of the pictures, as a part of the timesteps", Range(0, 1)] = 0.25
    fm_crop: Annotated[int, "for vgg and dinov2: side of the decoded crop in latent pixels; less takes less memory", Range(4)] = (
        64
    )
    fm_batch: Annotated[
        int | None, "pairs of a batch in feature matching beside the scores; default: half the batch", Range(1)
    ] = None
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"], "weighting of the score difference; none is Diff-Instruct's"
    ] = "dmd"
    fake_lr: Annotated[float | None, "learning rate of the online model; default --lr", Range(above=0)] = None
    vae: Annotated[
        str | None, "VAE for previews and closing figures, a folder, hub id or file; also decodes for vgg and dinov2"
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > min(self.alpha_start, self.alpha_end):
            raise UsageError(f"`t_min={self.t_min:g}`: must be at most `alpha_start` and `alpha_end`")

    @property
    def trains_whole(self) -> str | None:
        return "`fake=full`" if self.fake == "full" else None

    def open_student(self, dtype: "torch.dtype | None" = None) -> "Checkpoint":
        """The checkpoint of `init`, else the base."""
        return open_start(self.init, self, dtype) if self.init else self.open_base(dtype)

    def start(self, base: "Checkpoint") -> "Checkpoint":
        """The checkpoint that the student starts from. InputRefused if its UNet takes other inputs than the base's."""
        return checked_start(self.init, self, base) if self.init else base
