"""Distribution matching distillation (Yin et al. 2023, DMD; Yin et al. 2024, DMD2).

    x    = G(z, t_k)                           the student's x0 from pure noise, or from its own trajectory up to step k
    x_t  = alpha_t x + sigma_t eps             one t, one eps, for both scores
    real = teacher(x_t, t; c, empty; w)        guided                  fake = fake_score(x_t, t; c)      not guided
    g    = (fake.x0 - real.x0) / mean|x - real.x0|
    student:     dL/dx = g / numel  (+ lambda_reg LPIPS(G(z_ref), y_ref), DMD)  (+ lambda_gan softplus(-D(x_t)), DMD2)
    fake score:  its own training loss on x  (+ what D loses on x and on real latents)

Every step trains the fake score, every r-th the student too (`--fake-steps-per-gen r`: r updates of the fake score for each of
the student), on one x. With LoRAs the three roles are one network: teacher = no adapter.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints import locate
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Presets
from fastdiff.data.batch import Batch
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction
from fastdiff.diffusion.solvers import simulate
from fastdiff.methods.shared.scores import Scores, fitted_guidance, start_from
from fastdiff.models import perceptual
from fastdiff.models.denoiser import Cond
from fastdiff.models.discriminator import Head
from fastdiff.runtime.config import Range
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import UsageError
from fastdiff.runtime.rng import seed_for
from fastdiff.training.config import TrainConfig
from fastdiff.training.method import Load, Losses, Now, Phase, Trains, Turn, equation

# Rows are families; a row family:recipe lies over its family's.
# fmt: off
DMD2 = dict(lambda_reg=0.0, fake_steps_per_gen=5, num_steps=4)  # DMD2 sections 4.2, 4.5
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
            emoji=dict(DMD2, t_gen=None, guidance=2.0, fake_steps_per_gen=2, lr=3e-4, steps=300),
            sd15=dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3),  # its 1.75 gives the best FID, and poor pictures
            sd21=dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3),
            sdxl=dict(DMD2, gan_weight=5e-3),
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
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Distribution matching"
    VARIANT: ClassVar[str] = "recipe"  # its value picks a second row of PRESETS

    recipe: Annotated[Literal["dmd", "dmd2"], "dmd: one step, with regression; dmd2: few steps, two time scales, GAN"] = "dmd"
    student: Annotated[Literal["lora", "full"], "what becomes the few-step model"] = "lora"
    fake: Annotated[Literal["lora", "full"], "what learns the student's distribution"] = "lora"
    init: Annotated[str | None, "a few-step LoRA of the same base that the student starts from"] = None
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "their scale is alpha / rank", Range(above=0)] = 64
    lora_layers: Annotated[Literal["all", "attention"], "where they act; attention is faster and smaller"] = "all"
    num_steps: Annotated[int, "sampling steps of the student", Range(1, 8)] = 1
    t_gen: Annotated[
        int | None,
        "timestep of the first step, the others evenly below; default the last; 399 for one step of SDXL (DMD2)",
        Range(0),
    ] = None
    guidance: Annotated[float, "of the teacher, in its scores and its samples: u + w (c - u)", Range(1)] = 3.0
    score_guidance: Annotated[
        Literal["constant", "fitted"], "in the scores: --guidance, or at each noise level what fits the teacher's samples"
    ] = "constant"
    t_min: Annotated[float, "scores are compared from this part of the timesteps ...", Range(0, 1)] = 0.02
    t_max: Annotated[float, "... to this", Range(0, 1)] = 0.98
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"], "of the gradient: algorithm 2, equation 8, Diff-Instruct, SDS"
    ] = "dmd"
    fake_steps_per_gen: Annotated[int, "updates of the fake score for each of the student's; --steps counts them", Range(1)] = 1
    fake_lr: Annotated[float | None, "learning rate of the fake score; default --lr", Range(above=0)] = None
    lambda_reg: Annotated[float, "weight of the regression to the teacher's pictures of the same noise; 0 = none", Range(0)] = (
        0.25
    )
    reg_batch: Annotated[int | None, "pairs a step in the regression, of the batch; default half of it", Range(1)] = None
    reg_steps: Annotated[int, "first steps with the regression alone", Range(0)] = 0
    reg_crop: Annotated[int, "latent positions a side that it decodes: memory", Range(4)] = 64
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 for LPIPS, or embedded (the default for emoji)"] = None
    gan_weight: Annotated[float, "weight of the GAN term for the student; 0 = none", Range(0)] = 0.0
    gan_weight_fake: Annotated[float, "weight of the GAN term for the discriminator", Range(0)] = 1e-2
    gan_features: Annotated[Literal["fake", "teacher"], "whose bottleneck the discriminator sees"] = "fake"
    proof: Annotated[int, "samples a row of the closing table (emoji only); 0 = none", Range(0, 2000)] = 500

    def __post_init__(self) -> None:
        if self.t_min > self.t_max:
            raise UsageError(f"`t_min={self.t_min:g}`: must be at most `t_max={self.t_max:g}`")

    @property
    def regresses(self) -> bool:
        return self.lambda_reg > 0 or self.reg_steps > 0


class DMD(Scores):
    """Three roles, on one network where student and fake score are LoRAs; players: student, fake (with the GAN head)."""

    name, Config, presets, examples = "dmd", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Config) -> None:
        super().__init__(base, config)
        student_net, fake_net = (self.copied() if kind == "full" else None for kind in (config.student, config.fake))
        self.student, students = self.trained("student", student_net)
        self.fake, fakes = self.trained("fake", fake_net)
        if config.init:
            start_from(self.student, lora.load(config.init, allow_pickle=config.allow_pickle))
        self.head = None
        if config.gan_weight:
            self.watched = self.fake if config.gan_features == "fake" else self.teacher
            side = self.resolution_px // base.pixels_per_latent
            side //= 2 if config.buckets else 1  # the shortest of the buckets
            self.head = Head.on(self.watched.net, base.unet_config["block_out_channels"][-1], side)
            fakes += self.head.parameters()
        self.trains = {
            "student": Trains(students, averaged=True, net=student_net),
            "fake": Trains(fakes, config.fake_lr, net=fake_net),
        }
        self.distance = None
        if config.regresses:
            pixels = perceptual.open_distance(base.family, config.lpips_weights, off="`lambda_reg=0`")
            self.distance = perceptual.DecodedDistance(base.vae, pixels, config.reg_crop)
        self.timesteps = sampling_timesteps(self.schedule, config)
        self.recipe = replace(
            self.recipe,
            method=config.recipe,
            scheduler="lcm",
            spacing="trailing",
            num_steps=config.num_steps,
            timesteps=tuple(self.timesteps.tolist()),
            guidance=1.0,
        )

    @classmethod
    def check(cls, config: Config) -> Config:
        """A wrong file is refused before hours of sampling."""
        if config.init:
            lora.load(config.init, allow_pickle=config.allow_pickle)
        if config.regresses:
            family = locate.family_of(config.base, allow_pickle=config.allow_pickle)
            perceptual.locate(family, config.lpips_weights, off="`lambda_reg=0`")
        return config

    @classmethod
    def needs(cls, config: Config) -> Needs:
        if config.regresses:
            return "pairs"
        return "latents" if config.gan_weight or config.score_guidance == "fitted" else "prompts"

    @classmethod
    def load(cls, config: Config, base: Checkpoint) -> Load:
        full, turn = (config.student == "full") + (config.fake == "full"), 1 / config.fake_steps_per_gen
        gan = 1.5 if config.gan_weight else 0.0
        return Load(full, 2 - full, 1, 2 + gan / 2, 1 + turn + gan, 2 * turn + (config.num_steps - 1) / 2)

    @classmethod
    def cycle(cls, config: Config) -> int:
        return config.fake_steps_per_gen

    def players(self, phase: Phase) -> dict[str, Trains]:
        return self.trains

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.fake, *filter(None, (self.head, self.distance))]

    def prepare(self, batch: Batch) -> None:
        """Before training, on samples: the guidance that fits them."""
        if self.config.score_guidance == "fitted":
            self.guidance = fitted_guidance(self.teacher, batch)
            levels = ", ".join(f"{self.guidance[t]:.2f} at t = {t}" for t in (20, 100, 300, 600, 980))
            info(f"guidance that fits the teacher's samples: {levels}")

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """DMD, algorithm 1; DMD2, section 4. Student and fake score learn from the same x, both from the other's old weights.

        The fake score answers once: its prediction in g is also the one that it is trained on, at the same noise and level.
        """
        config, step = self.config, now.step
        alone = step < config.reg_steps
        turn = alone or step % config.fake_steps_per_gen == 0
        k = 0 if alone else self._step_index(step)
        pairs = self._pairs(batch, alone) if turn and k == 0 else 0  # their noise is where the first step starts
        x_t, t = self.start(batch, k, pairs), self.timesteps[k].expand(len(batch.latents))
        with torch.set_grad_enabled(turn):
            x = self.student(x_t, t, batch.cond).x0
        student: Losses = {}
        if pairs:
            student["regression"] = (config.lambda_reg or 1.0) * self.distance(x[:pairs], batch.latents[:pairs]).mean()
        if alone:
            yield {"student": student}
            return
        seen = self.noised(x.detach(), config.t_min, config.t_max)
        fake = self.fake(seen.x_t, seen.t, batch.cond)
        players = {"fake": self.fake_losses(seen, fake, batch)}
        if turn:
            student["matching"] = losses.along(x, self.gradient(seen, fake, batch))
            if self.head:
                student["gan"] = config.gan_weight * losses.gan_real(self.logits(x, batch.cond))
            players["student"] = student
        yield players

    @equation("DMD, equation 6; DMD2, section 4.3")
    def fake_losses(self, seen: Noised, fake: Prediction, batch: Batch) -> Losses:
        """The fake score's own training loss, and the discriminator's."""
        terms = self.denoising(seen, fake)
        if self.head:
            made, real = self.logits(seen.x, batch.cond), self.logits(batch.latents, batch.cond)
            terms["gan"] = self.config.gan_weight_fake * (losses.gan_fake(made) + losses.gan_real(real))
            self.log(d_fake=made.detach().sigmoid().mean(), d_real=real.detach().sigmoid().mean())
        return terms

    @equation("DMD2, equation 4")
    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """The discriminator on a noised latent, every noise level."""
        t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
        return self.head(self.watched.bottleneck(x_t, t, cond))

    @equation("DMD, algorithm 1; DMD2, section 4.5")
    def start(self, batch: Batch, k: int, pairs: int) -> Tensor:
        """What the student meets at its step k; the first `pairs` rows start from their pair's noise."""
        noise = torch.randn_like(batch.latents)
        if pairs:
            noise[:pairs] = batch.noise[:pairs]
        generator = lambda x, t: self.student(x, t, batch.cond)
        return simulate(generator, noise, self.schedule, self.timesteps, k)

    def _step_index(self, step: int) -> int:
        """Which of the student's steps trains: the same on every process and in every micro-batch, and no process's own draw."""
        g = torch.Generator().manual_seed(seed_for(self.config.seed, 999_983, step))
        return int(torch.randint(len(self.timesteps), (), generator=g))

    def _pairs(self, batch: Batch, alone: bool = False) -> int:
        """How many of the batch's first rows take part in the regression."""
        if not (alone or self.config.lambda_reg):
            return 0
        n = len(batch.latents)
        return n if alone else min(n, self.config.reg_batch or -(-n // 2))


def sampling_timesteps(schedule: NoiseSchedule, config: Config) -> Tensor:
    """999, 749, 499, 249 for four steps from the last timestep; 749, 561, 374, 187 from 749."""
    n, first = config.num_steps, len(schedule) - 1 if config.t_gen is None else config.t_gen
    if not n <= first + 1 <= len(schedule):
        raise UsageError(f"`t_gen={config.t_gen}`: must be at least {n - 1} and below {len(schedule)}")
    return torch.tensor([round((first + 1) * (n - k) / n) - 1 for k in range(n)])
