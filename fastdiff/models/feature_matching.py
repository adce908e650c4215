"""Feature matching loss for latents (Song 2024, SDXS, equation 10): 1 - SSIM of feature maps, as in DISTS (Ding 2020).

The paper finds that a CNN, a ViT and the encoder of the diffusion model's own UNet work equally well. The UNet's encoder is
already loaded and works on latents; the other networks need decoded pictures.
"""

from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints import component
from fastdiff.diffusion.losses import structure
from fastdiff.models import autoencoder, perceptual
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.feature_net import FeatureNet
from fastdiff.runtime.errors import InputRefused, UsageError, quoted

Encoder = Literal["unet", "vgg", "dinov2", "embedded"]
DINOV2 = "facebook/dinov2-small"
LAYERS = (3, 6, 9, 12)  # of DINOv2's twelve layers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as DINOv2 expects
PATCH = 14  # side of DINOv2's patches, in pixels


class UNetFeatures:
    """Features of slightly noised latents (B, C, h, w): the maps of each down block of a frozen UNet, and its bottleneck."""

    def __init__(self, net: Denoiser, t_max: float) -> None:
        self.net, self.t_max = net, t_max

    def __call__(self, a: Tensor, b: Tensor, cond: Cond) -> tuple[list[Tensor], list[Tensor]]:
        """Return the feature maps of both latents, with the same noise at one random timestep below t_max T for each item."""
        schedule, cond = self.net.schedule, cond.with_control(None)  # a ControlNet does not change the encoder's features
        t = torch.randint(max(1, round(self.t_max * len(schedule))), (len(a),), device=a.device)
        eps = torch.randn_like(a)
        mine = self.net.encoded(schedule.add_noise(a, eps, t), t, cond)
        with torch.no_grad():
            return mine, self.net.encoded(schedule.add_noise(b, eps, t), t, cond)


class PixelFeatures(nn.Module):
    """Feature maps of decoded latents (B, C, h, w), in a random window of at most `crop` x `crop` latent positions."""

    def __init__(self, vae: nn.Module, maps: nn.Module, crop: int) -> None:
        super().__init__()
        self.vae, self.maps, self.crop = vae.requires_grad_(False), maps.requires_grad_(False), crop

    def forward(self, a: Tensor, b: Tensor, cond: Cond) -> tuple[list[Tensor], list[Tensor]]:
        """Return the feature maps of latents a, with gradients, and of latents b, without; `cond` is not used."""
        a, b = perceptual.same_window(a, b, self.crop)
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                goals = self.maps(autoencoder.pixels(self.vae, b))
            large = a[:, 0].numel() * autoencoder.factor(self.vae) ** 2 >= perceptual.LARGE
            with perceptual.recomputed(self) if large else nullcontext():
                return self.maps(autoencoder.pixels(self.vae, a)), goals


class Embedded(nn.Module):
    """Feature maps of the small network that ships with the `emoji` base."""

    def __init__(self) -> None:
        super().__init__()
        self.net = FeatureNet.embedded()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.net.maps(pixels)


class VGG(nn.Module):
    """Feature maps relu1_2 to relu5_3 of VGG-16, the layers that LPIPS uses."""

    def __init__(self, lpips: nn.Module) -> None:
        super().__init__()
        self.lpips = lpips

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return list(self.lpips.net(self.lpips.scaling_layer(pixels)))


class DINOv2(nn.Module):
    """Patch tokens of the DINOv2 layers LAYERS as maps (B, D, H / 14, W / 14). Pictures are resized to whole patches first."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).reshape(3, 1, 1))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        h, w = (max(1, round(side / PATCH)) for side in pixels.shape[-2:])
        whole = F.interpolate(pixels / 2 + 0.5, (h * PATCH, w * PATCH), mode="bilinear", antialias=True)
        states = self.net((whole - self.mean) / self.std, output_hidden_states=True).hidden_states
        chosen = sorted({min(i, len(states) - 1) for i in LAYERS})
        return [states[i][:, 1:].transpose(1, 2).unflatten(2, (h, w)) for i in chosen]


class FeatureMatching(nn.Module):
    """The loss (B,) between latents a and b (B, C, h, w): mean of 1 - SSIM over maps and channels. Gradients flow to a."""

    def __init__(self, encoder: UNetFeatures | PixelFeatures) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, a: Tensor, b: Tensor, cond: Cond) -> Tensor:
        features_a, features_b = self.encoder(a, b, cond)
        return 1 - torch.stack([structure(x, y) for x, y in zip(features_a, features_b, strict=True)]).mean(0)


def open_matching(
    kind: Encoder, teacher: Denoiser, vae: nn.Module, *, weights: str | None = None, t_max: float = 0.25, crop: int = 64
) -> FeatureMatching:
    """Build the feature matching loss with one of the encoders.

    `weights` is a file as for LPIPS with `vgg`, and a folder or hub id with `dinov2`. `t_max` (share of all timesteps) is for
    `unet`, `crop` (latent positions a side) for the others. Raises UsageError if weights cannot be loaded or downloaded.
    """
    if kind == "unet":
        return FeatureMatching(UNetFeatures(teacher, t_max))
    if kind == "embedded":
        maps: nn.Module = Embedded()
    elif kind == "vgg":
        maps = VGG(perceptual.open_distance("", weights, option="fm_weights", off="`fm_encoder=unet`").net)
    else:
        maps = DINOv2(open_dinov2(weights or DINOV2))
    return FeatureMatching(PixelFeatures(vae, maps.eval(), crop))


def open_dinov2(ref: str) -> nn.Module:
    """Load DINOv2 from a folder or hub id in transformers' layout. Raises UsageError if that fails: never random weights."""
    from transformers import Dinov2Model

    hint = "give `fm_weights=FOLDER`, or use `fm_encoder=unet`, which needs no extra weights"
    try:
        folder = component.locate(ref, "fm_weights", "DINOv2")
    except InputRefused:
        raise
    except UsageError as error:
        error.hint = f"{error.hint}; or {hint}"
        raise
    try:
        return Dinov2Model.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = quoted(error).splitlines()[0]
        raise UsageError(f"`fm_encoder=dinov2`: the weights in {folder} cannot be read ({reason})", hint) from error
