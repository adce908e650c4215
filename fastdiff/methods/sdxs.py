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
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.lora.kinds import Factors
from fastdiff.methods.shared import segmented
from fastdiff.methods.shared.segmented import Segmented, SegmentedConfig, phases
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.models.discriminator import Discriminator
from fastdiff.runtime.config import Range
from fastdiff.runtime.console import warn
from fastdiff.runtime.errors import UsageError
from fastdiff.training.method import Phase, Turn
from fastdiff.training.run import Run
from fastdiff.training.session import train, write_student

CARD = dict(segmented.CARD, fake_lr=1e-5, max_grad_norm=10.0, match_steps=1000)
PRESETS = {
    # At 1 the gradient of feature matching is no stronger than that of the scores, which alone over-saturate.
    "emoji": dict(segmented.EMOJI, t_gen=749, lr=7e-4, steps=800, match_steps=100, lambda_fm_end=10.0),
    "sd15": dict(**CARD, guidance=7.5),  # table 3
    "sd21": dict(**CARD, guidance=7.5),
    "sdxl": dict(CARD, batch_size=1, grad_accum=32, guidance=7.5),
}
EXAMPLES = """fastdiff sdxs
fastdiff sdxs --base sd21 --init runs/prune-sd21/model --prompts prompts.txt
fastdiff sdxs --base sd21 --init runs/sdxs-sd21/model --style-lora anime.safetensors"""
SHOWN = 0.5  # the discriminator sees latents noised up to this part of the timesteps


@dataclass
class Config(SegmentedConfig):
    PANEL: ClassVar[str] = "One step"

    student: Annotated[Literal["full", "lora"], "what trains of it"] = "full"
    style_lora: Annotated[str | None, "FILE[=WEIGHT] the teacher wears: its style becomes a LoRA of the one-step --init"] = None
    style_pairs: Annotated[bool, "the pairs' pictures wear the style too; without it lower --lambda-fm-start"] = True
    gan_steps: Annotated[int, "last steps against a discriminator, with a LoRA of --gan-rank", Range(0)] = 0
    gan_rank: Annotated[int, "rank of that LoRA, which is folded into full weights", Range(1)] = 4
    gan_lr: Annotated[float | None, "learning rate of these steps; default --lr", Range(above=0)] = None
    proof: Annotated[int, "samples a row of the closing table (emoji only); 0 = none", Range(0, 2000)] = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.match_steps + self.gan_steps > self.steps:
            raise UsageError(f"--steps {self.steps}: less than --match-steps and --gan-steps together")
        if self.shard and self.gan_steps and self.student == "full" and not self.style_lora:
            raise UsageError("--shard: no LoRA goes onto split weights", "leave out --gan-steps, or --student lora")
        if self.style_lora and not self.init:
            raise UsageError("--style-lora: is for a student of one step", "give its checkpoint as --init")

    @property
    def teacher_loras(self) -> list[str]:
        """What the pairs' teacher wears."""
        return [self.style_lora] if self.style_lora and self.style_pairs else []


class SDXS(Segmented):
    """Teacher and online model on one network, the student another; players: student, then fake or discriminator."""

    def __init__(self, base: Checkpoint, config: Config) -> None:
        super().__init__(base, config)
        self.parent = checkpoint.fingerprint(base.unet)
        first = config.start(base)
        kind = first.recipe.predicts(first.prediction_type)
        self.lora = config.student == "lora" or config.style_lora is not None
        net = first.unet
        if self.lora:
            self.parent = checkpoint.fingerprint(net)
            self.trained_params = self.adapter(net, "student")
        else:
            net = trainable_copy(net)
            if config.gradient_checkpointing:
                adapters.checkpoint_gradients(net)
            self.trained_params = list(net.parameters())
        self.student = Denoiser(net, self.schedule, kind, "student" if self.lora else None)
        if config.style_lora:
            self.teacher = self.role(wear(base.unet, config))
        self.fake, self.fake_params = self.trained("fake", self.copied() if config.fake == "full" else None)
        self.watch(first)
        ends = config.match_steps, config.gan_steps
        self.phases = phases(match=ends[0], distill=config.steps - sum(ends), gan=ends[1])
        self.players: dict[str, nn.Module] = {}
        self.extra_state: dict[str, nn.Module] = {}
        self.recipe = Recipe(
            method="sdxs",
            family=base.family.name,
            scheduler="lcm",
            spacing="trailing",
            num_steps=1,
            timesteps=(self.t_gen,),
            guidance=1.0,
            prediction_type=kind,
        )

    def enter(self, part: Phase) -> None:
        """Who trains in this phase."""
        self.part, self.rates = part, {"fake": self.config.fake_lr or self.config.lr}
        self.players = {"student": nn.ParameterList(self.trained_params)}
        if part.name == "distill":
            self.players["fake"] = nn.ParameterList(self.fake_params)
        if part.name == "gan":
            self.rates = dict.fromkeys(("student", "discriminator"), self.config.gan_lr or self.config.lr)
            if not self.lora:
                net = self.student.net
                finish = adapters.attach(net, self.config.gan_rank, self.config.gan_rank, "finish")
                self.student = Denoiser(net, self.schedule, self.student.kind, "finish")
                self.players["student"], self.extra_state = nn.ParameterList(finish), {"network": net}
            base, side = self.base_model, self.config.resolution or self.base_model.resolution_px
            self.discriminator = Discriminator(self.teacher, side // base.pixels_per_latent, paired=False, every=True)
            self.players["discriminator"] = self.discriminator.heads

    def losses(self, batch: Batch, step: int) -> Iterator[Turn]:
        """Algorithm 1 of the paper, student and online model from one x; before it the warm-up, after it the finish."""
        pairs = self.pairs(batch)
        x = self.made(batch, pairs)
        if self.part.name == "gan":
            yield from self.finish(x, batch, pairs)
        else:
            yield self.turn(x, batch, step, pairs)

    def finish(self, x: Tensor, batch: Batch, pairs: int) -> Iterator[Turn]:
        """Heads on the frozen teacher's encoder tell the teacher's samples from the student's, both noised (LADD's features)."""
        t = torch.randint(max(1, round(SHOWN * len(self.schedule))), (len(x),), device=x.device)
        judge = lambda z: self.discriminator(self.schedule.add_noise(z, torch.randn_like(z), t), t, batch.cond)
        with torch.no_grad():
            shown = [self.schedule.add_noise(z, torch.randn_like(z), t) for z in (batch.latents, x)]
        d_real, d_fake = (self.discriminator(z, t, batch.cond) for z in shown)
        self.figures |= {"d_real": d_real.detach().sigmoid().mean(), "d_fake": d_fake.detach().sigmoid().mean()}
        yield {"discriminator": {"gan": losses.gan_real(d_real) + losses.gan_fake(d_fake)}}
        student = {"gan": losses.gan_real(judge(x))}
        if pairs:
            student["features"] = self.config.lambda_fm_end * self.feature_loss(x, batch, pairs)
        yield {"student": student}

    def updated(self, step: int) -> None: ...

    def export(self, run: Run) -> None:
        """`sdxs.safetensors`, a LoRA of --init, or the folder `model` with the finish folded in."""
        if self.lora:
            write_student(self, run, self.config.lora_alpha)
            return
        trained = self.student
        if trained.adapter:
            worn = lora.Lora(adapters.factors(trained.net, self.config.gan_rank, trained.adapter), {})
            self.student = Denoiser(adapters.plain(trained.net, worn), self.schedule, trained.kind)
        write_student(self, run, None)
        self.student = trained


def wear(net: nn.Module, config: Config) -> str:
    """The style as an adapter that nothing trains: exact for LoRAs, the nearest of rank 64 for other kinds."""
    path, weight = lora.parse_spec(config.style_lora, 1.0)
    style = lora.load(path, allow_pickle=config.allow_pickle)
    if texts := len(style.modules) - len(style.of_unet().modules):
        warn(f"--style-lora {path}: {texts} modules of text encoders are left out; the student has the base's")
    style = style.of_unet()
    rank = max((update.rank for update in style.modules.values() if isinstance(update, Factors)), default=64)
    adapters.attach(net, rank, rank, "style")
    adapters.start_from(net, style, "style")
    worn = adapters.parameters(net, "style")  # down, up, down, up, ...
    for i, p in enumerate(worn):
        p.requires_grad_(False).mul_(weight if i % 2 else 1.0)
    return "style"


METHOD = SDXS


def run(config: Config):
    """The `sdxs` command."""
    if config.style_lora:  # a wrong file is told before hours of sampling
        lora.load(lora.parse_spec(config.style_lora, 1.0)[0], allow_pickle=config.allow_pickle)
    config.start(config.open_base())
    return train("sdxs", SDXS, config)
