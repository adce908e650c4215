"""The embedded data set: emoji pictures on plain backgrounds, with their Unicode names as captions.

Each image shows one picture on one background. A caption without background ("red apple"), or with only the group ("fruit on
blue"), fits several images. So a model must learn to sample; it cannot memorise one image per caption.

The teacher was trained on all of it. `held_out.py` tells what no student may be trained on.
"""

import json
import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data.batch import Encoded
from fastdiff.models import autoencoder, text

PICTURES = SHIPPED.home / "pictures"
STYLES = ("noto", "fluent", "twemoji")
CELL_PX = 64

# The colours are far apart in RGB, so that the colour nearest to the corners tells the background.
BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "red": (220, 50, 47),
    "orange": (245, 150, 40),
    "yellow": (250, 225, 80),
    "green": (60, 170, 80),
    "blue": (50, 100, 220),
    "purple": (140, 70, 180),
    "pink": (250, 170, 200),
}


@dataclass(frozen=True)
class Picture:
    """One emoji: its name, such as "red apple", and its group, such as "fruit"."""

    name: str
    group: str


@cache
def pictures() -> tuple[Picture, ...]:
    """Return all pictures, in the order of the cells of the sheets."""
    rows = json.loads((PICTURES / "captions.json").read_text(encoding="utf-8"))
    return tuple(Picture(row["name"], row["group"]) for row in rows)


@cache
def sprites(style: str = "noto") -> Tensor:
    """Return all pictures of a drawing style as RGBA (N, 4, 64, 64) in [0, 1]. Raises ValueError for an unknown style."""
    import numpy as np
    from PIL import Image

    if style not in STYLES:
        raise ValueError(f"unknown emoji style {style!r}: use one of {', '.join(STYLES)}")
    image = Image.open(PICTURES / f"{style}.png").convert("RGBA")
    sheet = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    cells = sheet.unfold(1, CELL_PX, CELL_PX).unfold(2, CELL_PX, CELL_PX)  # (4, rows, columns, 64, 64)
    return cells.permute(1, 2, 0, 3, 4).flatten(0, 1)[: len(pictures())] / 255


def compose(picture: Tensor, background: Tensor, style: str = "noto") -> Tensor:
    """Draw pictures on backgrounds, given by indices (B,) and (B,), as pixels (B, 3, 64, 64) in [-1, 1]."""
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    rgba = sprites(style)[picture]
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + colours[background][:, :, None, None] * (1 - alpha)) * 2 - 1


def all_images() -> tuple[Tensor, Tensor]:
    """Return every picture on every background: picture numbers (N,) and backgrounds (N,)."""
    every = torch.arange(len(pictures()) * len(BACKGROUNDS))
    return every // len(BACKGROUNDS), every % len(BACKGROUNDS)


def caption(picture: int, background: int | None, coarse: bool = False) -> str:
    """Return a caption: "red apple on blue" or, without background, "red apple"; if `coarse`, "fruit on blue" or "fruit"."""
    subject = pictures()[picture].group if coarse else pictures()[picture].name
    return subject if background is None else f"{subject} on {list(BACKGROUNDS)[background]}"


def plain(line: str) -> str:
    """A prompt as the captions are written: without an article, in lower case."""
    return re.sub(r"^an? ", "", line.strip().lower())


COLOUR, BACKDROP = "|".join(BACKGROUNDS), r"\s+back(?:ground|drop)"
ON_A_BACKGROUND = re.compile(
    rf"(.+?)(?:(?:\W+on\s+(?:an?\s+|the\s+)?|\s*[,;(]\s*)({COLOUR})(?:{BACKDROP})?|\W+({COLOUR}){BACKDROP})\W*"
)


def subject_and_background(line: str) -> tuple[str, int | None]:
    """Split a prompt into its subject and the index of the background that it names ("meat on bone" names none).

    "red apple on blue", "a red apple on a blue background" and "Red apple (blue)." are read alike.
    """
    line = plain(line)
    if match := ON_A_BACKGROUND.fullmatch(line):
        subject, *colours = match.groups()
        return subject, list(BACKGROUNDS).index(next(filter(None, colours)))
    return line, None


@cache
def known_names() -> frozenset[str]:
    """Return the names and groups of all pictures."""
    return frozenset(name for picture in pictures() for name in (picture.name, picture.group))


def captions_of(picture: int, background: int) -> list[str]:
    """Return the four captions of an image: its name on the background, its name, its group on the background, its group."""
    return [caption(picture, b, coarse) for coarse in (False, True) for b in (background, None)]


CAPTION_WEIGHTS = (0.42, 0.18, 0.28, 0.12)  # name on background, name, group on background, group


def encode(
    base: Checkpoint, picture: Tensor, background: Tensor, *, device: torch.device | str = "cpu", style: str = "noto"
) -> Encoded:
    """Encode images, given by picture numbers (N,) and backgrounds (N,), by the checkpoint's VAE and text encoder."""
    columns = [captions_of(p, b) for p, b in zip(picture.tolist(), background.tolist(), strict=True)]
    rows = {prompt: i for i, prompt in enumerate(dict.fromkeys(c for row in columns for c in row))}
    return Encoded(
        moments=autoencoder.encode_moments(base.vae.to(device), compose(picture, background, style)).cpu(),
        texts=text.encode(base, list(rows), device=device),
        captions=torch.tensor([[rows[c] for c in row] for row in columns]),
        weights=torch.tensor(CAPTION_WEIGHTS),
        uncond=text.unconditional(base, device=device),
        names=[column[0] for column in columns],
    )


def background_of(pixels: Tensor) -> Tensor:
    """Return the index (B,) of the background nearest to the median colour of the 4 x 4 px corners of images (B, 3, H, W)."""
    corners = torch.cat(
        [pixels[..., y, x].flatten(2) for y in (slice(4), slice(-4, None)) for x in (slice(4), slice(-4, None))], 2
    )
    colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
    return torch.cdist(corners.median(2).values, colours).argmin(1)
