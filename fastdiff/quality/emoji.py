"""What ships with the embedded checkpoint to judge its students: prompts, a recognition network and the teacher's rows.

`examples/emoji/reference.py` makes the teacher's rows at every number of network calls and the statistics of its guided
25-step samples. So a closing table has to sample only the student.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data import emoji
from fastdiff.models.feature_net import FeatureNet
from fastdiff.quality.distances import Moments
from fastdiff.quality.metrics import Row
from fastdiff.sampling.settings import Settings

REFERENCE = EMOJI / "reference"


@dataclass(frozen=True)
class Prompts:
    """The judged prompts: prompt i asks for picture[i] on background[i] (-1: any), or where coarse[i] for any of its group.

    The group prompts are the hard test. The name of a picture describes nearly one image, which a network can look up in one
    call; "fruit" describes many, and the average that one call gives looks like none of them.
    """

    picture: Tensor  # (N,)
    background: Tensor  # (N,)
    coarse: Tensor  # (N,) bool

    @classmethod
    def judged(cls, n: int, seed: int = 0) -> "Prompts":
        """The first n prompts of one fixed list: all pictures in turn, half by name, half by group, 70 % with a background."""
        g = torch.Generator().manual_seed(seed)
        k, rows = len(emoji.BACKGROUNDS), 20_000
        background = torch.where(torch.rand(rows, generator=g) < 0.7, torch.randint(k, (rows,), generator=g), -1)
        coarse = torch.rand(rows, generator=g) < 0.5
        return cls(torch.arange(n) % len(emoji.pictures()), background[:n], coarse[:n])

    @classmethod
    def of(cls, lines: Sequence[str]) -> "Prompts | None":
        """The prompts that captions stand for; None where one of them is not a caption that the teacher was trained on."""
        table = known_captions()
        if any(line not in table for line in lines):
            return None
        picture, background, coarse = zip(*(table[line] for line in lines), strict=True)
        return cls(torch.tensor(picture), torch.tensor(background), torch.tensor(coarse))

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.picture[rows], self.background[rows], self.coarse[rows])

    @cached_property
    def captions(self) -> list[str]:
        """The prompts as text."""
        rows = zip(self.picture.tolist(), self.background.tolist(), self.coarse.tolist(), strict=True)
        return [emoji.caption(p, None if b < 0 else b, c) for p, b, c in rows]

    def __len__(self) -> int:
        return len(self.picture)


@cache
def known_captions() -> dict[str, tuple[int, int, bool]]:
    """{caption: (picture, background or -1, whether it names a group)} of all captions that the teacher was trained on.

    A group's picture is the first one of the group.
    """
    captions: dict[str, tuple[int, int, bool]] = {}
    for coarse in (False, True):
        for p in range(len(emoji.pictures())):
            for b in range(-1, len(emoji.BACKGROUNDS)):
                captions.setdefault(emoji.caption(p, None if b < 0 else b, coarse), (p, b, coarse))
    return captions


@cache
def feature_net() -> FeatureNet:
    """The feature network that ships with the embedded checkpoint, opened once."""
    return FeatureNet.embedded()


@cache
def prototypes() -> Tensor:
    """The mean embedding of every real picture over all backgrounds, normalised: (pictures, 128)."""
    every = torch.arange(len(emoji.pictures()))
    columns = [embed(emoji.compose(every, torch.full_like(every, c))) for c in range(len(emoji.BACKGROUNDS))]
    return F.normalize(torch.stack(columns).mean(0), dim=1)


@torch.no_grad()
def embed(pixels: Tensor) -> Tensor:
    """Embeddings (N, 128) of pixels (N, 3, H, W): normalised, times sqrt(128) so that each coordinate's variance is about 1."""
    parts = [F.normalize(feature_net()(part.cpu()), dim=1) for part in pixels.split(250)]
    return torch.cat(parts) * 128**0.5


@cache
def groups() -> Tensor:
    """The index of each picture's group: (pictures,)."""
    names = sorted({p.group for p in emoji.pictures()})
    return torch.tensor([names.index(p.group) for p in emoji.pictures()])


def recognised(features: Tensor, prompts: Prompts) -> Tensor:
    """Whether each embedding (N, 128) is nearest to the real picture that its prompt names: (N,) of 0 and 1.

    For a group prompt any picture of the group counts.
    """
    nearest = (F.normalize(features, dim=1) @ prototypes().T).argmax(1)
    in_group = groups()[nearest] == groups()[prompts.picture]
    return torch.where(prompts.coarse, in_group, nearest == prompts.picture).float()


def backgrounds(pixels: Tensor, prompts: Prompts) -> Tensor:
    """Whether the corners of each picture have the background of its prompt: (N,) of 0 and 1, NaN where it names none."""
    right = (emoji.background_of(pixels) == prompts.background).float()
    return torch.where(prompts.background >= 0, right, torch.nan)


def background_right(pixels: Tensor, prompts: Prompts) -> float:
    """The share of pictures with the right background, among the prompts that name one."""
    return backgrounds(pixels, prompts).nanmean().item()


@torch.no_grad()
def style_distances(pixels: Tensor, picture: Tensor) -> Tensor:
    """Feature distances (N, styles) of images (N, 3, H, W) to their emoji `picture` (N,), drawn in each style."""
    background = emoji.background_of(pixels)
    drawn = [emoji.compose(picture, background, style) for style in emoji.STYLES]
    return torch.stack([feature_net().distance(pixels, x) for x in drawn], 1)


@cache
def pictures_by_name() -> dict[str, int]:
    """{name: picture number}."""
    return {emoji.caption(p, None): p for p in range(len(emoji.pictures()))}


def named_pictures(prompts: Sequence[str]) -> Tensor:
    """The index (N,) of the picture that each prompt names ("a red apple on blue"), or -1."""
    return torch.tensor([pictures_by_name().get(re.sub(r"^an? | on \w+$", "", prompt.lower()), -1) for prompt in prompts])


def style_distance(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Any] | None:
    """How near images (N, 3, H, W) are to each drawing style: {style: {"distance", "nearest"}}.

    `distance` is the mean feature distance to the same emoji in that style, `nearest` the share of images that are nearest to
    it. Only prompts that name a picture ("a red apple on blue") count; None where no prompt does.
    """
    picture = named_pictures(prompts)
    if not (picture >= 0).any():
        return None
    distances = style_distances(pixels[picture >= 0], picture[picture >= 0])
    share = F.one_hot(distances.argmin(1), distances.shape[1]).float().mean(0)
    figures = zip(emoji.STYLES, distances.mean(0).tolist(), share.tolist(), strict=True)
    return {style: {"distance": distance, "nearest": nearest} for style, distance, nearest in figures}


class Shipped:
    """The shipped teacher: statistics of its guided 25-step samples, its rows, and its latents for the first seeds.

    A row holds stored features. Of metrics that need the pictures themselves only the figure is stored.
    """

    def __init__(self, folder: Path = REFERENCE) -> None:
        from safetensors.torch import load_file

        tensors = {k: v.float() for k, v in load_file(folder / "teacher.safetensors").items()}
        self.table = json.loads((folder / "teacher.json").read_text())
        self.moments = Moments(tensors["mean"].double(), tensors["cov"].double())
        self.latents = tensors["latents"]  # (500, C, h, w), seeds 0..499
        self.features = {k: v for k, v in tensors.items() if k.startswith(("features.", "ladder."))}
        self.calls = sorted({int(key.split(".")[1]) for key in self.table["best"]})  # 1, 2, 4, 8, and 50 for 25 guided steps

    def row(self, index: int, n: int) -> Row:
        """Row `index` of the table, over its first n samples."""
        return shipped_row(self.table["rows"][index], self.features[f"features.{index}"][:n])

    def best(self, calls: int, metric: str, n: int) -> Row:
        """The teacher's best row by `metric` in `calls` network calls, over its first n samples."""
        return self.row(self.table["best"][f"{metric}.{calls}"], n)

    def ladder(self, calls: int) -> Row:
        """The teacher's usual way of sampling in 50, 16, 8, 4, 2 or 1 network calls, over the first 500 samples."""
        entry = next(row for row in self.table["ladder"] if row["calls"] == calls)
        return shipped_row(entry, self.features[f"ladder.{calls}"])

    def undistilled(self, calls: int) -> dict[str, Settings]:
        """{metric: the teacher's best stock settings by it} in exactly `calls` network calls; {} where none is shipped."""
        best = {key.split(".")[0]: index for key, index in self.table["best"].items() if key.endswith(f".{calls}")}
        return {metric: settings_of(self.table["rows"][index]) for metric, index in best.items()}

    def nearest(self, calls: int) -> int:
        """The largest number of network calls with shipped rows that is not above `calls`; at least the smallest number."""
        few = self.calls[:-1]
        return max(c for c in few if c <= max(calls, few[0]))


@cache
def shipped() -> Shipped:
    """The shipped teacher, read once."""
    return Shipped()


def settings_of(entry: dict[str, Any]) -> Settings:
    """The sampling settings of an entry of teacher.json."""
    return Settings(entry["solver"], entry["num_steps"], entry["guidance"], entry["spacing"])


def shipped_row(entry: dict[str, Any], features: Tensor) -> Row:
    """A row of the teacher from an entry of teacher.json and its stored features (N, 128)."""
    hits = recognised(features, Prompts.judged(len(features)))
    known = {name: entry[name] for name in ("background", "same_noise") if entry[name] is not None}
    return Row("teacher", settings_of(entry), {"embedded": features, "hits": hits}, len(features), known=known)
