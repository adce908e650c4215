"""Pixels <-> scaled latents through a stock VAE, in chunks; fp32. B batch, H W pixels, h w latent."""

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import component
from fastdiff.models.fast.decoder import Decoder
from fastdiff.runtime.errors import InputRefused, as_field

CLASSES = ("AutoencoderKL", "AutoencoderTiny")


def load(ref: str, *, latent_channels: int = 4, option: str = "vae") -> nn.Module:
    """A VAE of its own: a diffusers folder (or the `vae` in one of a whole checkpoint) or a hub id; fp32, frozen.

    UsageError or InputRefused where it is none, or of other latents.
    """
    folder = component.locate(ref, option, "VAE")
    folder = folder / "vae" if (folder / "model_index.json").exists() else folder
    vae = component.load(folder, option, ref, component.config_of(folder, option, ref, CLASSES))
    if vae.config.latent_channels != latent_channels:
        own = vae.config.latent_channels
        raise InputRefused(f"{as_field(option, ref)}: of {own} latent channels, the base has {latent_channels}")
    return vae


def factor(vae: nn.Module | Decoder) -> int:
    """Pixels per latent position and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode_moments(vae: nn.Module, pixels: Tensor, *, chunk: int = 16) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> posterior mean and standard deviation of the scaled latents, (B, 2 C, h, w)."""
    moments = []
    for part in pixels.split(chunk):
        posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
        moments.append(torch.cat([posterior.mean, posterior.std], 1).float() * vae.config.scaling_factor)
    return torch.cat(moments)


def draw(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A sample (B, C, h, w) of the posterior."""
    mean, std = moments.chunk(2, 1)
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def pixels(vae: nn.Module | Decoder, latents: Tensor) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), not clamped; with gradients."""
    if isinstance(vae, Decoder):
        return vae(latents)
    return vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample.float()


@torch.no_grad()
def decode(vae: nn.Module | Decoder, latents: Tensor, *, chunk: int = 16) -> Tensor:
    """Scaled latents (B, C, h, w) -> pixels (B, 3, H, W), clamped to [-1, 1]."""
    return torch.cat([pixels(vae, z).clamp(-1, 1) for z in latents.split(chunk)])


def tiny(width: int, decoder_blocks: tuple[int, ...], latent_channels: int = 4) -> nn.Module:
    """A stock AutoencoderTiny (TAESD) of random weights: residual blocks and upsampling, no attention, no normalisation.

    Its latents are scaled ones (scaling_factor 1) and its pixels lie in [-1, 1], as its own encode and decode see to. It is
    trained through these: `forward` rounds latents to bytes, which stops gradients, and the encoder under gradient
    checkpointing skips the change of range, so nobody switches that on.
    """
    from diffusers import AutoencoderTiny

    widths, stages = (width,) * len(decoder_blocks), len(decoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, *(3,) * (stages - 1)),
        num_decoder_blocks=decoder_blocks,
        latent_channels=latent_channels,
        scaling_factor=1.0,
        force_upcast=False,
    )


def mean_latents(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) -> the scaled latents that a stock pipeline starts from, without their spread; with gradients."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

    answer = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = answer.latents if isinstance(answer, AutoencoderTinyOutput) else answer.latent_dist.mean
    return latents.float() * vae.config.scaling_factor
