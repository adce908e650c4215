"""The sampling engine: conditions + seeds -> images, for `sample`, previews, evaluation and teacher data alike.

Image i depends on seed i alone, never on its place in a batch: each has its own CPU generator for the start noise and for
every later draw.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.schedule import Prediction
from fastdiff.diffusion.solvers import SOLVERS, Grid
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.fast.decoder import Decoder, decoder_of
from fastdiff.models.fast.unet import unet_of
from fastdiff.runtime import stop
from fastdiff.runtime.errors import as_field
from fastdiff.sampling import solver_table
from fastdiff.sampling.engine import Compile, Engine, Inputs, Walk
from fastdiff.sampling.solver_table import Table


@dataclass(frozen=True)
class Settings:
    """How to walk from noise to an image."""

    scheduler: str = "dpm++"
    num_steps: int = 25
    guidance: float = 7.5  # u + w (c - u); 1 or less = the conditional network alone
    spacing: str | None = None  # None: the scheduler's own
    eta: float = 0.0
    timesteps: tuple[int, ...] | None = None  # explicit, descending; they go before spacing and num_steps

    def __post_init__(self) -> None:
        if self.scheduler not in SOLVERS:
            raise ValueError(f"{as_field('scheduler', self.scheduler)}: one of {', '.join(SOLVERS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, not {self.eta}")

    @classmethod
    def usual(cls, family: Family) -> "Settings":
        """How the family's checkpoints are usually sampled."""
        return cls(*family.sampling)

    @classmethod
    def of(cls, recipe: Recipe, default: "Settings", **given: Any) -> "Settings":
        """Given values first, then the recipe's, then the default's."""
        names = ("scheduler", "num_steps", "guidance", "spacing", "eta", "timesteps")
        # getattr: a loop over fields that both have
        from_recipe = {k: getattr(recipe, k) for k in names if getattr(recipe, k) is not None}
        chosen = from_recipe | {k: v for k, v in given.items() if v is not None}
        if "scheduler" in chosen and "spacing" not in chosen:
            chosen["spacing"] = None  # a spacing belongs to the scheduler it came with
        if given.get("spacing") or len(chosen.get("timesteps") or ()) != chosen.get("num_steps"):
            chosen["timesteps"] = None  # and timesteps to their number
        return replace(default, **chosen)

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def calls(self) -> int:
        """Network evaluations per image: a guided step costs two."""
        return self.num_steps * (2 if self.guided else 1)

    def grid(self, schedule: Any, scheduler_config: dict[str, Any]) -> Grid:
        spacing = self.spacing or SOLVERS[self.scheduler].spacing
        if self.timesteps:
            t = torch.tensor(self.timesteps)
        else:
            t = schedule.grid(self.num_steps, spacing, scheduler_config.get("steps_offset", 0))
        final = None if scheduler_config.get("set_alpha_to_one", True) else 0
        return Grid(schedule, t, final, start_scale=spacing in {"trailing", "linspace"}, eta=self.eta)


class SeededNoise:
    """Standard normals (B, C, h, w), row i from seed i's own generator."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


class Sampler:
    """A denoiser and a VAE of one checkpoint.

    `compile` is what happens on a GPU: a graph of the whole walk with the decoder, and its compiled form when that is ready
    (auto) or before the first picture (max); off for networks that are still trained, since a graph keeps their adapters.
    On the CPU `openvino` has network and decoder compiled by it at the first batch of each shape.
    """

    def __init__(
        self,
        base: Checkpoint,
        denoiser: Denoiser,
        vae: nn.Module | Decoder,
        *,
        device: torch.device | str = "cpu",
        compile: Compile = "off",
    ) -> None:
        self.base, self.denoiser, self.device = base, denoiser.to(device), device
        self.vae = vae if isinstance(vae, Decoder) else vae.to(device)
        self.engine = Engine(self.denoiser, lambda latents: autoencoder.decode(self.vae, latents), device, compile=compile)
        self.tables: dict[Settings, Table] = {}
        self.told: tuple[tuple[Any, ...], Inputs] | None = None

    @classmethod
    def opened(
        cls, base: Checkpoint, *, device: torch.device | str = "cpu", compile: Compile = "auto", vae: nn.Module | None = None
    ) -> "Sampler":
        """To draw with and nothing else: the checkpoint's networks folded, on that device, in the checkpoint's precision."""
        denoiser = Denoiser(unet_of(base, device=device), base.schedule(), base.prediction_type)
        decoder = decoder_of(base, vae, dtype=decoding(base.dtype), device=device)
        return cls(base, denoiser, decoder, device=device, compile=compile)

    def table(self, settings: Settings) -> Table:
        if settings not in self.tables:
            grid = settings.grid(self.denoiser.schedule, self.base.scheduler_config)
            self.tables[settings] = solver_table.table(settings.scheduler, grid, self.denoiser.kind).to(self.device)
        return self.tables[settings]

    def noise(self, table: Table, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """All that a walk draws (draws, B, C, h, w), on the device without waiting for it."""
        draw = SeededNoise(seeds, (self.denoiser.net.config.in_channels, *size), "cpu")
        noise = torch.stack([draw() for _ in range(table.draws)])
        return (noise.pin_memory() if on_cuda(self.device) else noise).to(self.device, non_blocking=True)

    def inputs(self, table: Table, cond: Cond, uncond: Cond | None, settings: Settings, px: int | None = None) -> Inputs:
        """What the network is told of prompts; of the same ones as last time the same tensors, so that nothing is copied."""
        key = (table, cond, uncond, px)
        if self.told is None or any(a is not b for a, b in zip(self.told[0], key, strict=True)):
            rows = cond
            if uncond is not None:  # guidance is of the text alone: both halves see the same control
                uncond = uncond if len(uncond) == len(cond) else uncond.expand(len(cond))
                rows = Cond.cat([cond, uncond.with_control(cond.control)])
            if px is not None and self.base.family.size_conditioned:
                rows = with_size(rows, px)
            if self.denoiser.guidance_embedded:
                rows = rows.with_guidance(torch.full((len(rows),), settings.guidance))
            self.told = key, self.engine.inputs(table, rows.map(lambda v: v.to(self.device)))
        return self.told[1]

    def walk(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int], px: int | None = None
    ) -> Walk:
        """The walk of one batch for latent size (h, w)."""
        guided, table = settings.guided and not self.denoiser.guidance_embedded, self.table(settings)
        inputs = self.inputs(table, cond, uncond if guided else None, settings, px)
        return Walk(table, self.noise(table, seeds, size), inputs, settings.guidance if guided else None)

    def latents(self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int]) -> Tensor:
        """Scaled latents (B, C, h, w) for latent size (h, w); cond has B rows, uncond one or B."""
        self.told = None  # the network may have been trained since
        if type(self.denoiser).forward is not Denoiser.forward:
            return self.solved(cond, uncond, seeds, settings, size)
        return self.engine.latents(self.walk(cond, uncond, seeds, settings, size))

    @torch.no_grad()
    def solved(self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int]) -> Tensor:
        """As `latents`, by the solver itself: for a denoiser whose answers are not those of its network."""
        noise = SeededNoise(seeds, (self.denoiser.net.config.in_channels, *size), self.device)
        cond, uncond = (c.map(lambda v: v.to(self.device)) for c in (cond, uncond))
        uncond = uncond if len(uncond) == len(cond) else uncond.expand(len(cond))

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            stop.check()
            p = self.denoiser(x, t, cond)
            return p.guide(self.denoiser(x, t, uncond), settings.guidance) if settings.guided else p

        grid = settings.grid(self.denoiser.schedule, self.base.scheduler_config)
        return SOLVERS[settings.scheduler].run(denoise, noise(), grid, noise)

    def pictures(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, resolution_px: int
    ) -> tuple[Tensor, Tensor]:
        """One batch: latents (B, C, h, w) and images (B, 3, H, W) in [-1, 1], on the CPU."""
        side = resolution_px // autoencoder.factor(self.vae)
        if self.base.family.size_conditioned:
            cond, uncond = (with_size(c, resolution_px) for c in (cond, uncond))
        z = self.latents(cond, uncond, seeds, settings, (side, side))
        return z.cpu(), autoencoder.decode(self.vae, z).cpu()

    def pixels(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, *, resolution_px: int, batch: int = 50
    ) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] on the CPU, in batches."""
        found = []
        for i in range(0, len(seeds), batch):
            rows = slice(i, i + batch)
            negative = uncond if len(uncond) == 1 else uncond[rows]
            found.append(self.pictures(cond[rows], negative, seeds[rows], settings, resolution_px)[1])
        return torch.cat(found)

    def stream(
        self, batches: Iterable[tuple[Cond, Cond, Sequence[int]]], settings: Settings, resolution_px: int
    ) -> Iterator[Tensor]:
        """Images (B, H, W, 3), uint8, on the CPU, of each (prompts, unconditional, seeds).

        While the caller has one batch the device draws the next. The same Cond objects again are not folded again. The
        networks must not change meanwhile.
        """
        side, waiting = resolution_px // autoencoder.factor(self.vae), deque()
        self.told = None
        for cond, uncond, seeds in batches:
            walk = self.walk(cond, uncond, seeds, settings, (side, side), resolution_px)
            waiting.append(Copy(self.engine.bytes(walk)))
            if len(waiting) > 1:
                yield waiting.popleft().wait()
        yield from (copy.wait() for copy in waiting)


class Copy:
    """A tensor on its way from the device; `wait` returns it."""

    def __init__(self, source: Tensor) -> None:
        self.event = None
        if source.is_cuda:
            self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self.host.copy_(source, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = source.cpu().clone()  # the engine may write there again

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


def on_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def decoding(dtype: torch.dtype) -> torch.dtype:
    """What a decoder runs in: bf16 has the range of fp32, in fp16 SDXL's overflows."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def at_once(side: int) -> int:
    """How many latents of that side a modest card samples in one batch: 8 of SD1.5's, 2 of SDXL's, 64 of the smallest."""
    return max(1, min(64, 8 * 64 * 64 // side**2))


def with_size(cond: Cond, resolution_px: int) -> Cond:
    """SDXL's size conditioning of a square, uncropped picture."""
    return replace(cond, time_ids=text.size_ids(resolution_px, resolution_px, len(cond)))
