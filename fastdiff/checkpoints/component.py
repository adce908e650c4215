"""A network of its own besides the base: a VAE or a ControlNet, in a diffusers folder or on the hub."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.runtime.errors import InputRefused, UsageError, as_field, quoted

FILES = ["config.json", "diffusion_pytorch_model.safetensors", "fastdiff.json"]


def locate(ref: str, option: str, what: str) -> Path:
    """The folder behind a reference, which `option` was given; UsageError where there is none."""
    folder = Path(ref).expanduser()
    if folder.exists():
        return folder
    if ref.startswith((".", "/", "~")) or ref.count("/") != 1:
        raise UsageError(
            f"{as_field(option, ref)}: no such folder", f"give a diffusers folder of a {what}, or a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ref, allow_patterns=FILES))
    except Exception as error:  # the hub client raises a dozen kinds
        raise UsageError(
            f"{as_field(option, ref)}: not on this machine, and the hub cannot be reached", "give a folder"
        ) from error


def config_of(folder: Path, option: str, ref: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """Its config; InputRefused where it is of none of these classes."""
    told = folder / "config.json"
    config = json.loads(told.read_text()) if told.is_file() else {}
    if config.get("_class_name") not in classes:
        found = config.get("_class_name") or "no config.json there"
        raise InputRefused(f"{as_field(option, ref)}: {found}", f"a diffusers folder of {' or '.join(classes)}")
    return config


def load(folder: Path, option: str, ref: str, config: dict[str, Any]) -> nn.Module:
    """The network in fp32, frozen; InputRefused where its weights cannot be read whole."""
    import diffusers

    kind = getattr(diffusers, config["_class_name"])  # one of the classes that were asked for
    try:
        net, told = kind.from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputRefused(f"{as_field(option, ref)}: its weights cannot be read ({quoted(error).splitlines()[0]})") from error
    if missing := sorted(told["missing_keys"]):
        raise InputRefused(f"{as_field(option, ref)}: {len(missing)} of its layers have no weights ({missing[0]})")
    return net.eval().requires_grad_(False)
