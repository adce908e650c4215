"""ControlNets: opened, and made smaller beside a smaller UNet, with the weights that they inherit."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastdiff.checkpoints import component
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.models import unet
from fastdiff.runtime.errors import InputRefused, as_field

EMBEDDED = SHIPPED.home / "controlnet"  # Canny edges to emoji

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
    """Every parameter of the student -> the parent's; UsageError where one has none of its shape."""
    whole = residuals(parent)
    layers = {k: v for k, v in unet.inherited_layers(parent, student).items() if k.startswith("down_blocks.")}
    layers |= {
        f"controlnet_down_blocks.{i}": f"controlnet_down_blocks.{whole.index(r)}" for i, r in enumerate(residuals(student))
    }
    return unet.matched(student_shapes, parent_shapes, layers, "the ControlNet")


def inheriting(parent: nn.Module, unet_config: Mapping[str, Any]) -> nn.Module:
    """A trainable fp32 ControlNet for a UNet of that config, which starts as the parent where the parent has it."""
    config = student_config(parent.config, unet_config)
    net = unet.unet_of(config, "ControlNetModel")
    state = parent.state_dict()
    names = inherited(parent.config, config, {k: tuple(v.shape) for k, v in state.items()}, unet.shapes_of(net))
    net.load_state_dict({name: state[parent_name].detach().float().clone() for name, parent_name in names.items()}, assign=True)
    return net.train().requires_grad_(True)


def load(ref: str, unet_config: Mapping[str, Any], *, option: str = "controlnet") -> nn.Module:
    """A ControlNet from a diffusers folder or hub id, or the embedded one; fp32, frozen.

    InputRefused where it is none, or of another UNet.
    """
    folder = EMBEDDED if ref == SHIPPED.name else component.locate(ref, option, "ControlNet")
    config = component.config_of(folder, option, ref, ("ControlNetModel",))
    check(config, unet_config, as_field(option, ref))
    return component.load(folder, option, ref, config)


def check(config: Mapping[str, Any], unet_config: Mapping[str, Any], where: str) -> None:
    """InputRefused unless what it adds has the places and widths of the UNet's skip connections."""
    for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
        if config.get(key) != unet_config.get(key):
            raise InputRefused(
                f"{where}: is for a UNet with {key} {config.get(key)}, this one has {unet_config.get(key)}",
                "it must be of the base's family",
            )
    own, needed = ([c, residuals(c)] for c in (config, unet_config))
    if list(own[0]["block_out_channels"]) != list(needed[0]["block_out_channels"]) or own[1] != needed[1]:
        raise InputRefused(
            f"{where}: is for another layout ({len(own[1])} residuals, the UNet has {len(needed[1])})",
            "`fastdiff prune --controlnet` cuts one alike, `fastdiff distill-controlnet` also trains it",
        )
