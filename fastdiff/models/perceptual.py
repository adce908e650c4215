"""Perceptual distance of decoded latents: LPIPS (Zhang 2018), or the embedded feature network through the same formula."""

from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import tensors
from fastdiff.models import autoencoder
from fastdiff.models.feature_net import FeatureNet
from fastdiff.runtime.download import weight_file
from fastdiff.runtime.errors import UsageError, as_field

EMBEDDED = "embedded"


class DecodedDistance(nn.Module):
    """Latents a, b (B, C, h, w) -> distance (B,) of their pictures, in fp32; gradients flow to a.

    A random window of `crop` x `crop` latent positions is decoded, the same of both: decoding a 1024 px picture with
    gradients takes more memory than the networks that are trained.
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
    """The same random window of both latents, at most `side` x `side` positions; fp32."""
    h, w = (min(side, n) for n in a.shape[-2:])
    y, x = (int(torch.randint(n - m + 1, ())) for n, m in zip(a.shape[-2:], (h, w), strict=True))
    return tuple(z[..., y : y + h, x : x + w].float() for z in (a, b))


class PixelDistance(nn.Module):
    """Pixels a, b (B, 3, H, W) in [-1, 1] -> (B,), by LPIPS or the embedded feature network; it moves to a device whole."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net.distance(a, b) if isinstance(self.net, FeatureNet) else self.net(a, b).flatten()


def open_distance(family: str, weights: str | None, *, option: str = "lpips_weights", off: str = "") -> PixelDistance:
    """The distance for a family.

    `weights`, what the field `option` was given: "embedded" = the shipped feature network (the default for `emoji`), a file
    with torchvision's VGG-16, None = that file from torchvision's cache or model zoo. Where it cannot be had that is an error,
    which names `off`, the option to do without; never a random backbone.
    """
    path = locate(family, weights, option=option, off=off)
    if path is None:
        return PixelDistance(FeatureNet.embedded())
    file = tensors.open_file(path, allow_pickle=True)
    return PixelDistance(lpips_vgg({key: file[key] for key in file if key.startswith("features.")}))


def locate(family: str, weights: str | None, *, option: str = "lpips_weights", off: str = "") -> Path | None:
    """The file of VGG-16's weights, downloaded if need be; None where the embedded network stands in. UsageError if neither."""
    if weights == EMBEDDED or (weights is None and family == "emoji"):
        return None
    from torchvision.models import VGG16_Weights

    instead = f"(3) {as_field(option, EMBEDDED)}, a small network that ships with fastdiff" + (f", or (4) {off}" if off else "")
    return weight_file(weights, VGG16_Weights.IMAGENET1K_V1.url, option=option, what="LPIPS", instead=instead)


def lpips_vgg(features: dict[str, Tensor]) -> nn.Module:
    """lpips' own network and linear heads (v0.1) on the given backbone; frozen, fp32."""
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it builds torchvision's network by a deprecated argument
        net = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.5.weight is features.5.weight.
    wanted = {key: "features." + key.split(".", 1)[1] for key in net.net.state_dict()}
    missing = [name for name in wanted.values() if name not in features]
    if missing:
        raise UsageError(f"`lpips_weights`: {len(missing)} of VGG-16's layers are not in that file, the first is {missing[0]}")
    net.net.load_state_dict({key: features[name].float() for key, name in wanted.items()})
    return net.eval().requires_grad_(False)
