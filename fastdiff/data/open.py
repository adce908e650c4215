"""Open training data: the shipped emoji pictures, samples of the teacher, a folder, wds:SHARDS or hf:ID."""

import os
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
from fastdiff.runtime import console, picture_file
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.settings import Settings

__all__ = ["Batch", "Buckets", "Data", "Encoded", "Framing", "Needs", "open_data"]


Needs = Literal["latents", "pairs", "prompts"]
STREAMED = 10_000  # default `max_images` of streams, whose length is unknown


def open_data(
    base: Checkpoint,
    spec: str | Path | None = None,
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
    caption_column: str | None = None,
    source: encode.Source | None = None,
) -> Data:
    """Open and encode a data set, whose `batch(n, generator)` draws training batches. The VAE and text encoders can then go.

    `spec` is the value of `data` (default: the family's); a Path is always a folder. `prompts` is a file with one prompt per
    line, for the teacher's samples. `resolution_px` is the side in pixels (default: the base's). `framing` (default: squares of
    the resolution) and `max_images` apply to pictures that are read, `caption_column` (default: text, caption or prompt) to their
    captions. `source` is what `source_of` made of `spec`, if it was called before. The teacher makes `pairs` samples with the
    settings `sampling` (default: the family's), or none if `needs` is "prompts". Only the teacher gives pairs of noise and
    sample.
    Raises UsageError if options do not go together or the data does not exist, and InputRefused if no picture is usable.
    """
    spec, resolution_px = in_full(spec) or base.family.default_data, resolution_px or base.resolution_px
    if needs == "pairs" and spec != "teacher":
        raise UsageError(f"{as_field('data', spec)}: the loss needs pairs of noise and picture", "use `data=teacher`")
    framing = framing or Framing(resolution_px)
    picture_file.colour(framing.background)
    unused: dict[str, int | str | None] = {
        "buckets": framing.buckets,
        "random_crops": framing.random_crops,
        "flip": framing.flip,
        "max_images": max_images,
    }
    unused |= {"min_size": framing.min_size_px, "caption_column": caption_column}
    unused |= {"background": framing.background if framing.background != picture_file.WHITE else None}
    given = next((name for name, value in unused.items() if value), None)
    if given and spec.partition(":")[0] in {SHIPPED.data, "teacher"}:
        hint = "it applies to pictures that are read: from a folder, wds: or hf:"
        raise UsageError(f"{as_field(given)}: has no effect with {as_field('data', spec)}", hint)
    if spec in shipped():
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
    opened = source or source_of(spec, caption_column)
    assert opened is not None  # the shipped pictures and the teacher have been dealt with
    streamed = opened.count is None
    most = max_images or (STREAMED if streamed else None)
    return encode.encode(base, opened, framing, most=most, by_default=streamed and not max_images, device=device)


def source_of(spec: str | Path | None, caption_column: str | None = None) -> encode.Source | None:
    """Open the pictures that a value of `data` names, without reading them; None for the shipped ones and the teacher's samples.

    UsageError or InputRefused where there are none. So a command finds out before it does anything that takes long.
    """
    spec = in_full(spec)
    if spec is None or spec == "teacher" or spec in shipped():
        return None
    if spec.startswith(("wds:", "hf:")):
        kind, _, location = spec.partition(":")
        return (streams.WebDataset if kind == "wds" else streams.HuggingFace)(location, caption_column)
    if Path(spec).is_dir():
        return folder.Folder(Path(spec), caption_column)
    if Path(spec).is_file():
        raise UsageError(f"{as_field('data', spec)}: is a file, not a folder", instead_of(Path(spec)))
    kinds = f"{SHIPPED.data}, {SHIPPED.data}:STYLE, teacher, wds:SHARDS, hf:ID, or a folder of images and captions"
    raise UsageError(f"{as_field('data', spec)}: no such data", f"use {kinds}")


def shipped() -> set[str]:
    """The values of `data` that name the shipped pictures."""
    return {str(SHIPPED.data), *(f"{SHIPPED.data}:{style}" for style in emoji.STYLES)}


def in_full(spec: str | Path | None) -> str | None:
    """Return a value of `data` as text, with ~ as the user's own folder, also behind wds: and hf:."""
    if isinstance(spec, Path):
        spec = spec.expanduser()
        return str(spec) if spec.is_absolute() else f"{os.curdir}{os.sep}{spec}"  # a folder, even one with the name `teacher`
    kind, colon, location = (spec or "").partition(":")
    if colon and kind in {"wds", "hf"}:
        return f"{kind}:" + "::".join(os.path.expanduser(part) for part in location.split("::"))  # noqa: PTH111  (may be an address)
    return os.path.expanduser(spec) if spec else None  # noqa: PTH111  (may be no path)


def instead_of(path: Path) -> str:
    """Say what to give as `data` instead of a single file."""
    suffix = path.suffix.lower()
    if ".tar" in [s.lower() for s in path.suffixes] or suffix == ".tgz":
        return f"a tar of pictures and captions is read as {as_field('data', f'wds:{path}')}"
    if suffix in {".parquet", ".arrow"}:
        return f"it is read as {as_field('data', f'hf:{path}')}"
    if suffix in {".zip", ".7z", ".rar", ".gz", ".zst"}:
        return "unpack it, and give the folder with the pictures and captions"
    if suffix in picture_file.suffixes() or picture_file.unreadable(suffix):
        return "put the pictures into a folder, each with its caption in a .txt file beside it, and give the folder"
    if suffix in {".txt", ".jsonl", ".json", ".csv"}:
        return "give the folder that holds the pictures; a list of captions is read from metadata.jsonl or metadata.csv in it"
    return "give a folder of pictures and captions"
