"""Find a base model and its family from an alias, hub id, folder or file; and the published configs that ship with fastdiff."""

import fnmatch
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import configs, folders, hub, hub_client, references, supported, views
from fastdiff.checkpoints.detect import detect
from fastdiff.checkpoints.family import SHIPPED, Family, aliases, base_names, named, of_unet_config
from fastdiff.checkpoints.hub_errors import Unreachable
from fastdiff.checkpoints.references import Reference
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.runtime.console import info
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

EMOJI = SHIPPED.home
ALIASES = aliases()
# What a first run downloads from the hub besides weights: configs and tokenizers.
CONFIGS = ["model_index.json", "*/*.json", "*/merges.txt"]
UNWANTED = ["*non_ema*", "*onnx*", "*openvino*", "*flax*", "safety_checker/*", "vae_1_0/*", "vae_*coder/*", "*.index.*"]


def missing_weights(ref: str, hub_ids: Sequence[str]) -> UsageError:
    """The error for a base that is not on this machine where nothing may be downloaded; it names the repositories behind it."""
    return Unreachable(
        f"{as_field('base', ref)}: no weights for it on this machine, and nothing is downloaded offline ({', '.join(hub_ids)})",
        "give it as (1) a hub id with network access (drop `offline`), (2) a diffusers folder: `base=path/to/folder`, or "
        "(3) a single file: `base=model.safetensors`",
    )


def locate(ref: str, *, configs_only: bool = False, allow_pickle: bool = False) -> Path:
    """The folder or file behind a reference to a base model; downloads what is missing unless HF_HUB_OFFLINE is set.

    A path on this machine wins over the hub. Of the repositories behind an alias, the first that is complete on this machine is
    taken, else the first that can be downloaded. UsageError where there is nothing of that name, InputRefused where a repository
    has no weights that can be read.
    """
    if (family := named(ref)) and family.ships_weights:
        return family.home
    if path := references.local(ref):
        return path
    hub_ids, given = ALIASES.get(ref, (ref,)), as_field("base", ref)
    wheres = [where for hub_id in hub_ids if (where := references.parse(hub_id, "base"))]
    if not wheres:
        if references.like_path(ref):
            raise UsageError(f"{given}: no such file or folder")
        raise UsageError(f"{given}: not an alias ({base_names()}), a hub id (owner/name), a folder or a file")
    if wheres[0].names_file:
        return hub.file(wheres[0], given)
    how: dict[str, bool] = dict(configs_only=configs_only, allow_pickle=allow_pickle)
    for where in wheres:
        if folder := cached(where, **how):
            return told(ref, where, wheres, hub.told(folder, where))
    if hub_client.offline():
        held = [error for where in wheres if (error := pickled_copy(ref, where, **how))]
        here = None if held or len(wheres) > 1 else hub.kept(wheres[0], given)
        if here and "model_index.json" not in here.inside():
            return hub.one_file(wheres[0], given, allow_pickle=allow_pickle)
        raise held[0] if held else missing_weights(ref, hub_ids)
    where, folder = hub.first_with(wheres, lambda where: downloaded(where, given, **how))
    return told(ref, where, wheres, folder)


def told(ref: str, where: Reference, wheres: Sequence[Reference], folder: Path) -> Path:
    """The folder; says which repository was used where it is not the first of an alias."""
    if where != wheres[0]:
        info(f"{ref}: {where} is used; {', '.join(map(str, wheres[: wheres.index(where)]))} is not to be had")
    return folder


def cached(where: Reference, *, configs_only: bool, allow_pickle: bool) -> Path | None:
    """The folder of a repository in the hub's cache on this machine, if it is complete."""
    folder = hub.cached(where)
    folder = folder and folder / where.path
    return folder if folder and complete(folder, configs_only=configs_only, allow_pickle=allow_pickle) else None


def pickled_copy(ref: str, where: Reference, *, configs_only: bool, allow_pickle: bool) -> InputRefused | None:
    """The error for a repository that is complete on this machine, but with pickled weights, which are not allowed."""
    folder = cached(where, configs_only=configs_only, allow_pickle=True)
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


def downloaded(where: Reference, given: str, *, configs_only: bool, allow_pickle: bool) -> Path:
    """Download a repository: full-precision safetensors, and of components that have none the fp16 variant, or pickles.

    One that is no diffusers folder must have a single file of weights, which is taken. InputRefused where it has no weights of a
    component that can be read, or is no checkpoint that we can use.
    """
    repository = hub.ask(where, given)
    files = repository.inside()
    if "model_index.json" not in files:
        name = files[repository.only_file(allow_pickle=allow_pickle)]
        return hub.fetch(repository, [name]) / name
    matches = lambda name, patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    wanted = [name for name in files if matches(name, CONFIGS) and not matches(name, UNWANTED)]
    folder = hub.fetch(repository, [files[name] for name in wanted]) / where.path
    supported.check_folder(folder)  # before gigabytes are downloaded
    if configs_only:
        return folder
    weights, lacking, variants = [], [], dict[str, list[str]]()
    for part in folders.components(folder):
        names, what = folders.choose([n.removeprefix(f"{part}/") for n in files if n.startswith(f"{part}/")], allow_pickle)
        weights += [files[f"{part}/{name}"] for name in names]
        lacking += [] if names else [part]
        if what:
            variants.setdefault(what, []).append(part)
    if lacking:
        hint = "give another repository" if allow_pickle else "`allow_pickle=True` also takes .bin files; nothing in them is run"
        what = f"no safetensors weights of {', '.join(lacking)}"
        raise repository.lacking(what, InputRefused(f"{given}: {where} has {what}", hint))
    for what, parts in variants.items():
        info(f"{where}: {', '.join(parts)}: {what} is used; {repository.no_other}")
    folder = hub.fetch(repository, [files[name] for name in wanted] + weights) / where.path
    if parts := folders.lacking(folder, allow_pickle=allow_pickle):
        problem, hint = folders.why_missing(folder, parts[0], allow_pickle=allow_pickle)
        raise repository.lacking(f"not all files of {', '.join(parts)}", InputRefused(f"{given}: {problem}", hint))
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
    path = locate(ref, configs_only=True, allow_pickle=allow_pickle)
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
    error = renamed(error, config, "base_config")
    message = str(error).replace("no such file or folder", "no such folder").replace(", a folder or a file", " or a folder")
    if message != str(error) or "a single file" in error.hint:
        return UsageError(message, "give a diffusers folder with the configs of the base, or a hub id with network access")
    return error


def renamed(error: UsageError, ref: str, option: str) -> UsageError:
    """The same error, of `locate`, which knows every reference as `base`, for the value of another option."""
    error.args = (str(error).replace(as_field("base", ref), as_field(option, ref)),)
    return error


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
