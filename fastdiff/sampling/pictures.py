"""Pictures for people: bytes and contact sheets."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdiff.sampling import engine


def uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded as diffusers rounds."""
    return engine.to_bytes(pixels)


def contact_sheet(columns: Sequence[Tensor], *, scale: int = 1, gap_px: int = 4) -> Any:
    """Equal-length stacks of images (N, 3, H, W) in [-1, 1] -> one PIL picture: a row each image, a column each stack."""
    from PIL import Image

    n, _, height, width = columns[0].shape
    height, width = height * scale, width * scale
    sheet = Image.new("RGB", (len(columns) * (width + gap_px) - gap_px, n * (height + gap_px) - gap_px), "white")
    for x, column in enumerate(columns):
        for y, image in enumerate(uint8(column)):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            sheet.paste(tile.resize((width, height), Image.Resampling.LANCZOS), (x * (width + gap_px), y * (height + gap_px)))
    return sheet
