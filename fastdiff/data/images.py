"""The pictures of a data set: reading, cropping to size, and reasons why one cannot be used."""

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
UNLISTED = (1344, 704)  # (height, width) missing in SDXL's list, although (704, 1344) is in it
CAPTIONS = ("text", "caption", "prompt")  # keys of a caption in .json files, metadata.jsonl and columns of data sets


class Refused(Exception):  # noqa: N818  (it is the sample that is refused; the run goes on)
    """A sample cannot be used; the message says why."""


@dataclass(frozen=True)
class Sample:
    """A picture and its caption from a source, or the problem with them."""

    name: str  # for messages
    caption: str | None = None
    read: Callable[[], bytes] = bytes
    problem: str = ""  # why the sample cannot be used; empty if it can

    @cached_property
    def data(self) -> bytes:
        """The bytes of the image file, read once."""
        return self.read()

    def forget(self) -> "Sample":
        """Return the same sample without the bytes that were read."""
        return Sample(self.name, self.caption, self.read, self.problem)


def caption_in(table: Any) -> str | None:
    """Return the caption of a JSON object or data set row, or None. Of several the first; a blank caption counts as none."""
    caption = next((table[key] for key in CAPTIONS if table.get(key)), None) if isinstance(table, dict) else None
    caption = caption[0] if isinstance(caption, list) and caption else caption
    return caption.strip() or None if isinstance(caption, str) else None


def caption_of_json(text: str | bytes) -> str | None:
    """Return the caption in a JSON text, or None if it is invalid or has no caption."""
    try:
        return caption_in(json.loads(text))
    except ValueError:
        return None


def decode(data: bytes) -> Any:
    """Decode an image file to an upright PIL picture in RGB. Raises Refused if it is not a readable, complete image."""
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
    """List (height, width) pairs of about resolution^2 pixels: SDXL's list (Podell 2023, appendix I) at any resolution.

    Sides are multiples of 64 px, or of an eighth of a small resolution, rounded down to a multiple of `least_px`. They lie
    between half and twice the resolution, with 90 to 100 % of a square's pixels. SDXL's list leaves out one pair, UNLISTED.
    """
    step = max(least_px, min(64, resolution_px // 8 // least_px * least_px))
    sides = range(-(-resolution_px // 2 // step) * step, 2 * resolution_px + 1, step)
    return [(h, w) for h in sides for w in sides if 0.9 < h * w / resolution_px**2 <= 1 and (h, w) != UNLISTED]


@dataclass(frozen=True)
class Framing:
    """How pictures are cropped. A picture gives one item for each crop and, with `flip`, another for its mirror image."""

    resolution_px: int  # side of a square of the same area
    buckets: bool = False  # crop to the nearest size of `sizes_near`, not to a square
    random_crops: int = 0  # crops per picture; 0: one at the centre
    flip: bool = False
    least_px: int = 8  # sides of crops are multiples of this: the VAE's pixels per latent

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """All (height, width) that a crop may have, in px."""
        square = self.resolution_px, self.resolution_px
        return sizes_near(self.resolution_px, self.least_px) if self.buckets else [square]

    @property
    def cuts(self) -> list[tuple[int | None, bool]]:
        """(number of the random crop or None, mirrored) for each item of a picture."""
        crops = range(self.random_crops) if self.random_crops else [None]
        return [(crop, mirrored) for crop in crops for mirrored in ((False, True) if self.flip else (False,))]

    def keys(self, digest: str) -> list[str]:
        """Return the cache keys of a picture's items: hashes of its bytes' hash and of everything that their pixels depend on."""
        rule = (self.resolution_px, self.buckets, self.least_px)
        return [hash_of(digest, *rule, "centre" if crop is None else crop, mirrored) for crop, mirrored in self.cuts]

    def cut(self, image: Any, digest: str) -> list[tuple[Tensor, list[int]]]:
        """Cut a PIL picture into items: pixels (3, H, W) uint8 and SDXL's six sizes in px of each.

        The sizes are: original height and width; top and left of the crop in the resized picture (mirrored, if the item is);
        height and width of the crop. `digest`, the hash of the picture, seeds the random crops.
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
    """Return a hash of 32 hexadecimal digits of the parts' repr."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def reasons(refused: Iterable[tuple[str, str]]) -> str:
    """Count the reasons of refused samples: '2 without a caption, 1 not a readable image'."""
    counts: dict[str, int] = {}
    for _, why in refused:
        kind = why.partition(" (")[0]
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items(), key=lambda row: -row[1]))
