"""Detect what a single checkpoint file is, from its tensors' names and shapes and its header.

The result is the family and the prediction type. Files of other kinds are refused with a message that says what they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.family import Family, of_width
from fastdiff.checkpoints.supported import INPUTS, refusal
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.checkpoints.views import UNET, is_diffusers_unet
from fastdiff.runtime.errors import InputRefused

OTHERS = (  # pattern of a tensor name, and what an unsupported file with such a name is
    (r"\.joint_blocks\.|^joint_blocks\.", "a Stable Diffusion 3 checkpoint (a flow model)"),
    (r"double_blocks\.|single_transformer_blocks\.", "a Flux checkpoint (a flow model)"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an EDM checkpoint (Playground v2.5, CosXL)"),
    (
        r"^(model\.diffusion_model\.)?(x_embedder|pos_embed|patch_embed|adaln_single|layers\.\d+\.adaLN)",
        "a diffusion transformer",
    ),
    (r"motion_modules|time_stack|temporal_transformer|time_mixer", "a video or motion model"),
)
NO_UNET = (  # the same for files without a UNet under LDM names
    (r"^control_model\.|^controlnet_|^input_hint_block|^zero_convs", "a ControlNet, not a base model"),
    (r"\.lora_(down|up|A|B)\.|_lora\.(down|up)|\.hada_w|\.lokr_w", "a LoRA, not a base model"),
    (r"string_to_param|^emb_params$|^clip_[lg]$", "a textual inversion embedding, not a base model"),
)
PARTS = (  # the same for files of one part of a model, whose other parts `base_config` may give
    (r"^(unet\.)?(down_blocks|mid_block)\.", "a UNet alone with diffusers' names"),
    (r"^(model_ema\.)", "averaged weights alone, without the model"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone, not a base model"),
    (
        r"^(text_model|transformer\.resblocks|cond_stage_model|conditioner|token_embedding)",
        "a text encoder alone, not a base model",
    ),
)
FIRST = f"{UNET}input_blocks.0.0.weight"
SPREAD = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"  # by which ComfyUI tells what a network of SD2 predicts
BESIDE = "the commands `fastdiff sample` and `fastdiff export` take it beside a base model, as its `vae`"
PART_OF = "give the folder that it belongs to, whose other parts are then used: `base_config=FOLDER`"


@dataclass(frozen=True)
class Detection:
    """What a Stable Diffusion checkpoint file turned out to be."""

    family: Family
    prediction_type: str  # epsilon, v_prediction; sample: x0, as of one-step students
    zero_snr: bool = False  # its noise schedule ends in pure noise
    why: str = ""  # what the prediction type was read from, for messages
    certain: bool = True  # the file states the prediction type; False: guessed from weights, or the family's default


def sidecar(path: Path) -> str:
    """The text of the file NAME.yaml beside `path`, the configuration that A1111 and Forge read; empty where there is none."""
    for suffix in (".yaml", ".yml"):
        if (yaml_path := path.with_suffix(suffix)).exists():
            return yaml_path.read_text(errors="replace")
    return ""


def check_kind(file: TensorFile, *, whole: bool) -> None:
    """InputRefused, saying what it is, for a file that is no Stable Diffusion checkpoint for text to image.

    With `whole` also for one part of such a checkpoint. Only names and shapes are read.
    """
    shapes, path = file.shapes, file.path
    for pattern, what in OTHERS if FIRST in shapes else (*OTHERS, *NO_UNET):
        if key := next((k for k in shapes if re.search(pattern, k)), None):
            raise refusal(path, what, key)
    for pattern, what in PARTS if whole and FIRST not in shapes else ():
        if key := next((k for k in shapes if re.search(pattern, k)), None):
            error = refusal(path, what, key)
            error.hint = PART_OF if is_diffusers_unet(file) else BESIDE if "VAE" in what else error.hint
            raise error
    names = (FIRST, "conv_in.weight", "unet.conv_in.weight")
    first = next((name for name in names if len(shapes.get(name, ())) == 4), None)
    if first is None:
        if whole:
            raise refusal(path, "not a Stable Diffusion checkpoint: no model.diffusion_model.input_blocks in it")
        return
    if first != FIRST and not is_diffusers_unet(file):
        return
    if (channels := shapes[first][1]) != 4:
        raise refusal(path, INPUTS.get(channels, f"a checkpoint of {channels} input channels"), first)
    last = f"{UNET}out.2.weight" if first == FIRST else first.replace("conv_in", "conv_out")
    if (out := shapes.get(last, (4,))[0]) != 4:
        raise refusal(path, f"a checkpoint of {out} output channels", last)


def detect(file: TensorFile) -> Detection:
    """Detect family and prediction type of a file in the LDM layout; InputRefused says what any other file is."""
    check_kind(file, whole=True)
    shapes, path = file.shapes, file.path
    cross = next((k for k in shapes if k.startswith(UNET) and k.endswith("attn2.to_k.weight")), "")
    if not cross:
        raise refusal(path, "a UNet without cross-attention")
    family = of_width(width := shapes[cross][1])
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    if width == 1280:
        raise refusal(path, "an SDXL refiner", cross)
    if label and not (family and family.size_conditioned):
        raise refusal(path, "an unCLIP checkpoint", f"{UNET}label_emb.0.0.weight")
    if family is None:
        what = f"{path}: a checkpoint with cross-attention of width {width} ({cross})"
        raise InputRefused(what, "for a network of unusual shape give a folder with its configs: `base_config=FOLDER`")
    return detect_prediction(file, family)


def detect_prediction(file: TensorFile, family: Family) -> Detection:
    """Detect whether a file of this family predicts epsilon, v or x0; InputRefused for a flow model.

    The first of these that says so decides: the yaml beside the file, a marker tensor, the header, the spread of a bias. Where
    none does, it is the family's default.
    """
    kind = lambda text: "v_prediction" if text.startswith("v") else "epsilon"
    zero_snr = "ztsnr" in file
    if file.metadata.get("fastdiff.prediction_type") == "sample":  # a one-step student, whatever the base predicts
        return Detection(family, "sample", zero_snr, "its header")
    if match := re.search(r"parameterization\s*:\s*[\"']?(\w+)", sidecar(file.path)):
        return Detection(family, kind(match[1]), zero_snr, "the yaml beside it")
    if "v_pred" in file:
        return Detection(family, "v_prediction", zero_snr, "its key v_pred")
    header = file.metadata.get("fastdiff.prediction_type") or file.metadata.get("modelspec.prediction_type", "")
    if "flow" in header or "flow" in file.metadata.get("modelspec.architecture", ""):
        raise refusal(file.path, "a flow checkpoint, by its header")
    if header:
        return Detection(family, kind(header), zero_snr, "its header")
    architecture = file.metadata.get("modelspec.architecture", "")
    if family.predicts_either and architecture.startswith(family.architecture_stem):
        predicts_v = architecture.split("/")[0].endswith("-v")
        return Detection(family, "v_prediction" if predicts_v else "epsilon", zero_snr, "its header")
    key = SPREAD
    if family.predicts_either and key in file:
        guess = guess_by_bias(file[key])
        return Detection(family, guess, zero_snr, "the spread of a bias; no yaml, no header", False)
    return Detection(family, family.prediction_type, zero_snr, "its family's default", False)


def guess_by_bias(bias: Tensor) -> str:
    """ComfyUI's rule where nothing else tells: the values of the bias SPREAD lie wider apart in a network that predicts v."""
    return "v_prediction" if bias.float().std(unbiased=False).item() > 0.09 else "epsilon"


def infer_unet(file: TensorFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The UNet config of a file: the family's `config` with the blocks that the file has, since pruned networks have fewer.

    InputRefused where the layers differ within a level, because names alone cannot describe such a network.
    """
    shapes = {k.removeprefix(UNET): v for k, v in file.shapes.items() if k.startswith(UNET)}
    count = lambda side: 1 + max(int(m[1]) for k in shapes if (m := re.match(rf"{side}\.(\d+)\.", k)))
    downs = sorted(int(m[1]) for k in shapes if (m := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", k)))
    blocks = count("input_blocks")
    layers = (downs[0] if downs else blocks) - 1
    levels = len(downs) + 1
    depth = lambda block: len({m[1] for k in shapes if (m := re.match(rf"{block}\.1\.transformer_blocks\.(\d+)\.", k))})
    down = [[depth(f"input_blocks.{i * (layers + 1) + j + 1}") for j in range(layers)] for i in range(levels)]
    up = [[depth(f"output_blocks.{i * (layers + 1) + j}") for j in range(layers + 1)] for i in range(levels)]
    middle = depth("middle_block") if "middle_block.0.in_layers.0.weight" in shapes else None
    across = list(zip(down, reversed(up), strict=True)) if len(down) == len(up) else []
    even = blocks == count("output_blocks") == levels * (layers + 1)
    even &= all(not 0 < row.count(0) < len(row) for row in (*down, *up))  # within a block, all layers have attention or none has
    widths = [shapes.get(f"input_blocks.{i * (layers + 1) + 1}.0.in_layers.2.weight", (0,))[0] for i in range(levels)]
    level_depths = [{depth for row in rows for depth in row} - {0} for rows in across]
    uniform = all(len(depths) <= 1 for depths in level_depths)  # every level has one depth throughout
    depths: list[Any] = [max(depths, default=0) for depths in level_depths]
    known = {depths[-1], config_depth(config)} if uniform else set()
    if not even or (middle and middle not in known):
        raise InputRefused(
            f"{file.path}: a pruned UNet whose layers differ within a level or from one half to the other",
            "give the folder with its configs: `base_config=FOLDER`",
        )
    kinds = {None: None, 0: "UNetMidBlock2D"}
    inferred = {
        **config,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if row[0] else "DownBlock2D" for row in down],
        "up_block_types": ["CrossAttnUpBlock2D" if row[0] else "UpBlock2D" for row in up],
        "mid_block_type": kinds.get(middle, "UNetMidBlock2DCrossAttn"),
    }
    if not uniform:  # depths layer by layer: of the down blocks, and of the up blocks from the innermost on
        flat = lambda row: row if any(row) else 1
        inferred["transformer_layers_per_block"] = [flat(row) for row in down]
        inferred["reverse_transformer_layers_per_block"] = [flat(row) for row in up]
    elif isinstance(config.get("transformer_layers_per_block"), list):
        inferred["transformer_layers_per_block"] = [d or 1 for d in depths[:-1]] + [middle or depths[-1] or 1]
    if isinstance(config.get("attention_head_dim"), list):  # heads of 64 channels
        inferred["attention_head_dim"] = [width // 64 for width in widths]
    if guidance := shapes.get("time_embed.cond_proj.weight"):  # the UNet of a whole LCM takes the guidance as an input
        inferred["time_cond_proj_dim"] = guidance[1]
    text_width = config["cross_attention_dim"]
    keys = (f"input_blocks.{i * (layers + 1) + 1}.1.transformer_blocks.0.attn1.to_k.weight" for i in range(levels))
    crossed = [key in shapes and shapes[key][1] == text_width != width for key, width in zip(keys, widths, strict=True)]
    if any(crossed):
        inferred["only_cross_attention"] = crossed
    return inferred


def config_depth(config: Mapping[str, Any]) -> int:
    """The number of transformers a layer has at the innermost level, as a UNet's config says."""
    depth = config.get("transformer_layers_per_block", 1)
    return depth[-1] if isinstance(depth, list) else depth
