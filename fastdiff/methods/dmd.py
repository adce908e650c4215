"""Distribution matching distillation (Yin et al. 2023, DMD; Yin et al. 2024, DMD2).

    x    = G(z, t_k)                           the student's x0 from pure noise, or from its own trajectory up to step k
    x_t  = alpha_t x + sigma_t eps             one t, one eps, for both scores
    real = teacher(x_t, t; c, empty; w)        guided                  fake = fake_score(x_t, t; c)      not guided
    g    = (fake.x0 - real.x0) / mean|x - real.x0|
    student:     dL/dx = g / numel  (+ lambda_reg LPIPS(G(z_ref), y_ref), DMD)  (+ lambda_gan softplus(-D(x_t)), DMD2)
    fake score:  its own training loss on x  (+ what D loses on x and on real latents)

Every step trains the fake score; every r-th the student before it (`--fake-steps-per-gen r`: r updates of the fake score for
each of the student), and both turns share one x. With LoRAs the three roles are one network: teacher = no adapter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastdiff import losses
from fastdiff.config import Range
from fastdiff.console import UsageError
from fastdiff.data import Batch, Wants
from fastdiff.io import checkpoint
from fastdiff.io.checkpoint import Checkpoint
from fastdiff.io.recipe import Recipe
from fastdiff.io.run import Run
from fastdiff.models import adapters, perceptual
from fastdiff.models.denoiser import Cond, Denoiser, trainable_copy
from fastdiff.models.discriminator import Head
from fastdiff.schedule import NoiseSchedule, Prediction
from fastdiff.session import train, write_student
from fastdiff.trainer import Losses, TrainConfig, seed_for

# Rows are families, and family:recipe lies over its family. Sources: DMD section 4.3 and table 5; DMD2 scripts and appendix.
DMD2 = dict(recipe="dmd2", lambda_reg=0.0, fake_steps_per_gen=5, num_steps=4)
PAPER = dict(weight_decay=0.01, max_grad_norm=10.0, warmup=500, batch_size=2, grad_accum=4, gradient_checkpointing=True)
PRESETS = {
    "emoji": dict(
        data="teacher",
        pairs=1024,
        lora_rank=32,
        lora_alpha=32,
        lr=1e-3,
        lr_schedule="cosine",
        warmup=20,
        ema=0.98,
        batch_size=24,
        steps=450,
        guidance=3.0,
        max_grad_norm=10.0,
    ),  # fmt: skip
    "emoji:dmd2": dict(**DMD2),
    "sd15": dict(**PAPER, lr=5e-5, guidance=3.0, steps=4000, pairs=2048),
    "sd15:dmd2": dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3, guidance=3.0),
    "sd21": dict(**PAPER, lr=5e-5, guidance=3.0, steps=4000, pairs=2048),
    "sd21:dmd2": dict(DMD2, fake_steps_per_gen=10, gan_weight=1e-3, guidance=3.0),
    "sdxl": dict(PAPER, batch_size=1, grad_accum=8, recipe="dmd2", lr=5e-5, guidance=8.0, steps=4000, pairs=1024),
    "sdxl:dmd2": dict(DMD2, gan_weight=5e-3),
}
EXAMPLES = """fastdiff dmd
fastdiff dmd --base sd15 --prompts prompts.txt
fastdiff dmd --base sdxl --recipe dmd2 --num-steps 4 --data pictures/
fastdiff dmd --base sdxl --recipe dmd2 --num-steps 1 --t-gen 399 --reg-steps 2000"""

Score = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) -> Prediction


def matching_gradient(
    schedule: NoiseSchedule, real: Score, fake: Score, x: Tensor, t: Tensor, weighting: losses.Weighting = "dmd"
) -> tuple[Tensor, dict[str, Tensor]]:
    """g (B, C, h, w) for samples x at noise levels t (B,), and what to watch; any two denoisers, no gradients (DMD, eq. 7).

    Both see the same noised sample. The watched figures: |fake - real|, mean and spread of x and of both predictions.
    """
    with torch.no_grad():
        x_t = schedule.add_noise(x, torch.randn_like(x), t)
        f, r = fake(x_t, t), real(x_t, t)
        g = losses.score_difference(schedule, x, t, r, f, weighting)
        seen = {"x": x, "real": r.x0, "fake": f.x0}
        figures = {f"{k}_{name}": getattr(v.float(), name)() for k, v in seen.items() for name in ("mean", "std")}
        return g, {**figures, "difference": (f.x0 - r.x0).abs().mean()}


@torch.no_grad()
def simulate(schedule: NoiseSchedule, generator: Score, noise: Tensor, timesteps: Tensor, k: int) -> Tensor:
    """What the generator meets at timesteps[k] when it samples: from pure noise through its own first k steps (DMD2, 4.5)."""
    x = noise
    for t, s in zip(timesteps[:k], timesteps[1 : k + 1], strict=True):
        x0 = generator(x, t.expand(len(x))).x0
        x = schedule.add_noise(x0, torch.randn_like(x0), s)
    return x


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Distribution matching"
    VARIANT: ClassVar[str] = "recipe"  # its value picks a second row of PRESETS

    recipe: Annotated[Literal["dmd", "dmd2"], "dmd: one step, with regression; dmd2: few steps, two time scales, GAN"] = "dmd"
    student: Annotated[Literal["lora", "full"], "what becomes the few-step model"] = "lora"
    fake: Annotated[Literal["lora", "full"], "what learns the student's distribution"] = "lora"
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "their scale is alpha / rank", Range(above=0)] = 64
    num_steps: Annotated[int, "sampling steps of the student", Range(1, 8)] = 1
    t_gen: Annotated[int | None, "timestep of a one-step student; default the last; 399 for SDXL (DMD2)", Range(0)] = None
    guidance: Annotated[float, "of the teacher, in scores and pairs: u + w (c - u)", Range(1)] = 3.0
    t_min: Annotated[float, "scores are compared from this part of the timesteps ...", Range(0, 1)] = 0.02
    t_max: Annotated[float, "... to this", Range(0, 1)] = 0.98
    weighting: Annotated[
        Literal["dmd", "eq8", "none", "sigma2"], "of the gradient: algorithm 2, equation 8, Diff-Instruct, SDS"
    ] = "dmd"
    fake_steps_per_gen: Annotated[int, "updates of the fake score for each of the student's; --steps counts them", Range(1)] = 1
    fake_lr: Annotated[float | None, "learning rate of the fake score; default --lr", Range(above=0)] = None
    lambda_reg: Annotated[float, "weight of the regression to the teacher's pictures of the same noise; 0 = none", Range(0)] = 0.25
    reg_batch: Annotated[int | None, "pairs a step in the regression; default half the batch", Range(1)] = None
    reg_steps: Annotated[int, "first steps with the regression alone", Range(0)] = 0
    reg_crop: Annotated[int, "latent positions a side that it decodes: memory", Range(4)] = 64
    lpips_weights: Annotated[str | None, "torchvision's VGG-16 for LPIPS, or embedded (the default for emoji)"] = None
    gan_weight: Annotated[float, "weight of the GAN term for the student; 0 = none", Range(0)] = 0.0
    gan_weight_fake: Annotated[float, "weight of the GAN term for the discriminator", Range(0)] = 1e-2
    gan_features: Annotated[Literal["fake", "teacher"], "whose bottleneck the discriminator sees"] = "fake"
    proof: Annotated[int, "samples a row of the closing table (emoji only); 0 = none", Range(0, 2000)] = 500

    def __post_init__(self) -> None:
        if self.t_min > self.t_max:
            raise UsageError(f"--t-min {self.t_min:g}: must be at most --t-max {self.t_max:g}")
        if self.t_gen is not None and self.num_steps > 1:
            raise UsageError(f"--t-gen {self.t_gen}: is for one step; --num-steps is {self.num_steps}")
        if self.lambda_reg and self.num_steps > 1:
            raise UsageError(f"--lambda-reg {self.lambda_reg:g}: pairs are for one step; use --recipe dmd2 or --lambda-reg 0")
        if self.reg_steps and self.num_steps > 1:
            raise UsageError(f"--reg-steps {self.reg_steps}: pairs are for one step; --num-steps is {self.num_steps}")
        if self.reg_batch is not None and self.reg_batch > self.batch_size:
            raise UsageError(f"--reg-batch {self.reg_batch}: must be at most --batch-size {self.batch_size}")

    @property
    def regresses(self) -> bool:
        return self.lambda_reg > 0 or self.reg_steps > 0

    @property
    def wants(self) -> Wants:
        return "pairs" if self.regresses else "latents" if self.gan_weight else "prompts"


class DMD:
    """Three roles, on one network where student and fake score are LoRAs; players: student, fake (with the GAN head)."""

    def __init__(self, base: Checkpoint, config: Config) -> None:
        self.base_model, self.config, self.schedule = base, config, base.schedule()
        self.parent = checkpoint.fingerprint(base.unet)
        self.teacher = self.role(None)
        copies = {name: trainable_copy(base.unet) for name in ("student", "fake") if getattr(config, name) == "full"}
        self.student, students = self.trained("student", copies)
        self.fake, fakes = self.trained("fake", copies)
        self.head = None
        if config.gan_weight:
            watched = self.fake if config.gan_features == "fake" else self.teacher
            self.watched, self.head = watched, head_for(watched, base)
            fakes += self.head.parameters()
        self.players: dict[str, nn.Module] = {"student": nn.ParameterList(students), "fake": nn.ParameterList(fakes)}
        self.rates = {"fake": config.fake_lr or config.lr}
        self.distance = None
        if config.regresses:
            pixels = perceptual.open_distance(base.family, config.lpips_weights)
            self.distance = perceptual.DecodedDistance(base.vae, pixels, config.reg_crop)
        self.timesteps = sampling_timesteps(self.schedule, config)
        self.figures: dict[str, Tensor] = {}
        self.recipe = Recipe(
            method=config.recipe,
            family=base.family,
            scheduler="lcm",
            spacing="trailing",
            num_steps=config.num_steps,
            timesteps=tuple(self.timesteps.tolist()),
            guidance=1.0,
            prediction_type=base.prediction_type,
        )

    def role(self, adapter: str | None, net: nn.Module | None = None) -> Denoiser:
        return Denoiser(self.base_model.unet if net is None else net, self.schedule, self.base_model.prediction_type, adapter)

    def trained(self, name: str, copies: dict[str, nn.Module]) -> tuple[Denoiser, list[nn.Parameter]]:
        """A role with what trains of it: a copy of the network, or an adapter on the shared one."""
        net = copies.get(name, self.base_model.unet)
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        if name in copies:
            return self.role(None, net), list(net.parameters())
        return self.role(name), adapters.attach(net, self.config.lora_rank, self.config.lora_alpha, name)

    def losses(self, batch: Batch, step: int) -> Iterator[tuple[str, Losses]]:
        """DMD, algorithm 1; DMD2, section 4."""
        config, alone = self.config, step < self.config.reg_steps
        turn = alone or step % config.fake_steps_per_gen == 0
        pairs = self.pairs(batch, alone) if turn else 0
        k = self.step_index(step)
        x_t, t = self.start(batch, k, pairs), self.timesteps[k].expand(len(batch.latents))
        with torch.set_grad_enabled(turn):
            x = self.student(x_t, t, batch.cond).x0
        if turn:
            terms = {} if alone else {"matching": losses.along(x, self.gradient(x.detach(), batch))}
            if pairs:
                weight = config.lambda_reg or 1.0
                terms["regression"] = weight * self.distance(x[:pairs], batch.latents[:pairs]).mean()
            if self.head and not alone:
                terms["gan"] = config.gan_weight * losses.gan_real(self.logits(x, batch.cond))
            x = x.detach()
            yield "student", terms
            del terms  # they hold the graph
        if not alone:
            yield "fake", self.fake_losses(x, batch)

    def gradient(self, x: Tensor, batch: Batch) -> Tensor:
        """g at noise levels drawn between t_min and t_max, both ends included."""
        low, high = (round(part * len(self.schedule)) for part in (self.config.t_min, self.config.t_max))
        t = torch.randint(low, min(high, len(self.schedule) - 1) + 1, (len(x),), device=x.device)
        real = lambda x_t, t: self.teacher.guided(x_t, t, batch.cond, batch.uncond, self.config.guidance)
        fake = lambda x_t, t: self.fake(x_t, t, batch.cond)
        g, self.figures = matching_gradient(self.schedule, real, fake, x, t, self.config.weighting)
        return g

    def fake_losses(self, x: Tensor, batch: Batch) -> Losses:
        """The fake score's own training loss on the student's samples (DMD, eq. 6), and the discriminator's (DMD2, 4.3)."""
        t, eps = torch.randint(len(self.schedule), (len(x),), device=x.device), torch.randn_like(x)
        p = self.fake(self.schedule.add_noise(x, eps, t), t, batch.cond)
        terms = {"denoising": losses.denoising(self.schedule, self.fake.kind, p, x, eps, t)}
        if self.head:
            made, real = self.logits(x, batch.cond), self.logits(batch.latents, batch.cond)
            terms["gan"] = self.config.gan_weight_fake * (losses.gan_fake(made) + losses.gan_real(real))
            self.figures |= {"d_fake": made.detach().sigmoid().mean(), "d_real": real.detach().sigmoid().mean()}
        return terms

    def logits(self, x0: Tensor, cond: Cond) -> Tensor:
        """The discriminator on a noised latent, every noise level (DMD2, eq. 4)."""
        t = torch.randint(len(self.schedule), (len(x0),), device=x0.device)
        x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
        return self.head(self.watched.bottleneck(x_t, t, cond))

    def start(self, batch: Batch, k: int, pairs: int) -> Tensor:
        """What the student meets at its step k; the first `pairs` rows start from their pair's noise (DMD, algorithm 1)."""
        noise = torch.randn_like(batch.latents)
        if pairs:
            noise[:pairs] = batch.noise[:pairs]
        generator = lambda x, t: self.student(x, t, batch.cond)
        return simulate(self.schedule, generator, noise, self.timesteps, k)

    def step_index(self, step: int) -> int:
        """Which of the student's steps trains: the same on every process and in every micro-batch."""
        g = torch.Generator().manual_seed(seed_for(self.config.seed, 0, step))
        return int(torch.randint(len(self.timesteps), (), generator=g))

    def pairs(self, batch: Batch, alone: bool = False) -> int:
        """How many of the batch's first rows take part in the regression."""
        if not (alone or self.config.lambda_reg):
            return 0
        return self.config.reg_batch or -(-len(batch.latents) // 2)

    def updated(self, step: int) -> None: ...

    def export(self, run: Run) -> None:
        """`dmd.safetensors` or `dmd2.safetensors`, or with --student full a diffusers folder."""
        write_student(self, run, None if self.config.student == "full" else self.config.lora_alpha)


def sampling_timesteps(schedule: NoiseSchedule, config: Config) -> Tensor:
    """999, 749, 499, 249 for four steps; one step is called at t_gen."""
    if config.t_gen is None:
        return schedule.grid(config.num_steps, "trailing")
    if config.t_gen >= len(schedule):
        raise UsageError(f"--t-gen {config.t_gen}: must be below {len(schedule)}")
    return torch.tensor([config.t_gen])


def head_for(watched: Denoiser, base: Checkpoint) -> Head:
    """A discriminator head that fits the network's bottleneck at its own resolution."""
    config, net = base.unet_config, watched.net
    width, side = config["block_out_channels"][-1], base.resolution_px // 8
    halvings = sum(block.downsamplers is not None for block in net.down_blocks)
    return Head(width, max(1, side >> halvings)).to(net.device)


METHOD = DMD


def run(config: Config):
    """The `dmd` command."""
    if config.regresses:  # before hours of sampling
        perceptual.locate(checkpoint.family_of(config.base, allow_pickle=config.allow_pickle), config.lpips_weights)
    return train("dmd", DMD, config)
