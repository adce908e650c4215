"""The embedded feature network: a small CNN trained on the emoji pictures, for metrics and feature losses without downloads.

It replaces the Inception, CLIP and LPIPS networks, which must be downloaded. Its figures compare runs of the embedded
checkpoint with each other; they cannot be compared with published figures.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints.family import SHIPPED

WEIGHTS = SHIPPED.home / "features" / "model.safetensors"


class FeatureNet(nn.Module):
    """Turns pixels (B, 3, 64, 64) in [-1, 1] into feature maps at 32, 16, 8 and 4 px and one embedding (B, 128)."""

    widths = (24, 48, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        ins = (3, *self.widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                nn.GroupNorm(8, c_out),
                nn.SiLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1),
                nn.GroupNorm(8, c_out),
                nn.SiLU(),
            )
            for c_in, c_out in zip(ins, self.widths, strict=True)
        )
        self.head = nn.Linear(self.widths[-1] * 16, 128)

    @classmethod
    def embedded(cls) -> "FeatureNet":
        """Load the network with the shipped weights, frozen."""
        from safetensors.torch import load_file

        net = cls()
        net.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        return net.eval().requires_grad_(False)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """Return the four feature maps of pixels (B, 3, H, W), finest first. Pixels of another size are resized to 64 px."""
        if pixels.shape[-2:] != (64, 64):
            pixels = F.interpolate(pixels, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        maps = []
        for stage in self.stages:
            pixels = stage(pixels)
            maps.append(pixels)
        return maps

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding (B, 128) of pixels (B, 3, H, W) in [-1, 1]."""
        return self.head(self.maps(pixels)[-1].flatten(1))

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance (B,) of pixels a and b (B, 3, H, W), by the LPIPS formula with unit weights (Zhang 2018, eq. 1)."""
        pairs = zip(self.maps(a), self.maps(b), strict=True)
        unit = lambda m: m / m.square().sum(1, keepdim=True).add(1e-8).sqrt()  # noqa: E731
        return torch.stack([(unit(x) - unit(y)).square().sum(1).mean((1, 2)) for x, y in pairs]).sum(0)
