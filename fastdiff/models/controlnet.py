"""A ControlNet beside a smaller UNet: the config that fits it, and which of the parent ControlNet's weights it inherits."""

from collections.abc import Mapping
from typing import Any

from fastdiff.console import InputRefused
from fastdiff.models import unet

# What a ControlNet has in common with its UNet's encoder.
SHARED = (
    "block_out_channels",
    "down_block_types",
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "only_cross_attention",
    "transformer_layers_per_block",
)


def student_config(parent: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, Any]:
    """The parent ControlNet's config for a smaller UNet's.

    A UNet without a middle still adds what a ControlNet has for it, and diffusers builds no ControlNet without one
    (`from_unet` raises): a plain one it is.
    """
    layers = unet.even(unet.each(student, "layers_per_block"))
    if not isinstance(layers, int):
        raise InputRefused("this UNet has another number of layers at each resolution: diffusers has no ControlNet for it")
    shared = {k: student[k] for k in SHARED if k in student and k in parent}
    return {**parent, **shared, "layers_per_block": layers, "mid_block_type": student.get("mid_block_type") or "UNetMidBlock2D"}


def residuals(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """What a ControlNet adds to the UNet, in order: of the first convolution, of each layer, of each downsampler (-1)."""
    found, n = [(-1, -1)], unet.stages(config)
    for i, layers in enumerate(unet.each(config, "layers_per_block")):
        found += [(i, j) for j in range(layers)] + ([(i, -1)] if i + 1 < n else [])
    return found


def inherited(
    parent: Mapping[str, Any],
    student: Mapping[str, Any],
    parent_shapes: Mapping[str, tuple[int, ...]],
    student_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Every parameter of the student -> the parent's; UsageError where one has none of its shape."""
    whole = residuals(parent)
    layers = {k: v for k, v in unet.inherited_layers(parent, student).items() if k.startswith("down_blocks.")}
    layers |= {
        f"controlnet_down_blocks.{i}": f"controlnet_down_blocks.{whole.index(r)}" for i, r in enumerate(residuals(student))
    }
    return unet.matched(student_shapes, parent_shapes, layers, "the ControlNet")
