"""Progressive adversarial distillation (Lin, Wang & Yang 2024, SDXL-Lightning).

    a stage a:b      teaches b steps what a steps do; t on the student's grid, s = t - T / b, -1 = clean
    x_t  = alpha_t x0 + sigma_t eps, at T - 1 eps itself                                              section 3.5
    real = x_s after a / b DDIM steps of the stage before, from x_t    fake = x_s after one of the student
    mse       |fake - real|^2, the first stage's teacher is guided: guidance is baked in              equation 16
    cond      D (x_s, x_t, s, t, c):  the student keeps the teacher's way                             section 3.2
    uncond    D'(x_s, s, c):          and where it cannot, stays on the teacher's pictures            section 3.2
              D loses softplus(-D(real)) + softplus(D(fake)), the student softplus(-D(fake))
    full      the same D', on the network with the LoRA merged in                                     section 3.6
    switch    before one step: |x0_student - x0_teacher|^2; from then on the network outputs x0       section 3.7

In two steps and one, t is any of 249, 499, 749, 999, clean latents are shown to D noised, and without a condition the
teacher is the one of a stage further back. One LoRA goes through all stages, so each stage's file is a LoRA of the base.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.schedule import per_sample
from fastdiff.diffusion.solvers import jump
from fastdiff.lora import adapters
from fastdiff.methods.shared.stages import Part, plan, timesteps
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.discriminator import Discriminator
from fastdiff.options.lightning import EXAMPLES, PRESETS, Config
from fastdiff.training.method import Load, Method, Now, Stateful, Trains, Turn, equation
from fastdiff.training.run import Run

SHOWN = (9, 249, 499, 749)  # noise levels at which clean latents are judged
DETAIL = (5.0, 1.0, 1.0, 1.0)  # their weights once training is stable


class Lightning(Method):
    """One UNet with adapters: student, teacher (the stage before), skip (the one before that), discriminator.

    Players: student (in the full phase a network of its own), discriminator.
    """

    name, Config, presets, examples = "lightning", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Config) -> None:
        super().__init__(base, config)
        self.parts = plan(config)
        self.adapter(base.unet, "student")
        if config.init:
            adapters.start_from(base.unet, lora.load(config.init, allow_pickle=config.allow_pickle), "student")
        self.kept = nn.ModuleDict()  # what a resumed run needs besides its players
        self.stage, self.discriminator = -1, None

    @classmethod
    def check(cls, config: Config) -> Config:
        """A wrong file is refused before anything is sampled."""
        if config.init:
            lora.load(config.init, allow_pickle=config.allow_pickle)
        return config

    @classmethod
    def load(cls, config: Config, base: Checkpoint) -> Load:
        """The largest phase: discriminator and student, in the full phase a network of its own."""
        first = plan(config)[0]
        own = 0.5 if config.discriminator == "full" else 0.0  # the encoder alone
        full = own + (0 if config.lora_only else 1)
        return Load(full, 2.0 if own else 2.5, graph=1.5, grad=2.5, free=1 + 2 * first.a / first.b)

    @classmethod
    def cycle(cls, config: Config) -> int:
        return config.d_steps_per_gen

    # ---- phases

    def phases(self) -> list[Part]:
        return self.parts

    def state(self) -> dict[str, Stateful]:
        return {"adapters": self.kept}

    def networks(self) -> list[nn.Module]:
        return [self.teacher, self.student, self.kept, *filter(None, (self.discriminator, self.sources[0]))]

    def players(self, part: Part) -> dict[str, Trains]:
        """Who is teacher, student and discriminator in this phase."""
        if part.stage != self.stage:
            self._begin_stage(part.stage)
        kind = "sample" if part.b == 1 else None
        self.student = self.role("student", kind=kind)
        trained = adapters.parameters(self.base_model.unet, "student")
        self.kept["student"] = nn.ParameterList(trained)
        if part.kind == "full":
            worn = lora.Lora(adapters.factors(self.base_model.unet, self.config.lora_alpha), {})
            self.student, trained = self.trained("student", adapters.plain(self.base_model.unet, worn), kind)
        self.sources = self._sources_of(part)
        how = dict(scheduler="euler", spacing="trailing", num_steps=part.b, guidance=0.0)
        self.recipe = replace(self.recipe, **how, prediction_type=self.student.kind)
        if part.kind in {"mse", "switch"}:
            return {"student": Trains(trained, averaged=True)}
        self._begin_discriminator(paired=part.kind == "cond")
        rate = self.config.full_lr if part.kind == "full" else self.config.adversarial_lr
        betas = (0.0, 0.99)  # section 3.6
        return {
            "student": Trains(trained, rate, betas, averaged=True),
            "discriminator": Trains(self.judges, self.config.d_lr or rate, betas),
        }

    def _begin_stage(self, stage: int) -> None:
        """The student of the last stage becomes the teacher, and the teacher the one to skip to; before that it is the base."""
        net, self.discriminator, self.stage = self.base_model.unet, None, stage
        depth = stage + bool(self.config.init)
        made = [name for name, first in (("teacher", 1), ("skip", 2)) if depth >= first]
        for name in made:
            if not adapters.parameters(net, name):
                self.adapter(net, name)
            self.kept[name] = nn.ParameterList(adapters.parameters(net, name)).requires_grad_(False)
        for name in reversed(made):
            adapters.copy_adapter(net, {"skip": "teacher", "teacher": "student"}[name], name)

    def _begin_discriminator(self, *, paired: bool) -> None:
        """A fresh one for each stage and each way of judging; it goes on from uncond to full."""
        if self.discriminator is not None and self.discriminator.paired == paired:
            return
        base, net, name = self.base_model, self.base_model.unet, "discriminator"
        if self.config.discriminator == "full":
            watched, judges = self.trained(name, adapters.encoder(net))
        else:
            if not adapters.parameters(net, name):
                self.adapter(net, name, adapters.encoder_layers(net))
            adapters.reset(net, name)
            watched, judges = self.role(name), adapters.parameters(net, name)
        side = self.resolution_px // base.pixels_per_latent
        self.discriminator = Discriminator(watched, side, paired=paired, every=self.config.d_features == "every")
        self.judges = [*judges, *self.discriminator.heads.parameters()]

    def _sources_of(self, part: Part) -> tuple[Denoiser, int, float]:
        """The network that shows the way, its number of steps, and its guidance."""
        further = self.config.skip_teacher and part.b <= 2 and part.kind in {"uncond", "full"} and part.stage > 0
        name, stage = ("skip", part.stage - 1) if further else ("teacher", part.stage)
        steps = next(p.a for p in self.parts if p.stage == stage)
        return (self.role(name), steps, 1.0) if name in self.kept else (self.teacher, steps, self.config.guidance)

    # ---- equations

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """One step of the phase; the discriminator first, then the student against it."""
        part, cond, done = now.phase, batch.cond, now.done
        x_t, place = self.start(batch, part)
        t, s = timesteps(self.schedule, place), timesteps(self.schedule, place - 1 / part.b)
        if part.kind == "switch":
            with torch.no_grad():
                x0 = (self.role("teacher") if "teacher" in self.kept else self.teacher)(x_t, t, cond).x0
            yield {"student": {"switch": losses.squared(self.student(x_t, t, cond).x0, x0)}}
            return
        real = self.way(x_t, place, batch, part)
        if part.kind == "mse":
            yield {"student": {"mse": losses.squared(self.move(x_t, t, s, cond), real)}}
            return
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
        """x_t and its place in (0, 1], where 1 is the last timestep; there x_t is pure noise, as it is when sampling."""
        latents, places = batch.latents, torch.tensor(part.places, dtype=torch.float64)
        place = places[torch.randint(len(places), (len(latents),))].to(latents.device)
        eps = torch.randn_like(latents)
        x_t = self.schedule.add_noise(latents, eps, timesteps(self.schedule, place))
        return torch.where(per_sample(place == 1, eps), eps, x_t), place

    @equation("DDIM, equation 12")
    def move(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """One step of the student from t to s, each (B,)."""
        return jump(self.schedule, self.student(x_t, t, cond), s)

    @equation("SDXL-Lightning, section 2.3")
    @torch.no_grad()
    def way(self, x: Tensor, place: Tensor, batch: Batch, part: Part) -> Tensor:
        """Where the teacher's DDIM steps lead in the time of one of the student's; who is clean already stays."""
        net, steps, guidance = self.sources
        for k in range(steps // part.b):
            t, s = (timesteps(self.schedule, place - j / steps) for j in (k, k + 1))
            p = net.guided(x, t.clamp(min=0), batch.cond, batch.uncond, guidance)
            x = torch.where(per_sample(t < 0, x), x, jump(self.schedule, p, s))
        return x

    @equation("SDXL-Lightning, section 3.7")
    def presented(self, s: Tensor, now: Now, like: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """At which timesteps the discriminator looks, and what it is shown of latents there; the same noise on real and fake.

        Clean latents of few-step students get one of four levels, later most often the lowest.
        """
        few = now.phase.b <= 2
        weights = torch.tensor(DETAIL if now.done >= self.config.late_detail_at else (1.0,) * len(SHOWN))
        level = torch.tensor(SHOWN)[torch.multinomial(weights, len(s), replacement=True)].to(s.device)
        at, eps = torch.where((s < 0) & few, level, s), torch.randn_like(like)
        noised = lambda x: self.schedule.add_noise(x, eps, at.clamp(min=0))
        return at, lambda x: torch.where(per_sample(at == s, x), x, noised(x))

    @equation("SDXL-Lightning, section 3.2; Jolicoeur-Martineau 2018, RpGAN")
    def discriminator_losses(self, judge: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """-log D(real) - log(1 - D(fake)), or -log of how much more real is real.

        Real and fake come from one x_t, so that their difference says more than either. As an option also how much a little
        noise moves D(real): R1 in first order.
        """
        d_real, d_fake = judge(real), judge(fake)
        self.log(d_real=d_real.detach().sigmoid().mean(), d_fake=d_fake.detach().sigmoid().mean())
        paired = self.config.gan == "paired"
        self.log(d_right=(d_real > d_fake).float().mean())  # how often it tells the two of one x_t apart
        terms = {"gan": losses.gan_real(d_real - d_fake) if paired else losses.gan_real(d_real) + losses.gan_fake(d_fake)}
        if self.config.r1:
            terms["r1"] = self.config.r1 * losses.squared(judge(real + 0.1 * torch.randn_like(real)), d_real)
        return terms

    def export(self, run: Run) -> None:
        """`lightning-8step.safetensors`, a LoRA of the base whatever came before; from the full phase the folder
        `lightning-8step-full`."""
        name = f"lightning-{self.recipe.num_steps}step"
        self.save_student(run, name if self.student.adapter else f"{name}-full")
