"""Sampler: draws images from prompts or conditions and seeds. Users, `sample`, previews, evaluation and teacher data use it.

Image i depends on its prompt and on seed i, never on its place in a batch: each seed has its own CPU generator for the start
noise and all later noise.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import published
from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.diffusion.schedule import Prediction
from fastdiff.lora import apply
from fastdiff.lora.file import Weighted, with_weights
from fastdiff.lora.merging import recipe_of
from fastdiff.models import autoencoder, text
from fastdiff.models.autoencoder import decoding
from fastdiff.models.denoiser import Cond, Denoiser
from fastdiff.models.fast.decoder import Decoder, decoder_of
from fastdiff.models.fast.unet import unet_of
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import UsageError, as_field, device_errors_explained
from fastdiff.sampling import assemble, linear_walk, pictures
from fastdiff.sampling.engine import Compile, Copy, Engine, Inputs, Walk, on_cuda
from fastdiff.sampling.linear_walk import Table
from fastdiff.sampling.pictures import Pictures
from fastdiff.sampling.settings import Settings, asked, listed


class SeededNoise:
    """Each call draws standard normal noise (B, C, h, w); row i comes from the generator of seed i. `shape` is (C, h, w)."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device = shape, device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


class Sampler:
    """Draws pictures with a checkpoint and LoRAs, by default with the settings of their recipe.

        fast = Sampler("sdxl", loras={"lcm.safetensors": 1.0})
        fast("a red apple", seeds=range(4)).save("apples.png")

    `base` is a `Checkpoint`, alias, hub id, folder or single file. `loras` is {FILE or Lora: WEIGHT}, or a list of FILE or
    FILE=WEIGHT. `vae` and `controlnet` are each a diffusers folder, a hub id or a network, and `vae` may be a single file.
    `control_scale` multiplies the effect of the ControlNet. `device` is auto, cpu, cuda or mps. `precision` is fp32, bf16, fp16
    or auto (an open checkpoint keeps its dtype, any other gets bf16 on CUDA, else fp32). `allow_partial` applies the parts of a
    LoRA that fit, `remap` moves LoRAs to a pruned base, `allow_pickle` reads .ckpt, .pt and .bin files. `recipe` replaces what
    the files say of sampling: a `Recipe`, or a name of checkpoints/published.py, or "none". Of a prompt `max_tokens` are
    read, a multiple of 75, and `clip_skip` last layers of the text encoders are left out, as diffusers counts them; by default
    225, and as the files say. `identified` also hashes all weights, into `identity`.

    `compile` on a GPU: `off`, or a CUDA graph of all steps and the decoder, which a compiled graph replaces when it is ready
    (`auto`) or before the first picture (`max`). Use `off` for networks that are still trained: a graph keeps old adapters. On
    the CPU, `openvino` compiles the network and decoder at the first batch of each shape.

    The given checkpoint does not change: with LoRAs, `Sampler.base` is a copy that has them in its text encoders, and
    `denoiser` is the network that draws. Raises UsageError or InputRefused if a part is not found or does not fit the base.
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
        recipe: str | Recipe | None = None,
        max_tokens: int | None = None,
        clip_skip: int | None = None,
        identified: bool = False,
    ) -> None:
        device = assemble.pick_device(device)
        self.source = assemble.open_base(base, precision, device, allow_pickle=allow_pickle).reading(max_tokens, clip_skip)
        self.source.schedule()  # refuses a base without one before anything is loaded
        self.loras = with_weights(loras)
        given, how = published.asked(recipe), dict(remap=remap, allow_partial=allow_partial, allow_pickle=allow_pickle)
        self.lora_options = how | {"recognise": given is None}
        ready = assemble.load_loras(self.source, self.loras, **self.lora_options)
        self.recipe = recipe_of(ready, self.source) if given is None else given
        if given is not None:
            published.warn_of_family(given, self.source.family.name)
            console.note(f"recipe: {published.settings_text(given) or 'none, as the base is usually drawn'}")
        self.same_family()
        self.source = assemble.with_clip_skip(self.source, self.recipe)
        assemble.tell_clip_skip(self.source, ready)
        alone = not ready and not identified
        self.base = own = self.source if alone else assemble.separate(self.source, "unet", "text_encoders")
        self.coverage = apply.apply(own, ready, allow_partial=allow_partial).coverage
        self.controlnet = assemble.open_controlnet(own, controlnet)
        self.other_vae = assemble.open_vae(own, vae, allow_pickle=allow_pickle)
        nets = [own.unet, self.other_vae or own.vae, *([self.controlnet] if self.controlnet else [])] if identified else []
        self.identity = tuple(fingerprint(net) for net in nets)
        net, kind = unet_of(own, device=device), self.recipe.predicts(own.prediction_type)
        if not alone:
            own.release("unet")  # loaded for LoRAs or hashes; the folded network now has its weights
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
        """Make a sampler of a denoiser and VAE in memory, even while they train. Everything else comes from `base`."""
        self = cls.__new__(cls)
        self.base, self.source, self.recipe = base, None, recipe or Recipe()
        self.coverage, self.identity = [], ()
        self.connect(denoiser, vae, device, compile)
        return self

    def connect(self, denoiser: Denoiser, vae: nn.Module | Decoder, device: torch.device | str, compile: Compile) -> None:
        """Move the networks to the device and make the engine for them."""
        self.denoiser, self.device = denoiser.to(device), device
        self.vae = drawing(self.base, vae, device)
        self.engine = Engine(self.denoiser, partial(autoencoder.decode, self.vae), device, compile=compile)
        self.tables: dict[Settings, Table] = {}
        self.latest: tuple[tuple[Any, ...], Inputs] | None = None  # the last arguments of `inputs`, and the result

    def same_family(self) -> None:
        """Raise UsageError if the recipe is for another family than the base's. Called before any network is loaded."""
        wants, family = self.recipe.family, self.source.family
        if not family.has_name(wants):
            raise UsageError(f"`lora`: it was distilled from {wants}, but `base` is {family}", f"use {as_field('base', wants)}")

    @property
    def settings(self) -> Settings:
        """The recipe's settings, completed by the usual settings of the family."""
        return Settings.of(self.recipe, Settings.usual(self.base.family))

    # ---- prompts to pictures

    @cached_property
    def prompts(self) -> text.Prompts:
        """The text encoders, loaded at the first prompt; they cache encoded prompts."""
        return text.Prompts(self.base, device=self.device)

    @device_errors_explained()
    def __call__(self, prompts: str | Sequence[str], *, seeds: int | Iterable[int] = (0,), **how: Any) -> Pictures:
        """Draw each prompt from every seed, prompt after prompt. Takes the options of `stream`.

        Returns `Pictures`, a list of PIL pictures with a `save(path)`. The pixels equal those of `fastdiff sample`.
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
        guidance_rescale: float | None = None,
        resolution_px: int | None = None,
        control_image: Any = None,
        batch_size: int = 4,
    ) -> Iterator[Any]:
        """Yield PIL pictures one by one, each prompt from every seed. The next batch is drawn while the caller uses this one.

        With one prompt, seeds may be endless (`itertools.count()`). Steps, scheduler (ddim, euler, dpm++, dpm++sde, lcm, tcd),
        guidance (w in u + w (c - u); 1 or less: none), spacing of the timesteps and eta (TCD's gamma) default to the recipe's.
        `guidance_rescale` (0 to 1) keeps the spread of unguided outputs (Lin et al. 2024), for zero-terminal-SNR bases about 0.7.
        `negative` is a prompt of what to avoid. `resolution_px` is the side in pixels (default: the base's). `control_image`,
        for a ControlNet, is a path, a PIL picture or pixels (3, H, W) in [0, 1]. `batch_size` pictures are drawn at once.
        Raises UsageError if only one of ControlNet and `control_image` is there, and ValueError for invalid settings.
        """
        given = dict(scheduler=scheduler, num_steps=num_steps, guidance=guidance, spacing=spacing, eta=eta)
        settings = asked(self.recipe, Settings.usual(self.base.family), **given, guidance_rescale=guidance_rescale)
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
        """Yield a PIL picture of each job (row of cond, seed), with the metadata `facts(row, seed)`."""
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
        """Encode prompts to a Cond, a row each, and the negative prompt to another. All get `control` (3, H, W) in [0, 1]."""
        for name, values in (("prompts", lines), ("negative", [negative])):
            if not values or not all(isinstance(value, str) for value in values):
                raise UsageError(f"`{name}`: not a text", "give each prompt as a str")
        cond = self.prompts(list(lines))
        if control is not None:
            cond = cond.with_control(control.to(self.device).contiguous().expand(len(cond), -1, -1, -1))
        return cond, self.prompts([negative], "negative") if negative else self.prompts.unconditional()

    @property
    def facts(self) -> dict[str, Any]:
        """The base and LoRAs for the metadata of a picture; file names without folders."""
        return {"base": Path(self.base.ref).name, "lora": [f"{Path(c['file']).name}={c['weight']:g}" for c in self.coverage]}

    def pipeline(self) -> Any:
        """Build the diffusers pipeline with the LoRAs merged in and the recipe's scheduler, on the same device.

        It has its own copies of the networks. Pass steps, guidance, clip_skip, control picture and control scale when you call
        it; of a long prompt it reads one window.
        Raises UsageError for a sampler of networks in memory.
        """
        if self.source is None:
            raise UsageError("pipeline(): this sampler was made of networks in memory; open one from a checkpoint")
        own = assemble.separate(self.source, "unet", "vae", "text_encoders")
        ready = assemble.load_loras(own, self.loras, **self.lora_options)
        apply.apply(own, ready, allow_partial=self.lora_options["allow_partial"])
        settings, kind = self.settings, self.denoiser.kind
        scheduler = assemble.stock_scheduler(settings.scheduler, own.scheduler_config, spacing=settings.spacing, kind=kind)
        return assemble.stock_pipeline(own, scheduler, vae=self.other_vae, controlnet=self.controlnet).to(self.device)

    # ---- conditions to tensors

    def table(self, settings: Settings) -> Table:
        """Return the solver's table for these settings, on the device; computed once."""
        if settings not in self.tables:
            schedule = self.denoiser.schedule
            grid = settings.grid(schedule, self.base.scheduler_config)
            if schedule.zero_terminal_snr and settings.timesteps is None and grid.t[0] + 1 < len(schedule):
                how = f"`spacing={settings.spacing}`: begins at timestep {int(grid.t[0])}, which is not pure noise with this base"
                console.warn(f"{how}, but the walk begins with pure noise; use trailing")
            if settings.guidance_rescale and settings.guided and self.denoiser.guidance_embedded:
                console.warn("`guidance_rescale` has no effect: the network takes the guidance as an input")
            self.tables[settings] = linear_walk.table(settings.scheduler, grid, self.denoiser.kind).to(self.device)
        return self.tables[settings]

    def noise(self, table: Table, seeds: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Draw all noise of a walk (draws, B, C, h, w) for latent size (h, w), and copy it to the device without waiting."""
        draw = SeededNoise(seeds, (self.denoiser.net.config.in_channels, *size), "cpu")
        noise = torch.stack([draw() for _ in range(table.draws)])
        return (noise.pin_memory() if on_cuda(self.device) else noise).to(self.device, non_blocking=True)

    def inputs(self, table: Table, cond: Cond, uncond: Cond | None, settings: Settings, px: int | None = None) -> Inputs:
        """Compute the network inputs of a walk. The same arguments as last time give the same tensors, so nothing is copied."""
        key = (table, cond, uncond, px)
        if self.latest is None or any(a is not b for a, b in zip(self.latest[0], key, strict=True)):
            rows = cond
            if uncond is not None:  # guidance is about the text: both halves get the same control picture
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
        """Prepare the walk of one batch for latent size (h, w); `px` is the picture's side, for SDXL's size conditioning."""
        guided, table = settings.guided and self.guided_outside(settings), self.table(settings)
        inputs = self.inputs(table, cond, uncond if guided else None, settings, px)
        weights = tuple(w if guided and w > 1 else None for w in settings.weights)
        return Walk(table, self.noise(table, seeds, size), inputs, weights, settings.guidance_rescale)

    def guided_outside(self, settings: Settings) -> bool:
        """Return whether guidance combines two answers of the network, because the network does not take w as an input.

        Raises UsageError if it takes w and the settings give each step its own: its inputs are computed for one w.
        """
        if self.denoiser.guidance_embedded and settings.step_guidance is not None:
            weights = listed(settings.step_guidance)
            raise UsageError(f"step_guidance {weights}: this network takes one for all steps, as an input", "give one `guidance`")
        return not self.denoiser.guidance_embedded

    def latents(self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int]) -> Tensor:
        """Draw scaled latents (B, C, h, w) for latent size (h, w). `cond` has B rows, `uncond` one or B."""
        self.latest = None  # folded inputs are stale if the network was trained since
        if type(self.denoiser).forward is not Denoiser.forward:
            return self.solved(cond, uncond, seeds, settings, size)
        return self.engine.latents(self.walk(cond, uncond, seeds, settings, size))

    @torch.no_grad()
    def solved(self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, size: tuple[int, int]) -> Tensor:
        """Like `latents`, by running the solver itself: for a subclass of Denoiser that overrides `forward`."""
        noise = SeededNoise(seeds, (self.denoiser.net.config.in_channels, *size), self.device)
        cond, uncond = (c.map(lambda v: v.to(self.device)) for c in (cond, uncond))
        uncond = uncond if len(uncond) == len(cond) else uncond.expand(len(cond))

        weights, phi = iter(settings.weights), settings.guidance_rescale  # a solver calls `denoise` once a step

        def denoise(x: Tensor, t: Tensor) -> Prediction:
            stop.check()
            p, w = self.denoiser(x, t, cond), next(weights)
            return self.denoiser.combined(p, self.denoiser(x, t, uncond), w, x, t, phi) if w > 1 else p

        grid = settings.grid(self.denoiser.schedule, self.base.scheduler_config)
        return SOLVERS[settings.scheduler].run(denoise, noise(), grid, noise)

    def pictures(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, resolution_px: int
    ) -> tuple[Tensor, Tensor]:
        """Draw one batch. Returns latents (B, C, h, w) and images (B, 3, H, W) in [-1, 1], on the CPU."""
        side = resolution_px // autoencoder.factor(self.vae)
        if self.base.family.size_conditioned:
            cond, uncond = (with_size(c, resolution_px) for c in (cond, uncond))
        z = self.latents(cond, uncond, seeds, settings, (side, side))
        return z.cpu(), autoencoder.decode(self.vae, z).cpu()

    def pixels(
        self, cond: Cond, uncond: Cond, seeds: Sequence[int], settings: Settings, *, resolution_px: int, batch: int | None = None
    ) -> Tensor:
        """Draw N images, `batch` at a time (default: by their size). Returns pixels (N, 3, H, W) in [-1, 1] on the CPU."""
        batch, images = batch or min(50, at_once(resolution_px // autoencoder.factor(self.vae))), []
        for i in range(0, len(seeds), batch):
            rows = slice(i, i + batch)
            negative = uncond if len(uncond) == 1 else uncond[rows]
            images.append(self.pictures(cond[rows], negative, seeds[rows], settings, resolution_px)[1])
        return torch.cat(images)

    def stream_batches(
        self, batches: Iterable[tuple[Cond, Cond, Sequence[int]]], settings: Settings, resolution_px: int
    ) -> Iterator[Tensor]:
        """Yield images (B, H, W, 3), uint8, on the CPU, of each batch (cond, uncond, seeds).

        The device draws the next batch while the caller uses this one. Passing the same Cond objects again saves folding them
        again. The networks must not change meanwhile.
        """
        side, waiting = resolution_px // autoencoder.factor(self.vae), deque()
        self.latest = None
        for cond, uncond, seeds in batches:
            walk = self.walk(cond, uncond, seeds, settings, (side, side), resolution_px)
            waiting.append(Copy(self.engine.bytes(walk)))
            if len(waiting) > 1:
                yield waiting.popleft().wait()
        yield from (copy.wait() for copy in waiting)


def drawing(base: Checkpoint, vae: nn.Module | Decoder, device: torch.device | str) -> nn.Module | Decoder:
    """Return the decoder of pictures that are looked at or measured, on the device; `vae` is the checkpoint's or replaces it.

    On the CPU it is the VAE itself. Elsewhere it is the fast decoder in a safe dtype, which takes half of the memory; the VAE
    then stays where it is, and the decoder's memory is free again when the caller drops it.
    """
    if isinstance(vae, Decoder):
        return vae
    if torch.device(device).type == "cpu":
        return vae.to(device)
    decoder = decoder_of(base, vae, dtype=decoding(base.dtype), device=device)
    return decoder if isinstance(decoder, Decoder) else decoder.to(device)


def at_once(side: int, *, training: bool = False) -> int:
    """Return the batch size that a modest GPU can sample for a latent side: 8 for SD1.5's 64, 2 for SDXL's 128, at most 64.

    With `training`, gradients and optimiser are in memory too: then it is 4 for SD1.5 and 1 for SDXL.
    """
    return max(1, min(64, (4 if training else 8) * 64 * 64 // side**2))


def with_size(cond: Cond, resolution_px: int) -> Cond:
    """Return a Cond with SDXL's size conditioning for a square, uncropped picture of this side in px."""
    return replace(cond, time_ids=text.size_ids(resolution_px, resolution_px, len(cond)))
