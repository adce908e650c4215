"""Score identity distillation with long-short guidance (Zhou et al. 2024, SiD and SiD-LSG), to one step or few.

    x    = G(z, t_k)                             the student's x0 from pure noise, or from its own trajectory up to step k
    x_t  = alpha_t x + sigma_t eps
    f    = teacher(x_t, t; c, empty; w).x0       guided
    g    = fake_score(x_t, t; c, empty; w').x0   guided too, with a weight of its own
    student:     (f - g) (f - x - a (f - g)) / mean|x - f|,      gradients through x, and through x_t into f and g
    fake score:  its training loss on x, of its guided prediction with w', weight SNR / (SNR + 1) on x0

Distribution matching follows the difference of two scores; here the student also learns how that difference changes with its
pictures, for a backward pass through the teacher and through the fake score. Prompts alone are needed. All roles are one network.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.losses import Noised
from fastdiff.diffusion.samplers import simulate
from fastdiff.diffusion.schedule import per_sample, timesteps_from
from fastdiff.methods.shared.from_prompts import FromPrompts
from fastdiff.options.sid import EXAMPLES, PRESETS, Config
from fastdiff.options.sid import Config as Options
from fastdiff.training.method import Load, Now, Turn, equation


class SiD(FromPrompts):
    """Score identity distillation."""

    config: Options

    name, Config, presets, examples = "sid", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        self.timesteps = torch.tensor(timesteps_from(config.t_first, config.num_steps))
        self.recipe = replace(
            self.recipe,
            scheduler="lcm",
            spacing="trailing",
            num_steps=config.num_steps,
            timesteps=tuple(self.timesteps.tolist()),
            guidance=1.0,
        )

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        often, both = 1 / config.fake_steps_per_gen, 2 if config.fake_guidance > 1 else 1
        return Load(lora=2, graph=3 + 2 * both, grad=both + often * (3 + both), free=1 - often + (config.num_steps - 1) / 2)

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Train the student on its samples, and the fake score on the same samples with other noise."""
        student_trains = self._student_trains(now)
        step = int(torch.randint(len(self.timesteps), ()))
        walk = lambda x, t: self.student(x, t, batch.cond)
        x_t = simulate(walk, torch.randn_like(batch.latents), self.schedule, self.timesteps, step)
        with torch.set_grad_enabled(student_trains):
            x = self.student(x_t, self.timesteps[step], batch.cond).x0
        players: Turn = {"fake": {"denoising": self.fake_loss(x.detach(), batch)}}
        if student_trains:
            seen = self.noised(x, self.config.t_min, self.config.t_max)
            players["student"] = {"identity": self.identity_loss(seen, batch)}
        yield players

    @equation("SiD, equation 23, with the guidance of SiD-LSG")
    def identity_loss(self, seen: Noised, batch: Batch) -> Tensor:
        """Compute the student's loss on its samples. It is zero where teacher and fake score agree."""
        f = self.teacher.guided(seen.x_t, seen.t, batch.cond, batch.uncond, self.config.guidance).x0
        g = self.fake.guided(seen.x_t, seen.t, batch.cond, batch.uncond, self.config.fake_guidance).x0
        scale = (seen.x.float() - f).abs().flatten(1).mean(1).clamp(min=1e-6).detach()
        self.log(difference=(f - g).detach().abs().mean())
        return ((f - g) * (f - seen.x - self.config.identity * (f - g)) / per_sample(scale, f)).mean()

    @equation("SiD-LSG, the fake score's loss")
    def fake_loss(self, x: Tensor, batch: Batch) -> Tensor:
        """Compute the fake score's loss on samples x (B, C, h, w): that of its guided prediction, at any noise level."""
        seen = self.noised(x, 0, 1)
        fake = self.fake.guided(seen.x_t, seen.t, batch.cond, batch.uncond, self.config.fake_guidance)
        snr = self.schedule.snr(seen.t)
        return losses.squared(fake.x0, x, per_sample(snr / (snr + 1), x))
