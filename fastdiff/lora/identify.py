"""Which base a LoRA is for. Of its family the layers tell first, then the header; of the type of prediction the header alone.

Headers are wrong at times: merge tools copy them, and trainers write what they were told. Shapes cannot be.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from fastdiff.checkpoints.family import FAMILIES, Family
from fastdiff.checkpoints.recipe import PREFIX

if TYPE_CHECKING:
    from fastdiff.diffusion.schedule import PredictionType

Shapes = Mapping[str, tuple[int, ...] | None]  # canonical name of a module -> shape of its weight, where the update tells it

CROSSING = re.compile(r"lora_unet_.*attn2_to_[kv]")
FIRST_ENCODER = re.compile(r"lora_te1?_.*_(?:self_attn_[qkv]_proj|mlp_fc1)")
SECOND_ENCODER = re.compile(r"lora_te2_.*_(?:self_attn_[qkv]_proj|mlp_fc1)")
DEEP = re.compile(r"lora_unet_.*_transformer_blocks_[1-9]\d*_.*")
EARLY = re.compile(r"lora_unet_(?:down_blocks_0_attentions_|(?:down|up)_blocks_3_).*")
# Header entries that name a family or an architecture; the names of networks that others write begin so.
FAMILY, ARCHITECTURE, VERSION, IS_V2 = PREFIX + "family", "modelspec.architecture", "ss_base_model_version", "ss_v2"

# What headers call a type of prediction, in lower case: diffusers' names, and modelspec's `v` and `epsilon`.
PREDICTIONS: dict[str, "PredictionType"] = {
    "v": "v_prediction", "v_prediction": "v_prediction", "v-prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon",
}  # fmt: skip
# sd-scripts' ss_base_model_version of SD1 and SD2. It has one value for every SDXL base.
SD_SCRIPTS_VERSIONS: dict[str, "PredictionType"] = {
    "sd_v1": "epsilon", "sd_v2": "epsilon", "sd_v1_v": "v_prediction", "sd_v2_v": "v_prediction",
}  # fmt: skip


def widths(shapes: Shapes, pattern: re.Pattern[str]) -> set[int]:
    """The numbers of inputs of the layers whose name is like `pattern`."""
    return {shape[1] for key, shape in shapes.items() if shape and len(shape) > 1 and pattern.fullmatch(key)}


def possible(shapes: Shapes) -> list[Family]:
    """The families whose networks have such layers; all of them where the layers tell nothing.

    A width that no family has, of a test's or a stranger's network, tells nothing.
    """
    rows = list(FAMILIES.values())
    evidence: list[list[Family]] = []  # the families that each thing seen allows
    for seen, allowed in (
        (any(key.startswith("lora_te2_") for key in shapes), [row for row in rows if row.text_encoders == 2]),
        (any(key.startswith("lora_unet_add_embedding") for key in shapes), [row for row in rows if row.size_conditioned]),
        (any(map(DEEP.fullmatch, shapes)), [row for row in rows if row.unet_plan == "xl"]),
        (any(map(EARLY.fullmatch, shapes)), [row for row in rows if row.unet_plan == "sd"]),
    ):
        evidence += [allowed] if seen else []
    for pattern, own in (
        (CROSSING, {row.name: row.cross_attention_width for row in rows}),
        (FIRST_ENCODER, {row.name: row.text_widths.get("text_encoder") for row in rows}),
        (SECOND_ENCODER, {row.name: row.text_widths.get("text_encoder_2") for row in rows}),
    ):
        wide = widths(shapes, pattern)
        evidence += [[row for row in rows if own[row.name] in wide]] if len(wide) == 1 else []
    for allowed in evidence:
        rows = [row for row in rows if row in allowed] or rows
    return rows


def claims(metadata: Mapping[str, str]) -> Iterator[tuple[str, Family]]:
    """The families that a header names, each with the entry that does, in the order in which they are believed."""
    own = FAMILIES.get(metadata.get(FAMILY, ""))
    if own:
        yield FAMILY, own
    published = [row for row in FAMILIES.values() if row.published]
    architecture, version = metadata.get(ARCHITECTURE, ""), metadata.get(VERSION, "")
    # Families may share an architecture, as the embedded one does with SD1: then it says nothing besides the family's own name.
    if not (own and architecture.startswith(own.architecture_stem)):
        yield from ((ARCHITECTURE, row) for row in published if architecture.startswith(row.architecture_stem))
    named = [row for row in published if VERSION in row.lora_header]
    if same := [row for row in named if version.split("_")[0] == row.lora_header[VERSION].split("_")[0]]:
        yield VERSION, same[0]
    elif IS_V2 in metadata:
        yield from ((IS_V2, row) for row in published if row.lora_header.get(IS_V2) == metadata[IS_V2])


def family_of(shapes: Shapes, metadata: Mapping[str, str]) -> Family | None:
    """The family of a LoRA; None where neither layers nor header tell."""
    rows = possible(shapes)
    believed = next((row for _, row in claims(metadata) if row in rows), None)
    return believed or (rows[0] if len(rows) == 1 else None)


def wrong_claims(shapes: Shapes, metadata: Mapping[str, str]) -> dict[str, Family]:
    """The entries of a header that name a family whose networks have no such layers, and that family."""
    rows = possible(shapes)
    return {entry: row for entry, row in claims(metadata) if row not in rows}


def stated_prediction(metadata: Mapping[str, str]) -> "PredictionType | None":
    """Read from a LoRA's header what its base predicts: epsilon or v_prediction; None where no entry says so.

    fastdiff's own entry comes first, then those of modelspec and of sd-scripts. A LoRA with which a network predicts x0
    ("sample") does not say what the base predicts.
    """
    entry = lambda name: str(metadata.get(name, "")).strip().lower()
    if own := entry(PREFIX + "prediction_type"):
        return PREDICTIONS.get(own)
    if named := PREDICTIONS.get(entry("modelspec.prediction_type")):
        return named
    if (trained_on_v := entry("ss_v_parameterization")) in {"true", "false"}:
        return "v_prediction" if trained_on_v == "true" else "epsilon"
    architecture = entry(ARCHITECTURE).partition("/")[0]
    for row in FAMILIES.values():
        if row.predicts_either and architecture in {row.architecture, row.architecture_v}:
            return "v_prediction" if architecture == row.architecture_v else "epsilon"
    return SD_SCRIPTS_VERSIONS.get(entry(VERSION))


def trained_clip_skip(metadata: Mapping[str, str]) -> int | None:
    """The `clip_skip` that sd-scripts trained a LoRA with, as diffusers counts it; None where the header does not say.

    sd-scripts counts from 1, the last layer. It has no clip skip for SDXL.
    """
    count = metadata.get("ss_clip_skip", "")
    return int(count) - 1 if count.isdecimal() and int(count) else None
