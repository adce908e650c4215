"""What a checkpoint file is: family, prediction type, and what is refused by name; from keys, shapes and the header."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.runtime.errors import InputRefused

FAMILIES = ("emoji", "sd15", "sd21", "sdxl")
FAMILY_OF_WIDTH = {128: "emoji", 768: "sd15", 1024: "sd21", 2048: "sdxl"}  # cross-attention width
UNET = "model.diffusion_model."
OTHERS = (  # a key that tells what the file is, when it is nothing that we read
    (r"\.joint_blocks\.|^joint_blocks\.", "a Stable Diffusion 3 checkpoint (a flow model)"),
    (r"double_blocks\.|single_transformer_blocks\.", "a Flux checkpoint (a flow model)"),
    (r"^edm_(mean|std)$|^edm_vpred\.", "an EDM checkpoint (Playground v2.5, CosXL)"),
    (
        r"^(model\.diffusion_model\.)?(x_embedder|pos_embed|patch_embed|adaln_single|layers\.\d+\.adaLN)",
        "a diffusion transformer",
    ),
    (r"motion_modules|time_stack|temporal_transformer|time_mixer", "a video or motion model"),
    (r"^control_model\.|^controlnet_|^input_hint_block|^zero_convs", "a ControlNet, not a base model"),
    (r"\.lora_(down|up|A|B)\.|_lora\.(down|up)|\.hada_w|\.lokr_w", "a LoRA: give it with `lora`"),
    (r"string_to_param|^emb_params$|^clip_[lg]$", "a textual inversion embedding, not a base model"),
    (r"^(unet\.)?(down_blocks|mid_block)\.", "a UNet alone with diffusers' names: give the folder that it belongs to"),
    (r"^(model_ema\.)", "averaged weights alone, without the model"),
    (r"^(first_stage_model\.)?(encoder|decoder)\.(conv_in|down|up|mid)", "a VAE alone, not a base model"),
    (
        r"^(text_model|transformer\.resblocks|cond_stage_model|conditioner|token_embedding)",
        "a text encoder alone, not a base model",
    ),
)
INPUTS = {  # channels that the first convolution takes
    5: "a depth-to-image checkpoint",
    7: "an upscaler checkpoint",
    8: "an InstructPix2Pix checkpoint",
    9: "an inpainting checkpoint",
    16: "a checkpoint of a 16-channel VAE",
}


@dataclass(frozen=True)
class Found:
    """A Stable Diffusion checkpoint that we read."""

    family: str
    prediction_type: str  # epsilon, v_prediction
    zero_snr: bool = False
    why: str = ""  # what tells the prediction type
    told: bool = True  # the file says it; False: guessed from weights, or the family's default


def refuse(path: Path, what: str, key: str = "") -> InputRefused:
    told = f" ({key})" if key else ""
    return InputRefused(f"{path}: {what}{told}", "SD1.5, SD2.1 and SDXL text-to-image checkpoints are supported")


def sidecar(path: Path) -> str:
    """The text of NAME.yaml beside a file, where A1111 and Forge look for its configuration."""
    for suffix in (".yaml", ".yml"):
        if (beside := path.with_suffix(suffix)).exists():
            return beside.read_text(errors="replace")
    return ""


def detect(file: TensorFile) -> Found:
    """Family and prediction type of an LDM-layout file; anything else is refused by name (InputRefused)."""
    shapes, path = file.shapes, file.path
    for pattern, what in OTHERS[:5]:
        if key := next((k for k in shapes if re.search(pattern, k)), None):
            raise refuse(path, what, key)
    if f"{UNET}input_blocks.0.0.weight" not in shapes:
        for pattern, what in OTHERS[5:]:
            if key := next((k for k in shapes if re.search(pattern, k)), None):
                raise refuse(path, what, key)
        raise refuse(path, "not a Stable Diffusion checkpoint: no model.diffusion_model.input_blocks in it")
    channels, first = shapes[f"{UNET}input_blocks.0.0.weight"][1], f"{UNET}input_blocks.0.0.weight"
    if channels != 4:
        raise refuse(path, INPUTS.get(channels, f"a checkpoint of {channels} input channels"), first)
    if (out := shapes.get(f"{UNET}out.2.weight", (4,))[0]) != 4:
        raise refuse(path, f"a checkpoint of {out} output channels", f"{UNET}out.2.weight")
    cross = next((k for k in shapes if k.startswith(UNET) and k.endswith("attn2.to_k.weight")), "")
    if not cross:
        raise refuse(path, "a UNet without cross-attention")
    family = FAMILY_OF_WIDTH.get(width := shapes[cross][1])
    label = shapes.get(f"{UNET}label_emb.0.0.weight")
    if width == 1280:
        raise refuse(path, "an SDXL refiner", cross)
    if family != "sdxl" and label:
        raise refuse(path, "an unCLIP checkpoint", f"{UNET}label_emb.0.0.weight")
    if family is None:
        what = f"{path}: a checkpoint with cross-attention of width {width} ({cross})"
        raise InputRefused(what, "for a network of unusual shape give a folder with its configs: `base_config=FOLDER`")
    return prediction(file, family)


def prediction(file: TensorFile, family: str) -> Found:
    """The family with epsilon or v_prediction, as the yaml beside the file, marker keys, the header, or SD2's weights tell."""
    kind = lambda text: "v_prediction" if text.startswith("v") else "epsilon"
    zero_snr = "ztsnr" in file
    if told := re.search(r"parameterization\s*:\s*[\"']?(\w+)", sidecar(file.path)):
        return Found(family, kind(told[1]), zero_snr, "the yaml beside it")
    if "v_pred" in file:
        return Found(family, "v_prediction", zero_snr, "its key v_pred")
    header = file.metadata.get("fastdiff.prediction_type") or file.metadata.get("modelspec.prediction_type", "")
    if "flow" in header or "flow" in file.metadata.get("modelspec.architecture", ""):
        raise refuse(file.path, "a flow checkpoint, by its header")
    if header:
        return Found(family, kind(header), zero_snr, "its header")
    architecture = file.metadata.get("modelspec.architecture", "")
    if family == "sd21" and architecture.startswith("stable-diffusion-v2"):
        return Found(family, "v_prediction" if architecture.split("/")[0].endswith("-v") else "epsilon", zero_snr, "its header")
    key = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    if family == "sd21" and key in file:
        # Where nothing else tells, ComfyUI's rule: this bias spreads wider in the network that predicts v.
        wide = file[key].float().std().item() > 0.09
        return Found(family, "v_prediction" if wide else "epsilon", zero_snr, "the spread of a bias; no yaml, no header", False)
    return Found(family, "v_prediction" if family == "sd21" else "epsilon", zero_snr, "its family's default", False)


def infer_unet(file: TensorFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's UNet config, its blocks changed to those that are in the file: pruned networks have fewer.

    A network whose layers differ within a level cannot be told from names alone: InputRefused asks for `base_config`.
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
    even &= all(not 0 < row.count(0) < len(row) for row in (*down, *up))  # attention in all layers of a block or in none
    widths = [shapes.get(f"input_blocks.{i * (layers + 1) + 1}.0.in_layers.2.weight", (0,))[0] for i in range(levels)]
    seen = [{depth for row in rows for depth in row} - {0} for rows in across]
    whole = all(len(found) <= 1 for found in seen)
    depths: list[Any] = [max(found, default=0) for found in seen]
    known = {depths[-1], config_depth(config)} if whole else set()
    if not even or (middle and middle not in known):
        raise InputRefused(
            f"{file.path}: a pruned UNet whose layers differ within a level or from one half to the other",
            "give the folder with its configs: `base_config=FOLDER`",
        )
    kinds = {None: None, 0: "UNetMidBlock2D"}
    found = {
        **config,
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if row[0] else "DownBlock2D" for row in down],
        "up_block_types": ["CrossAttnUpBlock2D" if row[0] else "UpBlock2D" for row in up],
        "mid_block_type": kinds.get(middle, "UNetMidBlock2DCrossAttn"),
    }
    if not whole:  # a list of every layer's, down and, from the innermost, up
        flat = lambda row: row if any(row) else 1
        found["transformer_layers_per_block"] = [flat(row) for row in down]
        found["reverse_transformer_layers_per_block"] = [flat(row) for row in up]
    elif isinstance(config.get("transformer_layers_per_block"), list):
        found["transformer_layers_per_block"] = [d or 1 for d in depths[:-1]] + [middle or depths[-1] or 1]
    if isinstance(config.get("attention_head_dim"), list):  # heads of 64 channels
        found["attention_head_dim"] = [width // 64 for width in widths]
    text = config["cross_attention_dim"]
    keys = (f"input_blocks.{i * (layers + 1) + 1}.1.transformer_blocks.0.attn1.to_k.weight" for i in range(levels))
    crossed = [key in shapes and shapes[key][1] == text != width for key, width in zip(keys, widths, strict=True)]
    if any(crossed):
        found["only_cross_attention"] = crossed
    return found


def config_depth(config: Mapping[str, Any]) -> int:
    depth = config.get("transformer_layers_per_block", 1)
    return depth[-1] if isinstance(depth, list) else depth
