"""Feature extractors: each turns a batch of pictures into numbers, one row per picture. B pictures, D features."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import fingerprint
from fastdiff.checkpoints.family import Family
from fastdiff.data import emoji
from fastdiff.models import perceptual
from fastdiff.options.evaluate import METRIC_NETWORKS
from fastdiff.quality import emoji as judge
from fastdiff.quality import networks
from fastdiff.quality.metrics import Features
from fastdiff.quality.networks import Clip, Inception, patch, resized
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError


class FeatureExtractor(ABC):
    """Turns a batch of pictures into features, one row per picture."""

    key: str  # extractors with equal keys give equal features
    side_px: int | None = None  # size at which to read reference pictures from files; None: the size of the evaluation

    @abstractmethod
    def extract(self, pictures: Tensor, rows: slice | None) -> Features:
        """Features of pictures (B, 3, H, W) uint8 drawn for the prompts `rows`; None: the pictures have no prompts."""

    def compared(self, features: Features, beside: Features | None) -> Features:
        """Features that need all pictures of a row, or the row `beside` it of the same prompts and seeds, if there are any."""
        return {}


class JudgeFeatures(FeatureExtractor):
    """The embedding of `emoji`'s judge; for known captions also whether the picture and background are right."""

    def __init__(self, lines: Sequence[str], *, styles: bool = False) -> None:
        """`styles`: add the distance to the named emoji in each drawing style; NaN for prompts that name none."""
        self.prompts = judge.Prompts.of(lines) if judge.Prompts.known(lines) else None
        self.named = judge.named_pictures(lines) if styles else None
        self.key = f"judge {fingerprint(judge.judge_net())[:16]}{' with styles' if styles else ''}"

    def extract(self, pictures: Tensor, rows: slice | None) -> Features:
        pixels = pictures.float() / 127.5 - 1
        features = {"embedded": judge.embed(pixels)}
        if self.prompts and rows is not None:
            prompts = self.prompts[rows]
            features["hits"] = judge.recognised(features["embedded"], prompts)
            features["background"] = judge.backgrounds(pixels, prompts)
        if self.named is not None and rows is not None:
            named = self.named[rows]
            features["style"] = torch.full((len(pixels), len(emoji.STYLES)), torch.nan)
            features["style"][named >= 0] = judge.style_distances(pixels[named >= 0], named[named >= 0])
        return features

    def compared(self, features: Features, beside: Features | None) -> Features:
        """How far each picture is from the others of its group prompt, and from the picture of the same noise in `beside`."""
        embedded = features["embedded"]
        n, further = len(embedded), {}
        if self.prompts:
            further["diversity"] = judge.diversity(embedded, self.prompts[:n])
        if beside is not None:
            further["same_noise"] = (embedded - beside["embedded"][:n]).norm(dim=1)
        return further


class InceptionFeatures(FeatureExtractor):
    """Inception features (B, 2048) of the whole picture, which is resized to `side_px` first if that is given."""

    def __init__(self, net: Inception, device: torch.device, side_px: int | None) -> None:
        self.net, self.device, self.side_px = net.to(device), device, side_px
        self.key = f"inception {fingerprint(net)} {side_px}"

    def extract(self, pictures: Tensor, rows: slice | None) -> Features:
        return {"inception": self.net(resized(pictures, self.side_px).to(self.device)).cpu()}


class CentreFeatures(FeatureExtractor):
    """Inception features (B, 2048) of a centre crop of 299 px at native size."""

    def __init__(self, net: Inception, device: torch.device) -> None:
        self.net, self.device = net.to(device), device
        self.key = f"inception {fingerprint(net)} None centre"

    def extract(self, pictures: Tensor, rows: slice | None) -> Features:
        return {"patch": self.net(patch(pictures).to(self.device)).cpu()}


class ClipFeatures(FeatureExtractor):
    """CLIP's embedding of the picture (B, D), and 100 times its cosine with the embedding of the prompt (B,)."""

    def __init__(self, net: Clip, device: torch.device, lines: Sequence[str]) -> None:
        self.net, self.key = net.to(device), f"clip {net.spec}"
        rows = {line: i for i, line in enumerate(dict.fromkeys(lines))}
        each = list(rows)
        with torch.no_grad():
            texts = torch.cat([net.texts(each[i : i + 64]).cpu() for i in range(0, len(each), 64)])
        self.texts = texts[[rows[line] for line in lines]]

    def extract(self, pictures: Tensor, rows: slice | None) -> Features:
        embedded = self.net.pictures(pictures).cpu()
        return {"clip": embedded} | ({} if rows is None else {"clip_score": 100 * (embedded * self.texts[rows]).sum(1)})


def open_extractors(
    family: Family,
    lines: Sequence[str],
    *,
    resolution_px: int,
    device: torch.device,
    asked: Sequence[str] = (),
    styles: bool = False,
    fid_px: int | None = None,
    inception_weights: str | None = None,
    clip: str = networks.CLIP,
) -> list[FeatureExtractor]:
    """Open the extractors that `asked` names. If it is empty, open all whose weights are available, and warn of each other one.

    `emoji` always uses its own network, and others only if `asked` names them. UsageError where a named one is not available.
    """
    shipped = family.judge_ships
    extractors: list[FeatureExtractor] = [JudgeFeatures(lines, styles=styles)] if shipped else []
    wanted = asked or ([] if shipped else list(METRIC_NETWORKS))
    try:
        if {"fid", "patch"} & set(wanted):
            net = Inception(inception_weights)
            extractors += [InceptionFeatures(net, device, fid_px)] if "fid" in wanted else []
            extractors += [CentreFeatures(net, device)] if "patch" in wanted and resolution_px > networks.PATCH_PX else []
    except UsageError as error:
        left_out("fid", error, asked)
    try:
        if "clip" in wanted:
            extractors.append(ClipFeatures(Clip(clip), device, lines))
    except UsageError as error:
        left_out("clip", error, asked)
    return extractors


def open_distance(family: Family, *, asked: Sequence[str] = (), lpips_weights: str | None = None) -> nn.Module | None:
    """Open LPIPS, the distance between two pictures. None if it is not asked, not available, or the family ships a judge.

    A judge measures distances too. The embedded network in LPIPS's place does not judge: losses look through it.
    """
    if family.judge_ships or (asked and "lpips" not in asked):
        return None
    try:
        return perceptual.open_distance(family, lpips_weights)
    except UsageError as error:
        left_out("lpips", error, asked)
        return None


def left_out(name: str, error: UsageError, asked: Sequence[str]) -> None:
    """Leave a metric out with a warning, or raise `error` if the user asked for metrics by name."""
    if asked:
        raise error
    console.warn(f"{name} is not measured: {error}; {error.hint}")
