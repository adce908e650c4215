"""Train a second drawing style as a LoRA on the embedded checkpoint: the `style.safetensors` that ships with it.

    python examples/emoji/style_lora.py --style fluent --output runs/style

The loss is plain denoising on the same emoji drawn in another style.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data import emoji
from fastdiff.diffusion import losses
from fastdiff.options.train import TrainConfig
from fastdiff.training.method import Method, Trains
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer


@dataclass
class Config(TrainConfig):
    lora_rank: int = 16
    lora_alpha: float = 16


class StyleLora(Method):
    """Denoising loss E |eps_theta(x_t, t, c) - eps|^2 with the weight of the teacher's own training, min(1 / alpha^2, 30)."""

    name, Config = "style", Config

    def __init__(self, base, config):
        super().__init__(base, config)
        self.student, self.params = self.trained("style")
        self.recipe = Recipe(family=base.family.name)  # sampled like the base

    def players(self, phase):
        return {"style": Trains(self.params, averaged=True)}

    def losses(self, batch, now):
        t = torch.randint(len(self.schedule), (len(batch.latents),))
        eps = torch.randn_like(batch.latents)
        out = self.student(self.schedule.add_noise(batch.latents, eps, t), t, batch.cond).eps
        weight = (1 / self.schedule.alpha[t]).clamp(max=30**0.5)[:, None, None, None]
        yield {"style": {"denoising": losses.squared(weight * out, weight * eps)}}

    def export(self, run):
        self.save_student(run, "style")


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
    # A style belongs to the teacher, so nothing is held out.
    data = emoji.encode(base, *emoji.all_images(), device=accelerator.device, style=args.style)
    data.empty_prompts = config.empty_prompts
    method = StyleLora(base, config)
    trainer = Trainer(method, data, run, config, accelerator)
    if state := run.load_state():
        trainer.restore(state)
    trainer.fit()
    with trainer.averaged():
        method.export(run)


if __name__ == "__main__":
    main()
