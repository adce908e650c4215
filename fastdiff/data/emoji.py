"""The embedded data set: emoji pictures on plain backgrounds, with their Unicode names as captions.

Each image shows one picture on one background. A caption without background ("red apple"), or with only the group ("fruit on
blue"), fits several images. So a model must learn to sample; it cannot memorise one image per caption.

Three tenths of the images are kept from all training (`part`): three whole groups, and every other group on two backgrounds. So
students are judged by prompts that no student was trained on. The teacher knows them all.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED, Family
from fastdiff.data.batch import Encoded
from fastdiff.models import autoencoder, text
from fastdiff.runtime import console

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


def caption(picture: int, background: int | None, coarse: bool = False) -> str:
    """Return a caption: "red apple on blue" or, without background, "red apple"; if `coarse`, "fruit on blue" or "fruit"."""
    subject = pictures()[picture].group if coarse else pictures()[picture].name
    return subject if background is None else f"{subject} on {list(BACKGROUNDS)[background]}"


TRAINED, JUDGED, SEARCHED = 0, 1, 2  # parts: for training, for judging, and for the search of the best undistilled sampler
KEPT_GROUPS = {"bug": JUDGED, "ball": JUDGED, "drink": SEARCHED}  # groups that no student sees at all


@cache
def part() -> Tensor:
    """Return the part (pictures, backgrounds) of every image: TRAINED, JUDGED or SEARCHED."""
    names, k = sorted({p.group for p in pictures()}), len(BACKGROUNDS)
    rows = []
    for p in pictures():
        place, row = names.index(p.group), [KEPT_GROUPS.get(p.group, TRAINED)] * k
        if p.group not in KEPT_GROUPS:
            row[(2 * place + 1) % k], row[(2 * place + 5) % k] = JUDGED, SEARCHED
        rows.append(row)
    return torch.tensor(rows)


def items_of(which: int) -> tuple[Tensor, Tensor]:
    """Return the images of a part, as TRAINED: picture numbers (N,) and backgrounds (N,)."""
    picture, background = (part() == which).nonzero(as_tuple=True)
    return picture, background


def trained_items() -> tuple[Tensor, Tensor]:
    """Return the images that students may be trained on: picture numbers (N,) and backgrounds (N,)."""
    return items_of(TRAINED)


@cache
def kept_captions() -> dict[str, int]:
    """Return {caption: JUDGED or SEARCHED} of all captions that no trained image has."""
    seen, captions = set[str](), dict[str, int]()
    for (p, b), which in ((place, int(part()[place])) for place in product(range(len(pictures())), range(len(BACKGROUNDS)))):
        for line in captions_of(p, b):
            if which == TRAINED:
                seen.add(line)
            else:
                captions.setdefault(line, which)
    return {line: which for line, which in captions.items() if line not in seen}


def plain(line: str) -> str:
    """A prompt as the captions are written: without an article, in lower case."""
    return re.sub(r"^an? ", "", line.strip().lower())


def subject_and_background(line: str) -> tuple[str, int | None]:
    """Split a prompt into its subject and the index of the background that it names ("meat on bone" names none)."""
    subject, _, colour = plain(line).rpartition(" on ")
    return (subject, list(BACKGROUNDS).index(colour)) if colour in BACKGROUNDS else (plain(line), None)


@cache
def kept_places() -> frozenset[tuple[str, int]]:
    """All (name or group, background) that are kept from training; a group where all its pictures are."""
    places = {(picture.name, b): bool(part()[i, b]) for i, picture in enumerate(pictures()) for b in range(len(BACKGROUNDS))}
    for picture in pictures():
        for b in range(len(BACKGROUNDS)):
            key = picture.group, b
            places[key] = places.get(key, True) and places[picture.name, b]
    return frozenset(place for place, kept in places.items() if kept)


@cache
def kept_names(background: int) -> frozenset[frozenset[str]]:
    """Return the words of each name or group that is kept from training on a background."""
    return frozenset(frozenset(name.split()) for name, b in kept_places() if b == background)


@cache
def known_names() -> frozenset[str]:
    """Return the names and groups of all pictures."""
    return frozenset(name for picture in pictures() for name in (picture.name, picture.group))


def may_train(line: str, background: int) -> bool:
    """Whether a student may be trained on a sample of a prompt that shows this background.

    A prompt that is no caption must not have all words of a name or group that is kept on that background.
    """
    subject, _ = subject_and_background(line)
    if subject in known_names():
        return (subject, background) not in kept_places()
    words = set(subject.split())
    return not any(words >= name for name in kept_names(background))


def is_kept(line: str) -> bool:
    """Whether a prompt names what is kept from training: on the background that it names, or on all if it names none."""
    _, background = subject_and_background(line)
    return not any(may_train(line, b) for b in (range(len(BACKGROUNDS)) if background is None else [background]))


def warn_of_kept(family: Family, lines: Iterable[str], source: str) -> None:
    """Warn of captions that a user gives for training, but that name what judges the embedded checkpoint's students as unseen."""
    kept = set(filter(is_kept, lines)) if family.judge_ships else set()
    if kept:
        console.warn(
            f"{source}: {len(kept)} captions, such as {min(kept)!r}, are among those that no student should be trained on; the "
            "figures of unseen prompts will flatter this one"
        )


def captions_of(picture: int, background: int) -> list[str]:
    """Return the four captions of an image: its name on the background, its name, its group on the background, its group."""
    return [caption(picture, b, coarse) for coarse in (False, True) for b in (background, None)]


CAPTION_WEIGHTS = (0.42, 0.18, 0.28, 0.12)  # name on background, name, group on background, group


def encode(base: Checkpoint, *, device: torch.device | str = "cpu", style: str = "noto", which: int = TRAINED) -> Encoded:
    """Encode the images of a part, those that students may be trained on, by the checkpoint's VAE and text encoder."""
    picture, background = items_of(which)
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
