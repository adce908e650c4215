"""Train the second drawing style as a LoRA on the embedded checkpoint: the `anime.safetensors` of the demo.

    python examples/emoji/style_lora.py --style fluent --output runs/style

The plain denoising loss on the same emoji drawn in another style. It is also what a new method looks like:
a Config, a class with `losses` and `export`, and the shared trainer does the rest.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.open import open_data
from fastdiff.diffusion import losses
from fastdiff.lora import adapters
from fastdiff.models.denoiser import Denoiser
from fastdiff.training.config import TrainConfig
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer


@dataclass
class Config(TrainConfig):
    lora_rank: int = 16


class StyleLora:
    """E |eps_theta(x_t, t, c) - eps|^2, weighted like the teacher's own training: min(1 / alpha^2, 30)."""

    def __init__(self, base, config):
        trained = adapters.attach(base.unet, config.lora_rank, config.lora_rank, "style")
        self.student = Denoiser(base.unet, base.schedule(), base.prediction_type, "style")
        self.teacher = Denoiser(base.unet, base.schedule(), base.prediction_type)
        self.players = {"style": torch.nn.ParameterList(trained)}
        self.recipe, self.config = Recipe(family=base.family.name), config

    def losses(self, batch, step):
        t = torch.randint(len(self.student.schedule), (len(batch.latents),))
        eps = torch.randn_like(batch.latents)
        out = self.student(self.student.schedule.add_noise(batch.latents, eps, t), t, batch.cond).eps
        weight = (1 / self.student.schedule.alpha[t]).clamp(max=30**0.5)[:, None, None, None]
        yield {"style": {"denoising": losses.squared(weight * out, weight * eps)}}

    def updated(self, step):
        pass

    def export(self, run):
        modules = adapters.factors(self.student.net, self.config.lora_rank, "style")
        lora.save(lora.Lora(modules, self.recipe.to_metadata()), run.folder / "style.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--style", default="fluent")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/style"))
    args = parser.parse_args()
    config = Config(steps=args.steps, lr=args.lr, lr_schedule="cosine", warmup=50, batch_size=32, ema=0.99, empty_prompts=0.1)
    base, run = checkpoint.load("emoji"), Run(args.output, "style")
    accelerator = open_accelerator(config, run)
    data = open_data(base, f"emoji:{args.style}", prompts=None, resolution_px=64, pairs=0, seed=0, device=accelerator.device)
    data.empty_prompts = config.empty_prompts
    method = StyleLora(base, config)
    method.student.to(accelerator.device)
    trainer = Trainer(method, data, run, config, accelerator)
    if state := run.load_state():
        trainer.restore(state)
    trainer.fit()
    with trainer.averaged():
        method.export(run)


if __name__ == "__main__":
    main()
