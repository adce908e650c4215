"""Progressive adversarial distillation (Lin, Wang & Yang 2024, SDXL-Lightning).

    a stage a:b      teaches b steps what a teacher does in a steps; t on the student's grid, s = t - T / b, -1 = clean
    x_t  = alpha_t x0 + sigma_t eps, at T - 1 eps itself                                              section 3.5
    real = x_s after a / b DDIM steps of the stage before, from x_t    fake = x_s after one of the student
    mse       |fake - real|^2, the first stage's teacher is guided: guidance is baked in              equation 16
    cond      D (x_s, x_t, s, t, c):  the student follows the teacher's trajectories                  section 3.2
    uncond    D'(x_s, s, c):          where it cannot, it still draws pictures like the teacher's     section 3.2
              D loses softplus(-D(real)) + softplus(D(fake)), the student softplus(-D(fake))
    full      the same D', on the network with the LoRA merged in                                     section 3.6
    switch    before one step: |x0_student - x0_teacher|^2; from then on the network outputs x0       section 3.7

For students of two steps and one, t is any of 249, 499, 749, 999, D sees clean latents with noise, and the phases uncond and full
take the teacher of the stage before. One LoRA goes through all stages, so every stage writes a LoRA of the base.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch, moved
from fastdiff.diffusion import losses
from fastdiff.diffusion.samplers import jump
from fastdiff.diffusion.schedule import PredictionType, per_sample
from fastdiff.lora import adapters
from fastdiff.methods.shared.stages import Part, plan, timesteps
from fastdiff.methods.shared.start import StartsFromLora
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.discriminator import Discriminator
from fastdiff.options.lightning import EXAMPLES, PRESETS, Config
from fastdiff.options.lightning import Config as Options
from fastdiff.training.method import Load, Now, Stateful, Trains, Turn, equation
from fastdiff.training.run import Run

SHOWN = (9, 249, 499, 749)  # noise levels at which clean latents are judged
DETAIL = (5.0, 1.0, 1.0, 1.0)  # weights of these levels from step `late_detail_at`: the lowest level shows the detail


class Lightning(StartsFromLora):
    """Progressive adversarial distillation, with four adapters on the base's UNet.

    The adapters are `student`, `teacher` (the student of the stage before), `skip` (that of the stage before it) and
    `discriminator`. Players: `student`, which in phase `full` is a network of its own, and `discriminator`.
    """

    name, Config, presets, examples = "lightning", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        self.parts = plan(config)
        self.adapter(base.unet, "student")
        if start := self._start(config):
            adapters.start_from(base.unet, start.of_unet(), "student")
        self.kept = nn.ModuleDict()  # adapters that are saved with the run, whether or not they train now
        self.stage = -1
        self.discriminator: Discriminator | None = None

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        """Return the cost of the largest phase, with a discriminator; without `lora_only` the student is a second network."""
        first = plan(config)[0]
        encoder = 0.5 if config.discriminator == "full" else 0.0  # a discriminator has half of a UNet, the encoder
        full = encoder + (0 if config.lora_only else 1)
        return Load(full, 2.0 if encoder else 2.5, graph=1.5, grad=2.5, free=1 + 2 * first.a / first.b)

    @classmethod
    def cycle(cls, config: Options) -> int:
        return config.d_steps_per_gen

    # ---- phases

    def phases(self) -> list[Part]:
        return self.parts

    def state(self) -> dict[str, Stateful]:
        """Save all adapters of the chain: those of the teachers do not train, but no file has them."""
        return {"adapters": self.kept}

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.kept, *filter(None, (self.discriminator, self.source[0]))]

    def players(self, part: Part) -> dict[str, Trains]:
        """Set up teacher, student and discriminator of a phase, and return who trains."""
        if part.stage != self.stage:
            self._begin_stage(part.stage)
        kind: PredictionType | None = "sample" if part.b == 1 else None
        self.student = self.role("student", kind=kind)
        trained = adapters.parameters(self.base_model.unet, "student")
        self.kept["student"] = nn.ParameterList(trained)
        if part.kind == "full":
            update = lora.Lora(dict(adapters.factors(self.base_model.unet, self.config.lora_alpha)), {})
            self.student, trained = self.trained("student", adapters.plain(self.base_model.unet, update), kind)
        self.source = self._source_of(part)
        self.recipe = replace(
            self.recipe,
            scheduler="euler",
            spacing="trailing",
            num_steps=part.b,
            guidance=0.0,
            prediction_type=self.student.kind,
        )
        if part.kind in {"mse", "switch"}:
            return {"student": Trains(trained, averaged=True)}
        self._begin_discriminator(paired=part.kind == "cond")
        rate = self.config.full_lr if part.kind == "full" else self.config.adversarial_lr
        betas = (0.0, 0.99)  # section 3.6
        return {
            "student": Trains(trained, rate, betas, averaged=True),
            "discriminator": Trains(self.discriminator_params, self.config.d_lr or rate, betas),
        }

    def _begin_stage(self, stage: int) -> None:
        """Begin a stage: the student becomes the teacher, and the teacher becomes `skip`. The first teacher is the base.

        With `init`, the first teacher is that LoRA.
        """
        net, self.discriminator, self.stage = self.base_model.unet, None, stage
        depth = stage + bool(self.config.init)
        names = [name for name, first in (("teacher", 1), ("skip", 2)) if depth >= first]
        for name in names:
            if not adapters.parameters(net, name):
                self.adapter(net, name)
                for p in adapters.parameters(net, name):
                    p.data = p.data.to(self.base_model.dtype)  # as autocast sees it; a teacher needs no more
            self.kept[name] = nn.ParameterList(adapters.parameters(net, name)).requires_grad_(False)
        for name in reversed(names):
            adapters.copy_adapter(net, {"skip": "teacher", "teacher": "student"}[name], name)

    def _begin_discriminator(self, *, paired: bool) -> None:
        """Make a fresh discriminator for each stage, and for cond and uncond; phase `full` goes on with that of `uncond`."""
        if self.discriminator is not None and self.discriminator.paired == paired:
            return
        base, net, name = self.base_model, self.base_model.unet, "discriminator"
        if self.config.discriminator == "full":
            watched, params = self.trained(name, adapters.encoder(net))
        else:
            if not adapters.parameters(net, name):
                self.adapter(net, name, adapters.encoder_layers(net))
            adapters.reset(net, name)
            watched, params = self.role(name), adapters.parameters(net, name)
        side = self.resolution_px // base.pixels_per_latent
        self.discriminator = Discriminator(watched, side, paired=paired, every=self.config.d_features == "every")
        self.discriminator_params = [*params, *self.discriminator.heads.parameters()]

    def _source_of(self, part: Part) -> tuple[Denoiser, int, float]:
        """Return the teacher of a phase, its number of steps, and its guidance."""
        further = self.config.skip_teacher and part.b <= 2 and part.kind in {"uncond", "full"} and part.stage > 0
        name, stage = ("skip", part.stage - 1) if further else ("teacher", part.stage)
        steps = next(p.a for p in self.parts if p.stage == stage)
        return (self.role(name), steps, 1.0) if name in self.kept else (self.teacher, steps, self.config.guidance)

    # ---- equations

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Compute the losses of one step of the phase: first the discriminator's, then the student's against it."""
        part, cond, done = now.phase, batch.cond, now.done
        assert isinstance(part, Part)
        x_t, place = self.start(batch, part)
        t, s = timesteps(self.schedule, place), timesteps(self.schedule, place - 1 / part.b)
        if part.kind == "switch":
            with torch.no_grad():
                x0 = self.source[0](x_t, t, cond).x0
            yield {"student": {"switch": losses.squared(self.student(x_t, t, cond).x0, x0)}}
            return
        real = self.teacher_steps(x_t, place, batch, part)
        if part.kind == "mse":
            yield {"student": {"mse": losses.squared(self.move(x_t, t, s, cond), real)}}
            return
        assert self.discriminator is not None
        at, show = self.presented(s, now, real)
        judge = partial(self.discriminator, s=at, cond=cond, x_t=x_t, t=t)
        with torch.no_grad():
            fake = show(self.move(x_t, t, s, cond))
        yield {"discriminator": self.discriminator_losses(judge, show(real), fake)}
        fresh = part.kind != "full" or not any(p.kind == "uncond" for p in self.parts)
        if (fresh and done < self.config.d_warmup) or done % self.config.d_steps_per_gen:
            return
        with torch.no_grad():
            d_real = judge(show(real)) if self.config.gan == "paired" else 0.0
        yield {"student": {"gan": losses.gan_real(judge(show(self.move(x_t, t, s, cond))) - d_real)}}

    @equation("SDXL-Lightning, section 3.5")
    def start(self, batch: Batch, part: Part) -> tuple[Tensor, Tensor]:
        """Draw x_t (B, C, h, w) and its place in (0, 1], (B,). At place 1, the last timestep, x_t is pure noise."""
        latents, device = batch.latents, batch.latents.device
        place = (torch.randint(part.places, (len(latents),), device=device) + 1).double() / part.places
        eps = torch.randn_like(latents)
        x_t = self.schedule.add_noise(latents, eps, timesteps(self.schedule, place))
        return torch.where(per_sample(place == 1, eps), eps, x_t), place

    @equation("DDIM, equation 12")
    def move(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """Take one DDIM step of the student from x_t (B, C, h, w) at t to s, both (B,)."""
        return jump(self.schedule, self.student(x_t, t, cond), s)

    @equation("SDXL-Lightning, section 2.3")
    @torch.no_grad()
    def teacher_steps(self, x: Tensor, place: Tensor, batch: Batch, part: Part) -> Tensor:
        """Take the teacher's DDIM steps that span one step of the student, from x (B, C, h, w) at `place` (B,).

        Samples that reach the clean latent before the last step stay there.
        """
        net, steps, guidance = self.source
        for k in range(steps // part.b):
            t, s = (timesteps(self.schedule, place - j / steps) for j in (k, k + 1))
            p = net.guided(x, t.clamp(min=0), batch.cond, batch.uncond, guidance)
            x = torch.where(per_sample(t < 0, x), x, jump(self.schedule, p, s))
        return x

    @equation("SDXL-Lightning, section 3.7")
    def presented(self, s: Tensor, now: Now, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the timesteps (B,) at which the discriminator judges, and a function that noises latents to them.

        Real and fake latents get the same noise. Latents at s stay as they are, but for students of two steps and one, clean
        latents are noised to one of four levels, and from step `late_detail_at` most often to the lowest.
        """
        assert isinstance(now.phase, Part)
        few = now.phase.b <= 2
        weights = torch.tensor(DETAIL if now.done >= self.config.late_detail_at else (1.0,) * len(SHOWN))
        level = moved(torch.tensor(SHOWN)[torch.multinomial(weights, len(s), replacement=True)], s.device)
        at, eps = torch.where((s < 0) & few, level, s), torch.randn_like(like)
        noised = lambda x: self.schedule.add_noise(x, eps, at.clamp(min=0))
        return at, lambda x: torch.where(per_sample(at == s, x), x, noised(x))

    @equation("SDXL-Lightning, section 3.2; Jolicoeur-Martineau 2018, RpGAN")
    def discriminator_losses(self, judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Compute the discriminator's loss: -log D(real) - log(1 - D(fake)), or with `gan=paired` that of the difference.

        Real and fake come from the same x_t, so their difference carries more information than either logit. `r1` adds a
        penalty on how much a little noise changes D(real), a first-order form of R1.
        """
        d_real, d_fake = judge(real), judge(fake)
        self.log(d_real=d_real.detach().sigmoid().mean(), d_fake=d_fake.detach().sigmoid().mean())
        paired = self.config.gan == "paired"
        self.log(d_right=(d_real > d_fake).float().mean())  # share of pairs in which it rates the real latent higher
        terms = {"gan": losses.gan_real(d_real - d_fake) if paired else losses.gan_real(d_real) + losses.gan_fake(d_fake)}
        if self.config.r1:
            terms["r1"] = self.config.r1 * losses.squared(judge(real + 0.1 * torch.randn_like(real)), d_real)
        return terms

    def export(self, run: Run) -> None:
        """Write `lightning-8step.safetensors`, a LoRA of the base; in phase `full` the folder `lightning-8step-full`.

        The number is that of the stage's steps.
        """
        name = f"lightning-{self.recipe.num_steps}step"
        self.save_student(run, name if self.student.adapter else f"{name}-full")
