"""Score identity distillation (SiD, Zhou et al. 2024) to one step, as a LoRA. It needs prompts, but no pictures.

x     = G(z, T)                                    the student's x0 of pure noise
x_t   = alpha_t x + sigma_t eps
f, g  = teacher(x_t).x0, fake(x_t).x0              the teacher is guided; the fake score is trained on the student's samples
student:  (1 - a) |f - g|^2 + (f - g) (g - x),     divided by the mean of |x - f|, gradients through all three
fake:     its own denoising loss on x
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch

from fastdiff.diffusion import losses
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.training.method import Load, Method, Trains, equation


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Score identity"

    lora_rank: Annotated[int, "rank of both adapters", Range(1)] = 16
    lora_alpha: Annotated[float, "their scale is alpha / rank", Range(above=0)] = 16
    guidance: Annotated[float, "of the teacher: u + w (c - u)", Range(1)] = 3.0
    identity: Annotated[float, "a: how far the second moment is subtracted; 1 to 1.2 in the paper", Range(0)] = 1.0
    proof: Annotated[int, "samples a row of the closing table (emoji only); 0 = none", Range(0, 2000)] = 500


class ScoreIdentity(Method):
    """SiD with teacher, student and fake score as one network with two adapters."""

    name, Config = "score-identity", Config
    examples = "fastdiff score-identity --steps 500"

    def __init__(self, base, config):
        super().__init__(base, config)
        self.student, self.students = self.trained("student")
        self.fake, self.fakes = self.trained("fake")
        self.t_last = len(self.schedule) - 1
        self.recipe = replace(self.recipe, scheduler="lcm", num_steps=1, timesteps=(self.t_last,), guidance=1.0)

    @classmethod
    def needs(cls, config):
        return "prompts"

    @classmethod
    def load(cls, config, base):
        return Load(lora=2, graph=4, grad=5, free=0)

    def players(self, phase):
        return {"student": Trains(self.students, averaged=True), "fake": Trains(self.fakes)}

    def networks(self):
        return [self.teacher, self.student, self.fake]

    def losses(self, batch, now):
        z = torch.randn_like(batch.latents)
        x = self.student(z, torch.tensor(self.t_last), batch.cond).x0
        t = torch.randint(20, 980, (len(x),), device=x.device)
        eps = torch.randn_like(x)
        yield {"student": {"identity": self.identity(x, self.schedule.add_noise(x, eps, t), t, batch)}}
        x = x.detach()
        p = self.fake(self.schedule.add_noise(x, eps, t), t, batch.cond)
        yield {"fake": {"denoising": losses.denoising(self.schedule, self.fake.kind, p, x, eps, t)}}

    @equation("SiD, equation 23")
    def identity(self, x, x_t, t, batch):
        """The student's loss on its samples x (B, C, h, w). Zero on average if student and teacher draw alike."""
        f = self.teacher.guided(x_t, t, batch.cond, batch.uncond, self.config.guidance).x0
        g = self.fake(x_t, t, batch.cond).x0
        weight = (x - f).abs().mean((1, 2, 3), keepdim=True).detach()
        return (((1 - self.config.identity) * (f - g).square() + (f - g) * (g - x)) / weight).mean()
