"""Trajectory-segmented consistency distillation in stages (Hyper-SD, Ren et al. 2024, section 3.1): 8 segments, then 4, 2 and 1.

Each stage cuts the timesteps into n segments. A sample at t moves by a guided DDIM step of the teacher to u < t, and
loss = | jump(student(x_t, t), s) - jump(student(x_u, u), s) |,    s the lower end of the segment.
One LoRA goes through all stages. Each stage writes its LoRA, to be sampled by DDIM with as many steps as segments.
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch

from fastdiff.diffusion import losses
from fastdiff.diffusion.samplers import jump
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.training.method import Load, Method, Phase, Trains, equation


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Segments"

    lora_rank: Annotated[int, "rank of the adapter", Range(1)] = 16
    lora_alpha: Annotated[float, "its scale is alpha / rank", Range(above=0)] = 16
    guidance: Annotated[float, "of the teacher: u + w (c - u)", Range(1)] = 3.0
    segments: Annotated[int, "of the first stage; each further one has half of them", Range(1, 64)] = 2
    stride: Annotated[int, "timesteps that a step of the teacher crosses", Range(1, 500)] = 20
    proof: Annotated[int, "samples a row of the closing table (emoji only); 0 = none", Range(0, 2000)] = 500


@dataclass(frozen=True)
class Stage(Phase):
    """A phase with its number of segments."""

    segments: int = 1


class Segments(Method):
    """Hyper-SD's first part: consistency inside segments, which are halved from stage to stage."""

    name, Config = "segments", Config
    examples = "fastdiff segments --segments 4 --steps 600"

    def __init__(self, base, config):
        super().__init__(base, config)
        self.student, self.params = self.trained("student")

    @classmethod
    def load(cls, config, base):
        return Load(lora=1, free=3)

    def phases(self):
        counts = [self.config.segments]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)
        steps = [self.config.steps * (i + 1) // len(counts) - self.config.steps * i // len(counts) for i in range(len(counts))]
        return [Stage(f"{n}-segments", length, segments=n) for n, length in zip(counts, steps, strict=True)]

    def players(self, phase):
        how = dict(scheduler="ddim", spacing="trailing", guidance=1.0)
        self.recipe = replace(self.recipe, num_steps=phase.segments, **how)
        return {"student": Trains(self.params, averaged=True)}

    def losses(self, batch, now):
        x0, total = batch.latents, len(self.schedule)
        length = total // now.phase.segments
        t = torch.randint(total, (len(x0),), device=x0.device)
        s = t // length * length - 1  # the next lower timestep of trailing spacing; -1 is a clean latent
        u = torch.maximum(t - self.config.stride, s)
        x_t = self.schedule.add_noise(x0, torch.randn_like(x0), t)
        with torch.no_grad():
            x_u = jump(self.schedule, self.teacher.guided(x_t, t, batch.cond, batch.uncond, self.config.guidance), u)
            goal = self.landing(x_u, u, s, batch.cond)
        yield {"student": {"consistency": losses.pseudo_huber(self.landing(x_t, t, s, batch.cond), goal, 0.001)}}

    @equation("Hyper-SD, equation 5")
    def landing(self, x, t, s, cond):
        """The student's DDIM jump of x (B, C, h, w) from t (B,) to the segment's end s (B,). Samples with t = s stay there."""
        there = jump(self.schedule, self.student(x, t.clamp(min=0), cond), s)
        return torch.where((t == s)[:, None, None, None], x, there)

    def export(self, run):
        self.save_student(run, f"segments-{self.recipe.num_steps}")
