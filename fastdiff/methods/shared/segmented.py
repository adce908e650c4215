"""One-step students by features and scores, each for a segment of the noise levels (Song et al. 2024, SDXS, section 3.2).

FM   = mean over feature maps of 1 - SSIM(f(x), f(y)),     y the teacher's sample from the noise of x           eq. 10
g    = (fake.x0 - real.x0) / mean|x - real.x0|  at t in [t_min T, alpha T],        dL/dx = g / numel            eq. 11
       above alpha T the scores are inaccurate, and FM replaces them:     loss = along(g) + lambda FM         eq. 12
       alpha and lambda fall while the two distributions come to overlap; the online model (fake) learns from every x
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.methods.shared.scores import Scores
from fastdiff.models import feature_matching
from fastdiff.options.segmented import SegmentedConfig
from fastdiff.training.method import Losses, Now, Turn, equation
from fastdiff.training.scene import open_vae


class Segmented(Scores):
    """The common part of methods with this loss. Subclasses choose the student's network and what of it trains.

    Student, teacher and online model may be three networks. Phases: `match`, with feature matching alone, then `distill`, with
    the scores too.
    """

    config: SegmentedConfig

    @classmethod
    def needs(cls, config: Any) -> Needs:
        return "pairs"

    def _open_matching(self, first: Checkpoint) -> None:
        """Open the feature extractor, and choose the timestep at which the student is called.

        That is `t_gen`, or the timestep in the recipe of `first`, or the last timestep.
        """
        base, config = self.base_model, self.config
        self.matching = feature_matching.open_matching(
            config.fm_encoder,
            self.teacher,
            open_vae(base, config.vae, allow_pickle=config.allow_pickle),
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
        """Generate the student's x0 (B, C, h, w) from pure noise.

        The first `pairs` rows start from the noise of their pair, of which a share `fresh` is drawn anew.
        """
        noise = torch.randn_like(batch.latents)
        if pairs:
            assert batch.noise is not None, "pairs without noise"
            own = batch.noise[:pairs]
            noise[:pairs] = torch.where(torch.rand_like(own[:, :1]) >= fresh, own, noise[:pairs]) if fresh else own
        return self.student(noise, torch.full((len(noise),), self.t_gen, device=noise.device), batch.cond).x0

    @equation("SDXS, algorithm 1")
    def turn(self, x: Tensor, batch: Batch, now: Now, pairs: int) -> Turn:
        """Compute the losses of both players on the samples x (B, C, h, w); in phase `match` those of the student alone."""
        alpha, weight = self.scheduled(now)
        student: Losses = {}
        if pairs:
            student["features"] = weight * self.feature_loss(x, batch, pairs)
        if now.phase.name == "match":
            return {"student": student}
        seen = self.noised(x.detach(), self.config.t_min, alpha)
        real = self.real_score(seen, batch)
        fake = self.fake(seen.x_t, seen.t, batch.cond)
        student["matching"] = losses.along(x, self.gradient(seen, real, fake))
        return {"fake": self.denoising(seen, fake), "student": student}

    def paired(self, n: int, now: Now) -> int:
        """Return how many of the batch's first rows are compared with the teacher's pictures of the same noise."""
        if now.phase.name == "match":
            return n
        return min(n, self.config.fm_batch or -(-n // 2)) if max(self.config.lambda_fm_start, self.config.lambda_fm_end) else 0

    @equation("SDXS, equation 12")
    def scheduled(self, now: Now) -> tuple[float, float]:
        """Return alpha and lambda, both linear in the progress of phase `distill`. Phase `match` has weight 1 and no scores."""
        if now.phase.name == "match":
            return 0.0, 1.0
        done, c = now.fraction, self.config
        alpha, weight = c.alpha_end - c.alpha_start, c.lambda_fm_end - c.lambda_fm_start
        return c.alpha_start + done * alpha, c.lambda_fm_start + done * weight

    @equation("SDXS, equation 10")
    def feature_loss(self, x: Tensor, batch: Batch, pairs: int) -> Tensor:
        """Compute the feature-matching loss of the first `pairs` rows: a scalar."""
        rows = slice(pairs)
        return self.matching(x[rows], batch.latents[rows], batch.cond[rows]).mean()
