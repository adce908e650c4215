"""Pixels <-> scaled latents through a stock VAE, in chunks; fp32. B batch, H W pixels, h w latent."""

import torch
from torch import Tensor, nn


def factor(vae: nn.Module) -> int:
    """Pixels per latent position and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: nn.Module, pixels: Tensor, *, chunk: int = 16) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation of the scaled latents, (B, 2 C, h, w)."""
    found = []
    for part in pixels.split(chunk):
        posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        found.append(torch.cat([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor)
    return torch.cat(found)


def draw(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample (B, C, h, w) of the posterior."""
    mean, std = moments.chunk(2, 1)
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def pixels(vae: nn.Module, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), not clamped; with gradients."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample.float()


@torch.no_grad()
def decode(vae: nn.Module, latents: Tensor, *, chunk: int = 16) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), clamped to [-1, 1]."""
    return torch.cat([pixels(vae, z).clamp(-1, 1) for z in latents.split(chunk)])
