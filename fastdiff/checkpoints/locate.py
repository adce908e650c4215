"""Find a base model and its family from an alias, hub id, folder or file; and the published configs that ship with fastdiff."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import tensors
from fastdiff.checkpoints.detect import detect
from fastdiff.checkpoints.family import SHIPPED, Family, aliases, base_names, named, of_unet_config
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

EMOJI = SHIPPED.home
ALIASES = aliases()
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
    if (family := named(ref)) and family.ships_weights:
        return family.home
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if path.suffix in FILES or ref.startswith((".", "/", "~")):
        raise UsageError(f"{as_field('base', ref)}: no such file or folder")
    hub_id = ALIASES.get(ref, ref)
    if hub_id.count("/") != 1:
        raise UsageError(f"{as_field('base', ref)}: not an alias ({base_names()}), a hub id (owner/name), a folder or a file")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/merges.txt"] if configs_only else WANTED
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub client raises a dozen kinds; each means that there is no complete copy
        raise missing_weights(ref, hub_id) from error


def family_of(ref: str, *, config: str | None = None, allow_pickle: bool = False) -> Family:
    """The family of a base model: from the alias, the config, or the keys of a file. No weights are read.

    `config`: folder or hub id with the configs for an unusual single file. UsageError where nothing is found, InputRefused where
    the files are no Stable Diffusion checkpoint.
    """
    if family := named(ref):
        return family
    path = locate(ref, configs_only=True)
    if path.is_file() and config:
        return family_of(config)
    if path.is_file():
        return detect(tensors.open_file(path, allow_pickle=allow_pickle)).family
    unet_config = path / "unet" / "config.json"
    if not unet_config.exists():
        raise InputRefused(
            f"{as_field('base', ref)}: {unet_config} is missing; a diffusers folder holds unet/, vae/, text_encoder/ ..."
        )
    return of_unet_config(json.loads(unet_config.read_text()))


def stock_config(family: Family) -> dict[str, Any]:
    """The UNet config of a family's published base."""
    return json.loads((family.home / "unet" / "config.json").read_text())


@cache
def shape_tables() -> dict[str, dict[str, dict[str, tuple[int, ...]]]]:
    """Parameter shapes of the published networks: family name -> component -> parameter -> shape.

    tests/test_checkpoints.py writes the file.
    """
    import gzip

    tables = json.loads(gzip.decompress((ASSETS / "families" / "shapes.json.gz").read_bytes()))
    return {f: {p: {k: tuple(s) for k, s in rows.items()} for p, rows in parts.items()} for f, parts in tables.items()}


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
