"""Where training data comes from: `data` is emoji, teacher, FOLDER, wds:SHARDS or hf:ID."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data import emoji, encode, folder, streams, teacher
from fastdiff.data.batch import Batch, Buckets, Data, Encoded
from fastdiff.data.images import Framing
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.sampler import DEFAULTS, Settings

__all__ = ["Batch", "Buckets", "Data", "Encoded", "Framing", "Wants", "open_data"]


Wants = Literal["latents", "pairs", "prompts"]
STREAMED = 10_000  # images of a stream, whose end nobody knows


def open_data(
    base: Checkpoint,
    spec: str | None,
    *,
    prompts: str | None,
    resolution_px: int,
    pairs: int,
    seed: int,
    device: torch.device | str,
    sampling: Settings | None = None,
    wants: Wants = "latents",
    framing: Framing | None = None,
    max_images: int | None = None,
) -> Data:
    """Encode once; afterwards the VAE and the text encoders may go. None: `emoji` for that base, `teacher` for others.

    `framing` (default: squares of the resolution) and `max_images` are of pictures that are read. The teacher makes `pairs`
    samples with `sampling` (default: the family's), and none where only prompts are wanted.
    Pairs of noise and sample come from the teacher alone.
    """
    spec = spec or ("emoji" if base.family == "emoji" else "teacher")
    if wants == "pairs" and spec != "teacher":
        hint = "use `data=teacher`, or `lambda_reg=0`"
        raise UsageError(f"{as_field('data', spec)}: regression needs pairs of noise and picture", hint)
    framing = framing or Framing(resolution_px)
    unused = {"buckets": framing.buckets, "random_crops": framing.random_crops, "flip": framing.flip, "max_images": max_images}
    given = next((name for name, value in unused.items() if value), None)
    if given and spec.partition(":")[0] in {"emoji", "teacher"}:
        hint = "it is for pictures that are read: a folder, wds: or hf:"
        raise UsageError(f"{as_field(given)}: has no use with {as_field('data', spec)}", hint)
    if spec == "emoji":
        if resolution_px != emoji.CELL_PX:
            raise UsageError(f"`data=emoji`: the pictures are {emoji.CELL_PX} px; use `resolution={emoji.CELL_PX}`")
        return emoji.encode(base, device=device)
    if spec in {f"emoji:{style}" for style in emoji.STYLES}:
        return emoji.encode(base, device=device, style=spec.split(":")[1])
    if spec == "teacher":
        lines = read_prompts(Path(prompts)) if prompts else default_prompts(base.family)
        chosen = sampling or DEFAULTS[base.family]
        n = 0 if wants == "prompts" else pairs
        return teacher.encode(base, lines, resolution_px, chosen, pairs=n, seed=seed, device=device)
    framing = replace(framing, least_px=base.pixels_per_latent)
    if spec.startswith(("wds:", "hf:")):
        kind, _, told = spec.partition(":")
        source = streams.WebDataset(told) if kind == "wds" else streams.HuggingFace(told)
        return encode.encode(base, source, framing, most=max_images or STREAMED, device=device)
    if Path(spec).is_dir():
        return encode.encode(base, folder.Folder(Path(spec)), framing, most=max_images, device=device)
    kinds = "emoji, emoji:STYLE, teacher, wds:SHARDS, hf:ID, or a folder of images and captions"
    raise UsageError(f"{as_field('data', spec)}: {kinds}")
