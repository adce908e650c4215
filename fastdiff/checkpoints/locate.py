"""Find a base model and its family from an alias, hub id, folder or file; and the published configs that ship with fastdiff."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import configs, folders, supported, views
from fastdiff.checkpoints.detect import detect
from fastdiff.checkpoints.family import SHIPPED, Family, aliases, base_names, named, of_unet_config
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.runtime.console import info
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

EMOJI = SHIPPED.home
ALIASES = aliases()
# What a first run downloads from the hub: configs, tokenizers and one full-precision safetensors file a component.
CONFIGS = ["model_index.json", "*/*.json", "*/merges.txt"]
WANTED = [*CONFIGS, "*/*.safetensors"]
UNWANTED = ["*non_ema*", "*onnx*", "*openvino*", "*flax*", "safety_checker/*", "vae_1_0/*", "vae_*coder/*"]
HALF = "*.fp16.*"  # the variant that is taken of a component which has no other
FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


def missing_weights(ref: str, hub_ids: Sequence[str], reason: str = "") -> UsageError:
    """The error for a base that is neither on this machine nor to be had; it names every repository that was tried."""
    return UsageError(
        f"{as_field('base', ref)}: no weights for it on this machine and the hub ({', '.join(hub_ids)}) cannot be reached"
        + (f" ({reason})" if reason else ""),
        "give it as (1) a hub id with network access (drop `offline`), (2) a diffusers folder: `base=path/to/folder`, or "
        "(3) a single file: `base=model.safetensors`",
    )


def locate(ref: str, *, configs_only: bool = False, allow_pickle: bool = False) -> Path:
    """The folder or file behind a reference to a base model; downloads what is missing unless HF_HUB_OFFLINE is set.

    Of the repositories behind an alias, the first that is complete on this machine is taken, else the first that can be
    downloaded. UsageError where there is nothing of that name, InputRefused where a repository has no weights that can be read.
    """
    if (family := named(ref)) and family.ships_weights:
        return family.home
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if path.suffix in FILES or ref.startswith((".", "/", "~")):
        raise UsageError(f"{as_field('base', ref)}: no such file or folder")
    hub_ids = ALIASES.get(ref, (ref,))
    if hub_ids[0].count("/") != 1:
        raise UsageError(f"{as_field('base', ref)}: not an alias ({base_names()}), a hub id (owner/name), a folder or a file")
    how: dict[str, bool] = dict(configs_only=configs_only, allow_pickle=allow_pickle)
    for hub_id in hub_ids:
        if folder := cached(hub_id, **how):
            return told(ref, hub_id, hub_ids, folder)
    from huggingface_hub import constants

    reason, refused, cause = "", None, None
    for hub_id in hub_ids:
        refused = refused or pickled_copy(ref, hub_id, **how)
        try:
            if not constants.HF_HUB_OFFLINE:
                return told(ref, hub_id, hub_ids, downloaded(ref, hub_id, **how))
        except InputRefused as error:  # the repository is there, but not what is wanted of it
            refused = error
        except Exception as error:  # the hub client raises a dozen kinds; each means that there is no complete copy
            reason, cause = reason or why(error), error
    raise refused or missing_weights(ref, hub_ids, reason) from cause


def why(error: Exception) -> str:
    """What an error of the hub client says in a few words, where that helps; else nothing."""
    name = type(error).__name__
    if name == "GatedRepoError":
        return "its owner lets in only those who asked: accept the licence on its page, and set HF_TOKEN"
    return "no such repository there, or a private one" if name == "RepositoryNotFoundError" else ""


def told(ref: str, hub_id: str, hub_ids: Sequence[str], folder: Path) -> Path:
    """The folder; says which repository was used where it is not the first of an alias."""
    if hub_id != hub_ids[0]:
        info(f"{ref}: {hub_id} is used; {', '.join(hub_ids[: hub_ids.index(hub_id)])} is not to be had")
    return folder


def cached(hub_id: str, *, configs_only: bool, allow_pickle: bool) -> Path | None:
    """The folder of a repository in the hub's cache on this machine, if it is complete."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True))
    except Exception:  # the hub client raises a dozen kinds; each means that there is no copy
        return None
    return folder if complete(folder, configs_only=configs_only, allow_pickle=allow_pickle) else None


def pickled_copy(ref: str, hub_id: str, *, configs_only: bool, allow_pickle: bool) -> InputRefused | None:
    """The error for a repository that is complete on this machine, but with pickled weights, which are not allowed."""
    folder = cached(hub_id, configs_only=configs_only, allow_pickle=True)
    if folder is None or allow_pickle:
        return None
    problem, hint = folders.why_missing(folder, folders.lacking(folder)[0])
    return InputRefused(f"{as_field('base', ref)}: {problem}", hint)


def complete(folder: Path, *, configs_only: bool, allow_pickle: bool) -> bool:
    """Whether a repository's folder has what is wanted of it: a model index, and the configs or weights of its components."""
    parts = folders.components(folder)
    if not parts:
        return False
    return configs_only or not folders.lacking(folder, allow_pickle=allow_pickle)


def downloaded(ref: str, hub_id: str, *, configs_only: bool, allow_pickle: bool) -> Path:
    """Download a repository: full-precision safetensors, and of components that have none the fp16 variant, or pickles.

    InputRefused where it has no weights of a component that can be read, or is no checkpoint that we can use.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(hub_id, allow_patterns=CONFIGS, ignore_patterns=[*UNWANTED, HALF]))
    supported.check_folder(folder)  # before gigabytes are downloaded
    if configs_only:
        return folder
    folder = Path(snapshot_download(hub_id, allow_patterns=WANTED, ignore_patterns=[*UNWANTED, HALF]))
    more: list[tuple[str, list[str], str]] = [("safetensors", [], "the fp16 variant of its weights")]
    if allow_pickle:
        more += [("bin", [HALF], "pickled weights"), ("bin", [], "the fp16 variant of pickled weights")]
    for suffix, unwanted, what in more:
        if not (parts := folders.lacking(folder, allow_pickle=allow_pickle)):
            break
        patterns = [pattern for part in parts for pattern in (f"{part}/*.{suffix}", f"{part}/*.{suffix}.index*.json")]
        folder = Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=[*UNWANTED, *unwanted]))
        if got := [part for part in parts if part not in folders.lacking(folder, allow_pickle=allow_pickle)]:
            info(f"{hub_id}: {', '.join(got)}: {what} is used; it has no other")
    if parts := folders.lacking(folder, allow_pickle=allow_pickle):
        hint = "give another repository" if allow_pickle else "`allow_pickle=True` also takes .bin files; nothing in them is run"
        raise InputRefused(f"{as_field('base', ref)}: {hub_id} has no safetensors weights of {', '.join(parts)}", hint)
    return folder


def hub_id_of(path: Path) -> str | None:
    """The hub id of a folder in the hub's cache; None for any other folder."""
    home = next((parent.name for parent in (path, *path.parents) if parent.name.startswith("models--")), None)
    return home and "/".join(home.split("--")[1:])


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
        return detect(views.opened(path, allow_pickle=allow_pickle)).family
    supported.check_folder(path)
    unet_config = path / "unet" / "config.json"
    if not unet_config.exists():
        raise InputRefused(
            f"{as_field('base', ref)}: {unet_config} is missing; a diffusers folder holds unet/, vae/, text_encoder/ ..."
        )
    return of_unet_config(configs.read(unet_config))


def config_folder(config: str, file: TensorFile, *, allow_pickle: bool) -> Path:
    """The folder that `base_config` names; with weights where the file lacks a part of the model, since it is then taken there.

    UsageError where there is none of that name.
    """
    lacks = lambda family: any(not any(name.startswith(prefix) for name in file) for prefix in family.prefixes.values())
    try:
        folder = locate(config, configs_only=True)
    except UsageError as error:
        if not isinstance(error, InputRefused) and (family := named(config)) and not lacks(family):
            return family.home  # configs of the published bases ship with fastdiff
        raise of_configs(error, config) from error
    if folder.is_file():
        raise UsageError(f"{as_field('base_config', config)}: is a file", "give a diffusers folder, with the configs of the base")
    if Path(config).expanduser().exists() or not lacks(family_of(str(folder))):
        return folder
    try:
        return locate(config, allow_pickle=allow_pickle)
    except UsageError as error:
        raise of_configs(error, config) from error


def of_configs(error: UsageError, config: str) -> UsageError:
    """The error of `locate`, which knows every reference as `base`, for the value of `base_config`, which is no single file."""
    message = str(error).replace(as_field("base", config), as_field("base_config", config))
    message = message.replace("no such file or folder", "no such folder").replace(", a folder or a file", " or a folder")
    if isinstance(error, InputRefused):
        return InputRefused(message, error.hint)
    return UsageError(message, "give a diffusers folder with the configs of the base, or a hub id with network access")


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
