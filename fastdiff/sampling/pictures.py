"""Finished pictures: bytes, PIL pictures with metadata, and lists that can be saved; and reading of control pictures."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime import picture_file, text_file
from fastdiff.runtime.errors import InputRefused, UsageError, as_field
from fastdiff.runtime.secrets import hidden_in
from fastdiff.sampling import engine
from fastdiff.sampling.sheet import Sheet

ONE_ROW = 6  # the most pictures of one prompt that lie in one row of a sheet


def uint8(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to uint8 in 0..255, rounded like diffusers."""
    return engine.to_bytes(pixels)


def portrait(pixels: Tensor, facts: dict[str, Any]) -> Any:
    """Make a PIL picture of pixels (H, W, 3), uint8. Its info keeps `facts`: the prompt, and all else needed to draw it again.

    Access tokens in them are left out, for pictures are passed on.
    """
    from PIL import Image

    image, facts = Image.fromarray(pixels.numpy()), hidden_in(facts)
    image.info |= {"prompt": facts["prompt"], "fastdiff": json.dumps(facts)}
    return image


def write_picture(image: Any, path: Path) -> Path:
    """Write a picture to a file and return the path. A PNG also stores the facts about the picture."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key in ("prompt", "fastdiff"):
        if key in image.info:
            info.add_text(key, image.info[key])
    image.save(path, pnginfo=info)
    return path


class Pictures(Sequence):
    """A list of PIL pictures with file names that can be saved; `columns` is the width of its sheet in pictures."""

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
        """Return all pictures side by side as one PIL picture, with their prompts and seeds as labels."""
        return sheet_of(self.images, self.columns).image()

    def save(self, path: str | Path) -> list[Path]:
        """Save to a file (one picture, or a sheet of several) or to a folder (a file each). Returns the written paths.

        A sheet shows large pictures reduced; the same sheet in full size is then written beside it, as NAME-full.
        Raises UsageError if there are no pictures.
        """
        path = Path(path).expanduser()
        if not self.images:
            raise UsageError("there are no pictures to save")
        if not path.suffix or path.is_dir():
            path.mkdir(parents=True, exist_ok=True)
            return [write_picture(image, path / name) for image, name in zip(self.images, self.names, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        if len(self.images) == 1:
            return [write_picture(self.images[0], path)]
        return sheet_of(self.images, self.columns).save(path)


def sheet_of(images: Sequence[Any], columns: int) -> Sheet:
    """Make a sheet of PIL pictures, row by row: a row for each prompt and a column for each seed.

    With one column, or one prompt in many seeds, the sheet is almost square, and the label is below each picture.
    """
    prompts = [image.info.get("prompt", "") for image in images]
    facts = [json.loads(image.info.get("fastdiff", "{}")) for image in images]
    seeds = [f"seed {fact['seed']}" if "seed" in fact else "" for fact in facts]
    if 1 < columns < len(images) or 1 < columns <= ONE_ROW:
        return Sheet(images, seeds[:columns], prompts[::columns])
    square = [""] * math.ceil(len(images) ** 0.5)
    if len(set(prompts)) == 1:
        return Sheet(images, square, prompts[:1], captions=seeds)
    return Sheet(images, square, captions=prompts)


GROUND = "black"  # the ground of control pictures: no edge, no pose, far away


def control_file(path: str | Path) -> Path:
    """Return the path of a control picture, with ~ as the user's own folder. Raises UsageError if it is no file."""
    found = Path(path).expanduser()
    if found.is_dir():
        raise UsageError(f"{as_field('control_image', path)}: is a folder, not a picture", "give one picture of it")
    if not found.exists():
        raise UsageError(f"{as_field('control_image', path)}: no such file")
    return found


def control_of(image: Any, side_px: int) -> Tensor:
    """Make a control picture (3, S, S) in [0, 1], S = `side_px`, from a path, a PIL picture or pixels (1 or 3, S, S) in [0, 1].

    Files and PIL pictures are composed on black where they are transparent, and resized and cropped to the square at their
    centre. Raises UsageError if the file does not exist or pixels have another size, and InputRefused if the file is not a
    readable picture, or nothing of it is left on black.
    """
    import numpy as np
    from PIL import Image

    if isinstance(image, Tensor):
        if image.shape[1:] != (side_px, side_px) or image.shape[0] not in (1, 3):
            raise UsageError(f"`control_image`: the pixels have shape {tuple(image.shape)}, not (3, {side_px}, {side_px})")
        return image.float().expand(3, -1, -1)
    name = "the control picture" if isinstance(image, Image.Image) else str(image)
    try:
        if isinstance(image, Image.Image):
            image, kinds = picture_file.to_rgb(image, GROUND)
        else:
            image, kinds = picture_file.decode(control_file(image).read_bytes(), GROUND)
    except OSError as error:
        raise InputRefused(f"{name}: cannot be read ({error.strerror or error})") from error
    except picture_file.Refused as error:
        raise InputRefused(f"{name}: {error}") from error
    if picture_file.transparent(GROUND) in kinds and all(low == high for low, high in image.getextrema()):
        what = f"transparent, and one colour alone when it is composed on {GROUND}"
        raise InputRefused(f"{name}: {what}", f"draw the control in white or colours, on {GROUND}")
    text_file.tell(name, [*kinds, *([picture_file.ENLARGED] if min(image.size) < side_px else [])])
    scale = side_px / min(image.size)
    width, height = (max(side_px, round(side * scale)) for side in image.size)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    cut = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side_px, top + side_px))
    pixels = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 127.5 - 1
    return pixels / 2 + 0.5  # two steps, to round exactly like the command line does
