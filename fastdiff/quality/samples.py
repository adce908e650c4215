"""Draws the pictures to judge, with the same prompts and seeds for every model, and keeps only their features.

Where the hashes of the weights are known, a row is cached on disk by its content (weights, prompts, seeds, settings,
extractors). So an evaluation that was stopped goes on where it was, and a second one does not draw the same teacher again.
"""

import re
import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data import folder, teacher
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond
from fastdiff.quality.drift import departures
from fastdiff.quality.features import FeatureExtractor
from fastdiff.quality.metrics import Features, Row, title
from fastdiff.runtime import console, rng
from fastdiff.runtime.counts import Counts
from fastdiff.runtime.errors import InputRefused, as_field
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, at_once
from fastdiff.sampling.settings import Settings

DIVERSE = (16, 4)  # diversity is measured on so many prompts, with so many pictures of each
PAIRED_BYTES = 256 * 2**20  # memory for a row's first pictures, which other rows are compared with one by one
SHOWN = 256  # pictures of a row that are kept where features alone are compared
TIMED_S, TIMED = 3.0, (3, 20)  # latency is measured for so many seconds, on so many pictures at least and at most


@dataclass
class Samples:
    """Draws rows of pictures and extracts their features. `lines` has one prompt per picture; picture i has seed first_seed + i.

    `distance` maps two batches of pixels (B, 3, H, W) to (B,): LPIPS. With it a few more pictures of some prompts are drawn, to
    measure how far apart those of one prompt are.
    """

    lines: list[str]
    first_seed: int
    resolution_px: int
    extractors: Sequence[FeatureExtractor]
    distance: nn.Module | None
    device: torch.device | str
    batch: int | None = None
    save_to: Path | None = None
    block: rng.Block = rng.USERS  # where the seeds are taken from
    silent: bool = False  # show no progress, because another one is on the screen
    prompts: tuple[ref[Checkpoint], Cond, Cond] | None = None  # as encoded by the checkpoint that was sampled last

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def paired(self) -> int:
        """How many of a row's first pictures are kept: to show them, and where there is a distance to compare them."""
        return max(2, min(len(self), PAIRED_BYTES // (3 * self.resolution_px**2) if self.distance else SHOWN))

    def encode(self, base: Checkpoint) -> tuple[Cond, Cond]:
        """All prompts, one row each, and the unconditional branch, encoded by a checkpoint. The last checkpoint's are kept."""
        if self.prompts is None or self.prompts[0]() is not base:
            text.tell(base, self.lines, "`prompts`")
            cond, uncond = text.encode_unique(base, self.lines, self.device), text.unconditional(base, device=self.device)
            self.prompts = ref(base), cond, uncond
        return self.prompts[1:]

    def row(
        self,
        model: str,
        sampler: Sampler,
        settings: Settings,
        *,
        identity: Sequence[str] = (),
        beside: Row | None = None,
        block: rng.Block | None = None,
        n: int | None = None,
        controls: Tensor | None = None,
    ) -> Row:
        """Draw the first n pictures (default: all) and extract their features.

        With the hashes of the weights in `identity` the row is cached on disk. `beside` is the row that the pictures are compared
        with one by one. `block` is where the seeds are taken from (default: as usual). `controls` (n, 1 or 3, H, W) uint8 are the
        pictures for a ControlNet.
        """
        n, block, (cond, uncond) = n or len(self), block or self.block, self.encode(sampler.base)
        cond = cond[:n]
        if controls is not None:
            cond = cond.with_control((controls[:n].float() / 255).expand(-1, 3, -1, -1))
        key = self.key(identity, sampler, cond, uncond, settings, block, beside) if identity else ""
        if key and not self.save_to and (stored := self.stored(key)):
            features, pictures = stored, stored.pop("kept")
        else:
            features, pictures = self.drawn(model, sampler, cond, uncond, settings, block, beside)
            if key:
                self.store(key, features, pictures)
        for extractor in self.extractors:
            features |= extractor.compared(features, None if beside is None else beside.features)
        return Row(model, settings, features, n, pictures)

    def drawn(
        self, model: str, sampler: Sampler, cond: Cond, uncond: Cond, settings: Settings, block: rng.Block, beside: Row | None
    ) -> tuple[Features, Tensor]:
        """Draw all pictures, and measure what the distance network measures."""
        n = len(cond)
        features, pictures = self.draw(model, sampler, cond, uncond, settings, block)
        if self.distance and n == len(self) and block is self.block:
            features["diversity"] = self.diversity(sampler, settings)
        if self.distance and beside is not None and beside.pictures is not None:
            features["same_noise"] = torch.full((n,), torch.nan)
            k = min(len(pictures), len(beside.pictures))
            features["same_noise"][:k] = self.apart(pictures[:k], beside.pictures[:k])
        return features, pictures

    def draw(
        self, model: str, sampler: Sampler, cond: Cond, uncond: Cond, settings: Settings, block: rng.Block
    ) -> tuple[Features, Tensor]:
        """Draw all pictures: their features, and the first `paired` pictures (K, 3, H, W) uint8."""
        n, parts, first = len(cond), [], []
        size = self.batch or at_once(self.resolution_px // autoencoder.factor(sampler.vae))
        progress = nullcontext() if self.silent else console.progress(n, title(model, settings))
        with progress as bar, torch.no_grad():
            for i in range(0, n, size):
                rows = slice(i, min(i + size, n))
                seeds = [block(self.first_seed + k) for k in range(rows.start, rows.stop)]
                z, pixels = sampler.pictures(cond[rows], uncond, seeds, settings, self.resolution_px)
                pictures = uint8(pixels)
                parts.append({"departures": departures(z, pixels), **self.features_of(pictures, rows)})
                first.append(pictures[: max(0, self.paired - i)])
                if self.save_to and block is self.block:
                    write(self.save_to / folder_name(title(model, settings)), pictures, seeds)
                if bar:
                    bar.update(len(seeds))
        return together(parts), torch.cat(first)

    def features_of(self, pictures: Tensor, rows: slice) -> Features:
        """All extractors' features of pictures (B, 3, H, W) uint8 of the prompts `rows`."""
        features: Features = {}
        for extractor in self.extractors:
            features |= extractor.extract(pictures, rows)
        return features

    def diversity(self, sampler: Sampler, settings: Settings) -> Tensor:
        """Distances between all pairs of pictures of the same prompt, over a few prompts."""
        count, each = DIVERSE
        lines = list(dict.fromkeys(self.lines))
        lines = lines[:: max(1, len(lines) // count)][:count]
        cond = text.encode_unique(sampler.base, [line for line in lines for _ in range(each)], self.device)
        _, uncond = self.encode(sampler.base)
        seeds = [rng.DIVERSE(self.first_seed + i) for i in range(len(cond))]
        size = self.batch or at_once(self.resolution_px // autoencoder.factor(sampler.vae))
        px = sampler.pixels(cond, uncond, seeds, settings, resolution_px=self.resolution_px, batch=size)
        first, second = torch.triu_indices(each, each, 1)
        grid = uint8(px).view(len(lines), each, *px.shape[1:])
        return self.apart(grid[:, first].flatten(0, 1), grid[:, second].flatten(0, 1))

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) between pictures a and b (N, 3, H, W) uint8, pair by pair."""
        net = self.distance.to(self.device)
        pixels = lambda x: x.to(self.device).float() / 127.5 - 1
        with torch.no_grad():
            return torch.cat([net(pixels(x), pixels(y)).cpu() for x, y in zip(a.split(16), b.split(16), strict=True)])

    def latency_ms(self, sampler: Sampler, settings: Settings) -> float:
        """Milliseconds from an encoded prompt to the bytes of one picture, drawn alone: the median of several."""
        cond, uncond = self.encode(sampler.base)
        cond = cond[:1]
        times_ms, began = [], time.perf_counter()
        while len(times_ms) <= TIMED[0] or (time.perf_counter() - began < TIMED_S and len(times_ms) <= TIMED[1]):
            start = time.perf_counter()
            list(sampler.stream_batches([(cond, uncond, [len(times_ms)])], settings, self.resolution_px))
            times_ms.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times_ms[1:])  # the first one warms up

    def key(
        self,
        identity: Sequence[str],
        sampler: Sampler,
        cond: Cond,
        uncond: Cond,
        settings: Settings,
        block: rng.Block,
        beside: Row | None,
    ) -> str:
        """The name of a row in the cache: a hash of all that its features depend on."""
        digest = sha256()
        set_now = settings.fields_set()  # fields that came late are left out where they are unset, so that names of rows stay
        way = {k: v for k, v in asdict(settings).items() if k in set_now or k == "step_guidance"}
        content: list[Any] = [tuple(identity), sampler.denoiser.kind, sampler.denoiser.strength, way]
        if sampler.denoiser.schedule.zero_terminal_snr:  # the same weights draw otherwise on another schedule
            content.append("zero terminal SNR")
        content += [block(self.first_seed), self.resolution_px, str(sampler.base.dtype)]
        content += [[extractor.key for extractor in self.extractors], self.distance is not None]
        compared = beside is not None and beside.pictures is not None and self.distance is not None
        content += [sha256(beside.pictures.numpy().tobytes()).hexdigest() if compared else None, self.lines[: len(cond)]]
        digest.update(repr(content).encode())
        for tensor in (cond.tokens, uncond.tokens, cond.control, cond.pooled, uncond.pooled):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    def path(self, key: str) -> Path:
        return teacher.cache_folder() / "evaluated" / f"{key}.safetensors"

    def stored(self, key: str) -> Features | None:
        """A row's features from the cache, with its first pictures as "kept"; None where there are none that can be read."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(key))
        except FileNotFoundError:
            return None
        except SafetensorError:
            console.warn(f"{self.path(key)}: the cached row is damaged, so it is drawn again")
            return None

    def store(self, key: str, features: Features, pictures: Tensor) -> None:
        """Write a row to the cache, whole or not at all."""
        from safetensors.torch import save_file

        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in {**features, "kept": pictures}.items()}, staged)
        staged.replace(path)

    def of_folder(self, path: Path) -> Features:
        """The features of all pictures in a folder, each cut to a centred square.

        InputRefused where the folder has fewer than 2 pictures.
        """
        files, counts = folder.pictures_of(path, "reference"), Counts()
        if len(files) < 2:
            raise InputRefused(f"`reference={path}`: pictures in it: {len(files)}", "at least 2 are needed for a distribution")
        parts: list[Features] = []
        sides = {extractor.side_px or self.resolution_px for extractor in self.extractors}
        with console.progress(len(files), "looking at the reference") as bar, torch.no_grad():
            for file in files:
                of_side = {side: uint8(folder.square(file, side, counts)[0])[None] for side in sides}
                features: Features = {}
                for extractor in self.extractors:
                    features |= extractor.extract(of_side[extractor.side_px or self.resolution_px], None)
                parts.append(features)
                bar.update(1)
        counts.tell(as_field("reference", path))
        mixed = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))  # the first ones may be all of one kind
        return {name: feature[mixed] for name, feature in together(parts).items()}


def together(parts: Sequence[Features]) -> Features:
    """The features of several batches, concatenated."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def folder_name(title: str) -> str:
    """A row's title as the name of a folder: teacher-4-steps-guidance-2-dpm++."""
    return re.sub(r"[^\w.+]+", "-", title).strip("-")


def write(to: Path, pictures: Tensor, seeds: Sequence[int]) -> None:
    """Write pictures (N, 3, H, W) uint8 as PNGs, each named by its seed."""
    from PIL import Image

    to.mkdir(parents=True, exist_ok=True)
    for picture, seed in zip(pictures, seeds, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(to / f"{seed:08d}.png")
