"""Latent consistency distillation, as a LoRA or of the full network (Luo et al. 2023, LCM and the LCM-LoRA report).

    t = t_i, u = t_{i-skip}  on the grid  k - 1, 2k - 1, ..., T - 1  with k = T / N;  0 below it
    x_t = alpha_t x0 + sigma_t eps
    p   = teacher(x_t, t; c, empty; w)                    guided: u + w (c - u), both halves in one batch
    x_u = alpha_u p.x0 + sigma_u p.eps                    DDIM step of the augmented PF-ODE
    F(x, t -> s):  zero    s = 0:  c_skip(t) x + c_out(t) x0(x, t)             LCM
                   edge    s = lower edge of t's phase:  DDIM jump to s        PCM (Wang 2024)
                   random  s uniform on the grid below t:  DDIM jump to s      TCD (Zheng 2024)
    loss = d( F_student(x_t, t -> s),  F_target(x_u, u -> s) ),   target = student without gradient, or its average

With a LoRA, the teacher is the same network with the adapter off. Fine-tuning (`finetune`, called LCF in the LCM paper) has no
teacher: x_u is made of the same x0 and eps at the lower noise level.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.samplers import jump
from fastdiff.diffusion.schedule import NoiseSchedule, per_sample
from fastdiff.lora.file import Lora
from fastdiff.methods.shared.scores import start_from
from fastdiff.methods.shared.start import StartsFromLora
from fastdiff.models.denoiser import Cond, trainable_copy
from fastdiff.models.ema import EMA
from fastdiff.models.unet import unet_of
from fastdiff.options.lcm import EXAMPLES, PRESETS, Config
from fastdiff.options.lcm import Config as Options
from fastdiff.options.start import checked_start
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.assemble import is_lora
from fastdiff.training.method import Load, Now, Phase, Stateful, Trains, Turn, equation
from fastdiff.training.run import Run

SCHEDULERS = {"zero": "lcm", "edge": "ddim", "random": "tcd"}


class LCM(StartsFromLora):
    """Latent consistency distillation. The one player is `student`: an adapter on the base's UNet, or a UNet of its own."""

    name, Config, presets, examples = "train-lcm-lora", Config, PRESETS, EXAMPLES
    embeds_guidance = True

    def __init__(self, base: Checkpoint, config: Options) -> None:
        super().__init__(base, config)
        first = self._whole_start(config, base)
        net = guidance_embedded((first or base).unet) if config.full else None
        self.student, self.params = self.trained("student", net, first.prediction_type if first else None)
        if start := self._start(config):
            start_from(self.student, start.of_unet())
        self.target = EMA(self.params, config.target_ema, warm=False) if config.full else None
        self.grid = distillation_grid(self.schedule, config)
        edges = (config.phases or config.num_steps) if config.target == "edge" else config.num_steps
        self.recipe = replace(
            self.recipe,
            method={"zero": "lcm", "edge": "pcm", "random": "tcd"}[config.target],
            scheduler=SCHEDULERS[config.target],
            num_steps=config.num_steps,
            guidance=config.guidance_min if self.student.guidance_embedded else 1.0,
            eta=0.3 if config.target == "random" else None,
            step_counts=tuple(sorted({config.num_steps, edges})) if edges != config.num_steps else None,
        )

    @classmethod
    def check_base(cls, config: Options, base: Checkpoint) -> None:
        super().check_base(config, base)
        cls._whole_start(config, base)

    @classmethod
    def load(cls, config: Options, base: Checkpoint) -> Load:
        return Load(full=1, free=3) if config.full else Load(lora=1, free=1 if config.finetune else 3)

    @classmethod
    def guides(cls, config: Options) -> bool:
        return not config.finetune

    def players(self, phase: Phase) -> dict[str, Trains]:
        return {"student": Trains(self.params, averaged=True, net=self.student.net if self.config.full else None)}

    def state(self) -> dict[str, Stateful]:
        return {"target": self.target} if self.target else {}

    def export(self, run: Run) -> None:
        """Write the student as `lcm.safetensors`, whatever the target (the header names it), or as the folder `model`."""
        self.save_student(run, None if self.config.full else "lcm")

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """Compute the consistency loss between two points of one trajectory (LCM, algorithm 1; LCF, algorithm 4)."""
        n, device = len(batch.latents), batch.latents.device
        index = torch.randint(len(self.grid), (n,), device=device)
        t, u, s = self.grid[index], *self.pair(index, self.grid)
        w = torch.empty(n, device=device).uniform_(self.config.guidance_min, self.config.guidance_max)
        eps = torch.randn_like(batch.latents)
        x_t = self.schedule.add_noise(batch.latents, eps, t)
        cond = batch.cond.with_guidance(w) if self.student.guidance_embedded else batch.cond
        with torch.no_grad():
            x_u = self.schedule.add_noise(batch.latents, eps, u) if self.config.finetune else self.ode_step(x_t, t, u, batch, w)
            with self._target_weights():
                target = self.consistency(x_u, u, s, cond)
        online = self.consistency(x_t, t, s, cond)
        distance = losses.CONSISTENCY[self.config.loss]
        yield {"student": {"consistency": distance(online, target, self.config.huber_c, self.weight(t, u, online))}}

    @equation("LCM, equations 13 and 14")
    def ode_step(self, x_t: Tensor, t: Tensor, u: Tensor, batch: Batch, w: Tensor) -> Tensor:
        """Take one guided DDIM step of the teacher from x_t (B, C, h, w) at t to u, both (B,), with guidance w (B,)."""
        return jump(self.schedule, self.teacher.guided(x_t, t, batch.cond, batch.uncond, w), u)

    @equation("LCM, equation 9")
    def consistency(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Cond) -> Tensor:
        """Evaluate F(x, t -> s) of the student: (B, C, h, w).

        Without `s` it goes to zero by the boundary form; otherwise by a DDIM jump, and x stays as it is where t = s.
        """
        p = self.student(x, t, cond)
        if s is None:
            c_skip, c_out = self.schedule.boundary(t, x)
            return c_skip * x + c_out * p.x0
        return torch.where(per_sample(t == s, x), x, jump(self.schedule, p, s))

    @equation("Song & Dhariwal 2023, equation 6")
    def weight(self, t: Tensor, u: Tensor, like: Tensor) -> Tensor | float:
        """Return the weight of each pair, 1 / (sigma_t / alpha_t - sigma_u / alpha_u), or 1 without weighting.

        The plain loss on x0 pulls an epsilon network sigma / alpha times as hard. That differs by a factor of 100 between the
        ends, so that the low noise levels, which make the detail, decay.
        """
        if self.config.weighting == "none":
            return 1.0
        return per_sample(1 / (self.schedule.noise_scale(t) - self.schedule.noise_scale(u)), like)

    @equation("LCM, algorithm 1; PCM, section 3; TCD, section 4")
    def pair(self, index: Tensor, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the lower timestep u (B,) of each sample's pair, and the timestep s <= u that both jump to.

        `index` (B,) are the upper points' places in `grid`. s is None for jumps to zero.
        """
        below = lambda i: torch.where(i >= 0, grid[i.clamp(min=0)], 0)
        u = below(index - self.config.skip)
        if self.config.target == "zero":
            return u, None
        if self.config.target == "edge":
            length = len(grid) // (self.config.phases or self.config.num_steps)
            s = below(index // length * length - 1)
            return torch.maximum(u, s), s  # a teacher step must not cross the edge of its phase
        points = (index - self.config.skip + 2).clamp(min=1)  # how many timesteps s can be: 0, and the grid up to u
        return u, below((torch.rand(len(index), device=grid.device) * points).long() - 1)

    @classmethod
    def _whole_start(cls, config: Options, base: Checkpoint) -> Checkpoint | None:
        """Open the whole checkpoint of `init`; None where there is none, or `init` is a LoRA.

        InputRefused where its UNet has other inputs than the base's; only one of them may take the guidance as an input.
        """
        if not config.full or not config.init or is_lora(config.init):
            return None
        return checked_start(config.init, config, base, any_guidance=True)

    @classmethod
    def _start(cls, config: Options) -> Lora | None:
        if config.init and not config.full and (Path(config.init).expanduser() / "model_index.json").exists():
            raise UsageError(
                f"{as_field('init', config.init)}: a whole checkpoint, but a LoRA is trained",
                "give `full` to start from it; to train a LoRA on it, give it as `base`, with `finetune`",
            )
        return None if config.full and config.init and not is_lora(config.init) else super()._start(config)

    @classmethod
    def _start_layers(cls, config: Options) -> Sequence[str] | None:
        return None if config.full else super()._start_layers(config)

    @contextmanager
    def _target_weights(self) -> Iterator[None]:
        """Put the averaged target into the network that trains. With a LoRA the target is the student itself (mu = 0)."""
        with self.target.swapped() if self.target else ExitStack():
            yield

    def after_update(self, now: Now) -> None:
        """Update the averaged target of full training."""
        if self.target:
            self.target.update()


def distillation_grid(schedule: NoiseSchedule, config: Config) -> Tensor:
    """Return the timesteps to distil on, ascending: (N,).

    For `target=edge` every phase has the same number of points and ends on a timestep of the sampler (T - 1, T - 1 - T / phases,
    ...). A network that were called between two phases would not know which edge to jump to.
    """
    if config.target != "edge":
        return schedule.ddim_grid(config.grid_steps)
    phases = config.phases or config.num_steps
    return schedule.grid(-(-config.grid_steps // phases) * phases, "trailing").flip(0)


def guidance_embedded(unet: nn.Module, width: int = 256) -> nn.Module:
    """Return a trainable fp32 copy of a UNet with LCM's guidance embedding of that width.

    The new projection starts at zero, so that the copy at first computes exactly what the teacher does. A UNet that has a
    guidance embedding keeps it, in its own width.
    """
    from diffusers.models import UNet2DConditionModel

    assert isinstance(unet, UNet2DConditionModel)
    if unet.config.get("time_cond_proj_dim") is not None:
        return trainable_copy(unet)
    copy = unet_of({**unet.config, "time_cond_proj_dim": width})
    state = {name: value.detach().float().clone() for name, value in unet.state_dict().items()}
    projection = copy.get_parameter("time_embedding.cond_proj.weight")
    state["time_embedding.cond_proj.weight"] = torch.zeros(projection.shape, device=unet.device)
    copy.load_state_dict(state, assign=True)
    return copy.train().requires_grad_(True)
