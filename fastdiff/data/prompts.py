"""Prompts from a file, or the shipped ones of a family."""

from pathlib import Path

import torch

from fastdiff.checkpoints.family import Family
from fastdiff.data import emoji
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import UsageError, as_field

PROMPTS = ASSETS / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a file, one per line; blank lines and lines that start with # are skipped.

    Raises UsageError if the file does not exist or has no prompts.
    """
    if not path.exists():
        raise UsageError(f"{as_field('prompts', path)}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{as_field('prompts', path)}: the file has no prompts (one per line)")
    return prompts


def default_prompts(family: Family) -> list[str]:
    """Return the shipped prompts. For a family with an embedded data set: captions of its images that students may train on."""
    if family.data is None:
        return read_prompts(PROMPTS)
    pairs = list(zip(*(column.tolist() for column in emoji.trained_items()), strict=True))
    g = torch.Generator().manual_seed(0)
    kinds = torch.multinomial(torch.tensor(emoji.CAPTION_WEIGHTS), len(pairs), replacement=True, generator=g).tolist()
    lines = [emoji.caption(p, None if k % 2 else b, coarse=k > 1) for (p, b), k in zip(pairs, kinds, strict=True)]
    return [lines[i] for i in torch.randperm(len(lines), generator=g)]
