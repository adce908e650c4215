"""One-step students by feature matching and segmented score distillation (Song et al. 2024, SDXS).

    x      = G(z, t_gen)                      one call of a network that may be smaller than the teacher
    match:   FM = mean over feature maps of 1 - SSIM(f(x), f(y)),     y the teacher's sample from the same z        eq. 10
    distill: t in [t_min T, alpha T]:  g = (fake.x0 - real.x0) / mean|x - real.x0|,    dL/dx = g / numel            eq. 11
             above alpha T the scores are inaccurate, and FM replaces them:     loss = along(g) + lambda FM         eq. 12
             alpha and lambda fall while the two distributions come to overlap; the online model (fake) learns from every x
    gan:     a LoRA of very low rank on G against heads on the frozen teacher's encoder, to restore texture    section 4

With alpha = 1 and lambda = 0 the student's gradient is DMD's. A style LoRA is added to the teacher but never to the online model;
then a LoRA of a one-step student is trained (section 3.3).
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.lora import adapters, apply
from fastdiff.lora.kinds import Factors
from fastdiff.methods.shared.segmented import Segmented
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.models.discriminator import Discriminator
from fastdiff.options.sdxs import EXAMPLES, PRESETS, Config
from fastdiff.options.sdxs import Config as Options
from fastdiff.training.method import Load, Now, Phase, Stateful, Trains, Turn, equation, planned, relative_size
from fastdiff.training.run import Run

NOISED_TO = 0.5  # the discriminator sees latents with noise up to this fraction of the timesteps


class SDXS(Segmented):
    """One-step distillation. The teacher is the base's UNet, and the online model is an adapter on it or a copy of it.

    Players: `student`, in phase `distill` also `fake` (the online model), in phase `gan` also `discriminator`.
    """

    config: Options

    name, Config, presets, examples = "sdxs", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        first = config.start(base)
        kind = first.recipe.predicts(first.prediction_type)
        self.lora = config.student == "lora" or config.style_lora is not None
        net = first.unet
        if self.lora:
            if first is not base:  # the base may be quantised by now
                self.parent = checkpoint.fingerprint(net)
            self.student_params = self.adapter(net, "student")
        else:
            net = trainable_copy(net)
            if config.gradient_checkpointing:
                adapters.checkpoint_gradients(net)
        self.student = Denoiser(net, self.schedule, kind, "student" if self.lora else None)
        if config.style_lora:
            self.teacher = self.role(attach_style(base.unet, config.style_lora, allow_pickle=config.allow_pickle))
            self.teacher.guidance_rescale = config.guidance_rescale
        self.fake_net = self.copied() if config.fake == "full" else None
        self.fake, self.fake_params = self.trained("fake", self.fake_net)
        self._open_matching(first)
        self.discriminator: Discriminator | None = None
        self.recipe = replace(
            self.recipe,
            scheduler="lcm",
            spacing="trailing",
            num_steps=1,
            timesteps=(self.t_gen,),
            guidance=1.0,
            prediction_type=kind,
        )

    @classmethod
    def check(cls, config: Options) -> Options:
        """Read `style_lora` and `init` now, so that a wrong file fails before hours of sampling."""
        base = config.open_base()
        if config.style_lora:
            style = lora.load(lora.parse_spec(config.style_lora, 1.0, "style_lora")[0], allow_pickle=config.allow_pickle)
            apply.warn_of_prediction(base, [style])
        config.start(base)
        return config

    @classmethod
    def teacher_loras(cls, config: Options) -> list[str]:
        """Sample the training pairs with the style, unless `style_pairs` is off."""
        return [config.style_lora] if config.style_lora and config.style_pairs else []

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        student = relative_size(base, config.open_student().unet_config) if config.init else 1.0
        full = student * (config.student == "full" and not config.style_lora) + (config.fake == "full")
        return Load(full, 2 - (full > 0) - (full > 1), 1, 1.5 + student, 1.5 + student, 2.5)

    def phases(self) -> list[Phase]:
        c = self.config
        return planned(match=c.match_steps, distill=c.steps - c.match_steps - c.gan_steps, gan=c.gan_steps)

    def players(self, phase: Phase) -> dict[str, Trains]:
        """Return who trains in a phase; in phase `gan` it also makes the discriminator and the LoRA that trains against it."""
        whole = None if self.lora else self.student.net  # parameters are listed anew, because `shard` replaces them
        student = Trains(list(whole.parameters()) if whole else self.student_params, averaged=True, net=whole)
        if phase.name == "match":
            return {"student": student}
        if phase.name == "distill":
            return {"student": student, "fake": Trains(self.fake_params, self.config.fake_lr, net=self.fake_net)}
        if not self.lora:
            net = self.student.net
            finish = adapters.attach(net, self.config.gan_rank, self.config.gan_rank, "finish")
            self.student, student = Denoiser(net, self.schedule, self.student.kind, "finish"), Trains(finish, averaged=True)
        side = self.resolution_px // self.base_model.pixels_per_latent
        self.discriminator = Discriminator(self.teacher, side, paired=False, every=True)
        rate = self.config.gan_lr
        return {
            "student": replace(student, lr=rate),
            "discriminator": Trains(list(self.discriminator.heads.parameters()), rate),
        }

    def state(self) -> dict[str, Stateful]:
        """In phase `gan` the student's weights do not train, but they are saved: they differ from those of any file."""
        return {"network": self.student.net} if self.student.adapter == "finish" else {}

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *filter(None, [self.discriminator])]

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Run algorithm 1 of the paper on samples x of the student; phase `gan` has losses of its own."""
        pairs = self.paired(len(batch.latents), now)
        x = self.generated(batch, pairs)
        if now.phase.name == "gan":
            yield from self.finish(x, batch, pairs)
        else:
            yield self.turn(x, batch, now, pairs)

    @equation("SDXS, section 4; LADD, section 3")
    def finish(self, x: Tensor, batch: Batch, pairs: int) -> Iterator[Turn]:
        """Train heads on the frozen teacher's encoder to tell the teacher's samples from the student's, then the student.

        Both are noised to the same random timesteps, as in LADD.
        """
        discriminator = self.discriminator
        assert discriminator is not None
        t = torch.randint(max(1, round(NOISED_TO * len(self.schedule))), (len(x),), device=x.device)
        judge = lambda z: discriminator(self.schedule.add_noise(z, torch.randn_like(z), t), t, batch.cond)
        with torch.no_grad():
            noised = [self.schedule.add_noise(z, torch.randn_like(z), t) for z in (batch.latents, x)]
        d_real, d_fake = (discriminator(z, t, batch.cond) for z in noised)
        self.log(d_real=d_real.detach().sigmoid().mean(), d_fake=d_fake.detach().sigmoid().mean())
        yield {"discriminator": {"gan": losses.gan_real(d_real) + losses.gan_fake(d_fake)}}
        student = {"gan": losses.gan_real(judge(x))}
        if pairs:
            student["features"] = self.config.lambda_fm_end * self.feature_loss(x, batch, pairs)
        yield {"student": student}

    def export(self, run: Run) -> None:
        """Write `sdxs.safetensors`, a LoRA of `init`, or the folder `model`, with the LoRA of phase `gan` folded in."""
        student = self.student
        if student.adapter == "finish":
            finish = lora.Lora(dict(adapters.factors(student.net, self.config.gan_rank, student.adapter)), {})
            self.student = Denoiser(adapters.plain(student.net, finish), self.schedule, student.kind)
        self.save_student(run)
        self.student = student


def attach_style(net: nn.Module, spec: str, *, allow_pickle: bool) -> str:
    """Put the LoRA of `spec` (FILE[=WEIGHT]) on a network as a frozen adapter, and return the adapter's name.

    The adapter equals a LoRA exactly; other kinds of file are approximated by the nearest one of rank 64.
    """
    path, weight = lora.parse_spec(spec, 1.0, "style_lora")
    style = lora.load(path, allow_pickle=allow_pickle).for_unet("style_lora")
    rank = max((update.rank for update in style.modules.values() if isinstance(update, Factors)), default=64)
    adapters.attach(net, rank, rank, "style")
    adapters.start_from(net, style, "style")
    params = adapters.parameters(net, "style")  # down, up, down, up, ...
    for i, p in enumerate(params):
        p.requires_grad_(False).mul_(weight if i % 2 else 1.0)
    return "style"
