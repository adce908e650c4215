"""Where a base model is and of which family: alias, hub id, folder or file; and what of the published ones ships with us."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import tensors
from fastdiff.checkpoints.family import FAMILIES, FAMILY_OF_WIDTH, detect
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

EMOJI = ASSETS / "emoji"
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd-1b": "segmind/SSD-1B",
}
# What a first run downloads from the hub: configs, tokenizers and one full-precision safetensors file a component.
WANTED = ["model_index.json", "*/*.json", "*/merges.txt", "*/*.safetensors"]
UNWANTED = ["*.fp16.*", "*non_ema*", "*onnx*", "*openvino*", "*flax*", "safety_checker/*", "vae_1_0/*", "vae_*coder/*"]
FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


def missing_weights(ref: str, hub_id: str) -> UsageError:
    return UsageError(
        f"{as_field('base', ref)}: no weights for it on this machine and the hub ({hub_id}) cannot be reached",
        "give it as (1) a hub id with network access (drop `offline`), (2) a diffusers folder: `base=path/to/folder`, or "
        "(3) a single file: `base=model.safetensors`",
    )


def locate(ref: str, *, configs_only: bool = False) -> Path:
    """The folder or file behind a reference to a base model; downloads what is missing unless HF_HUB_OFFLINE is set."""
    if ref == "emoji":
        return EMOJI
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if path.suffix in FILES or ref.startswith((".", "/", "~")):
        raise UsageError(f"{as_field('base', ref)}: no such file or folder")
    hub_id = ALIASES.get(ref, ref)
    if hub_id.count("/") != 1:
        known = ", ".join(["emoji", *ALIASES])
        raise UsageError(f"{as_field('base', ref)}: not an alias ({known}), a hub id (owner/name), a folder or a file")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/merges.txt"] if configs_only else WANTED
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub client raises a dozen kinds; each means that there is no complete copy
        raise missing_weights(ref, hub_id) from error


def family_of(ref: str, *, config: str | None = None, allow_pickle: bool = False) -> str:
    """emoji, sd15, sd21 or sdxl, from the alias, the config or a file's keys; cheap, no weights are read.

    `config`: the folder or hub id that tells it for an unusual single file.
    """
    if ref in FAMILIES:
        return ref
    if ref in ALIASES:
        return "sdxl"
    path = locate(ref, configs_only=True)
    if path.is_file() and config:
        return family_of(config)
    if path.is_file():
        return detect(tensors.open_file(path, allow_pickle=allow_pickle)).family
    config = path / "unet" / "config.json"
    if not config.exists():
        raise InputRefused(
            f"{as_field('base', ref)}: {config} is missing; a diffusers folder holds unet/, vae/, text_encoder/ ..."
        )
    return family_of_config(json.loads(config.read_text()))


def stock_config(family: str) -> dict[str, Any]:
    """The UNet config of a family's published base."""
    return json.loads(((EMOJI if family == "emoji" else ASSETS / "families" / family) / "unet" / "config.json").read_text())


def family_of_config(config: Mapping[str, Any]) -> str:
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return FAMILY_OF_WIDTH.get(config.get("cross_attention_dim", 0), "sd15")


@cache
def shape_tables() -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Family -> component -> parameter -> shape, of the published networks. `tests/test_checkpoints.py` writes and checks it."""
    import gzip

    told = json.loads(gzip.decompress((ASSETS / "families" / "shapes.json.gz").read_bytes()))
    return {f: {p: {k: tuple(s) for k, s in rows.items()} for p, rows in parts.items()} for f, parts in told.items()}


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary (49,408 entries) and merges, out of the merges alone: their order is the numbering.

    Bytes in the order of the original code (printable ones first), the same at the end of a word, merges, the two marks.
    """
    import gzip

    text = gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode()
    merges = [(a, b) for a, b in (line.split(" ") for line in text.splitlines())]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges
