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
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints import locate
from fastdiff.checkpoints.checkpoint import Checkpoint
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
from fastdiff.options.dmd import EXAMPLES, PRESETS, Config
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import UsageError
from fastdiff.runtime.rng import seed_for
from fastdiff.training.method import Load, Losses, Now, Phase, Trains, Turn, equation


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
