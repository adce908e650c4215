"""The base model that `fastdiff.load` returns: a checkpoint whose UNet can be called directly."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models.denoiser import Denoiser


class Base(Checkpoint):
    """A `Checkpoint` with a `denoiser`. All denoisers of one base share a single UNet in memory."""

    def denoiser(self, adapter: str | None = None) -> Denoiser:
        """Return the UNet as a function (x_t, t, cond) -> Prediction(x0, eps), with the named adapter on, or without adapters."""
        return Denoiser.of(self, adapter)


def load(ref: str | Path, **how: Any) -> Base:
    """Open a model by alias (`sdxl`), hub id, diffusers folder or single file. Weights are read later, at first use.

    `dtype` is the UNet's (default fp32). `config` is a folder or hub id with the configs of a single file of unusual shape.
    `prediction` (epsilon or v_prediction) overrides what the files say. `allow_pickle` also reads .ckpt, .pt and .bin files.
    Raises UsageError if there is no such model, and InputRefused if its files cannot be read completely.
    """
    opened = checkpoint.load(str(ref), **how)
    base = Base(**{field.name: vars(opened)[field.name] for field in fields(Checkpoint)})
    vars(base).update(vars(opened))  # keep the parts that are already read
    return base
