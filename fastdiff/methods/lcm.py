"""Latent consistency distillation as a LoRA, or of the full network (Luo et al. 2023; LCM-LoRA report 2023).

    t = t_i, u = t_{i-skip}  on the grid  k - 1, 2k - 1, ..., T - 1  with k = T / N;  0 below it
    x_t = alpha_t x0 + sigma_t eps
    p   = teacher(x_t, t; c, empty; w)                    guided: u + w (c - u), both halves in one batch
    x_u = alpha_u p.x0 + sigma_u p.eps                    DDIM step of the augmented PF-ODE
    F(x, t -> s):  zero    s = 0:  c_skip(t) x + c_out(t) x0(x, t)             LCM
                   edge    s = lower edge of t's phase:  DDIM jump to s        PCM (Wang 2024)
                   random  s uniform on the grid below t:  DDIM jump to s      TCD (Zheng 2024)
    loss = d( F_student(x_t, t -> s),  F_target(x_u, u -> s) ),   target = student without gradient, or its average

With a LoRA the teacher is the same network with the adapter off. Fine-tuning (`--finetune`, the LCM paper's LCF) has no
teacher: x_u is the same noise at the lower level.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Batch
from fastdiff.diffusion import losses
from fastdiff.diffusion.schedule import NoiseSchedule, per_sample
from fastdiff.diffusion.solvers import jump
from fastdiff.models.denoiser import Cond
from fastdiff.models.ema import EMA
from fastdiff.options.lcm import EXAMPLES, PRESETS, Config
from fastdiff.training.method import Load, Method, Now, Phase, Stateful, Trains, Turn, equation

SCHEDULERS = {"zero": "lcm", "edge": "ddim", "random": "tcd"}


class LCM(Method):
    """One UNet; players: the student's adapter (or all its weights)."""

    name, Config, presets, examples = "train-lcm-lora", Config, PRESETS, EXAMPLES

    def __init__(self, base: Checkpoint, config: Config) -> None:
        super().__init__(base, config)
        self.student, self.params = self.trained("student", guidance_embedded(base.unet) if config.full else None)
        self.target = EMA(self.params, config.target_ema, warm=False) if config.full else None
        self.grid = distillation_grid(self.schedule, config)
        self.recipe = replace(
            self.recipe,
            method={"zero": "lcm", "edge": "pcm", "random": "tcd"}[config.target],
            scheduler=SCHEDULERS[config.target],
            num_steps=config.num_steps,
            guidance=config.guidance_min if config.full else 1.0,
            eta=0.3 if config.target == "random" else None,
        )

    @classmethod
    def load(cls, config: Config, base: Checkpoint) -> Load:
        return Load(full=1, free=3) if config.full else Load(lora=1, free=1 if config.finetune else 3)

    def players(self, phase: Phase) -> dict[str, Trains]:
        return {"student": Trains(self.params, averaged=True, net=self.student.net if self.config.full else None)}

    def state(self) -> dict[str, Stateful]:
        return {"target": self.target} if self.target else {}

    def losses(self, batch: Batch, now: Now) -> Iterator[Turn]:
        """One consistency step (LCM, algorithm 1; LCF, algorithm 4)."""
        n, device = len(batch.latents), batch.latents.device
        index = torch.randint(len(self.grid), (n,), device=device)
        grid = self.grid.to(device)
        t, u, s = grid[index], *self.pair(index, grid)
        w = torch.empty(n, device=device).uniform_(self.config.guidance_min, self.config.guidance_max)
        eps = torch.randn_like(batch.latents)
        x_t = self.schedule.add_noise(batch.latents, eps, t)
        cond = batch.cond.with_guidance(w) if self.config.full else batch.cond
        with torch.no_grad():
            x_u = self.schedule.add_noise(batch.latents, eps, u) if self.config.finetune else self.ode_step(x_t, t, u, batch, w)
            with self._target_weights():
                target = self.consistency(x_u, u, s, cond)
        online = self.consistency(x_t, t, s, cond)
        distance = losses.CONSISTENCY[self.config.loss]
        yield {"student": {"consistency": distance(online, target, self.config.huber_c, self.weight(t, u, online))}}

    @equation("LCM, equations 13 and 14")
    def ode_step(self, x_t: Tensor, t: Tensor, u: Tensor, batch: Batch, w: Tensor) -> Tensor:
        """Guided DDIM step t -> u of the teacher."""
        return jump(self.schedule, self.teacher.guided(x_t, t, batch.cond, batch.uncond, w), u)

    @equation("LCM, equation 9")
    def consistency(self, x: Tensor, t: Tensor, s: Tensor | None, cond: Cond) -> Tensor:
        """F(x, t -> s): the boundary form to zero, else a DDIM jump that leaves x alone where t = s."""
        p = self.student(x, t, cond)
        if s is None:
            c_skip, c_out = self.schedule.boundary(t, x)
            return c_skip * x + c_out * p.x0
        return torch.where(per_sample(t == s, x), x, jump(self.schedule, p, s))

    @equation("Song & Dhariwal 2023, equation 6")
    def weight(self, t: Tensor, u: Tensor, like: Tensor) -> Tensor | float:
        """1 / (sigma_t / alpha_t - sigma_u / alpha_u): with an epsilon network the plain

        loss on x0 pulls sigma / alpha times as hard, 100 times between the ends, and low noise levels, the detail, decay.
        """
        if self.config.weighting == "none":
            return 1.0
        return per_sample(1 / (self.schedule.noise_scale(t) - self.schedule.noise_scale(u)), like)

    @equation("LCM, algorithm 1; PCM, section 3; TCD, section 4")
    def pair(self, index: Tensor, grid: Tensor) -> tuple[Tensor, Tensor | None]:
        """The lower point u of each sample's pair, and where both jump to: s <= u, None for zero."""
        below = lambda i: torch.where(i >= 0, grid[i.clamp(min=0)], 0)
        u = below(index - self.config.skip)
        if self.config.target == "zero":
            return u, None
        if self.config.target == "edge":
            length = len(grid) // (self.config.phases or self.config.num_steps)
            s = below(index // length * length - 1)
            return torch.maximum(u, s), s  # a teacher step ends at the edge of its phase
        points = (index - self.config.skip + 2).clamp(min=1)  # 0 and the grid up to u
        return u, below((torch.rand(len(index), device=grid.device) * points).long() - 1)

    @contextmanager
    def _target_weights(self) -> Iterator[None]:
        """The averaged target of full training; with a LoRA the target is the student itself (mu = 0)."""
        with self.target.swapped() if self.target else ExitStack():
            yield

    def after_update(self, now: Now) -> None:
        if self.target:
            self.target.update()


def distillation_grid(schedule: NoiseSchedule, config: Config) -> Tensor:
    """Ascending timesteps to distil on. With phases, each has the same number of points and ends on a step of the sampler,

    T - 1, T - 1 - T / phases, ...: a network asked between two phases would not know which edge to jump to.
    """
    if config.target != "edge":
        return schedule.ddim_grid(config.grid_steps)
    phases = config.phases or config.num_steps
    return schedule.grid(-(-config.grid_steps // phases) * phases, "trailing").flip(0)


def guidance_embedded(unet: nn.Module, width: int = 256) -> nn.Module:
    """A trainable fp32 copy with LCM's guidance embedding, whose new projection starts at zero: the teacher exactly."""
    copy = type(unet).from_config({**unet.config, "time_cond_proj_dim": width})
    missing = copy.load_state_dict(unet.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"], missing
    nn.init.zeros_(copy.time_embedding.cond_proj.weight)
    return copy.float().train().requires_grad_(True)
