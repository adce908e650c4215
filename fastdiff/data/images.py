"""One picture of a data set: read, cut to size, and told where it cannot be."""

import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNLISTED = (1344, 704)  # though its mirror image is
CAPTIONS = ("text", "caption", "prompt")  # keys of a caption, in .json, metadata.jsonl and data sets' columns


class Refused(Exception):  # noqa: N818  (it is the sample that is refused; the run goes on)
    """A sample that cannot be used; the message is why."""


@dataclass(frozen=True)
class Sample:
    """A picture and its caption, where a source has them."""

    name: str  # what a message calls it
    caption: str | None = None
    read: Callable[[], bytes] = bytes
    problem: str = ""  # why there is nothing to read

    @cached_property
    def data(self) -> bytes:
        return self.read()

    def forget(self) -> "Sample":
        """The same, its bytes unread."""
        return Sample(self.name, self.caption, self.read, self.problem)


def caption_in(table: Any) -> str | None:
    """The caption of a JSON object or a row of a data set; of several, the first. None where there is none, or a blank one."""
    caption = next((table[key] for key in CAPTIONS if table.get(key)), None) if isinstance(table, dict) else None
    caption = caption[0] if isinstance(caption, list) and caption else caption
    return caption.strip() or None if isinstance(caption, str) else None


def caption_of_json(text: str | bytes) -> str | None:
    try:
        return caption_in(json.loads(text))
    except ValueError:
        return None


def decode(data: bytes) -> Any:
    """Bytes of an image file -> an upright PIL picture in RGB. Refused where they are none, or not all of one."""
    from PIL import Image, ImageOps

    if not data:
        raise Refused("0 bytes")
    try:
        with Image.open(io.BytesIO(data)) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except Exception as error:  # a decoder may raise anything over a damaged file
        reason = str(error).partition(" <_io")[0].removesuffix(" file")
        raise Refused(f"not a readable image ({reason})") from error


def sizes_near(resolution_px: int, least_px: int) -> list[tuple[int, int]]:
    """Heights and widths of about resolution^2 pixels, SDXL's list (Podell 2023, appendix I) at any resolution.

    Sides are multiples of 64 px (an eighth of small resolutions, but of `least_px`) from half to twice the resolution, with
    between 90 and 100 % of a square's pixels. Of what that gives at 1024 px, the list leaves out one.
    """
    step = max(least_px, min(64, resolution_px // 8 // least_px * least_px))
    sides = range(-(-resolution_px // 2 // step) * step, 2 * resolution_px + 1, step)
    return [(h, w) for h in sides for w in sides if 0.9 < h * w / resolution_px**2 <= 1 and (h, w) != UNLISTED]


@dataclass(frozen=True)
class Framing:
    """What is cut out of a picture. A picture gives one item for each crop and, with `flip`, for its mirror image."""

    resolution_px: int
    buckets: bool = False
    random_crops: int = 0  # 0: one at the centre
    flip: bool = False
    least_px: int = 8  # sides are multiples of it: the VAE's pixels per latent

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        square = self.resolution_px, self.resolution_px
        return sizes_near(self.resolution_px, self.least_px) if self.buckets else [square]

    @property
    def cuts(self) -> list[tuple[int | None, bool]]:
        """(number of the random crop, mirrored) of each item of a picture."""
        crops = range(self.random_crops) if self.random_crops else [None]
        return [(crop, mirrored) for crop in crops for mirrored in ((False, True) if self.flip else (False,))]

    def keys(self, digest: str) -> list[str]:
        """What identifies the items of a picture with that hash: everything that their pixels depend on."""
        rule = (self.resolution_px, self.buckets, self.least_px)
        return [hash_of(digest, *rule, "centre" if crop is None else crop, mirrored) for crop, mirrored in self.cuts]

    def cut(self, image: Any, digest: str) -> list[tuple[Tensor, list[int]]]:
        """A PIL picture -> pixels (3, H, W) uint8 and SDXL's six numbers of each item.

        These are: original height and width, the crop's top and left in the resized picture as it is shown (a mirrored one is
        measured from its own left), height and width of the crop.
        """
        import numpy as np
        from PIL import Image

        ratio = math.log(image.height / image.width)
        h, w = min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - ratio))
        scale = max(h / image.height, w / image.width)
        height, width = max(h, round(image.height * scale)), max(w, round(image.width * scale))
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        items = []
        for crop, mirrored in self.cuts:
            top, left = (height - h) // 2, (width - w) // 2
            if crop is not None:
                place = random.Random(f"{digest} {crop}")  # the same crop in every run
                top, left = place.randint(0, height - h), place.randint(0, width - w)
            pixels = torch.from_numpy(np.array(resized.crop((left, top, left + w, top + h)))).permute(2, 0, 1)
            if mirrored:
                pixels, left = pixels.flip(-1), width - w - left
            items.append((pixels.contiguous(), [image.height, image.width, top, left, h, w]))
        return items


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def reasons(refused: Iterable[tuple[str, str]]) -> str:
    """How many of each kind: '2 without a caption, 1 not a readable image'."""
    counts: dict[str, int] = {}
    for _, why in refused:
        kind = why.partition(" (")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda row: -row[1]))
