"""Refuse by name, from the configs of a diffusers folder, every model whose networks fastdiff does not know how to use.

This is asked as soon as a folder is opened: such a model would fail only after its prompts and pictures are encoded.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.configs import read
from fastdiff.checkpoints.family import of_unet_config, titles
from fastdiff.runtime.errors import InputRefused

INPUTS = {  # input channels of the first convolution, and what an unsupported model with that many is
    5: "a depth-to-image checkpoint",
    7: "an upscaler checkpoint",
    8: "an InstructPix2Pix checkpoint",
    9: "an inpainting checkpoint",
    16: "a checkpoint of a 16-channel VAE",
}
CLASSES = {  # component -> the classes of it that we can build
    "unet": {"UNet2DConditionModel"},
    "vae": {"AutoencoderKL", "AutoencoderTiny"},
    "text_encoder": {"CLIPTextModel", "CLIPTextModelWithProjection"},
    "text_encoder_2": {"CLIPTextModel", "CLIPTextModelWithProjection"},
}
SCHEDULERS = {"EDM": "an EDM checkpoint (Playground v2.5, CosXL)", "Flow": "a flow checkpoint"}  # start of the class name


def refusal(where: Path, what: str, reason: str = "") -> InputRefused:
    """The error for an unsupported file or folder: `what` it is, and in `reason` what that was seen by."""
    message = f"{where}: {what}" + (f" ({reason})" if reason else "")
    return InputRefused(message, f"{titles()} text-to-image checkpoints are supported")


def pipeline_of(index: Mapping[str, Any]) -> str:
    """The pipeline class that model_index.json names; for a community pipeline it is a pair, of a file and a class."""
    name = index.get("_class_name", "")
    return str(name[-1] if isinstance(name, list) and name else name)


def class_of(index: Mapping[str, Any], part: str) -> str | None:
    """The class of a component by model_index.json; None where the model has no such component."""
    row = index.get(part)
    return str(row[1]) if isinstance(row, list) and len(row) == 2 and row[1] else None


def check_folder(folder: Path) -> None:
    """InputRefused, by what the model is, where a diffusers folder is no text-to-image checkpoint that we can use.

    Only the JSON files are read. What a folder lacks altogether is not asked here.
    """
    index = read(folder / "model_index.json")
    if index:
        check_components(folder, index)
    unet, vae = (read(folder / part / "config.json") for part in ("unet", "vae"))
    if unet:
        check_unet(folder, unet, index)
    if vae:
        check_vae(folder, vae)
    scheduler = str(read(folder / "scheduler" / "scheduler_config.json").get("_class_name", ""))
    for start, what in SCHEDULERS.items():
        if scheduler.startswith(start):
            raise refusal(folder, what, scheduler)
    check_tokenizers(folder, index)


def check_tokenizers(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that has not one tokenizer for each text encoder."""
    count = lambda start: sum(part.startswith(start) and class_of(index, part) is not None for part in index)
    encoders, tokenizers = count("text_encoder"), count("tokenizer")
    if encoders != tokenizers:
        what = f"{pipeline_of(index)} with {encoders} text encoders and {tokenizers} tokenizers"
        raise refusal(folder, what, "model_index.json")


def check_components(folder: Path, index: Mapping[str, Any]) -> None:
    """Refuse a pipeline that has no UNet, or a component of a class that we cannot build."""
    name = pipeline_of(index) or "a pipeline of no name"
    if class_of(index, "unet") is None:
        net = next((part for part in ("transformer", "prior", "decoder") if class_of(index, part)), "")
        raise refusal(folder, f"{name}, not a Stable Diffusion checkpoint", f"it has {net or 'no unet'}")
    for part, classes in CLASSES.items():
        if (own := class_of(index, part)) is not None and own not in classes:
            raise refusal(folder, f"{name}, whose {part} is of an unknown class", own)
    if index.get("requires_aesthetics_score"):
        raise refusal(folder, "an SDXL refiner", "requires_aesthetics_score")
    for part in ("motion_adapter", "image_encoder", "controlnet"):
        # SD1.5's folders may have an image encoder, which serves IP-Adapters alone; without a text encoder it is what conditions.
        if class_of(index, part) and (part == "motion_adapter" or class_of(index, "text_encoder") is None):
            raise refusal(folder, f"{name}, which takes other conditions than a text", part)


def check_unet(folder: Path, config: Mapping[str, Any], index: Mapping[str, Any]) -> None:
    """Refuse a UNet with other inputs or outputs than latents of four channels, a timestep and a text."""
    own = config.get("_class_name", "UNet2DConditionModel")
    if own not in CLASSES["unet"]:
        raise refusal(folder, f"a UNet of an unknown class ({own})")
    channels, out = config.get("in_channels", 4), config.get("out_channels", 4)
    if channels != 4:
        raise refusal(folder, INPUTS.get(channels, f"a checkpoint of {channels} input channels"), f"in_channels {channels}")
    if out != 4:
        raise refusal(folder, f"a checkpoint of {out} output channels", f"out_channels {out}")
    if config.get("class_embed_type") or config.get("num_class_embeds"):
        kind = config.get("class_embed_type")
        what = "an unCLIP checkpoint" if kind in {"projection", "simple_projection"} else "a class-conditioned checkpoint"
        raise refusal(folder, what, f"class_embed_type {kind}" if kind else f"num_class_embeds {config['num_class_embeds']}")
    added, hidden = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    if added not in {None, "text_time"} or hidden:
        reason = f"encoder_hid_dim_type {hidden}" if hidden else f"addition_embed_type {added}"
        raise refusal(folder, "a UNet that takes other conditions than a text", reason)
    family = of_unet_config(config)
    if family.size_conditioned and config.get("cross_attention_dim") == 1280:
        raise refusal(folder, "an SDXL refiner", "cross_attention_dim 1280")
    encoders = [part for part in index if part.startswith("text_encoder") and class_of(index, part)]
    if index and len(encoders) != family.text_encoders:
        what = f"{pipeline_of(index)} with {len(encoders)} text encoders, where {family.title} has {family.text_encoders}"
        raise refusal(folder, what)


def check_vae(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a VAE that is no AutoencoderKL of four channels."""
    own, channels = config.get("_class_name", "AutoencoderKL"), config.get("latent_channels", 4)
    if own not in CLASSES["vae"]:
        raise refusal(folder, f"a checkpoint whose VAE is of an unknown class ({own})")
    if channels != 4:
        raise refusal(folder, f"a checkpoint of a {channels}-channel VAE", f"latent_channels {channels}")
