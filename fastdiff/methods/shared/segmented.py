"""One step by features and scores, in two segments of the noise levels (Song et al. 2024, SDXS, section 3.2).

FM   = mean over feature maps of 1 - SSIM(f(x), f(y)),     y the teacher's sample from the noise of x           eq. 10
g    = (fake.x0 - real.x0) / mean|x - real.x0|  at t in [t_min T, alpha T],        dL/dx = g / numel            eq. 11
       above alpha T the scores are inaccurate, and FM stands for them:   loss = along(g) + lambda FM         eq. 12
       alpha and lambda fall as the distributions come to overlap; the online model (fake) learns from every x
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.methods.shared.scores import Scores
from fastdiff.models import feature_matching
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import InputRefused, UsageError
from fastdiff.training.config import TrainConfig
from fastdiff.training.method import Losses, Now, Phase, Turn, equation
from fastdiff.training.scene import open_vae

# Presets of these methods begin with these rows. Paper: batches of 1024 to 2048, no schedules told; ours, for one card.
# fmt: off
CARD = dict(lr=1e-5, batch_size=4, grad_accum=8, warmup=100, gradient_checkpointing=True, steps=10_000, pairs=4096, ema=0.999)
EMOJI = dict(
    pairs=2160, teacher_steps=8, fake_lr=1e-3, lr_schedule="cosine", warmup=20, ema=0.98, batch_size=24, alpha_start=0.6,
    alpha_end=0.6, lora_layers="attention", lora_rank=16, lora_alpha=16, guidance=3.0, max_grad_norm=10.0,
)
# fmt: on


@dataclass
class SegmentedConfig(TrainConfig):
    """What methods with this loss take."""

    PANEL: ClassVar[str] = "Features and scores"

    init: Annotated[str | None, "checkpoint the student starts from: pruned, or of one step already; default: the base"] = None
    t_gen: Annotated[int | None, "timestep at which the student is called; default: --init's own, else the last", Range(0)] = None
    match_steps: Annotated[int, "first steps with feature matching alone", Range(0)] = 1000
    data: Annotated[str | None, "teacher: pairs of noise and picture come from nowhere else"] = "teacher"
    fake: Annotated[Literal["lora", "full"], "the online model, which learns the student's distribution"] = "lora"
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "their scale is alpha / rank", Range(above=0)] = 64
    lora_layers: Annotated[Literal["all", "attention"], "where they act; attention is faster and smaller"] = "all"
    guidance: Annotated[float, "of the teacher, in its scores and its samples: u + w (c - u)", Range(1)] = 7.5
    t_min: Annotated[float, "scores are compared from this part of the timesteps ...", Range(0, 1)] = 0.02
    alpha_start: Annotated[float, "... to this at first ...", Range(0, 1)] = 0.98
    alpha_end: Annotated[float, "... and to this at the end", Range(0, 1)] = 0.5
    lambda_fm_start: Annotated[float, "weight of feature matching beside the scores at first ...", Range(0)] = 10.0
    lambda_fm_end: Annotated[float, "... and at the end", Range(0)] = 1.0
    fm_encoder: Annotated[Literal["unet", "vgg", "dinov2", "embedded"], "whose features: unet needs no decoder"] = "unet"
    fm_weights: Annotated[str | None, "vgg: torchvision's VGG-16 file; dinov2: a folder or hub id"] = None
    fm_t_max: Annotated[float, "unet: with noise up to this part of the timesteps", Range(0, 1)] = 0.25
    fm_crop: Annotated[int, "vgg, dinov2: latent positions a side that are decoded: memory", Range(4)] = 64
    fm_batch: Annotated[int | None, "pairs a step in it beside the scores, of the batch; default half of it", Range(1)] = None
    weighting: Annotated[Literal["dmd", "eq8", "none", "sigma2"], "of g; none is Diff-Instruct's"] = "dmd"
    fake_lr: Annotated[float | None, "learning rate of the online model; default --lr", Range(above=0)] = None
    vae: Annotated[str | None, "VAE of previews and closing figures, as a tiny decoder; also decodes for vgg and dinov2"] = None

    def __post_init__(self) -> None:
        if self.t_min > min(self.alpha_start, self.alpha_end):
            raise UsageError(f"`t_min={self.t_min:g}`: must be at most `alpha_start` and `alpha_end`")

    def open_student(self, dtype: torch.dtype = torch.float32) -> Checkpoint:
        return checkpoint.load(self.init, dtype=dtype, allow_pickle=self.allow_pickle) if self.init else self.open_base(dtype)

    def start(self, base: Checkpoint) -> Checkpoint:
        """The checkpoint that the student starts from; InputRefused where it is of another family, or cannot be called so."""
        if self.t_gen is not None and self.t_gen >= len(base.schedule()):
            raise UsageError(f"`t_gen={self.t_gen}`: must be below {len(base.schedule())}")
        if not self.init:
            return base
        other = self.open_student(base.dtype)
        for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
            other_value, base_value = other.unet_config.get(key), base.unet_config.get(key)
            if other_value != base_value:
                raise InputRefused(
                    f"`init={self.init}`: its UNet has {key} {other_value}, the base {base_value}",
                    "it must be of the base's family",
                )
        return other


class Segmented(Scores):
    """Student, teacher and online model may be three networks; subclasses say who the student is, and what trains of it.

    Phases: `match`, feature matching alone; `distill`, with the scores.
    """

    config: SegmentedConfig

    @classmethod
    def needs(cls, config: SegmentedConfig) -> Needs:
        return "pairs"

    def _open_matching(self, first: Checkpoint) -> None:
        """Open the features, and choose where the student is called: `t_gen`, else where it was called before, else the last."""
        base, config = self.base_model, self.config
        self.matching = feature_matching.open_matching(
            config.fm_encoder,
            self.teacher,
            open_vae(base, config.vae),
            weights=config.fm_weights,
            t_max=config.fm_t_max,
            crop=config.fm_crop,
        )
        before = first.recipe.timesteps
        self.t_gen = config.t_gen if config.t_gen is not None else before[0] if before else len(self.schedule) - 1

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.fake, self.matching]

    @equation("SDXS, section 3.2")
    def generated(self, batch: Batch, pairs: int, fresh: float = 0.0) -> Tensor:
        """The student's x0 of pure noise; the first rows start from their pair's, but for a share `fresh` of it."""
        noise = torch.randn_like(batch.latents)
        if pairs:
            kept = torch.rand_like(batch.noise[:pairs, :1]) >= fresh if fresh else torch.tensor(True, device=noise.device)
            noise[:pairs] = torch.where(kept, batch.noise[:pairs], noise[:pairs])
        return self.student(noise, torch.full((len(noise),), self.t_gen, device=noise.device), batch.cond).x0

    @equation("SDXS, algorithm 1")
    def turn(self, x: Tensor, batch: Batch, now: Now, pairs: int) -> Turn:
        """Both players from one x; in the warm-up the student alone."""
        alpha, weight = self.scheduled(now)
        student: Losses = {}
        if pairs:
            student["features"] = weight * self.feature_loss(x, batch, pairs)
        if now.phase.name == "match":
            return {"student": student}
        seen = self.noised(x.detach(), self.config.t_min, alpha)
        fake = self.fake(seen.x_t, seen.t, batch.cond)
        student["matching"] = losses.along(x, self.gradient(seen, fake, batch))
        return {"fake": self.denoising(seen, fake), "student": student}

    def _pairs(self, batch: Batch, now: Now) -> int:
        """How many of the batch's first rows are compared with the teacher's pictures of their noise."""
        n = len(batch.latents)
        if now.phase.name == "match":
            return n
        return min(n, self.config.fm_batch or -(-n // 2)) if max(self.config.lambda_fm_start, self.config.lambda_fm_end) else 0

    @equation("SDXS, equation 12")
    def scheduled(self, now: Now) -> tuple[float, float]:
        """alpha and lambda: linear over the phase that has them; the warm-up is feature matching at weight 1."""
        if now.phase.name == "match":
            return 0.0, 1.0
        done, c = now.fraction, self.config
        alpha, weight = c.alpha_end - c.alpha_start, c.lambda_fm_end - c.lambda_fm_start
        return c.alpha_start + done * alpha, c.lambda_fm_start + done * weight

    @equation("SDXS, equation 10")
    def feature_loss(self, x: Tensor, batch: Batch, pairs: int) -> Tensor:
        """Feature matching, on the first rows."""
        rows = slice(pairs)
        return self.matching(x[rows], batch.latents[rows], batch.cond[rows]).mean()


def planned(**lengths: int) -> list[Phase]:
    """The phases that have steps; the last one writes."""
    names = [name for name, steps in lengths.items() if steps]
    return [Phase(name, lengths[name], exports=name == names[-1]) for name in names]
