"""The whole checkpoint that a student starts from, the value of the option `init`."""

from typing import TYPE_CHECKING

from fastdiff.options.train import TrainConfig
from fastdiff.runtime.console import info, warn
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

if TYPE_CHECKING:
    import torch

    from fastdiff.checkpoints.checkpoint import Checkpoint

INPUTS = ("in_channels", "cross_attention_dim", "addition_embed_type")
GUIDANCE = "time_cond_proj_dim"  # of a UNet that takes the guidance as an input, as a whole LCM's


def open_start(ref: str, config: TrainConfig, dtype: "torch.dtype | None" = None) -> "Checkpoint":
    """The checkpoint of `init`; its networks load on first use, in `dtype` (default: float32)."""
    import torch

    from fastdiff.checkpoints import checkpoint, locate

    try:
        return checkpoint.load(ref, dtype=dtype or torch.float32, allow_pickle=config.allow_pickle)
    except UsageError as error:  # it knows every checkpoint as `base`
        locate.renamed(error, ref, "init")
        raise


def checked_start(ref: str, config: TrainConfig, base: "Checkpoint", *, any_guidance: bool = False) -> "Checkpoint":
    """The checkpoint of `init`, in the dtype of the base. InputRefused if its UNet takes other inputs than the base's.

    With `any_guidance` one of both may take the guidance as an input, and the other not. Tells where the two predict different
    things, or have different noise schedules: the student goes on with the type of its own, on the base's schedule.
    """
    other, given = open_start(ref, config, base.dtype), as_field("init", ref)
    for key in INPUTS if any_guidance else (*INPUTS, GUIDANCE):
        other_value, base_value = other.unet_config.get(key), base.unet_config.get(key)
        if other_value != base_value:
            raise InputRefused(
                f"{given}: the UNet has {key} {other_value}, the base {base_value}",
                "it must be of the base's family",
            )
    if other.prediction_type != base.prediction_type:
        kinds = f"it predicts {other.prediction_type}, the base {base.prediction_type}"
        info(f"{given}: {kinds}; the student goes on predicting {other.prediction_type}")
    if other.ends_in_noise != base.ends_in_noise:
        where = "there, and not" if other.ends_in_noise else "not there, but"
        warn(f"{given}: the noise schedule ends in pure noise {where} in the base; the student is trained on the base's schedule")
    return other
