"""GAN head on a UNet's bottleneck (Yin 2024, DMD2): is the latent behind these features a real one?"""

import math

from torch import Tensor, nn


class Head(nn.Module):
    """Features (B, D, h, w) -> logits (B, N), N = 1 at the size that it was built for, more on larger maps.

    Strided convolutions down to 4 x 4, one over the rest, then one logit; on SD1.5's 8 x 8 and SDXL's 32 x 32 features these
    are the published heads. Maps narrower than four are taken whole.
    """

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        groups = math.gcd(32, width)
        halvings = max(0, math.ceil(math.log2(side / 4)))
        last = min(4, side)
        layers: list[nn.Module] = []
        for kernel, stride, padding in [(4, 2, 1)] * halvings + [(last, last, 0)]:
            layers += [nn.Conv2d(width, width, kernel, stride, padding), nn.GroupNorm(groups, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 1))

    @classmethod
    def on(cls, net: nn.Module, width: int, latent_side: int) -> "Head":
        """A head for the bottleneck of a UNet that is given latents of that side."""
        halvings = sum(block.downsamplers is not None for block in net.down_blocks)
        return cls(width, max(1, latent_side >> halvings)).to(net.device)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.float()).flatten(1)
