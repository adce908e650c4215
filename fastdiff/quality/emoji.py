"""How good a few-step model is, judged on pictures: recognised captions, Frechet distance, distance for the same noise.

For the embedded checkpoint everything needed ships with it: a feature network, the teacher's rows at every number of
network calls, and the statistics of its guided 25-step samples (`examples/emoji/reference.py` makes them). Only the student
is sampled here.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data import emoji
from fastdiff.models import autoencoder, text
from fastdiff.models.feature_net import FeatureNet
from fastdiff.quality.distances import Metric, Moments, frechet, gap_closed
from fastdiff.sampling.sampler import Sampler, Settings

REFERENCE = EMOJI / "reference"


@dataclass(frozen=True)
class Prompts:
    """The judged prompts: sample i asks for picture[i], or for any of its group where coarse[i], on background[i] (-1: any).

    The open ones carry the judgement. A named picture is nearly one image, which a network can look up in one call;
    "fruit" has many, and their average in one call looks like none of them.
    """

    picture: Tensor  # (N,)
    background: Tensor  # (N,)
    coarse: Tensor  # (N,) bool

    @classmethod
    def judged(cls, n: int, seed: int = 0) -> "Prompts":
        """The first n of one fixed list: every picture in turn, half by name, half by group, 7 in 10 with a background."""
        g = torch.Generator().manual_seed(seed)
        k, rows = len(emoji.BACKGROUNDS), 20_000
        background = torch.where(torch.rand(rows, generator=g) < 0.7, torch.randint(k, (rows,), generator=g), -1)
        coarse = torch.rand(rows, generator=g) < 0.5
        return cls(torch.arange(n) % len(emoji.pictures()), background[:n], coarse[:n])

    @classmethod
    def of(cls, lines: Sequence[str]) -> "Prompts | None":
        """What captions ask for; None where one of them is no caption of this kind."""
        table = known_captions()
        if any(line not in table for line in lines):
            return None
        picture, background, coarse = zip(*(table[line] for line in lines), strict=True)
        return cls(torch.tensor(picture), torch.tensor(background), torch.tensor(coarse))

    def __getitem__(self, rows: slice) -> "Prompts":
        return Prompts(self.picture[rows], self.background[rows], self.coarse[rows])

    @cached_property
    def captions(self) -> list[str]:
        rows = zip(self.picture.tolist(), self.background.tolist(), self.coarse.tolist(), strict=True)
        return [emoji.caption(p, None if b < 0 else b, c) for p, b, c in rows]

    def __len__(self) -> int:
        return len(self.picture)


@cache
def known_captions() -> dict[str, tuple[int, int, bool]]:
    """Caption -> picture (of a group its first), background or -1, whether a group; all that the teacher was trained on."""
    found: dict[str, tuple[int, int, bool]] = {}
    for coarse in (False, True):
        for p in range(len(emoji.pictures())):
            for b in range(-1, len(emoji.BACKGROUNDS)):
                found.setdefault(emoji.caption(p, None if b < 0 else b, coarse), (p, b, coarse))
    return found


@cache
def feature_net() -> FeatureNet:
    return FeatureNet.embedded()


@cache
def prototypes() -> Tensor:
    """Mean embedding of every picture over the backgrounds, normalised: (pictures, 128)."""
    every = torch.arange(len(emoji.pictures()))
    columns = [embed(emoji.compose(every, torch.full_like(every, c))) for c in range(len(emoji.BACKGROUNDS))]
    return F.normalize(torch.stack(columns).mean(0), dim=1)


@torch.no_grad()
def embed(pixels: Tensor) -> Tensor:
    """Normalised embeddings times sqrt(128), so that a coordinate's variance is about one: (N, 128)."""
    parts = [F.normalize(feature_net()(part.cpu()), dim=1) for part in pixels.split(250)]
    return torch.cat(parts) * 128**0.5


@cache
def groups() -> Tensor:
    """Index of each picture's group: (pictures,)."""
    names = sorted({p.group for p in emoji.pictures()})
    return torch.tensor([names.index(p.group) for p in emoji.pictures()])


def recognised(features: Tensor, prompts: Prompts) -> Tensor:
    """Whether the nearest of all real pictures is the caption's, or for a group caption one of the group: (N,) of 0 and 1."""
    nearest = (F.normalize(features, dim=1) @ prototypes().T).argmax(1)
    in_group = groups()[nearest] == groups()[prompts.picture]
    return torch.where(prompts.coarse, in_group, nearest == prompts.picture).float()


def backgrounds(pixels: Tensor, prompts: Prompts) -> Tensor:
    """Whether the corners show the background that the prompt names: (N,) of 0 and 1, NaN where it names none."""
    right = (emoji.background_of(pixels) == prompts.background).float()
    return torch.where(prompts.background >= 0, right, torch.nan)


def background_right(pixels: Tensor, prompts: Prompts) -> float:
    """Share of the prompts that name a background in which the corners show it."""
    return backgrounds(pixels, prompts).nanmean().item()


@torch.no_grad()
def style_distances(pixels: Tensor, picture: Tensor) -> Tensor:
    """Feature distance (N, styles) of images (N, 3, H, W) to their emoji, `picture` (N,), drawn in each style."""
    background = emoji.background_of(pixels)
    drawn = [emoji.compose(picture, background, style) for style in emoji.STYLES]
    return torch.stack([feature_net().distance(pixels, x) for x in drawn], 1)


@cache
def pictures_by_name() -> dict[str, int]:
    return {emoji.caption(p, None): p for p in range(len(emoji.pictures()))}


def named_pictures(prompts: Sequence[str]) -> Tensor:
    """The picture that each prompt names ("a red apple on blue"), or -1: (N,)."""
    return torch.tensor([pictures_by_name().get(re.sub(r"^an? | on \w+$", "", prompt.lower()), -1) for prompt in prompts])


def style_distance(pixels: Tensor, prompts: Sequence[str]) -> dict[str, Any] | None:
    """In which drawing style images (N, 3, H, W) are: mean feature distance to their emoji drawn in each, and the share

    nearest to each. Counts prompts that name a picture ("a red apple on blue"); None where no prompt does.
    """
    picture = named_pictures(prompts)
    if not (picture >= 0).any():
        return None
    distances = style_distances(pixels[picture >= 0], picture[picture >= 0])
    share = F.one_hot(distances.argmin(1), distances.shape[1]).float().mean(0)
    figures = zip(emoji.STYLES, distances.mean(0).tolist(), share.tolist(), strict=True)
    return {style: {"distance": distance, "nearest": nearest} for style, distance, nearest in figures}


@dataclass
class Row:
    """One judged way of sampling."""

    model: str
    settings: Settings
    features: Tensor  # (N, 128)
    hits: Tensor  # (N,)
    background: float
    same_noise: float | None = None

    def __len__(self) -> int:
        return len(self.features)

    @property
    def calls(self) -> int:
        return self.settings.calls

    def figures(self, reference: Moments) -> dict[str, Any]:
        return {
            "model": self.model,
            "solver": self.settings.scheduler,
            "spacing": self.settings.spacing,
            "num_steps": self.settings.num_steps,
            "guidance": self.settings.guidance,
            "calls": self.calls,
            "retrieval": self.hits.mean().item(),
            "background": self.background,
            "frechet": frechet(self.features, reference),
            "same_noise": self.same_noise,
        }


class Judge:
    """Samples the judged prompts with a model and measures the pictures."""

    def __init__(self, base: Checkpoint, n: int, *, device: torch.device | str = "cpu") -> None:
        self.prompts, self.device = Prompts.judged(n), device
        self.cond, self.uncond = text.encode_unique(base, self.prompts.captions, device), text.unconditional(base, device=device)

    def __len__(self) -> int:
        return len(self.prompts)

    def sample(self, sampler: Sampler, settings: Settings, *, first_seed: int = 0, batch: int = 100) -> tuple[Tensor, Tensor]:
        """Latents (N, C, h, w) and pixels (N, 3, H, W) of all prompts, seed first_seed + i for prompt i."""
        seeds = range(first_seed, first_seed + len(self))
        side = emoji.CELL_PX // autoencoder.factor(sampler.vae)
        parts = [
            sampler.latents(self.cond[i : i + batch], self.uncond, seeds[i : i + batch], settings, (side, side)).cpu()
            for i in range(0, len(self), batch)
        ]
        latents = torch.cat(parts)
        return latents, autoencoder.decode(sampler.vae, latents).cpu()

    def row(self, model: str, sampler: Sampler, settings: Settings, *, teacher_latents: Tensor | None = None) -> Row:
        _, pixels = self.sample(sampler, settings)
        return self.row_of(model, settings, pixels, sampler, teacher_latents)

    def row_of(
        self, model: str, settings: Settings, pixels: Tensor, sampler: Sampler, teacher_latents: Tensor | None = None
    ) -> Row:
        features = embed(pixels)
        distance = None
        if teacher_latents is not None:
            k = min(len(teacher_latents), len(pixels))
            target = autoencoder.decode(sampler.vae, teacher_latents[:k].to(self.device).float()).cpu()
            distance = feature_net().distance(pixels[:k], target).mean().item()
        hits = recognised(features, self.prompts)
        return Row(model, settings, features, hits, background_right(pixels, self.prompts), distance)


class Reference:
    """The shipped teacher: statistics of its guided 25-step samples, its rows, and its latents for the first seeds."""

    def __init__(self, folder: Path = REFERENCE) -> None:
        from safetensors.torch import load_file

        tensors = {k: v.float() for k, v in load_file(folder / "teacher.safetensors").items()}
        self.table = json.loads((folder / "teacher.json").read_text())
        self.moments = Moments(tensors["mean"].double(), tensors["cov"].double())
        self.latents = tensors["latents"]  # (500, C, h, w), seeds 0..499
        self.features = {k: v for k, v in tensors.items() if k.startswith(("features.", "ladder."))}

    def best(self, calls: int, metric: str, n: int) -> Row:
        """The best undistilled row at that many network calls by `metric`, over its first n samples."""
        entry = self.table["best"][f"{metric}.{calls}"]
        return self.row(self.table["rows"][entry], self.features[f"features.{entry}"][:n])

    def ladder(self, calls: int) -> Row:
        """The teacher's own way of sampling with 50, 16, 8, 4, 2 or 1 calls, over the first 500 samples."""
        told = next(row for row in self.table["ladder"] if row["calls"] == calls)
        return self.row(told, self.features[f"ladder.{calls}"])

    def row(self, told: dict[str, Any], features: Tensor) -> Row:
        settings = Settings(told["solver"], told["num_steps"], told["guidance"], told["spacing"])
        hits = recognised(features, Prompts.judged(len(features)))
        return Row("teacher", settings, features, hits, told["background"], told["same_noise"])


def metrics_of(reference: Reference) -> dict[str, Metric]:
    return {
        "retrieval": lambda row, i: row.hits[i].mean().item(),
        "frechet": lambda row, i: frechet(row.features[i], reference.moments),
    }


def prove(
    judge: Judge,
    sampler: Sampler,
    settings_of: Callable[[int], Settings],
    calls: Sequence[int] = (1, 2, 4, 8),
    name: str = "student",
) -> dict[str, Any]:
    """The closing table of a training run on `emoji`: rows at those numbers of network calls, and the gap closed up to 8."""
    reference, n = Reference(), len(judge)
    metrics = metrics_of(reference)
    rows, gaps = [reference.best(50, "retrieval", n).figures(reference.moments)], {m: {} for m in metrics}
    for k in calls:
        latents = reference.latents if k == 1 else None
        student = judge.row(name, sampler, settings_of(k), teacher_latents=latents)
        teachers: dict[str, Row] = {}
        if k <= 8:  # above, the teacher has no gap to close
            teachers = {m: reference.best(max(c for c in (1, 2, 4, 8) if c <= k), m, n) for m in metrics}
            for metric, measure in metrics.items():
                best = reference.best(50, metric, n)
                gaps[metric][str(k)] = gap_closed(student, teachers[metric], best, measure)
        distinct = list(teachers.values())
        if distinct and teachers["retrieval"].settings == teachers["frechet"].settings:
            distinct = distinct[:1]
        rows += [r.figures(reference.moments) for r in (*distinct, student)]
    return {"samples": n, "rows": rows, "gap_closed": gaps}


def recovered(judge: Judge, sampler: Sampler, before: Row, name: str = "student") -> dict[str, Any]:
    """The closing table of a run that repairs a network on `emoji`: what it was before, what it is now, the teacher.

    `recovered`: (before - now) / (before - teacher) with a 95 % bootstrap band, all three in as many network calls.
    """
    reference, n = Reference(), len(judge)
    student, found = judge.row(name, sampler, before.settings, teacher_latents=reference.latents), {}
    best = {metric: reference.best(50, metric, n) for metric in ("retrieval", "frechet")}
    for metric, measure in metrics_of(reference).items():
        gap = gap_closed(student, before, best[metric], measure)
        found[metric] = {"recovered": gap["gap_closed"], "low": gap["low"], "high": gap["high"]}
        found[metric] |= {"before": gap["teacher"], "student": gap["student"], "teacher": gap["teacher_50"]}
    rows = [row.figures(reference.moments) for row in (best["retrieval"], before, student)]
    return {"samples": n, "rows": rows, "recovered": found}
