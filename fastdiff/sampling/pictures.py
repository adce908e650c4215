"""Pictures for people: bytes, PIL pictures with their facts, lists of them, contact sheets; and control pictures in."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.errors import InputRefused, UsageError, as_field
from fastdiff.sampling import engine


def uint8(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded as diffusers rounds."""
    return engine.to_bytes(pixels)


def portrait(pixels: Tensor, facts: dict[str, Any]) -> Any:
    """pixels (H, W, 3), uint8 -> a PIL picture; `facts`, with its prompt, is all that is needed to draw it again."""
    from PIL import Image

    image = Image.fromarray(pixels.numpy())
    image.info |= {"prompt": facts["prompt"], "fastdiff": json.dumps(facts)}
    return image


def write_picture(image: Any, path: Path) -> Path:
    """A file of the picture; a PNG keeps its facts."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key in ("prompt", "fastdiff"):
        if key in image.info:
            info.add_text(key, image.info[key])
    image.save(path, pnginfo=info)
    return path


class Pictures(Sequence):
    """A list of PIL pictures that can be saved; `columns` of its sheet are the seeds where there are several."""

    def __init__(self, images: Iterable[Any], *, names: Sequence[str] | None = None, columns: int = 1) -> None:
        self.images = list(images)
        self.names = list(names or (f"{i:04d}.png" for i in range(len(self.images))))
        self.columns = columns
        assert len(self.names) == len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.images[index], names=self.names[index])
        return self.images[index]

    def sheet(self) -> Any:
        """All pictures side by side as one."""
        return tiled(self.images, self.columns)

    def save(self, path: str | Path) -> list[Path]:
        """To NAME.png one picture, or the sheet of several; to a folder one file each. Returns what was written."""
        path = Path(path).expanduser()
        if not self.images:
            raise UsageError("there are no pictures to save")
        if not path.suffix or path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            return [write_picture(image, path / name) for image, name in zip(self.images, self.names, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(self.images) == 1:
            return [write_picture(self.images[0], path)]
        self.sheet().save(path)
        return [path]


def tiled(images: Sequence[Any], columns: int, *, gap_px: int = 4) -> Any:
    """PIL pictures of one size as one, row by row; with one column as a square."""
    from PIL import Image

    columns = columns if columns > 1 else math.ceil(len(images) ** 0.5)
    width, height = (side + gap_px for side in images[0].size)
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width - gap_px, rows * height - gap_px), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


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


def control_of(image: Any, side_px: int) -> Tensor:
    """What a ControlNet is shown, (3, S, S) in [0, 1]: the square at the centre of a path's or PIL picture, or pixels as given.

    InputRefused where a file is no picture, UsageError where pixels are of another size.
    """
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(image, Tensor):
        if image.shape[1:] != (side_px, side_px) or image.shape[0] not in (1, 3):
            raise UsageError(f"`control_image`: pixels of shape {tuple(image.shape)}, not (3, {side_px}, {side_px})")
        return image.float().expand(3, -1, -1)
    if not isinstance(image, Image.Image):
        try:
            with Image.open(Path(image).expanduser()) as file:
                image = ImageOps.exif_transpose(file)
        except FileNotFoundError as error:
            raise UsageError(f"{as_field('control_image', image)}: no such file") from error
        except Exception as error:  # a decoder may raise anything over a damaged file
            raise InputRefused(f"{image}: not a readable image") from error
    scale = side_px / min(image.size)
    width, height = (max(side_px, round(side * scale)) for side in image.size)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    cut = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side_px, top + side_px))
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 127.5 - 1
    return pixels / 2 + 0.5  # in two steps, which rounds as the pictures of the command line do
