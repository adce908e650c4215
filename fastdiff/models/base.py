"""A base model as users of the library hold it: a checkpoint whose network is called in roles."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models.denoiser import Denoiser


class Base(Checkpoint):
    """A `Checkpoint`; one UNet in memory serves all roles."""

    def denoiser(self, adapter: str | None = None) -> Denoiser:
        """The UNet as a function (x_t, t, cond) -> Prediction(x0, eps), wearing the adapter of that name, or bare."""
        return Denoiser.of(self, adapter)


def load(ref: str | Path, **how: Any) -> Base:
    """Open an alias (`sdxl`), hub id, diffusers folder or single file; nothing heavy is read yet.

    `dtype`: of the UNet, fp32 unless given. `config`: a folder or hub id with the configs of a single file of unusual shape.
    `prediction`: epsilon or v_prediction, where that is not what the files say. `allow_pickle`: read .ckpt, .pt and .bin too.
    UsageError where there is no such model, InputRefused where its files cannot be read whole.
    """
    opened = checkpoint.load(str(ref), **how)
    base = Base(**{field.name: vars(opened)[field.name] for field in fields(Checkpoint)})
    vars(base).update(vars(opened))  # and what was read already
    return base
