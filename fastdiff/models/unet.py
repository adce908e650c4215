"""Smaller UNets: layouts as edits of a config, and which of the parent's weights each layer of the student inherits.

Students are always built from an edited config. A network with modules removed in memory would be saved with the parent's config.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fastdiff.checkpoints import configs
from fastdiff.checkpoints.family import Family
from fastdiff.runtime import text_file
from fastdiff.runtime.errors import UsageError, as_field, quoted

Config = dict[str, Any]
Edit = Callable[[Config], Config]
PER_STAGE = ("block_out_channels", "layers_per_block", "attention_head_dim", "num_attention_heads", "only_cross_attention")


# ---- reading a config


def stages(config: Mapping[str, Any]) -> int:
    """Return the number of resolutions of a UNet."""
    return len(config["block_out_channels"])


def each(config: Mapping[str, Any], key: str) -> list[Any]:
    """Return a field's value for every stage, highest resolution first. A single value is repeated."""
    value = config.get(key)
    return list(value) if isinstance(value, list | tuple) else [value] * stages(config)


def depths(config: Mapping[str, Any]) -> list[Any]:
    """Return the transformer blocks per layer of every stage: a number, or a list if the layers of a stage differ."""
    return [d or 1 for d in each(config, "transformer_layers_per_block")]


def even(values: list[Any]) -> Any:
    """Return one value if all are equal, else the list. Every program can read a single value."""
    return values[0] if all(v == values[0] for v in values) else values


def attended(config: Mapping[str, Any]) -> list[bool]:
    """Return for every stage whether it has attention."""
    return ["CrossAttn" in kind for kind in config["down_block_types"]]


# ---- editing a config


def with_layers(n: int, stage: int | None = None) -> Edit:
    """Use n layers in every down block, or in that of one stage, and n + 1 in the up block of the same stage."""

    def edit(config: Config) -> Config:
        layers = each(config, "layers_per_block")
        return {**config, "layers_per_block": even([n if stage in {None, i} else was for i, was in enumerate(layers)])}

    return edit


def with_depths(rows: list[Any], reverse: list[Any] | None = None) -> Edit:
    """Set the transformer blocks of every stage; `reverse` lists those of the up blocks if they differ."""
    return lambda config: {
        **config,
        "transformer_layers_per_block": rows,
        "reverse_transformer_layers_per_block": reverse,
    }


def without_middle(config: Config) -> Config:
    """Remove the middle block."""
    return {**config, "mid_block_type": None}


def plain_middle(config: Config) -> Config:
    """Use a middle block of one residual layer without attention."""
    return {**config, "mid_block_type": "UNetMidBlock2D"}


def without_innermost(config: Config) -> Config:
    """Remove the lowest resolution: the last down block and the first up block."""
    kept = stages(config) - 1
    cut = {
        k: list(config[k])[:kept] for k in (*PER_STAGE, "transformer_layers_per_block") if isinstance(config.get(k), list | tuple)
    }
    types = {"down_block_types": list(config["down_block_types"])[:kept], "up_block_types": list(config["up_block_types"])[1:]}
    return {**config, **cut, **types}


def without_attention(stage: int) -> Edit:
    """Remove the transformers of one stage."""

    def edit(config: Config) -> Config:
        down, up = list(config["down_block_types"]), list(config["up_block_types"])
        down[stage], up[-1 - stage] = "DownBlock2D", "UpBlock2D"
        return {**config, "down_block_types": down, "up_block_types": up}

    return edit


def without_self_attention(stage: int) -> Edit:
    """Replace self-attention by a second cross-attention in the transformers of one stage (`only_cross_attention`)."""
    return lambda config: {**config, "only_cross_attention": [i == stage for i in range(stages(config))]}


class Layout(NamedTuple):
    """A published small network, as edits of the config of its family."""

    plans: tuple[str, ...]  # values of Family.unet_plan that it can be cut from
    edits: tuple[Edit, ...]

    def config(self, parent: Mapping[str, Any]) -> Config:
        """Return the parent's config with all edits applied."""
        return reduce(lambda config, edit: edit(config), self.edits, dict(parent))

    def fits(self, family: Family) -> bool:
        """Return whether the layout can be cut from the family's UNet."""
        return family.unet_plan in self.plans


SD, ALL, XL = ("sd",), ("sd", "xl"), ("xl",)
TINY = (with_layers(1), without_middle, without_innermost)
LAYOUTS = {
    "bk-base": Layout(ALL, (with_layers(1),)),  # Kim 2023, BK-SDM; Segmind's small-sd
    "bk-small": Layout(ALL, (with_layers(1), without_middle)),
    "bk-tiny": Layout(SD, TINY),  # Segmind's tiny-sd
    "sdxs-512": Layout(SD, (*TINY, without_attention(0))),  # Song 2024, SDXS
    "sdxs-512-xattn": Layout(SD, (*TINY, without_self_attention(0))),  # release 0.9 of SDXS-512
    "ssd-1b": Layout(XL, (with_depths([1, [2, 2], [4, 4]], [[4, 4, 10], [2, 1, 1], 1]), plain_middle)),  # Gupta 2024, Segmind
    "vega": Layout(XL, (with_depths([1, 1, 2]), plain_middle)),  # Gupta 2024, Segmind; used by SDXS-1024
    "koala-1b": Layout(XL, (with_layers(1), with_depths([1, 2, 6]))),  # Lee 2023
    "koala-700m": Layout(XL, (with_layers(1), with_depths([1, 2, 5]), without_middle)),
}


def student_config(parent: Mapping[str, Any], layout: str, family: Family) -> Config:
    """Return a student's config, for a layout's name or a FILE.json whose missing fields come from the parent.

    Raises UsageError if the layout or file is unknown, does not fit the family, is not JSON, or has an unknown field.
    """
    if layout in LAYOUTS:
        known = LAYOUTS[layout]
        if not known.fits(family):
            fitting = ", ".join(name for name, row in LAYOUTS.items() if row.fits(family))
            raise UsageError(f"{as_field('layout', layout)}: not a layout of {family} networks", f"use one of {fitting}")
        return known.config(parent)
    path = Path(layout).expanduser()
    if path.suffix != ".json" or not path.is_file():
        raise UsageError(
            f"{as_field('layout', layout)}: no such layout or file", f"use one of {', '.join(LAYOUTS)}, or a UNet's config.json"
        )
    try:
        text, kinds = text_file.read(path)
        changes = configs.parsed(text)
        assert isinstance(changes, dict)
    except (ValueError, AssertionError) as error:
        raise UsageError(f"{as_field('layout', layout)}: not a JSON object with the config of a UNet") from error
    text_file.tell(as_field("layout", layout), kinds)
    from diffusers import UNet2DConditionModel

    known = {*parent, *inspect.signature(UNet2DConditionModel.__init__).parameters}
    unknown = sorted(k for k in changes if k not in known and not k.startswith("_"))
    if unknown:
        raise UsageError(
            f"{as_field('layout', layout)}: unknown field {unknown[0]}",
            "use only fields of the config.json of diffusers' UNet2DConditionModel",
        )
    return {**parent, **{k: v for k, v in changes.items() if not k.startswith("_")}}


# ---- inheritance


def inherited_layers(parent: Mapping[str, Any], student: Mapping[str, Any]) -> dict[str, str]:
    """Map the student's layers to the parent's layers that they inherit: student path -> parent path.

    Removed stages are the innermost ones, so down blocks keep their number and up blocks count from the end. A block keeps
    its first layers, except that the last layer of an up block inherits the parent's last: its skip connection has another
    width than the others.
    """
    offset, paths = stages(parent) - stages(student), {}
    counts, parent_counts = each(student, "layers_per_block"), each(parent, "layers_per_block")
    only_cross, has_attention = [bool(v) for v in each(student, "only_cross_attention")], attended(student)
    for i in range(stages(student)):
        mirror = stages(student) - 1 - i
        for side, n, of, to in (
            ("down_blocks", counts[i], parent_counts[i], i),
            ("up_blocks", counts[mirror] + 1, parent_counts[mirror] + 1, i + offset),
        ):
            for j in range(n):
                k = of - 1 if side == "up_blocks" and j == n - 1 else j
                paths[f"{side}.{i}.resnets.{j}"] = f"{side}.{to}.resnets.{k}"
                stage = i if side == "down_blocks" else mirror
                if not has_attention[stage]:
                    continue
                paths[f"{side}.{i}.attentions.{j}"] = f"{side}.{to}.attentions.{k}"
                if only_cross[stage] and not any(each(parent, "only_cross_attention")):
                    paths |= twice_crossed(f"{side}.{i}.attentions.{j}", f"{side}.{to}.attentions.{k}", depths(student)[stage])
        paths[f"down_blocks.{i}.downsamplers"] = f"down_blocks.{i}.downsamplers"
        paths[f"up_blocks.{i}.upsamplers"] = f"up_blocks.{i + offset}.upsamplers"
    return paths


def twice_crossed(path: str, parent_path: str, depth: int) -> dict[str, str]:
    """Map self-attention that became cross-attention (`only_cross_attention`) to the parent's cross-attention."""
    pairs = {"attn1": "attn2", "norm1": "norm2"}
    block = "transformer_blocks"
    return {f"{path}.{block}.{d}.{a}": f"{parent_path}.{block}.{d}.{b}" for d in range(depth) for a, b in pairs.items()}


def renamed(name: str, layers: Mapping[str, str]) -> str:
    """Replace the longest prefix of a parameter's or module's name that is a key of `layers`; without one, return the name."""
    pieces = name.split(".")
    for cut in range(len(pieces), 0, -1):
        if (path := ".".join(pieces[:cut])) in layers:
            return ".".join([layers[path], *pieces[cut:]])
    return name


def inherited(
    parent: Mapping[str, Any],
    student: Mapping[str, Any],
    parent_shapes: Mapping[str, tuple[int, ...]],
    student_shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, str]:
    """Map every parameter of the student to the parent's that it starts from.

    Raises UsageError if the student has more stages than the parent, or a parameter finds none of its shape.
    """
    if stages(student) > stages(parent):
        raise UsageError(
            f"the layout has {stages(student)} resolutions, the base only {stages(parent)}: it cannot be cut from that network"
        )
    return matched(student_shapes, parent_shapes, inherited_layers(parent, student), "the layout")


def matched(
    student_shapes: Mapping[str, tuple[int, ...]],
    parent_shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, str],
    what: str,
) -> dict[str, str]:
    """Map every parameter to the parent's, by the map of layers. Raises UsageError if one has no match in shape."""
    origins = {name: renamed(name, layers) for name in student_shapes}
    wrong = [
        f"{name} {student_shapes[name]} from {old} {parent_shapes.get(old, '(none)')}"
        for name, old in origins.items()
        if parent_shapes.get(old) != tuple(student_shapes[name])
    ]
    if wrong:
        raise UsageError(
            f"{what} does not fit into the base: {len(wrong)} of {len(origins)} parameters have nothing to inherit; {wrong[0]}",
            "a layout may leave out layers of the base, but not add or widen any",
        )
    return origins


def unet_of(config: Mapping[str, Any], kind: str = "UNet2DConditionModel") -> nn.Module:
    """Build the network of a config on the meta device. Raises UsageError if diffusers cannot build it.

    `config` may be an edited copy of a network's own. Such a config lists the fields that its file left out, and diffusers
    resets those to their defaults, edited or not; so the list is dropped.
    """
    import diffusers
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            edited = {key: value for key, value in config.items() if key != "_use_default_values"}
            return getattr(diffusers, kind).from_config(edited)  # the diffusers class named by `kind`
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise UsageError(f"diffusers cannot build a {kind} of this layout: {quoted(error)}") from error


def shapes_of(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter and buffer by name."""
    return {name: tuple(p.shape) for name, p in net.state_dict().items()}


def inheriting(parent: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Build a trainable fp32 UNet of the given config with the weights that it inherits from `parent`."""
    net = unet_of(config)
    state = parent.state_dict()
    names = inherited(parent.config, config, {k: tuple(v.shape) for k, v in state.items()}, shapes_of(net))
    net.load_state_dict({name: state[parent_name].detach().float().clone() for name, parent_name in names.items()}, assign=True)
    return net.train().requires_grad_(True)


def feature_pairs(parent: Mapping[str, Any], student: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the (student block, parent block) pairs whose outputs are compared: all down and up blocks, and the bottleneck.

    If stages were removed, the student's bottleneck replaces everything below it, so it is compared with the output of the
    parent's up block at that resolution (Segmind's tiny-sd). If only the middle was removed, it is compared with the output
    of the parent's middle. [BK-SDM's tiny compares with the parent's layer at the same place, which has another task.]
    """
    n, offset = stages(student), stages(parent) - stages(student)
    middle, whole = student.get("mid_block_type"), parent.get("mid_block_type")
    below = f"up_blocks.{offset - 1}" if offset else "mid_block" if whole else f"down_blocks.{n - 1}"
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(n - 1)]
    if middle and not offset:
        pairs.append((f"down_blocks.{n - 1}", f"down_blocks.{n - 1}"))
    pairs.append(("mid_block" if middle else f"down_blocks.{n - 1}", below))
    return pairs + [(f"up_blocks.{i}", f"up_blocks.{i + offset}") for i in range(n)]
