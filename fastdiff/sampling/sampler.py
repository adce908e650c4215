"""Prompts or conditions + seeds -> images, for users, `sample`, previews, evaluation and teacher data alike.

Image i depends on seed i alone, never on its place in a batch: each has its own CPU generator for the start noise and for
every later draw.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.schedule import Prediction
from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.lora import apply
from fastdiff.lora.file import Weighted, with_weights
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.fast.decoder import Decoder, decoder_of
from fastdiff.models.fast.unet import unet_of
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling import assemble, pictures, solver_table
from fastdiff.sampling.engine import Compile, Copy, Engine, Inputs, Walk, on_cuda
from fastdiff.sampling.pictures import Pictures
from fastdiff.sampling.settings import Settings, asked
from fastdiff.sampling.solver_table import Table


class SeededNoise:
    """Standard normals (B, C, h, w), row i from seed i's own generator."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


class Sampler:
    """Draws pictures with a checkpoint and the LoRAs that it wears, as their own recipe asks for.

        fast = Sampler("sdxl", loras={"lcm.safetensors": 1.0})
        fast("a red apple", seeds=range(4)).save("apples.png")

    `base`: a `Checkpoint`, alias, hub id, folder or single file. `loras`: {FILE or Lora: WEIGHT}, or a list of FILE or
    FILE=WEIGHT. `vae`, `controlnet`: another VAE, and a ControlNet, which acts `control_scale` strong: each a diffusers folder, a
    hub id or a network. `device`: auto, cpu, cuda or mps. `precision`: auto (bf16 on CUDA, else fp32; an open checkpoint keeps
    its own), fp32, bf16 or fp16. `allow_partial` applies what fits of a LoRA that does not fit whole, `remap` moves LoRAs of the
    network that the base was pruned from, `allow_pickle` reads .ckpt, .pt and .bin files. `identified` also hashes all weights.

    `compile` is what happens on a GPU: a graph of the whole walk with the decoder, and its compiled form when that is ready
    (auto) or before the first picture (max); off for networks that are still trained, since a graph keeps their adapters.
    On the CPU `openvino` has network and decoder compiled by it at the first batch of each shape.

    What is given stays as it is: with LoRAs `Sampler.base` is a copy of the checkpoint that has them in its text encoders, and
    the network that draws is `denoiser`. UsageError or InputRefused where a part does not belong to the base.
    """

    def __init__(
        self,
        base: Checkpoint | str | Path,
        *,
        loras: Weighted = None,
        vae: str | Path | nn.Module | None = None,
        controlnet: str | Path | nn.Module | None = None,
        control_scale: float = 1.0,
        device: torch.device | str = "auto",
        precision: str = "auto",
        compile: Compile = "auto",
        allow_partial: bool = False,
        allow_pickle: bool = False,
        remap: bool = False,
        identified: bool = False,
    ) -> None:
        device = assemble.pick_device(device)
        self.source = assemble.open_base(base, precision, device, allow_pickle=allow_pickle)
        self.loras = with_weights(loras)
        self.lora_options = dict(remap=remap, allow_partial=allow_partial, allow_pickle=allow_pickle)
        ready = assemble.load_loras(self.source, self.loras, **self.lora_options)
        self.recipe = assemble.recipe_of(self.source, ready)
        self.same_family()
        alone = not ready and not identified
        self.base = own = self.source if alone else assemble.separate(self.source, "unet", "text_encoders")
        self.coverage = apply.apply(own, ready, allow_partial=allow_partial).coverage
        self.controlnet, self.other_vae = assemble.open_controlnet(own, controlnet), assemble.open_vae(own, vae)
        nets = [own.unet, self.other_vae or own.vae, *([self.controlnet] if self.controlnet else [])] if identified else []
        self.identity = tuple(fingerprint(net) for net in nets)
        net, kind = unet_of(own, device=device), self.recipe.predicts(own.prediction_type)
        if not alone:
            own.release("unet")  # it was loaded for LoRAs or hashes; its weights are the folded network's now
        denoiser = Denoiser(net, own.schedule(), kind, controlnet=self.controlnet, strength=control_scale)
        self.connect(denoiser, decoder_of(own, self.other_vae, dtype=decoding(own.dtype), device=device), device, compile)

    @classmethod
    def of_networks(
        cls,
        base: Checkpoint,
        denoiser: Denoiser,
        vae: nn.Module | Decoder,
        *,
        device: torch.device | str = "cpu",
        compile: Compile = "off",
        recipe: Recipe | None = None,
    ) -> "Sampler":
        """Draws with a denoiser and a VAE as they are, also while they train; the rest is the checkpoint's."""
        self = cls.__new__(cls)
        self.base, self.source, self.recipe = base, None, recipe or Recipe()
        self.coverage, self.identity = [], ()
        self.connect(denoiser, vae, device, compile)
        return self

    def connect(self, denoiser: Denoiser, vae: nn.Module | Decoder, device: torch.device | str, compile: Compile) -> None:
        """Put the networks on the device, and the engine over them."""
        self.denoiser, self.device = denoiser.to(device), device
        self.vae = vae if isinstance(vae, Decoder) else vae.to(device)
        self.engine = Engine(self.denoiser, lambda latents: autoencoder.decode(self.vae, latents), device, compile=compile)
        self.tables: dict[Settings, Table] = {}
        self.latest: tuple[tuple[Any, ...], Inputs] | None = None

    def same_family(self) -> None:
        """UsageError where the recipe is of another family than the base, before anything heavy loads."""
        wants, family = self.recipe.family, self.source.family
        if not family.has_name(wants):
            raise UsageError(f"`lora`: distilled from {wants}, but `base` is {family}", f"use {as_field('base', wants)}")

    @property
    def settings(self) -> Settings:
        """What the recipe asks for, and where it says nothing the family's usual settings."""
        return Settings.of(self.recipe, Settings.usual(self.base.family))

    # ---- prompts to pictures

    @cached_property
    def prompts(self) -> text.Prompts:
        """The text encoders, opened at the first prompt; they remember prompts."""
        return text.Prompts(self.base, device=self.device)

    def __call__(self, prompts: str | Sequence[str], *, seeds: int | Iterable[int] = (0,), **how: Any) -> Pictures:
        """Pictures of each prompt from every seed, prompt after prompt; the options are `stream`'s.

        The pixels are those of `fastdiff sample`. `Pictures` is a list of PIL pictures with a `save(path)`.
        """
        seeds = [seeds] if isinstance(seeds, int) else list(seeds)
        lines = [prompts] if isinstance(prompts, str) else list(prompts)
        names = [f"{k:04d}-seed{seed}.png" for k in range(len(lines)) for seed in seeds]
        return Pictures(self.stream(lines, seeds=seeds, **how), names=names, columns=len(seeds))

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Iterable[int] = (0,),
        negative: str = "",
        num_steps: int | None = None,
        scheduler: str | None = None,
        guidance: float | None = None,
        spacing: str | None = None,
        eta: float | None = None,
        resolution_px: int | None = None,
        control_image: Any = None,
        batch_size: int = 4,
    ) -> Iterator[Any]:
        """PIL pictures one by one, each prompt from every seed; the next batch is drawn while the caller has this one.

        Of one prompt the seeds may go on for ever (`itertools.count()`). Steps, scheduler (ddim, euler, dpm++, lcm, tcd),
        guidance (u + w (c - u); 1 or less = none), spacing of the timesteps and eta (TCD's gamma) are the recipe's unless given.
        `negative` is what to avoid. `resolution_px`: pixels a side, the family's own unless given. `control_image`: what a
        ControlNet is shown, a path, a PIL picture or pixels (3, H, W) in [0, 1]. `batch_size` pictures are drawn at once.
        """
        given = dict(scheduler=scheduler, num_steps=num_steps, guidance=guidance, spacing=spacing, eta=eta)
        settings = asked(self.recipe, Settings.usual(self.base.family), **given)
        if negative and not settings.guided:
            console.warn("`negative` has no effect at guidance 1 or less")
        if (control_image is None) != (self.denoiser.controlnet is None):
            raise UsageError("`controlnet` and `control_image` go together", "give both, or none")
        lines = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds] if isinstance(seeds, int) else seeds if len(lines) == 1 else list(seeds)
        px = resolution_px or self.base.resolution_px
        control = None if control_image is None else pictures.control_of(control_image, px)
        cond, uncond = self.conds(lines, negative=negative, control=control)
        jobs = ((k, int(seed)) for k in range(len(lines)) for seed in seeds)
        facts = lambda k, seed: {"prompt": lines[k], "negative": negative, "seed": seed, **self.facts, **asdict(settings)}
        return self.portraits(cond, uncond, jobs, facts, settings, px, batch_size)

    def portraits(
        self, cond: Cond, uncond: Cond, jobs: Iterable[tuple[int, int]], facts: Any, settings: Settings, px: int, batch_size: int
    ) -> Iterator[Any]:
        """A PIL picture of each job (row of cond, seed), with its facts."""
        kept: deque[list[tuple[int, int]]] = deque()
        waiting = iter(jobs)

        def batches() -> Iterator[tuple[Cond, Cond, list[int]]]:
            rows, part = None, cond
            while batch := list(islice(waiting, batch_size)):
                kept.append(batch)
                if rows != (rows := [k for k, _ in batch]):
                    part = cond[rows]
                yield part, uncond, [seed for _, seed in batch]

        for batch in self.stream_batches(batches(), settings, px):
            for pixels, job in zip(batch, kept.popleft(), strict=True):
                yield pictures.portrait(pixels, facts(*job))

    def conds(self, lines: Sequence[str], *, negative: str = "", control: Tensor | None = None) -> tuple[Cond, Cond]:
        """Conditions of the prompts, one row each, and of the negative prompt; `control` (3, H, W) in [0, 1] is one for all."""
        cond = self.prompts(list(lines))
        if control is not None:
            cond = cond.with_control(control.to(self.device).contiguous().expand(len(cond), -1, -1, -1))
        return cond, self.prompts([negative]) if negative else self.prompts.unconditional()

    @property
    def facts(self) -> dict[str, Any]:
        """What a picture is told to be drawn with; names of files alone."""
        return {"base": Path(self.base.ref).name, "lora": [f"{Path(c['file']).name}={c['weight']:g}" for c in self.coverage]}

    def pipeline(self) -> Any:
        """The stock diffusers pipeline with the LoRAs folded in and the recipe's scheduler, on the same device.

        Its networks are its own. Steps, guidance, a control picture and its scale are arguments of its call.
        """
        if self.source is None:
            raise UsageError("pipeline(): only of a sampler that was opened from a checkpoint, not of networks in memory")
        own = assemble.separate(self.source, "unet", "vae", "text_encoders")
        ready = assemble.load_loras(own, self.loras, **self.lora_options)
        apply.apply(own, ready, allow_partial=self.lora_options["allow_partial"])
        settings, kind = self.settings, self.denoiser.kind
        scheduler = assemble.stock_scheduler(settings.scheduler, own.scheduler_config, spacing=settings.spacing, kind=kind)
        return assemble.stock_pipeline(own, scheduler, vae=self.other_vae, controlnet=self.controlnet).to(self.device)

    # ---- conditions to tensors

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
        if self.latest is None or any(a is not b for a, b in zip(self.latest[0], key, strict=True)):
            rows = cond
            if uncond is not None:  # guidance is of the text alone: both halves see the same control
                uncond = uncond if len(uncond) == len(cond) else uncond.expand(len(cond))
                rows = Cond.cat([cond, uncond.with_control(cond.control)])
            if px is not None and self.base.family.size_conditioned:
                rows = with_size(rows, px)
            if self.denoiser.guidance_embedded:
                rows = rows.with_guidance(torch.full((len(rows),), settings.guidance))
            self.latest = key, self.engine.inputs(table, rows.map(lambda v: v.to(self.device)))
        return self.latest[1]

    def walk(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int], px: int | None = None
    ) -> Walk:
        """The walk of one batch for latent size (h, w)."""
        guided, table = settings.guided and not self.denoiser.guidance_embedded, self.table(settings)
        inputs = self.inputs(table, cond, uncond if guided else None, settings, px)
        return Walk(table, self.noise(table, seeds, size), inputs, settings.guidance if guided else None)

    def latents(self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int]) -> Tensor:
        """Scaled latents (B, C, h, w) for latent size (h, w); cond has B rows, uncond one or B."""
        self.latest = None  # the network may have been trained since
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
        images = []
        for i in range(0, len(seeds), batch):
            rows = slice(i, i + batch)
            negative = uncond if len(uncond) == 1 else uncond[rows]
            images.append(self.pictures(cond[rows], negative, seeds[rows], settings, resolution_px)[1])
        return torch.cat(images)

    def stream_batches(
        self, batches: Iterable[tuple[Cond, Cond, Sequence[int]]], settings: Settings, resolution_px: int
    ) -> Iterator[Tensor]:
        """Images (B, H, W, 3), uint8, on the CPU, of each (prompts, unconditional, seeds).

        While the caller has one batch the device draws the next. The same Cond objects again are not folded again. The
        networks must not change meanwhile.
        """
        side, waiting = resolution_px // autoencoder.factor(self.vae), deque()
        self.latest = None
        for cond, uncond, seeds in batches:
            walk = self.walk(cond, uncond, seeds, settings, (side, side), resolution_px)
            waiting.append(Copy(self.engine.bytes(walk)))
            if len(waiting) > 1:
                yield waiting.popleft().wait()
        yield from (copy.wait() for copy in waiting)


def decoding(dtype: torch.dtype) -> torch.dtype:
    """What a decoder runs in: bf16 has the range of fp32, in fp16 SDXL's overflows."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def at_once(side: int) -> int:
    """How many latents of that side a modest card samples in one batch: 8 of SD1.5's, 2 of SDXL's, 64 of the smallest."""
    return max(1, min(64, 8 * 64 * 64 // side**2))


def with_size(cond: Cond, resolution_px: int) -> Cond:
    """SDXL's size conditioning of a square, uncropped picture."""
    return replace(cond, time_ids=text.size_ids(resolution_px, resolution_px, len(cond)))
