"""Perceptual distance of pictures: LPIPS (Zhang 2018), or the same formula with the embedded feature network.

Gradients through a VAE's decoder and VGG-16 take more memory than the networks that train: 6 GiB for two pictures of 512 px.
So large pictures go through one pair at a time, each pair's gradient is computed at once, and the networks' blocks keep only
their inputs for it (gradient checkpointing, Chen 2016).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from fastdiff.checkpoints import tensors
from fastdiff.checkpoints.family import Family
from fastdiff.models import autoencoder
from fastdiff.models.feature_net import FeatureNet
from fastdiff.runtime.download import weight_file
from fastdiff.runtime.errors import UsageError, as_field

EMBEDDED = "embedded"
LARGE = 2**18  # pixels of one picture of 512 px: pictures with fewer in all go through together, as torch does it
# Blocks whose activations are computed again in the backward pass: of diffusers' decoders, and the five slices of LPIPS's VGG.
BLOCKS = {"ResnetBlock2D", "Attention", "Upsample2D", "AutoencoderTinyBlock", "Sequential"}

Apart = Callable[[Tensor, Tensor], Tensor]


class DecodedDistance(nn.Module):
    """The distance (B,) between the pictures of latents a and b (B, C, h, w), in fp32. Gradients flow to a.

    Only a random window of `crop` x `crop` latent positions is decoded, the same one of both: decoding a whole 1024 px
    picture with gradients takes more memory than the trained networks. With `dtype`, a copy of the decoder in it is used.
    """

    def __init__(self, vae: nn.Module, distance: nn.Module, crop: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        vae = vae if dtype in {None, vae.dtype} else autoencoder.decoder_copy(vae, dtype)
        self.vae, self.distance, self.crop = vae.requires_grad_(False), distance, crop

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = same_window(a, b, self.crop)
        with torch.autocast(a.device.type, enabled=False):
            return pair_by_pair(self.apart, a, b, a[0, 0].numel() * autoencoder.factor(self.vae) ** 2)

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the distances (B,) of latents that go through together."""
        with torch.no_grad():
            target = autoencoder.pixels(self.vae, b).clamp(-1, 1)
        large = len(a) * target[0, 0].numel() >= LARGE
        with recomputed(self.vae) if large else nullcontext():
            pixels = autoencoder.pixels(self.vae, a)
        return self.distance(pixels, target)


def pair_by_pair(apart: Apart, a: Tensor, b: Tensor, pixels: int) -> Tensor:
    """Compute distances (B,) of a and b, as many pairs at a time as their pictures' size allows; gradients flow to a.

    `apart` maps some of the pairs to their distances, and `pixels` is the size of one picture. Large pictures' gradients are
    computed here and now, so that only those of one pair are in memory; the backward pass multiplies them. They are computed
    before the loss is scaled, so not in fp16, where they would be zeros.
    """
    if len(a) * pixels < LARGE:
        return apart(a, b)
    n = max(1, LARGE // pixels)
    if torch.is_grad_enabled() and a.requires_grad:
        with autoencoder.without_fp16(a.device):
            return Eager.apply(a.float(), b.float(), apart, n)
    return torch.cat([apart(x, y) for x, y in zip(a.split(n), b.split(n), strict=True)])


class Eager(torch.autograd.Function):
    """Distances of pairs, whose gradients are computed in the forward pass, a few pairs at a time."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, apart: Apart, n: int) -> Tensor:  # type: ignore[override]  # torch's is *args
        distances, gradients = [], []
        for x, y in zip(a.detach().split(n), b.split(n), strict=True):
            x = x.clone().requires_grad_(True)
            with torch.enable_grad():
                distance = apart(x, y)
                gradients.append(torch.autograd.grad(distance.sum(), x)[0])
            distances.append(distance.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(distances)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch's is *args
        (gradients,) = ctx.saved_tensors
        return gradients * grad.reshape(-1, *[1] * (gradients.ndim - 1)), None, None, None


@contextmanager
def recomputed(net: nn.Module) -> Iterator[None]:
    """Make the blocks of a network keep only their inputs while it runs inside; the backward pass computes the rest again."""
    blocks = [module for module in net.modules() if type(module).__name__ in BLOCKS]
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own again


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
        return pair_by_pair(self.apart, a, b, a[0, 0].numel())

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the distances (B,) of pictures that go through together."""
        if isinstance(self.net, FeatureNet):
            return self.net.distance(a, b)
        with recomputed(self.net) if a.numel() >= 3 * LARGE else nullcontext():
            return self.net(a, b).flatten()


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


def lpips_net(*, heads: bool = True) -> nn.Module:
    """Build the lpips package's network, with its linear heads (v0.1) if `heads`; VGG-16's weights are random."""
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips passes a deprecated argument to torchvision
        return lpips.LPIPS(net="vgg", pnet_rand=True, pretrained=heads, verbose=False)


def lpips_vgg(features: dict[str, Tensor]) -> nn.Module:
    """Build the lpips package's network with its linear heads (v0.1) and the given VGG-16 weights; frozen, fp32.

    Raises UsageError if the weights lack a layer.
    """
    net = lpips_net()
    # lpips cuts torchvision's `features` into slices and keeps their numbers: slice2.5.weight is features.5.weight.
    wanted = {key: "features." + key.split(".", 1)[1] for key in net.net.state_dict()}
    missing = [name for name in wanted.values() if name not in features]
    if missing:
        raise UsageError(f"`lpips_weights`: that file lacks {len(missing)} of VGG-16's layers, the first is {missing[0]}")
    net.net.load_state_dict({key: features[name].float() for key, name in wanted.items()})
    return net.eval().requires_grad_(False)
