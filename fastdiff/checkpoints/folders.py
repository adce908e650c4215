"""Which files of a diffusers folder hold the weights of a component, in all the names that diffusers and transformers write."""

import re
from pathlib import Path

from fastdiff.checkpoints.configs import AGAIN, read
from fastdiff.checkpoints.supported import class_of
from fastdiff.runtime.errors import InputRefused, quoted

STEMS = ("diffusion_pytorch_model", "model")  # of safetensors files: of a UNet or VAE, and of a text encoder
PICKLED = ("diffusion_pytorch_model", "pytorch_model")  # of .bin files
FILE_NAME = re.compile(r"[\w-][\w. +-]{0,199}", re.ASCII)  # of a shard: no path, and nothing that a disk would not take
VARIANTS = ("", ".fp16")  # full precision is preferred


def named(home: Path, stem: str, suffix: str) -> list[Path]:
    """The files NAME.suffix of a component, shards included, in the first variant that is there; [] where there is none.

    InputRefused where the index of the shards is no index, or names a file outside the folder.
    """
    for variant in VARIANTS:
        for index in (home / f"{stem}.{suffix}.index{variant}.json", home / f"{stem}{variant}.{suffix}.index.json"):
            if index.exists():
                return shards(index)
        if (one := home / f"{stem}{variant}.{suffix}").exists():
            return [one]
    return []


def shards(index: Path) -> list[Path]:
    """The files that the index of a component in several files names."""
    places = read(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputRefused(f"{index}: not an index of shards", AGAIN)
    if paths := [name for name in places.values() if "/" in name or "\\" in name]:
        raise InputRefused(f"{index}: the name of a shard looks like a path ({quoted(ascii(paths[0]))[:80]})", AGAIN)
    if strange := [name for name in places.values() if not FILE_NAME.fullmatch(name)]:
        raise InputRefused(f"{index}: a shard has no plain file name ({quoted(ascii(strange[0]))[:80]})", AGAIN)
    return [index.with_name(name) for name in sorted(set(places.values()))]


def stored(folder: Path, part: str, *, allow_pickle: bool = False) -> list[Path]:
    """The weight files of a component in a diffusers folder, shards included; empty where there are none.

    Safetensors are preferred to pickles, which count only with `allow_pickle`, and full precision to the fp16 variant.
    """
    home = folder / part
    for stem in STEMS:
        if files := named(home, stem, "safetensors"):
            return files
    for stem in PICKLED if allow_pickle else ():
        if files := named(home, stem, "bin"):
            return files
    return []


def components(folder: Path) -> list[str]:
    """The components with weights, by model_index.json; [] where it is missing."""
    index = read(folder / "model_index.json")
    encoders = [part for part in index if part.startswith("text_encoder") and class_of(index, part)]
    return ["unet", "vae", *encoders] if index else []


def lacking(folder: Path, *, allow_pickle: bool = False) -> list[str]:
    """The components of a diffusers folder whose config or weights are not all there."""
    gone = []
    for part in components(folder):
        files = stored(folder, part, allow_pickle=allow_pickle)
        if not files or not all(path.exists() for path in files) or not (folder / part / "config.json").exists():
            gone.append(part)
    return gone


def why_missing(folder: Path, part: str, *, allow_pickle: bool = False) -> tuple[str, str]:
    """Why a component has no weights in a folder, and what to do about it."""
    if not stored(folder, part, allow_pickle=allow_pickle) and stored(folder, part, allow_pickle=True):
        return (
            f"{folder / part} has pickled weights alone (.bin)",
            "`allow_pickle=True` reads them; nothing in them is run",
        )
    gone = [path.name for path in stored(folder, part, allow_pickle=allow_pickle) if not path.exists()]
    if gone:
        return f"{folder / part}: {len(gone)} of its shards are missing ({gone[0]})", "download or copy the folder again"
    return f"{folder / part} has no weights", "download or copy the folder again, with its .safetensors files"
