"""The weights of a component in a diffusers folder: the files that hold them, and the tensors by the names that we use.

diffusers and transformers write these files under many names.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints import single_file
from fastdiff.checkpoints.configs import AGAIN, read
from fastdiff.checkpoints.single_file import Weights
from fastdiff.checkpoints.supported import class_of
from fastdiff.checkpoints.tensors import TensorFile
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


def choose(names: Sequence[str], allow_pickle: bool) -> tuple[list[str], str]:
    """Which weight files of a component to download, of the names in its folder: ([], "") where there are none to be read.

    The order is that of `stored`. All shards come with their index. The second result says what they are, where that is not the
    usual: full precision in safetensors.
    """
    kinds = [("safetensors", STEMS, ""), *([("bin", PICKLED, "pickled weights")] if allow_pickle else [])]
    for suffix, stems, pickled in kinds:
        for stem in stems:
            for variant in VARIANTS:
                v, number = re.escape(variant), r"-\d+-of-\d+"
                shard = rf"{stem}{v}{number}\.{suffix}|{stem}{number}{v}\.{suffix}"
                index = rf"{stem}{v}\.{suffix}\.index\.json|{stem}\.{suffix}\.index{v}\.json"
                what = pickled if not variant else f"the fp16 variant of {pickled or 'its weights'}"
                for form in (f"{shard}|{index}", rf"{stem}{v}\.{suffix}"):
                    if (found := [name for name in names if re.fullmatch(form, name)]) and not all(
                        re.fullmatch(index, name) for name in found
                    ):
                        return found, what
    return [], ""


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


def plain_name(part: str, name: str) -> str:
    """The name that we use for the stored parameter `name` of component `part`.

    Text encoders get the prefix `text_model.`, which transformers 5.6 dropped; old names of VAE attention become today's.
    """
    if part.startswith("text_encoder"):
        return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
    if part == "vae" and (old := re.search(r"\.attentions\.0\.(query|key|value|proj_attn)\.", name)):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old[1]]
        return name.replace(f".{old[1]}.", f".{new}.")
    return name


def require_complete(part: str, missing: list[str], unknown: list[str], where: Path) -> None:
    """Raise InputRefused if layers of a component are missing or unknown; `where` is the file or folder, for messages."""
    for problem, names in (("are missing", missing), ("have no place in the model", unknown)):
        if names:
            message = f"{where}: {part}: {len(names)} layers {problem}: {', '.join(names[:3])}"
            raise InputRefused(message, "the file is damaged or another model; for unusual networks give `base_config`")


def weights_in(part: str, shapes: Mapping[str, tuple[int, ...]], files: Sequence[TensorFile], where: Path) -> Weights:
    """The tensors of a component in files under diffusers' names, each read on access; `where` is for messages.

    InputRefused names layers that are missing, that have no place in the model, or that have another shape than in `shapes`.
    """
    readers: dict[str, Callable[[], Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    unknown = []
    for file in files:
        for key in file:
            name = plain_name(part, key.removeprefix(f"{part}."))
            if name not in shapes:
                unknown += [] if re.search(r"position_ids$|logit_scale$|text_projection", name) else [key]
                continue
            if single_file.strip(file.layouts[key].shape) != single_file.strip(shapes[name]):
                raise InputRefused(f"{file.path}: {key} is {file.layouts[key].shape}, the model has {shapes[name]}")
            readers[name] = partial(single_file.read_reshaped, file, key, shapes[name])
            dtypes[name] = file.layouts[key].dtype
    require_complete(part, [name for name in shapes if name not in readers], unknown, where)
    return Weights(readers, shapes, dtypes)
