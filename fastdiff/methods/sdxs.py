"""One step by feature matching and segmented score distillation (Song et al. 2024, SDXS).

    x      = G(z, t_gen)                      one call of a network that may be smaller than the teacher
    match:   FM = mean over feature maps of 1 - SSIM(f(x), f(y)),     y the teacher's sample from the same z        eq. 10
    distill: t in [t_min T, alpha T]:  g = (fake.x0 - real.x0) / mean|x - real.x0|,    dL/dx = g / numel            eq. 11
             above alpha T the scores are inaccurate, and FM stands for them:   loss = along(g) + lambda FM         eq. 12
             alpha and lambda fall as the distributions come to overlap; the online model (fake) learns from every x
    gan:     a LoRA of very low rank on G against heads on the frozen teacher's encoder, to restore texture    section 4

With alpha = 1 and lambda = 0 the student's gradient is DMD's. With a style LoRA the teacher wears it and the online model never
does: what is trained then is a LoRA of a one-step student (section 3.3).
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
from fastdiff.lora import adapters
from fastdiff.lora.kinds import Factors
from fastdiff.methods.shared.segmented import Segmented, planned
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.models.discriminator import Discriminator
from fastdiff.options.sdxs import EXAMPLES, PRESETS, Config
from fastdiff.runtime.console import warn
from fastdiff.training.method import Load, Now, Phase, Stateful, Trains, Turn, equation, relative_size
from fastdiff.training.run import Run

SHOWN = 0.5  # the discriminator sees latents noised up to this part of the timesteps


class SDXS(Segmented):
    """Teacher and online model on one network, the student another; players: student, then fake or discriminator."""

    name, Config, presets, examples = "sdxs", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Config) -> None:
        super().__init__(base, config)
        first = config.start(base)
        kind = first.recipe.predicts(first.prediction_type)
        self.lora = config.student == "lora" or config.style_lora is not None
        net = first.unet
        if self.lora:
            self.parent = checkpoint.fingerprint(net)
            self.student_params = self.adapter(net, "student")
        else:
            net = trainable_copy(net)
            if config.gradient_checkpointing:
                adapters.checkpoint_gradients(net)
        self.student = Denoiser(net, self.schedule, kind, "student" if self.lora else None)
        if config.style_lora:
            self.teacher = self.role(wear(base.unet, config))
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
    def check(cls, config: Config) -> Config:
        """A wrong file is refused before hours of sampling."""
        if config.style_lora:
            lora.load(lora.parse_spec(config.style_lora, 1.0)[0], allow_pickle=config.allow_pickle)
        config.start(config.open_base())
        return config

    @classmethod
    def teacher_loras(cls, config: Config) -> list[str]:
        return [config.style_lora] if config.style_lora and config.style_pairs else []

    @classmethod
    def load(cls, config: Config, base: Checkpoint) -> Load:
        student = relative_size(base, config.open_student().unet_config) if config.init else 1.0
        full = student * (config.student == "full" and not config.style_lora) + (config.fake == "full")
        return Load(full, 2 - (full > 0) - (full > 1), 1, 1.5 + student, 1.5 + student, 2.5)

    def phases(self) -> list[Phase]:
        c = self.config
        return planned(match=c.match_steps, distill=c.steps - c.match_steps - c.gan_steps, gan=c.gan_steps)

    def players(self, phase: Phase) -> dict[str, Trains]:
        """Who trains in this phase."""
        whole = None if self.lora else self.student.net  # asked anew: splitting it over processes gives it other parameters
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
        """The finish is a LoRA on weights that trained before it."""
        return {"network": self.student.net} if self.student.adapter == "finish" else {}

    def networks(self) -> list[nn.Module]:
        return [*super().networks(), *filter(None, [self.discriminator])]

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Algorithm 1 of the paper, student and online model from one x; before it the warm-up, after it the finish."""
        pairs = self._pairs(batch, now)
        x = self.generated(batch, pairs)
        if now.phase.name == "gan":
            yield from self.finish(x, batch, pairs)
        else:
            yield self.turn(x, batch, now, pairs)

    @equation("SDXS, section 4; LADD, section 3")
    def finish(self, x: Tensor, batch: Batch, pairs: int) -> Iterator[Turn]:
        """Heads on the frozen teacher's encoder tell the teacher's samples from the student's, both noised (LADD's features)."""
        t = torch.randint(max(1, round(SHOWN * len(self.schedule))), (len(x),), device=x.device)
        judge = lambda z: self.discriminator(self.schedule.add_noise(z, torch.randn_like(z), t), t, batch.cond)
        with torch.no_grad():
            noised = [self.schedule.add_noise(z, torch.randn_like(z), t) for z in (batch.latents, x)]
        d_real, d_fake = (self.discriminator(z, t, batch.cond) for z in noised)
        self.log(d_real=d_real.detach().sigmoid().mean(), d_fake=d_fake.detach().sigmoid().mean())
        yield {"discriminator": {"gan": losses.gan_real(d_real) + losses.gan_fake(d_fake)}}
        student = {"gan": losses.gan_real(judge(x))}
        if pairs:
            student["features"] = self.config.lambda_fm_end * self.feature_loss(x, batch, pairs)
        yield {"student": student}

    def export(self, run: Run) -> None:
        """`sdxs.safetensors`, a LoRA of `init`, or the folder `model` with the finish folded in."""
        trained = self.student
        if trained.adapter == "finish":
            worn = lora.Lora(adapters.factors(trained.net, self.config.gan_rank, trained.adapter), {})
            self.student = Denoiser(adapters.plain(trained.net, worn), self.schedule, trained.kind)
        self.save_student(run)
        self.student = trained


def wear(net: nn.Module, config: Config) -> str:
    """The style as an adapter that nothing trains: exact for LoRAs, the nearest of rank 64 for other kinds."""
    path, weight = lora.parse_spec(config.style_lora, 1.0)
    style = lora.load(path, allow_pickle=config.allow_pickle)
    if texts := len(style.modules) - len(style.of_unet().modules):
        warn(f"`style_lora={path}`: {texts} modules of text encoders are left out; the student has the base's")
    style = style.of_unet()
    rank = max((update.rank for update in style.modules.values() if isinstance(update, Factors)), default=64)
    adapters.attach(net, rank, rank, "style")
    adapters.start_from(net, style, "style")
    worn = adapters.parameters(net, "style")  # down, up, down, up, ...
    for i, p in enumerate(worn):
        p.requires_grad_(False).mul_(weight if i % 2 else 1.0)
    return "style"
