"""The options of `export`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.options.base import BaseConfig

EXAMPLES = """fastdiff export --base runs/model --single-file -o model.safetensors
fastdiff export --base model.safetensors -o folder
fastdiff export --base sdxl --vae sdxl_vae.safetensors --single-file -o sdxl.safetensors
fastdiff export --base sd15 --vae runs/distill-vae-sd15/tiny-vae --format taesd -o ComfyUI/models/vae_approx
fastdiff export --lora lcm.safetensors --format diffusers -o lcm-diffusers.safetensors"""


@dataclass
class Config(BaseConfig):
    PANEL: ClassVar[str] = "Export"
    ESSENTIALS: ClassVar[str] = "base lora vae single_file format precision output force"

    single_file: Annotated[bool, "write one LDM-layout file for ComfyUI, A1111 and Forge instead of a diffusers folder"] = False
    force: Annotated[bool, "write a single file even if no other program is known to read such a network"] = False
    lora: Annotated[str | None, "write this LoRA in --format instead of a checkpoint"] = None
    vae: Annotated[
        str | None, "bake this VAE into the checkpoint, a folder, hub id or file; with --format taesd write it alone"
    ] = None
    format: Annotated[
        Literal["kohya", "diffusers", "peft", "taesd"],
        "key layout of the LoRA: kohya loads in all programs, of diffusers' layout ComfyUI skips attention layers; taesd: a tiny "
        "VAE as two files for ComfyUI's models/vae_approx",
    ] = "kohya"
    output: Annotated[str | None, "a folder, or NAME.safetensors for one file"] = field(default=None, metadata={"flags": ["-o"]})
    precision: Annotated[
        Literal["stored", "fp16", "bf16", "fp32"],
        "precision of UNet and text encoders, the VAE keeps its own; or of the LoRA; stored: as they are",
    ] = "stored"
