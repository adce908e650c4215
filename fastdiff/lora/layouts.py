"""The layouts of LoRA files: read a key of any layout as (module, side), and turn modules back into names.

The canonical name of a module is kohya's without suffix: `lora_unet_` + diffusers' dotted name with _ instead of dots. Text
encoders have the prefix `lora_te_` (SD1, SD2), or `lora_te1_` and `lora_te2_` (SDXL). A bias has its module's name + `.bias`.
A canonical name can be turned back into dots because the words of diffusers with _ inside are known (WORDS).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fastdiff.checkpoints import single_file
from fastdiff.checkpoints.family import titles

COMPONENTS = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
ROOTS = {  # how dotted names begin in each component, for files that do not name the component
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "conv_", "time_embedding.", "add_embedding."),
    "text_encoder": ("text_model.", "encoder.layers.", "text_projection"),
}
SIDES = {  # suffix of a flat key -> the side that it is in `kinds.build`
    "lora_down.weight": "down", "lora_up.weight": "up", "lora_mid.weight": "mid", "alpha": "alpha", "dora_scale": "magnitude",
    "hada_w1_a": "w1_a", "hada_w1_b": "w1_b", "hada_w2_a": "w2_a", "hada_w2_b": "w2_b", "hada_t1": "t1", "hada_t2": "t2",
    "lokr_w1": "kron1", "lokr_w1_a": "kron1_a", "lokr_w1_b": "kron1_b",
    "lokr_w2": "kron2", "lokr_w2_a": "kron2_a", "lokr_w2_b": "kron2_b", "lokr_t2": "kron_t2",
    "diff": "diff", "diff_b": "bias", "w_norm": "diff", "b_norm": "bias", "weight": "vector", "on_input": "on_input",
    "a1.weight": "a1", "a2.weight": "a2", "b1.weight": "b1", "b2.weight": "b2", "bm.weight": "bm",
    "oft_blocks": "blocks", "rescale": "rescale", "scalar": "scalar",
}  # fmt: skip
PEFT_SIDES = {  # the same for peft's tensors, which may have the name of the adapter behind them
    "lora_A": "down", "lora_B": "up", "lora_magnitude_vector": "magnitude_out",
    **{name: side for name, side in SIDES.items() if name.startswith(("hada_", "lokr_"))},
}  # fmt: skip
DOTTED_SIDES = {  # and for the dotted names of diffusers and ComfyUI, where `.weight` would be a weight itself
    **{name: side for name, side in SIDES.items() if name not in {"weight", "on_input"}},
    "lora.down.weight": "down", "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down", "lora_linear_layer.up.weight": "up",
}  # fmt: skip
FLAT = re.compile(r"(lora_unet_|lora_te_|lora_te1_|lora_te2_|lycoris_|oft_unet_)([^.]+)\.(.+)")
COMFY = re.compile(r"(?:diffusion_model|text_encoders\.(clip_[lhg])\.transformer)\.(.+)")
COMFY_ENCODERS = {"clip_l": "lora_te_", "clip_h": "lora_te_", "clip_g": "lora_te2_"}  # of SD1 and SDXL, of SD2, of SDXL
PEFT, DOTTED = (
    re.compile(rf"(.+?)\.({'|'.join(map(re.escape, sides))}){adapter}")
    for sides, adapter in ((PEFT_SIDES, r"(?:\.(?!weight$)[^.]+)?(?:\.weight)?"), (DOTTED_SIDES, ""))
)


class Other(NamedTuple):
    """A kind of file that is no LoRA for our families."""

    pattern: str  # of a key that such a file has
    kind: str  # what it is
    hint: str = ""  # what to do with it; "": say which LoRAs are supported
    adapter: bool = True  # False: a checkpoint, which other commands take
    key: str = ""  # the key of a file that has one


OTHERS = (
    Other(
        r"^(lora_)?transformer[._]|^lora_unet_((double|single|joint|transformer)_blocks|blocks_|layers_|final_layer)"
        r"|^diffusion_model\.((double|single|joint|transformer)_blocks|blocks|layers|final_layer)\."
        r"|^lora_te3_|^text_encoders\.(t5|umt5|gemma|llama|qwen)",
        "a LoRA of a transformer (SD3, Flux)",
    ),
    Other(r"^lora_prior_", "a LoRA of Stable Cascade"),
    Other(
        r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
        "a whole checkpoint (give it as `base`)",
        adapter=False,
    ),
    Other(r"string_to_param|^emb_params$|^clip_[lg]$", "a textual inversion embedding"),
    Other(r"motion_modules|temporal_transformer", "a motion LoRA (AnimateDiff)"),
    Other(r"^lllite_", "a ControlNet-LLLite of sd-scripts", "use it in ComfyUI"),
    Other(r"^lora_controlnet$|^input_hint_block\.|^control_model\.|^controlnet_", "a ControlNet or Control-LoRA"),
    Other(r"^(image_proj|ip_adapter)\.|\.to_[kv]_ip\b", "an IP-Adapter"),
    Other(r"^(adapter\.)?body\.\d+\.", "a T2I-Adapter"),
    Other(
        r"\.(oft_[rR]|boft_[RsS]|ia3_l|vera_lambda_[bd]|lora_E|lora_embedding_[AB]|hra_u|delora_\w+)(\.|$)",
        "a peft adapter other than LoRA, LoHa and LoKr",
        "merge it into its model in peft: PeftModel.merge_and_unload()",
    ),
    Other(r"\.(set_weight|reshape_weight)$", "a LoRA that replaces weights or changes their shapes", "use it in ComfyUI"),
)


def other_kind(keys: Iterable[str]) -> Other | None:
    """The kind of file that no LoRA for our families is, by the first key that shows one; None where there is no such key."""
    for key in keys:
        for row in OTHERS:
            if re.search(row.pattern, key) and not key.startswith("bundle_emb."):
                return row._replace(key=key, hint=row.hint or f"LoRAs of {titles()} are supported")
    return None


KERNEL_3 = re.compile(r"lora_unet_(?:.*_)?(?:conv1|conv2|conv_in|conv_out|(?:down|up)samplers_\d+_conv)")
KERNEL_1 = re.compile(r"lora_unet_.*_conv_shortcut")
PROJECTION = re.compile(r"lora_unet_.*_attentions_\d+_proj_(?:in|out)")
WORDS = (  # diffusers' and transformers' names that have _ inside
    "down_blocks", "up_blocks", "mid_block", "time_embedding", "add_embedding", "conv_in", "conv_out", "conv_norm_out",
    "linear_1", "linear_2", "transformer_blocks", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out", "time_emb_proj",
    "conv_shortcut", "text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj", "layer_norm1",
    "layer_norm2", "final_layer_norm", "token_embedding", "position_embedding", "class_embedding",
)  # fmt: skip
# The layers of the published LCM- and DMD2-LoRAs: rank 64 on these is 67,252,224 parameters on SD1.5, 196,751,360 on SDXL.
# fmt: off
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)
# fmt: on
WORD = re.compile("|".join(sorted(WORDS, key=len, reverse=True)) + "|[^_]+")


class Part(NamedTuple):
    """What one tensor of a LoRA file is."""

    key: str  # canonical name of the module
    side: str  # as in `kinds.build`
    component: str = ""  # whose entries in the header apply; "": the file does not name it
    name: str = ""  # dotted name inside the component; "": a flat layout, which has its own alphas


def canonical(prefix: str, name: str) -> str:
    """The canonical name of the module `name` in the component of `prefix`.

    Text encoders get back the level `text_model.`, which transformers 5.6 dropped and every program expects.
    """
    flat = name.replace(".", "_")
    outside = prefix == "lora_unet_" or flat.startswith(("text_model_", "text_projection"))
    return prefix + (flat if outside else "text_model_" + flat)


def dotted(flat: str) -> str:
    """Turn a flat name into a dotted one, as down_blocks_0_attentions_1_proj_in into down_blocks.0.attentions.1.proj_in."""
    return ".".join(WORD.findall(flat))


def split(key: str) -> tuple[str, str]:
    """The component and the dotted name of a canonical module name, as ("text_encoder_2", "text_model.encoder...")."""
    prefixes = {**{v: k for k, v in COMPONENTS.items()}, "lora_te1_": "text_encoder"}
    prefix = next(p for p in prefixes if key.startswith(p))
    return prefixes[prefix], dotted(key.removeprefix(prefix))


def read_flat(key: str, table: Mapping[str, str]) -> Part | None:
    """Read a key `lora_unet_<flat>.<suffix>`: kohya with diffusers' or LDM's names, LyCORIS, SimpleTuner; None for others."""
    if not (match := FLAT.fullmatch(key)) or match[3] not in SIDES:
        return None
    prefix, flat, side = match[1], match[2], SIDES[match[3]]
    if prefix == "oft_unet_":
        prefix = "lora_unet_"  # sd-scripts' OFT, which has LyCORIS's formula
    if prefix == "lycoris_":
        prefix = "lora_te_" if flat.startswith("text_model") else "lora_unet_"
    if prefix == "lora_unet_":
        flat = single_file.from_flat(flat, table) or flat
    name = canonical(prefix, flat)
    return Part(f"{name}.bias", "diff") if side == "bias" else Part(name, side)


def read_comfy(key: str, table: Mapping[str, str]) -> Part | None:
    """Read `diffusion_model.<LDM name>.lora_up.weight` or `text_encoders.clip_l.transformer.<name>...`, which ComfyUI saves.

    Its text encoders have the names of transformers, with q, k and v apart. Other programs write lora_A and lora_B there.
    """
    if not (match := COMFY.fullmatch(key)) or not (found := sided(match[2])):
        return None
    path, side = found
    if match[1]:
        name = canonical(COMFY_ENCODERS[match[1]], path)
    elif flat := single_file.from_flat(path.replace(".", "_"), table):
        name = canonical("lora_unet_", flat)
    else:
        return None
    return Part(f"{name}.bias", "diff") if side == "bias" else Part(name, side)


def sided(key: str) -> tuple[str, str] | None:
    """The module's path and the side of a dotted key; None where it ends in no known suffix."""
    if match := PEFT.fullmatch(key):
        return match[1], PEFT_SIDES[match[2]]
    return (match[1], DOTTED_SIDES[match[2]]) if (match := DOTTED.fullmatch(key)) else None


def read_peft(key: str, _: Mapping[str, str]) -> Part | None:
    """Read `unet.<dotted>.lora_A.weight` (diffusers now) or `base_model.model.<dotted>.lora_A[.<adapter>].weight` (peft).

    peft has LoHa and LoKr too, as `base_model.model.<dotted>.hada_w1_a`.
    """
    match = PEFT.fullmatch(key)
    return of_path(match[1], PEFT_SIDES[match[2]]) if match else None


def read_processor(key: str, _: Mapping[str, str]) -> Part | None:
    """Read `unet.<dotted>.processor.to_q_lora.down.weight` or `text_encoder.<dotted>.to_q_lora...` (diffusers before 0.18)."""
    match = re.fullmatch(r"(.+?)(\.processor)?\.to_(q|k|v|out)_lora\.(?:(down|up)\.weight|alpha)", key)
    if not match:
        return None
    text = match[1].startswith("text_encoder") or ".self_attn" in match[1]
    last = f"{match[3]}_proj" if text else {"out": "to_out.0"}.get(match[3], f"to_{match[3]}")
    return of_path(f"{match[1]}.{last}", match[4] or "alpha")


def read_diffusers(key: str, _: Mapping[str, str]) -> Part | None:
    """Read `unet.<dotted>.lora.down.weight` or `text_encoder.<dotted>.lora_linear_layer.down.weight` (diffusers from 0.18).

    kohya's suffixes are read behind dotted names too, as `unet.<dotted>.lora_down.weight`.
    """
    match = DOTTED.fullmatch(key)
    return of_path(match[1], DOTTED_SIDES[match[2]]) if match else None


READERS: tuple[Callable[[str, Mapping[str, str]], Part | None], ...] = (
    read_flat,
    read_comfy,
    read_peft,
    read_processor,
    read_diffusers,
)
LAYOUTS = {  # reader -> name of its layout in reports
    "read_flat": "kohya",
    "read_comfy": "ComfyUI",
    "read_peft": "peft",
    "read_processor": "diffusers before 0.18",
    "read_diffusers": "diffusers 0.18",
}


def kernel_of(key: str) -> int:
    """The side of the kernel of the layer with that canonical name: 3 or 1. All families have the same layers."""
    return 3 if KERNEL_3.fullmatch(key) else 1


def is_convolution(key: str, linear_projection: bool | None) -> bool | None:
    """Whether a layer is a convolution, by its canonical name; None where the name does not tell.

    The projections of transformers differ between families: `linear_projection` says whether they are linear layers.
    """
    if KERNEL_3.fullmatch(key) or KERNEL_1.fullmatch(key):
        return True
    if PROJECTION.fullmatch(key):
        return None if linear_projection is None else not linear_projection
    return None


def of_path(path: str, side: str) -> Part | None:
    """The part for `side` of a module's dotted path, which may begin with its component and peft's wrapper.

    None where the path belongs to no known component.
    """
    component, _, name = path.partition(".")
    if component not in COMPONENTS:
        component, name = "", path
    stated = "" if name.startswith("base_model.model.") else component
    name = name.removeprefix("base_model.model.")
    component = component or next((c for c, roots in ROOTS.items() if name.startswith(roots)), "")
    if not component:
        return None
    key = canonical(COMPONENTS[component], name)
    return Part(f"{key}.bias", "diff", stated, name) if side == "bias" else Part(key, side, stated, name)


def layout_of(key: str, table: Mapping[str, str]) -> str:
    """The common name of the layout that a key belongs to; "unknown" where there is none."""
    for reader in READERS:
        if reader(key, table):
            name = LAYOUTS[reader.__name__]
            if name == "kohya" and key.startswith("lycoris_"):
                return "LyCORIS"
            if name == "kohya" and (match := FLAT.fullmatch(key)) and single_file.from_flat(match[2], table):
                return "kohya, LDM names"
            if name == "peft" and key.startswith(tuple(f"{c}." for c in COMPONENTS)):
                return "diffusers"
            return name
    return "unknown"
