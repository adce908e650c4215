"""Rows of pictures to judge: the same prompts and seeds by any model, looked at batch by batch and not kept.

What was seen of a row is stored by content (weights, prompts, seeds, settings, lenses), so an evaluation that was stopped goes on
where it was, and a second one does not draw the same teacher again.
"""

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data import folder, teacher
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond
from fastdiff.quality.drift import REFERENCE_SEED, departures
from fastdiff.quality.metrics import Lens, Seen, Shown, title
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused
from fastdiff.sampling.assemble import Assembled
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, Settings, at_once

DIVERSE = (16, 4)  # prompts, and pictures of each
DIVERSE_SEED = 2 * REFERENCE_SEED
PAIRED_BYTES = 256 * 2**20  # of a row's first pictures, which others are compared with one by one
TIMED_S, TIMED = 3.0, (3, 20)  # latency: so long, and so many pictures at least and at most


@dataclass
class Gallery:
    """`lines` is one prompt a picture; picture i is of seed first_seed + i."""

    lines: list[str]
    first_seed: int
    resolution_px: int
    lenses: list[Lens]
    distance: nn.Module | None  # pixels a, b -> (B,): LPIPS, or what stands in for it
    device: torch.device
    batch: int | None = None
    save_to: Path | None = None

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def paired(self) -> int:
        return max(2, min(len(self), PAIRED_BYTES // (3 * self.resolution_px**2)))

    def encoded(self, sampler: Sampler, lines: Sequence[str]) -> tuple[Cond, Cond]:
        base = sampler.base
        return text.encode_unique(base, lines, self.device), text.unconditional(base, device=self.device)

    def show(
        self,
        model: str,
        made: Assembled,
        settings: Settings,
        *,
        beside: Shown | None = None,
        offset: int = 0,
        n: int | None = None,
        controls: Tensor | None = None,
    ) -> Shown:
        """Draw and look at the first n pictures (default all); `beside`, the row that they are compared with one by one.

        `offset` moves the seeds; `controls` (n, 1 or 3, H, W) uint8 are what a ControlNet is shown.
        """
        n, sampler = n or len(self), made.sampler
        cond, uncond = self.encoded(sampler, self.lines[:n])
        if controls is not None:
            cond = cond.with_control((controls[:n].float() / 255).expand(-1, 3, -1, -1))
        key = self.key(made, cond, uncond, settings, offset, beside)
        if not self.save_to and (stored := self.stored(key)):
            kept = stored.pop("kept")
            return Shown(model, settings, stored, kept)
        seen, kept = self.draw(model, sampler, cond, uncond, settings, offset)
        if self.distance and n == len(self) and offset == 0:
            seen["diversity"] = self.diversity(sampler, settings)
        if self.distance and beside is not None:
            seen["same_noise"] = torch.full((n,), torch.nan)
            k = min(len(kept), len(beside.kept))
            seen["same_noise"][:k] = self.apart(kept[:k], beside.kept[:k])
        self.store(key, seen, kept)
        return Shown(model, settings, seen, kept)

    def draw(
        self, model: str, sampler: Sampler, cond: Cond, uncond: Cond, settings: Settings, offset: int
    ) -> tuple[Seen, Tensor]:
        n, parts, kept = len(cond), [], []
        size = self.batch or at_once(self.resolution_px // autoencoder.factor(sampler.vae))
        with console.progress(n, title(model, settings)) as bar, torch.no_grad():
            for i in range(0, n, size):
                rows = slice(i, min(i + size, n))
                seeds = [self.first_seed + offset + k for k in range(rows.start, rows.stop)]
                z, pixels = sampler.pictures(cond[rows], uncond, seeds, settings, self.resolution_px)
                pictures = uint8(pixels)
                parts.append({"departures": departures(z, pixels), **self.seen_of(pictures, rows)})
                kept.append(pictures[: max(0, self.paired - i)])
                if self.save_to and offset == 0:
                    write(self.save_to / folder_name(title(model, settings)), pictures, seeds)
                bar.update(len(seeds))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, torch.cat(kept)

    def seen_of(self, pictures: Tensor, rows: slice) -> Seen:
        found: Seen = {}
        for lens in self.lenses:
            found |= lens.see(pictures, rows)
        return found

    def diversity(self, sampler: Sampler, settings: Settings) -> Tensor:
        """Distances of all pairs of pictures of one prompt, over a few prompts."""
        count, each = DIVERSE
        lines = list(dict.fromkeys(self.lines))
        lines = lines[:: max(1, len(lines) // count)][:count]
        cond, uncond = self.encoded(sampler, [line for line in lines for _ in range(each)])
        seeds = [DIVERSE_SEED + self.first_seed + i for i in range(len(cond))]
        size = self.batch or at_once(self.resolution_px // autoencoder.factor(sampler.vae))
        px = sampler.pixels(cond, uncond, seeds, settings, resolution_px=self.resolution_px, batch=size)
        first, second = torch.triu_indices(each, each, 1)
        grid = uint8(px).view(len(lines), each, *px.shape[1:])
        return self.apart(grid[:, first].flatten(0, 1), grid[:, second].flatten(0, 1))

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (N,) of pictures (N, 3, H, W) uint8."""
        net = self.distance.to(self.device)
        pixels = lambda x: x.to(self.device).float() / 127.5 - 1
        with torch.no_grad():
            return torch.cat([net(pixels(x), pixels(y)).cpu() for x, y in zip(a.split(16), b.split(16), strict=True)])

    def latency_ms(self, made: Assembled, settings: Settings) -> float:
        """One prompt's embedding to one picture's bytes, alone; median."""
        cond, uncond = self.encoded(made.sampler, self.lines[:1])
        found, began = [], time.perf_counter()
        while len(found) <= TIMED[0] or (time.perf_counter() - began < TIMED_S and len(found) <= TIMED[1]):
            start = time.perf_counter()
            list(made.sampler.stream_batches([(cond, uncond, [len(found)])], settings, self.resolution_px))
            found.append(1e3 * (time.perf_counter() - start))
        return statistics.median(found[1:])  # the first one warms up

    def key(self, made: Assembled, cond: Cond, uncond: Cond, settings: Settings, offset: int, beside: Shown | None) -> str:
        digest, sampler = sha256(), made.sampler
        told: list[Any] = [made.identity, sampler.denoiser.kind, sampler.denoiser.strength, asdict(settings)]
        told += [self.first_seed + offset, self.resolution_px, str(sampler.base.dtype)]
        told += [[lens.key for lens in self.lenses], self.distance is not None]
        told += [None if beside is None else sha256(beside.kept.numpy().tobytes()).hexdigest(), self.lines[: len(cond)]]
        digest.update(repr(told).encode())
        for tensor in (cond.tokens, uncond.tokens, cond.control):
            if tensor is not None:
                digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:24]

    def path(self, key: str) -> Path:
        return teacher.cache_folder() / "evaluated" / f"{key}.safetensors"

    def stored(self, key: str) -> Seen | None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self.path(key))
        except FileNotFoundError:
            return None
        except SafetensorError:
            console.warn(f"{self.path(key)}: damaged; drawn again")
            return None

    def store(self, key: str, seen: Seen, kept: Tensor) -> None:
        from safetensors.torch import save_file

        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in {**seen, "kept": kept}.items()}, staged)
        staged.replace(path)

    def of_folder(self, path: Path) -> Seen:
        """What the lenses see of a folder of pictures, each a centred square."""
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in folder.SUFFIXES)
        if len(files) < 2:
            raise InputRefused(f"--reference {path}: {len(files)} pictures in it", "a distribution needs at least 2")
        parts: list[Seen] = []
        sides = {lens.side_px or self.resolution_px for lens in self.lenses}
        with console.progress(len(files), "looking at the reference") as bar, torch.no_grad():
            for file in files:
                of_side = {side: uint8(folder.square(file, side)[0])[None] for side in sides}
                found: Seen = {}
                for lens in self.lenses:
                    found |= lens.see(of_side[lens.side_px or self.resolution_px], None)
                parts.append(found)
                bar.update(1)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def folder_name(title: str) -> str:
    """teacher-4-steps-guidance-2-dpm++"""
    return re.sub(r"[^\w.+]+", "-", title).strip("-")


def write(to: Path, pictures: Tensor, seeds: Sequence[int]) -> None:
    from PIL import Image

    to.mkdir(parents=True, exist_ok=True)
    for picture, seed in zip(pictures, seeds, strict=True):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(to / f"{seed:08d}.png")
