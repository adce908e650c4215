"""The pictures of a data set: captions, cropping to size, and reasons why one cannot be used."""

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime import text_file
from fastdiff.runtime.counts import Kind
from fastdiff.runtime.picture_file import RULES, WHITE

UNLISTED = (1344, 704)  # (height, width) missing in SDXL's list, although (704, 1344) is in it
CAPTIONS = ("text", "caption", "prompt")  # keys of a caption in .json files, tables and columns of data sets

NOTHING: tuple[Any, ...] = (None, "", b"", [], {})  # values of a caption that is not there

DIFFER = Kind("caption", "several columns differ ({}), the first of them is used (`caption_column`)")
LIST = Kind("caption", "a list, its first entry is used")
LINES = Kind("caption", "of several lines, used whole (sd-scripts takes the first line alone)", warns=False)
BAD_JSON = Kind("caption", "a .json file that is no valid JSON or has no caption in it")


@dataclass(frozen=True)
class Sample:
    """A picture and its caption from a source, or the problem with them."""

    name: str  # for messages
    caption: str | None = None
    read: Callable[[], bytes] = bytes
    problem: str = ""  # why the sample cannot be used; empty if it can
    kinds: tuple[Kind, ...] = ()  # what was guessed or changed in the caption
    passing: bool = False  # the problem may be gone in the next run, as a cut connection is

    @cached_property
    def data(self) -> bytes:
        """The bytes of the image file, read once."""
        return self.read()

    def forget(self) -> "Sample":
        """Return the same sample without the bytes that were read."""
        return Sample(self.name, self.caption, self.read, self.problem, self.kinds)


@dataclass
class Caption:
    """A caption from one source, or None if it has none, with what was guessed or changed, or why it cannot be used."""

    text: str | None = None
    kinds: tuple[Kind, ...] = ()
    problem: str = ""

    @classmethod
    def of_text(cls, text: str, kinds: Iterable[Kind] = ()) -> "Caption":
        """Make a caption of text, on one line and without what is no character."""
        lines = [LINES] if "\n" in text.strip() else []
        words, changed = text_file.clean(text)
        return cls(words or None, tuple(as_captions([*kinds, *lines, *changed])))

    @classmethod
    def of_row(cls, row: Any, column: str | None = None) -> "Caption":
        """Take the caption of a JSON object or data set row: of the key `column`, else of the first of CAPTIONS that has one."""
        if not isinstance(row, dict):
            return cls()
        given = [key for key in ([column] if column else CAPTIONS) if row.get(key) not in NOTHING]
        keys = [key for key in given if not no_text(row[key])]
        if given and not keys:
            return cls(problem=f"a caption that is {no_text(row[given[0]])}, not text")
        kinds = [DIFFER._replace(what=DIFFER.what.format(", ".join(keys)))] if len({str(row[key]) for key in keys}) > 1 else []
        value = row[keys[0]] if keys else None
        if isinstance(value, list) and value:
            kinds += [LIST] if len(value) > 1 else []
            value = value[0]
        if isinstance(value, bytes):
            return cls.of_bytes(value, kinds)
        return cls.of_text(value, kinds) if isinstance(value, str) else cls()

    @classmethod
    def of_bytes(cls, data: bytes, kinds: Iterable[Kind] = ()) -> "Caption":
        """Take the caption of the bytes of a text file."""
        try:
            text, guessed = text_file.decode(data)
        except text_file.NotText as error:
            return cls(problem=f"a caption that is no text ({error}; save it as UTF-8)")
        return cls.of_text(text, [*kinds, *guessed])

    @classmethod
    def of_json(cls, data: bytes, column: str | None = None) -> "Caption":
        """Take the caption of the bytes of a .json file."""
        try:
            text, guessed = text_file.decode(data)
            caption = cls.of_row(json.loads(text), column)
        except text_file.NotText as error:
            return cls(problem=f"a caption that is no text ({error}; save it as UTF-8)")
        except (ValueError, RecursionError):
            return cls(kinds=(BAD_JSON,))
        if caption.problem:
            return caption
        kinds = tuple(as_captions(guessed)) + (caption.kinds if caption.text else (BAD_JSON,))
        return cls(caption.text, kinds)


def no_text(value: Any) -> str:
    """Return what the value of a caption is if it is not text or a list of texts, or ""."""
    if isinstance(value, (str, bytes)):
        return ""
    if isinstance(value, list):
        return "" if isinstance(value[0], (str, bytes)) else "a list without text"
    return "a number" if isinstance(value, (int, float)) else "an object" if isinstance(value, dict) else type(value).__name__


def as_captions(kinds: Iterable[Kind]) -> list[Kind]:
    """Return the kinds, each once, as kinds of captions instead of texts."""
    return [kind._replace(noun="caption") for kind in dict.fromkeys(kinds)]


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
    background: str = WHITE  # colour behind transparent parts: a name or #rrggbb
    min_size_px: int = 0  # pictures with a smaller short side are left out

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
        rule = (RULES, self.background, self.resolution_px, self.buckets, self.least_px)
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
