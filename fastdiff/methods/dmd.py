"""Distribution matching distillation (Yin et al. 2023, DMD; Yin et al. 2024, DMD2).

    x    = G(z, t_k)                           the student's x0 from pure noise, or from its own trajectory up to step k
    x_t  = alpha_t x + sigma_t eps             one t, one eps, for both scores
    real = teacher(x_t, t; c, empty; w)        guided                  fake = fake_score(x_t, t; c)      not guided
    g    = (fake.x0 - real.x0) / mean|x - real.x0|                         diffusion/dmd_gradient.py
    student:     dL/dx = g / numel  (+ lambda_reg LPIPS(G(z_ref), y_ref), DMD)  (+ lambda_gan softplus(-D(x_t)), DMD2)
    fake score:  its own training loss on x  (+ what D loses on x and on real latents)

Every step trains the fake score, and every r-th step (`fake_steps_per_gen`) also the student, on the same x. With `reg_steps` the
student first trains alone, by regression. With LoRAs the three roles share one network, and the teacher is that network without
an adapter.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import locate
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.data.open import Needs
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import simulate
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, timesteps_from
from fastdiff.methods.shared.scores import fitted_guidance
from fastdiff.methods.shared.student_and_fake import StudentAndFake
from fastdiff.models import autoencoder, perceptual
from fastdiff.models.denoiser import Cond
from fastdiff.models.discriminator import Head
from fastdiff.options.dmd import EXAMPLES, PRESETS, Config
from fastdiff.options.dmd import Config as Options
from fastdiff.runtime.console import info
from fastdiff.runtime.rng import seed_for
from fastdiff.training.method import Load, Losses, Now, Trains, Turn, equation


class DMD(StudentAndFake):
    """Distribution matching. Players: `student`, and `fake`: the fake score, with the GAN head where there is one."""

    config: Options

    name, Config, presets, examples = "dmd", Config, PRESETS, EXAMPLES
    _alone = "regress"

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        student_net, fake_net = (self.copied() if kind == "full" else None for kind in (config.student, config.fake))
        self.student, students = self.trained("student", student_net)
        self.fake, fakes = self.trained("fake", fake_net)
        self.fake.full_precision = config.fake_precision == "fp32"
        self._begin()
        self.head: Head | None = None
        if config.gan_weight:
            self.watched = self.fake if config.gan_features == "fake" else self.teacher
            side = self.resolution_px // base.pixels_per_latent
            side //= 2 if config.buckets else 1  # the shortest side of any bucket
            self.head = Head.on(self.watched.net, base.unet_config["block_out_channels"][-1], side, config.gan_width)
            fakes += self.head.parameters()
        self.trains = {
            "student": Trains(students, averaged=True, net=student_net),
            "fake": Trains(fakes, config.fake_lr, net=fake_net),
        }
        self.distance: perceptual.DecodedDistance | None = None
        if config.regresses:
            pixels = perceptual.open_distance(base.family, config.lpips_weights, off="`lambda_reg=0`")
            self.distance = perceptual.DecodedDistance(base.vae, pixels, config.reg_crop, autoencoder.decoding(base.dtype))
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
    def check(cls, config: Options) -> Options:
        """Read the LoRA of `init` and find the LPIPS weights now, so that a wrong file fails before hours of sampling."""
        if config.regresses:
            family = locate.family_of(config.base, allow_pickle=config.allow_pickle)
            perceptual.locate(family, config.lpips_weights, off="`lambda_reg=0`")
        return super().check(config)

    @classmethod
    def needs(cls, config: Options) -> Needs:
        if config.regresses:
            return "pairs"
        return "latents" if config.gan_weight or config.score_guidance == "fitted" else "prompts"

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        full, often = (config.student == "full") + (config.fake == "full"), 1 / config.fake_steps_per_gen
        gan = 1.5 if config.gan_weight else 0.0
        free = (3 if config.fake_noise == "fresh" else 2) * often + (1 - often) + (config.num_steps - 1) / 2
        return Load(full, 2 - full, 1, 2 + gan / 2, 1 + often + gan, free)

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *filter(None, (self.head, self.distance))]

    def prepare(self, batch: Batch) -> None:
        """Fit the guidance of the real score to samples, for `score_guidance=fitted`."""
        if self.config.score_guidance == "fitted":
            self.guidance = guidance = fitted_guidance(self.teacher, batch)
            levels = ", ".join(f"{guidance[t]:.2f} at t = {t}" for t in (20, 100, 300, 600, 980))
            info(f"guidance that fits the teacher's samples: {levels}")

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Train student and fake score on the same x, each with the other's old weights (DMD, algorithm 1; DMD2, section 4).

        With `fake_noise=same` the fake score is called once: its prediction is used in g and in its own loss. With `fresh` its
        loss has noise of its own, at any of the T levels.
        """
        config = self.config
        alone, student_trains = now.phase.name == self._alone, self._student_trains(now)
        k = 0 if alone else self._step_index(now.step)
        pairs = (
            self.paired(len(batch.latents), now) if student_trains and k == 0 else 0
        )  # only the first step starts from a pair's noise
        x_t, t = self.start(batch, k, pairs), self.timesteps[k].expand(len(batch.latents))
        with torch.set_grad_enabled(student_trains):
            x = self.student(x_t, t, batch.cond).x0
        student: Losses = {}
        if pairs:
            assert self.distance is not None
            student["regression"] = (config.lambda_reg or 1.0) * self.distance(x[:pairs], batch.latents[:pairs]).mean()
        if alone:
            yield {"student": student}
            return
        seen = self.noised(x.detach(), config.t_min, config.t_max)
        if student_trains:
            real = self.real_score(seen, batch)
        same = config.fake_noise == "same"
        if student_trains or same:
            with torch.set_grad_enabled(same):
                fake = self.fake(seen.x_t, seen.t, batch.cond)
        if student_trains:
            student["matching"] = losses.along(x, self.gradient(seen, real, fake))
        if not same:
            seen = self.noised(x.detach(), 0, 1)
            fake = self.fake(seen.x_t, seen.t, batch.cond)
        players = {"fake": self.fake_losses(seen, fake, batch)}
        if student_trains:
            if self.head:
                student["gan"] = config.gan_weight * losses.gan_real(self.logits(x, batch.cond))
            players["student"] = student
        yield players

    @equation("DMD, equation 6; DMD2, section 4.3")
    def fake_losses(self, seen: Noised, fake: Prediction, batch: Batch) -> Losses:
        """Compute the fake score's own training loss, and the loss of the GAN head where there is one."""
        terms = self.denoising(seen, fake)
        if self.head:
            d_fake, d_real = self.logits(seen.x, batch.cond), self.logits(batch.latents, batch.cond)
            terms["gan"] = self.config.gan_weight_fake * (losses.gan_fake(d_fake) + losses.gan_real(d_real))
            self.log(d_fake=d_fake.detach().sigmoid().mean(), d_real=d_real.detach().sigmoid().mean())
        return terms

    @equation("DMD2, equation 4")
    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """Judge latents x0 (B, C, h, w) with the GAN head, each noised to a random timestep; returns logits."""
        assert self.head is not None
        t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
        return self.head(self.watched.bottleneck(x_t, t, cond))

    @equation("DMD, algorithm 1; DMD2, section 4.5")
    def start(self, batch: Batch, k: int, pairs: int) -> Tensor:
        """Simulate the student up to step k and return x_t there: (B, C, h, w). The first `pairs` rows start from their noise."""
        noise = torch.randn_like(batch.latents)
        if pairs:
            assert batch.noise is not None, "pairs without noise"
            noise[:pairs] = batch.noise[:pairs]
        generator = lambda x, t: self.student(x, t, batch.cond)
        return simulate(generator, noise, self.schedule, self.timesteps, k)

    def _step_index(self, step: int) -> int:
        """Draw which of the student's sampling steps trains: the same on every process and in every micro-batch."""
        g = torch.Generator().manual_seed(seed_for(self.config.seed, 999_983, step))
        return int(torch.randint(len(self.timesteps), (), generator=g))

    def _steps_alone(self) -> int:
        return self.config.reg_steps

    def paired(self, n: int, now: Now) -> int:
        """Return how many of the batch's first rows take part in the regression; all of them where it trains alone."""
        alone = now.phase.name == self._alone
        if not (alone or self.config.lambda_reg):
            return 0
        return n if alone else min(n, self.config.reg_batch or -(-n // 2))


def sampling_timesteps(schedule: NoiseSchedule, config: Config) -> Tensor:
    """Return the timesteps at which the student is called, (num_steps,), descending and evenly spaced from `t_gen`.

    Four steps are at 999, 749, 499, 249 from the last timestep, and at 749, 561, 374, 187 from `t_gen=749`.
    """
    first = len(schedule) - 1 if config.t_gen is None else config.t_gen
    return torch.tensor(timesteps_from(first, config.num_steps))
