"""The judge: the network through whose eyes the closing tables of the embedded checkpoint see pictures.

No loss looks through it. Losses use `FeatureNet`, which is of another architecture and seed, so that a student cannot learn to
please the network that judges it. Its figures compare runs of the embedded checkpoint with each other only.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints.family import SHIPPED

WEIGHTS = SHIPPED.home / "judge" / "model.safetensors"
SIDE_PX = 64


class Block(nn.Module):
    """A ConvNeXt block (Liu 2022): a depthwise 7 x 7 convolution, then two products per position, beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.space = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.narrow = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(self.space(x)))))


class JudgeNet(nn.Module):
    """Turns pixels (B, 3, 64, 64) in [-1, 1] into one embedding (B, 64)."""

    widths, depths, dim = (40, 80, 160), (1, 2, 2), 64

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = 3
        for width, depth in zip(self.widths, self.depths, strict=True):
            patch = 4 if before == 3 else 2
            stages += [nn.Conv2d(before, width, patch, stride=patch), nn.GroupNorm(1, width)]
            stages += [Block(width) for _ in range(depth)]
            before = width
        self.body, self.head = nn.Sequential(*stages), nn.Linear(before * 4, self.dim)

    @classmethod
    def embedded(cls) -> "JudgeNet":
        """Load the network with the shipped weights, frozen."""
        from safetensors.torch import load_file

        net = cls()
        net.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
        return net.eval().requires_grad_(False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the embedding (B, 64) of pixels (B, 3, H, W) in [-1, 1]. Pixels of another size are resized to 64 px."""
        if pixels.shape[-2:] != (SIDE_PX, SIDE_PX):
            pixels = F.interpolate(pixels, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True, align_corners=False)
        return self.head(F.adaptive_avg_pool2d(self.body(pixels), 2).flatten(1))
