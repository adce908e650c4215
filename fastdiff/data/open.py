"""Open training data: the shipped emoji pictures, samples of the teacher, a folder, wds:SHARDS or hf:ID."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji, encode, folder, held_out, streams, teacher
from fastdiff.data.batch import Batch, Buckets, Data, Encoded
from fastdiff.data.images import Framing
from fastdiff.data.prompts import training_prompts
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.settings import Settings

__all__ = ["Batch", "Buckets", "Data", "Encoded", "Framing", "Needs", "open_data"]


Needs = Literal["latents", "pairs", "prompts"]
STREAMED = 10_000  # default `max_images` of streams, whose length is unknown


def open_data(
    base: Checkpoint,
    spec: str | None = None,
    *,
    prompts: str | None = None,
    resolution_px: int | None = None,
    pairs: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    sampling: Settings | None = None,
    needs: Needs = "latents",
    framing: Framing | None = None,
    max_images: int | None = None,
) -> Data:
    """Open and encode a data set, whose `batch(n, generator)` draws training batches. The VAE and text encoders can then go.

    `spec` is the value of `data` (default: the family's). `prompts` is a file with one prompt per line, for the teacher's
    samples. `resolution_px` is the side in pixels (default: the base's). `framing` (default: squares of the resolution) and
    `max_images` apply to pictures that are read. The teacher makes `pairs` samples with the settings `sampling` (default: the
    family's), or none if `needs` is "prompts". Only the teacher gives pairs of noise and sample.
    Raises UsageError if options do not go together or the data does not exist, and InputRefused if no picture is usable.
    """
    spec, resolution_px = spec or base.family.default_data, resolution_px or base.resolution_px
    if needs == "pairs" and spec != "teacher":
        raise UsageError(f"{as_field('data', spec)}: the loss needs pairs of noise and picture", "use `data=teacher`")
    framing = framing or Framing(resolution_px)
    unused = {"buckets": framing.buckets, "random_crops": framing.random_crops, "flip": framing.flip, "max_images": max_images}
    given = next((name for name, value in unused.items() if value), None)
    if given and spec.partition(":")[0] in {SHIPPED.data, "teacher"}:
        hint = "it applies to pictures that are read: from a folder, wds: or hf:"
        raise UsageError(f"{as_field(given)}: has no effect with {as_field('data', spec)}", hint)
    if spec in {SHIPPED.data, *(f"{SHIPPED.data}:{style}" for style in emoji.STYLES)}:
        if resolution_px != emoji.CELL_PX:
            raise UsageError(f"`data={spec}`: the pictures are {emoji.CELL_PX} px; use `resolution={emoji.CELL_PX}`")
        style = spec.partition(":")[2] or emoji.STYLES[0]
        return emoji.encode(base, *held_out.images(held_out.TRAINED), device=device, style=style)
    if spec == "teacher":
        lines = training_prompts(base.family, prompts)
        chosen = sampling or Settings.of_base(base)
        n = 0 if needs == "prompts" else pairs
        if prompts and 0 < n < len(lines):
            console.warn(f"`pairs={n}`: only the first {n} of the {len(lines)} prompts are used")
        return teacher.encode(base, lines, resolution_px, chosen, pairs=n, seed=seed, device=device)
    framing = replace(framing, least_px=base.pixels_per_latent)
    if spec.startswith(("wds:", "hf:")):
        kind, _, location = spec.partition(":")
        source = streams.WebDataset(location) if kind == "wds" else streams.HuggingFace(location)
        return encode.encode(base, source, framing, most=max_images or STREAMED, device=device)
    if Path(spec).is_dir():
        return encode.encode(base, folder.Folder(Path(spec)), framing, most=max_images, device=device)
    kinds = f"{SHIPPED.data}, {SHIPPED.data}:STYLE, teacher, wds:SHARDS, hf:ID, or a folder of images and captions"
    raise UsageError(f"{as_field('data', spec)}: no such data", f"use {kinds}")
