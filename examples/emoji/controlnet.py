"""Train the embedded ControlNet from edges to emoji, which `sample --controlnet emoji` and `distill-controlnet` use offline.

    python examples/emoji/controlnet.py --output runs/controlnet

The loss is plain denoising with the frozen teacher (Zhang 2023): a copy of the teacher's encoder sees Canny edges of the picture
and adds to the teacher's skip connections. Pictures are also moved, mirrored and shrunk, which no prompt mentions, and half of
the prompts are empty. So only the edges can tell where and what to draw.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.data import control, emoji
from fastdiff.diffusion import losses
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.train import TrainConfig
from fastdiff.sampling.pictures import uint8
from fastdiff.training.method import Method, Trains
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer


@dataclass
class Config(TrainConfig):
    pass


class ControlNet(Method):
    """Denoising loss E |eps_theta(x_t, t, c, control) - eps|^2 weighted as the teacher's: min(1 / alpha^2, 30)."""

    name, Config = "controlnet", Config

    def __init__(self, base, config):
        from diffusers import ControlNetModel

        super().__init__(base, config)
        net = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 16, 32, 64)).train()
        # With zeros at both ends (Zhang 2023) it learns nothing for thousands of small batches. Zeros at one end are enough.
        torch.nn.init.kaiming_normal_(net.controlnet_cond_embedding.conv_out.weight)
        self.student = Denoiser(base.unet, self.schedule, base.prediction_type, controlnet=net)

    def players(self, phase):
        net = self.student.controlnet
        return {"controlnet": Trains(list(net.parameters()), averaged=True, net=net)}

    def losses(self, batch, now):
        t = torch.randint(len(self.schedule), (len(batch.latents),))
        eps = torch.randn_like(batch.latents)
        out = self.student(self.schedule.add_noise(batch.latents, eps, t), t, batch.cond).eps
        weight = (1 / self.schedule.alpha[t]).clamp(max=30**0.5)[:, None, None, None]
        yield {"controlnet": {"denoising": losses.squared(weight * out, weight * eps)}}

    def export(self, run):
        self.student.controlnet.half().save_pretrained(run.folder / "controlnet")


def moved(rgba: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Draw sprites (B, 4, 64, 64) in [0, 1] at random places, some mirrored, up to a fifth smaller, on their backgrounds.

    Returns pixels (B, 3, 64, 64) in [-1, 1].
    """
    n = len(rgba)
    scale = 1 + 0.25 * torch.rand(n)  # the sampled region grows by this factor, so the picture shrinks by it
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * (torch.randint(2, (n,)) * 2 - 1)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (torch.rand(n, 2) * 2 - 1) * (scale - 0.95)[:, None]
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    grid = torch.nn.functional.affine_grid(theta, list(rgba.shape), align_corners=False)
    sprites = torch.nn.functional.grid_sample(premultiplied, grid, align_corners=False)
    colours = torch.tensor(list(emoji.BACKGROUNDS.values())) / 255
    return (sprites[:, :3] + colours[background][:, :, None, None] * (1 - sprites[:, 3:])) * 2 - 1


def add_moved(base, data, variants: int) -> None:
    """Add `variants` moved copies of every picture on every background to the data, and the edges of all pictures."""
    picture, background = emoji.all_images()
    pixels = [emoji.compose(picture, background)]
    for _ in range(variants):
        pixels.append(moved(emoji.sprites()[picture], background))
        data.moments = torch.cat([data.moments, autoencoder.encode_moments(base.vae, pixels[-1]).cpu()])
    data.captions, data.names = data.captions.repeat(variants + 1, 1), (data.names or []) * (variants + 1)
    data.controls = torch.cat([control.extract(uint8(part), control.canny) for part in pixels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/controlnet"))
    args = parser.parse_args()
    config = Config(steps=args.steps, lr=args.lr, lr_schedule="cosine", warmup=50, batch_size=24, ema=0.99, empty_prompts=0.5)
    base, run = checkpoint.load("emoji"), Run(args.output, "controlnet")
    accelerator = open_accelerator(config, run)
    data = emoji.encode(base, *emoji.all_images(), device=accelerator.device)  # the teacher's ControlNet: nothing is held out
    data.empty_prompts = config.empty_prompts
    torch.manual_seed(config.seed)
    add_moved(base, data, variants=3)
    method = ControlNet(base, config)
    trainer = Trainer(method, data, run, config, accelerator)
    if state := run.load_state():
        trainer.restore(state)
    trainer.fit()
    with trainer.averaged():
        method.export(run)


if __name__ == "__main__":
    main()
