"""Load ControlNets, and cut smaller ones for smaller UNets out of an existing one."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import component
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.models import unet
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

EMBEDDED = SHIPPED.home / "controlnet"  # draws emoji pictures from Canny edges

# Config fields that a ControlNet shares with the encoder of its UNet.
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
    """Return the config of a smaller ControlNet: the parent's, with the encoder of the student UNet's config.

    If the student UNet has no middle block, the ControlNet gets a plain one: diffusers cannot build a ControlNet without a
    middle block (`from_unet` raises), and such a UNet still adds the middle residual. Raises InputRefused if the student's
    stages have different numbers of layers.
    """
    layers = unet.even(unet.each(student, "layers_per_block"))
    if not isinstance(layers, int):
        raise InputRefused("this UNet has different numbers of layers per resolution: diffusers has no ControlNet for it")
    shared = {k: student[k] for k in SHARED if k in student and k in parent}
    return {**parent, **shared, "layers_per_block": layers, "mid_block_type": student.get("mid_block_type") or "UNetMidBlock2D"}


def residuals(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """List the places where a ControlNet adds to the UNet, in order, as (stage, layer).

    (-1, -1) is the first convolution; (stage, -1) is the downsampler of that stage.
    """
    places, n = [(-1, -1)], unet.stages(config)
    for i, layers in enumerate(unet.each(config, "layers_per_block")):
        places += [(i, j) for j in range(layers)] + ([(i, -1)] if i + 1 < n else [])
    return places


def inherited(
    parent: Mapping[str, Any],
    student: Mapping[str, Any],
    parent_shapes: Mapping[str, tuple[int, ...]],
    student_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Map every parameter of the student to the parent's that it starts from. Raises UsageError if one has no match in shape."""
    whole = residuals(parent)
    layers = {k: v for k, v in unet.inherited_layers(parent, student).items() if k.startswith("down_blocks.")}
    layers |= {
        f"controlnet_down_blocks.{i}": f"controlnet_down_blocks.{whole.index(r)}" for i, r in enumerate(residuals(student))
    }
    return unet.matched(student_shapes, parent_shapes, layers, "the ControlNet")


def inheriting(parent: nn.Module, unet_config: Mapping[str, Any]) -> nn.Module:
    """Build a trainable fp32 ControlNet for a UNet of the given config, with the weights that it inherits from `parent`."""
    config = student_config(parent.config, unet_config)
    net = unet.unet_of(config, "ControlNetModel")
    state = parent.state_dict()
    names = inherited(parent.config, config, {k: tuple(v.shape) for k, v in state.items()}, unet.shapes_of(net))
    net.load_state_dict({name: state[parent_name].detach().float().clone() for name, parent_name in names.items()}, assign=True)
    return net.train().requires_grad_(True)


def load(ref: str, unet_config: Mapping[str, Any], *, option: str = "controlnet") -> nn.Module:
    """Load a ControlNet from a diffusers folder or hub id, or the embedded one (`emoji`); fp32, frozen.

    Raises UsageError if `ref` is not found, and InputRefused if it is not a ControlNet or does not fit the UNet's config.
    """
    folder = EMBEDDED if ref == SHIPPED.name else component.locate(ref, option, "ControlNet")
    config = component.config_of(folder, option, ref, ("ControlNetModel",))
    check(config, unet_config, as_field(option, ref))
    return component.load(folder, option, ref, config)


def skeleton(ref: str, unet_config: Mapping[str, Any], *, option: str = "controlnet") -> nn.Module:
    """Build a ControlNet without weights, on the meta device, to find out how much memory it takes; fp32, frozen.

    If `ref` is not on this machine, it has the shape that ControlNets usually have: that of the UNet's encoder.
    """
    from diffusers.models import ControlNetModel

    try:
        folder = EMBEDDED if ref == SHIPPED.name else component.locate(ref, option, "ControlNet")
        config = component.config_of(folder, option, ref, ("ControlNetModel",))
        check(config, unet_config, as_field(option, ref))
    except UsageError as error:
        console.info(f"{error}; one of the usual shape is counted")
        known = inspect.signature(ControlNetModel.__init__).parameters
        config = {key: value for key, value in unet_config.items() if key in known}
    with torch.device("meta"):
        return unet.unet_of(config, "ControlNetModel").requires_grad_(False)


def check(config: Mapping[str, Any], unet_config: Mapping[str, Any], where: str) -> None:
    """Raise InputRefused unless the ControlNet's residuals match the skip connections of the UNet in number and width."""
    for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
        if config.get(key) != unet_config.get(key):
            raise InputRefused(
                f"{where}: is for a UNet with {key} {config.get(key)}, but the base's UNet has {unet_config.get(key)}",
                "use a ControlNet of the base's family",
            )
    own, needed = ([c, residuals(c)] for c in (config, unet_config))
    if list(own[0]["block_out_channels"]) != list(needed[0]["block_out_channels"]) or own[1] != needed[1]:
        raise InputRefused(
            f"{where}: is for another layout ({len(own[1])} residuals, but the base's UNet takes {len(needed[1])})",
            "`fastdiff prune --controlnet` cuts a matching one, `fastdiff distill-controlnet` also trains it",
        )
