"""Perceptual distance of pictures: LPIPS (Zhang 2018), or the same formula with the embedded feature network."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import tensors
from fastdiff.checkpoints.family import Family
from fastdiff.models import autoencoder
from fastdiff.models.feature_net import FeatureNet
from fastdiff.runtime.download import weight_file
from fastdiff.runtime.errors import UsageError, as_field

EMBEDDED = "embedded"


class DecodedDistance(nn.Module):
    """The distance (B,) between the pictures of latents a and b (B, C, h, w), in fp32. Gradients flow to a.

    Only a random window of `crop` x `crop` latent positions is decoded, the same one of both: decoding a whole 1024 px
    picture with gradients takes more memory than the trained networks.
    """

    def __init__(self, vae: nn.Module, distance: nn.Module, crop: int) -> None:
        super().__init__()
        self.vae, self.distance, self.crop = vae.requires_grad_(False), distance, crop

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = same_window(a, b, self.crop)
        with torch.autocast(a.device.type, enabled=False):
            with torch.no_grad():
                target = autoencoder.pixels(self.vae, b).clamp(-1, 1)
            return self.distance(autoencoder.pixels(self.vae, a), target)


def same_window(a: Tensor, b: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Cut the same random window, at most `side` x `side` positions, out of two latents (B, C, h, w); fp32."""
    h, w = (min(side, n) for n in a.shape[-2:])
    y, x = (int(torch.randint(n - m + 1, ())) for n, m in zip(a.shape[-2:], (h, w), strict=True))
    return tuple(z[..., y : y + h, x : x + w].float() for z in (a, b))


class PixelDistance(nn.Module):
    """The distance (B,) between pixels a and b (B, 3, H, W) in [-1, 1], by LPIPS or the embedded feature network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net.distance(a, b) if isinstance(self.net, FeatureNet) else self.net(a, b).flatten()


def open_distance(family: Family, weights: str | None, *, option: str = "lpips_weights", off: str = "") -> PixelDistance:
    """Build the perceptual distance for a family.

    `weights` is the value of the field `option`: "embedded" for the shipped feature network (the default for families that
    have one), a file with torchvision's VGG-16, or None to take that file from torchvision's cache or model zoo. Raises
    UsageError if the weights cannot be loaded; the message suggests `off`, the option that avoids the distance. Random
    weights are never used.
    """
    path = locate(family, weights, option=option, off=off)
    if path is None:
        return PixelDistance(FeatureNet.embedded())
    file = tensors.open_file(path, allow_pickle=True)
    return PixelDistance(lpips_vgg({key: file[key] for key in file if key.startswith("features.")}))


def locate(family: Family, weights: str | None, *, option: str = "lpips_weights", off: str = "") -> Path | None:
    """Return the file of VGG-16's weights, downloaded if needed; None for the embedded network. Raises UsageError on failure."""
    if weights == EMBEDDED or (weights is None and family.judge_ships):
        return None
    from torchvision.models import VGG16_Weights

    instead = f"(3) {as_field(option, EMBEDDED)}, a small network that ships with fastdiff" + (f", or (4) {off}" if off else "")
    return weight_file(weights, VGG16_Weights.IMAGENET1K_V1.url, option=option, what="LPIPS", instead=instead)


def lpips_vgg(features: dict[str, Tensor]) -> nn.Module:
    """Build the lpips package's network with its linear heads (v0.1) and the given VGG-16 weights; frozen, fp32.

    Raises UsageError if the weights lack a layer.
    """
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips passes a deprecated argument to torchvision
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.5.weight is features.5.weight.
    wanted = {key: "features." + key.split(".", 1)[1] for key in net.net.state_dict()}
    missing = [name for name in wanted.values() if name not in features]
    if missing:
        raise UsageError(f"`lpips_weights`: that file lacks {len(missing)} of VGG-16's layers, the first is {missing[0]}")
    net.net.load_state_dict({key: features[name].float() for key, name in wanted.items()})
    return net.eval().requires_grad_(False)
