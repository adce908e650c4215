"""Discriminators: networks that tell real latents (by a UNet's features) or real patches of pictures from generated ones."""

import math

import torch
from torch import Tensor, nn

from fastdiff.models.denoiser import Cond, Denoiser


class Head(nn.Module):
    """A classification head on the features of another network (Yin 2024, DMD2): features (B, D, h, w) -> logits (B, N).

    Strided convolutions reduce the map to 4 x 4, one more covers the rest, and a last one gives the logit. Maps smaller than
    4 x 4 are covered at once. N is 1 for maps of `side` x `side`, more for larger ones. For SD1.5's 8 x 8 and SDXL's 32 x 32
    features these are the published heads, unless `hidden` asks for another number of channels after the first convolution.
    """

    def __init__(self, width: int, side: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or width
        groups = math.gcd(32, hidden)
        halvings = max(0, math.ceil(math.log2(side / 4)))
        last = min(4, side >> halvings)  # 3 for the 12 x 12 features of SD2.1 at 768 px
        layers: list[nn.Module] = []
        for kernel, stride, padding in [(4, 2, 1)] * halvings + [(last, last, 0)]:
            layers += [nn.Conv2d(width, hidden, kernel, stride, padding), nn.GroupNorm(groups, hidden), nn.SiLU()]
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    @classmethod
    def on(cls, net: nn.Module, width: int, latent_side: int, hidden: int | None = None) -> "Head":
        """Build a head for the bottleneck of a UNet whose latents are `latent_side` positions wide."""
        halvings = sum(block.downsamplers is not None for block in net.down_blocks)
        return cls(width, max(1, latent_side >> halvings), hidden).to(net.device)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.float()).flatten(1)


class Discriminator(nn.Module):
    """SDXL-Lightning's discriminator (Lin 2024, section 3.3): D(x_s, x_t, s, t, c), or D'(x_s, s, c) if not `paired`.

    A UNet's encoder and mid block see each latent at its own timestep. The features of both latents, side by side, go through
    4 x 4 convolutions with stride 2, group norm and SiLU down to four positions a side. The logit is the mean of a projection
    of what is left, so any picture size works. Returns logits (B, number of heads).
    [Ours: the width and the mean; `every` puts a head on each down block too, for networks whose bottleneck is too narrow for
    detail.]
    """

    def __init__(self, watched: Denoiser, latent_side: int, *, paired: bool, every: bool = False, hidden: int = 512) -> None:
        super().__init__()
        net, self.watched, self.paired, self.every = watched.net, watched, paired, every
        sides, side = [], latent_side
        for block in net.down_blocks:
            sides.append(side)
            side //= 2 if block.downsamplers else 1
        widths = list(net.config.block_out_channels)
        if net.mid_block is not None:
            widths, sides = [*widths, widths[-1]], [*sides, side]
        maps = list(zip(widths, sides, strict=True))[None if every else -1 :]
        self.heads = nn.ModuleList(self.head(width * (2 if paired else 1), side, hidden) for width, side in maps).to(net.device)

    @staticmethod
    def head(width: int, side: int, hidden: int) -> nn.Sequential:
        """Build the head for feature maps of `width` channels and `side` x `side` positions."""
        layers: list[nn.Module] = []
        for _ in range(max(0, math.ceil(math.log2(max(1, side) / 4)))):
            layers += [nn.Conv2d(width, hidden, 4, 2, 1), nn.GroupNorm(math.gcd(32, hidden), hidden), nn.SiLU()]
            width = hidden
        if not layers:  # a small map needs no convolution with stride, but still a nonlinear layer
            layers = [nn.Conv2d(width, hidden, 1), nn.SiLU()]
        return nn.Sequential(*layers, nn.Conv2d(hidden, 1, 1))

    def forward(self, x_s: Tensor, s: Tensor, cond: Cond, x_t: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """Return logits (B, number of heads) of latents x_s and x_t (B, C, h, w) at timesteps s and t (B,); s = -1 is clean."""
        xs, at = [x_s], [s.clamp(min=0)]  # the network sees a clean latent at the lowest timestep
        if self.paired:
            xs, at = [x_s, x_t], [*at, t]
        maps = self.watched.encoded(torch.cat(xs), torch.cat(at), Cond.cat([cond] * len(xs)))
        maps = maps if self.every else maps[-1:]
        beside = [torch.cat(features.float().chunk(len(xs)), 1) for features in maps]
        return torch.stack([head(features).mean((1, 2, 3)) for head, features in zip(self.heads, beside, strict=True)], 1)


class PatchDiscriminator(nn.Module):
    """A patch discriminator (Isola 2017): pixels (B, 3, H, W) in [-1, 1] -> logits (B, 1, H / 8, W / 8), one a patch.

    With `latent_channels` it also sees the latents (B, C, h, w) that the picture was decoded from, resized to the picture.
    It can then reject a realistic picture that does not belong to its latents (TAESD).
    """

    def __init__(self, width: int = 64, latent_channels: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3 + latent_channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(2):
            wide = width * 2**i
            layers += [nn.Conv2d(wide, 2 * wide, 4, 2, 1), nn.GroupNorm(8, 2 * wide), nn.LeakyReLU(0.2)]
        self.conditional = latent_channels > 0
        self.layers = nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 3, 1, 1))

    def forward(self, pixels: Tensor, latents: Tensor) -> Tensor:
        if self.conditional:
            pixels = torch.cat([pixels, nn.functional.interpolate(latents, size=pixels.shape[-2:])], 1)
        return self.layers(pixels)
