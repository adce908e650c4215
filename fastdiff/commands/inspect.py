"""The `inspect` command: says from a file's header what it is, whether fastdiff can read it, and whether it is safe to open."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import (
    checkpoint,
    component,
    configs,
    folders,
    hub,
    locate,
    pickles,
    references,
    single_file,
    tensors,
    tokens,
    vae_file,
    views,
)
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import named
from fastdiff.checkpoints.published import Found
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.lora import apply, foreign, layouts
from fastdiff.lora.file import Lora
from fastdiff.lora.identify import stated_prediction
from fastdiff.lora.kinds import Factors
from fastdiff.models import autoencoder
from fastdiff.options.inspect import EXAMPLES, Config
from fastdiff.runtime import console
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import InputRefused, Result, UsageError, as_field, quoted

KINDS = (  # (tensor of a module, kind of update); the first tensor that a module has decides its kind
    ("magnitude", "dora"), ("magnitude_out", "dora"), ("blocks", "oft"), ("a1", "glora"), ("vector", "ia3"),
    ("diff", "full"), ("kron1", "lokr"), ("kron1_a", "lokr"), ("w1_a", "loha"), ("down", "lora"),
)  # fmt: skip


SUMMARY = {"modules", "family", "kinds", "rank_min", "rank_max"}  # what of `lora.summary` is told


def of_lora(file: TensorFile, path: Path) -> dict[str, Any]:
    """Layouts, kinds, ranks and scales of a LoRA, and whether commands take it. Of its tensors only single numbers are read."""
    facts: dict[str, Any] = named_parts(file)
    try:
        item = lora.outline(file)
    except InputRefused as error:
        return facts | {"supported": False, **why_not(error, path)}
    summary = lora.summary(item)
    facts |= {k: v for k, v in summary.items() if k in SUMMARY}
    facts |= known_as(foreign.identify(path, file.metadata, item.modules, summary["family"]), item.recipe)
    return facts | {"supported": True, "commands": takers(item)}


def why_not(error: InputRefused, path: Path) -> dict[str, str]:
    """Why a file is not supported, and what to do, where anything can be done."""
    told = {"why_not": console.worded(str(error).removeprefix(f"{path}: "))}
    return told | ({"hint": console.worded(error.hint)} if error.hint else {})


def takers(item: Lora) -> list[str]:
    """The commands that take a LoRA. Updates that are no product of factors fit in no LoRA exactly, others in none at all."""
    commands = ["sample", "merge-lora --base"]
    if all(isinstance(update, Factors) for update in item.modules.values()):
        return [*commands, "merge-lora", "export --lora"]
    if all(not update.needs_weight and len(update.shape or ()) > 1 for update in item.modules.values()):
        return [*commands, "merge-lora --rank"]
    return commands


def named_parts(file: TensorFile) -> dict[str, Any]:
    """What the names and shapes of a LoRA's tensors tell, whether they fit together or not."""
    table = table_of(file)
    embeddings = [key for key in file if key.startswith("bundle_emb.")]
    parts = {key: lora.parse(key, table) for key in file if key not in embeddings}
    sides: dict[str, dict[str, str]] = {}
    for key, part in parts.items():
        if part:
            sides.setdefault(part.key, {})[part.side] = key
    kinds: dict[str, int] = {}
    ranks: list[int] = []
    scales: set[float] = set()
    for module in sides.values():
        kind = next((name for side, name in KINDS if side in module), "unknown")
        kinds[kind] = kinds.get(kind, 0) + 1
        if "down" in module and (shape := file.layouts[module["down"]].shape):
            ranks.append(rank := shape[0])
            number = "alpha" in module and file.layouts[module["alpha"]].shape in {(), (1,)}
            alpha = file[module["alpha"]].float().item() if number else rank
            scale = (alpha or rank) / max(rank, 1)
            scales |= {round(scale, 6)} if math.isfinite(scale) else set()
    return {
        "layouts": sorted({layouts.layout_of(key, table) for key, part in parts.items() if part}),
        "modules": len(sides),
        "kinds": kinds,
        "components": sorted({layouts.split(key)[0] for key in sides}),
        "rank_min": min(ranks, default=None),
        "rank_max": max(ranks, default=None),
        "scales": sorted(scales)[:8],
        "unknown_keys": [key for key, part in parts.items() if part is None],
        "bundled_embeddings": sorted({key.split(".")[1] for key in embeddings}),
        "prediction_type": stated_prediction(file.metadata),
    }


def table_of(file: TensorFile, layers: int = 2) -> dict[str, str]:
    """The names of LDM layers by the number of layers in a block, which the header may state."""
    stated = file.metadata.get("fastdiff.layers_per_block", "")
    return single_file.flat_table(int(stated) if re.fullmatch(r"\d|1[0-6]", stated) else layers)


def known_as(found: Found | None, recipe: Recipe) -> dict[str, Any]:
    """The recipe of a file, and which published few-step weights it is: their name, and by what they are known."""
    facts: dict[str, Any] = {"recipe": {k: v for k, v in asdict(recipe).items() if v is not None}}
    return facts | ({"published": found.row.name, "published_by": found.by, "published_as": found.row.title} if found else {})


def coverage(file: TensorFile | Path, ref: str) -> dict[str, Any]:
    """How many of a LoRA's modules match a layer of a checkpoint in name and shape. No weights are read."""
    base = checkpoint.load(ref)
    layers = base.unet_config.get("layers_per_block", 2)
    (item, _), *_ = apply.encoders(
        [(lora.outline(file, layers=layers if isinstance(layers, int) else 2), 1.0)], len(base.text_parts)
    )
    places = {
        k: p
        for part, prefix in apply.prefixes(len(base.text_parts)).items()
        for k, p in apply.places(base.shapes(part), prefix).items()
    }
    landed = [key for key, update in item.modules.items() if key in places and apply.fits(update, places[key].shape)]
    missing = sorted(set(item.modules) - set(landed))
    apply.warn_of_prediction(base, [item])
    return {
        "base": ref,
        "base_family": base.family.name,
        "applied": len(landed),
        "total": len(item.modules),
        "missing": missing[:20],
    }


def of_checkpoint(file: TensorFile) -> dict[str, Any]:
    """Family, prediction type and components of a single-file checkpoint; `unusual` says why it cannot be read, if so."""
    base = checkpoint.of_file(str(file.path), file)
    assert base.detected is not None, "a file is always detected"
    facts: dict[str, Any] = {
        "family": base.family.name,
        "prediction_type": base.detected.prediction_type,
        "prediction_by": base.detected.why,
        "zero_snr": base.detected.zero_snr,
        **known_as(base.published, base.recipe),
    }
    try:
        shapes = {part: base.shapes(part) for part in base.parts}
        wanted = {part: base.slots(part, shapes[part]) for part in base.parts}
        facts["components"] = {
            part: {"tensors": len(rows) - len(gone), "missing": gone[:5], "missing_count": len(gone)}
            for part, rows in wanted.items()
            if (gone := single_file.missing(file, rows)) is not None
        }
        left = [k for part, rows in wanted.items() for k in single_file.unknown(file, rows, [base.family.prefixes[part]])]
        facts["unplaced"] = {"count": len(left), "first": left[:5]}
        facts["ema"] = any(key.startswith("model_ema.") for key in file)
    except InputRefused as error:
        facts["unusual"] = console.worded(str(error))
    return facts | opens(base)


def opens(base: Checkpoint) -> dict[str, Any]:
    """Whether `sample` can open a checkpoint, and `why_not` if it cannot. Headers and configs are read, no weights."""
    told: dict[str, str] = {}
    try:
        for part in base.parts:
            weights = base.weights(part)
            wrong = next((name for name in weights if not weights.dtypes[name].is_floating_point), None)
            if wrong:
                raise InputRefused(f"{part}: {wrong} is {weights.dtypes[wrong]}, not floating point")
        base.schedule()
        base.resolution_px  # noqa: B018  (it reads the configs, which are checked on the way)
        tokens.check(base.folder, base.index)
    except InputRefused as error:
        told = why_not(error, base.path)
    except (ValueError, OSError) as error:
        told = {"why_not": console.worded(quoted(error))}
    return {"supported": not told, **told}


def of_folder(path: Path) -> dict[str, Any]:
    """All facts that the configs and headers of a diffusers folder give."""
    if not (path / "model_index.json").exists():
        if (path / "config.json").is_file():
            return of_part(path)
        if not (path / "unet").is_dir():
            raise InputRefused(f"{path}: neither model_index.json nor config.json is there; it is not a diffusers folder")
    try:
        base = checkpoint.load(str(path))
        stored = {part: [p.name for p in base.stored(part, path)] for part in base.parts}
        return {"kind": "diffusers folder", "family": base.family.name, "prediction_type": base.prediction_type,
                "zero_snr": base.ends_in_noise, "files": stored,
                "embeds_guidance": base.embeds_guidance, **known_as(base.published, base.recipe), **opens(base)}  # fmt: skip
    except InputRefused as error:
        if not (path / "model_index.json").exists():
            raise
        return {"kind": "other", "supported": False, **why_not(error, path)}


PARTS = {  # class of a network -> kind, and the commands that take its folder
    "AutoencoderKL": ("VAE", ["sample --vae", "export --vae"]),
    "AutoencoderTiny": ("VAE", ["sample --vae", "export --vae"]),
    "ControlNetModel": ("ControlNet", ["sample --controlnet"]),
}


def of_part(folder: Path) -> dict[str, Any]:
    """The facts about a folder of one network with its config.json: a VAE, a ControlNet, or part of a base model."""
    config = configs.read(folder / "config.json")
    named = config.get("_class_name") or (config.get("architectures") or ["no class"])[0]
    kind, commands = PARTS.get(str(named), ("UNet" if named == "UNet2DConditionModel" else "other", []))
    if not commands:
        error = InputRefused(f"{folder}: {named} alone, not a base model", "give the folder that it belongs to")
        return {"kind": kind, "class": named, "supported": False, **why_not(error, folder)}
    try:
        check_weights(folder, config)
    except InputRefused as error:
        return {"kind": kind, "class": named, "supported": False, **why_not(error, folder)}
    return {"kind": kind, "class": named, "supported": True, "commands": commands}


def check_weights(folder: Path, config: dict[str, Any]) -> None:
    """InputRefused where the weights of a VAE or a ControlNet do not fit its config. Headers alone are read."""
    import diffusers

    component.check_values(config, folder / "config.json")
    if config.get("latent_channels", 4) != 4:
        raise InputRefused(f"{folder}: a VAE of {config['latent_channels']} latent channels, where Stable Diffusion has 4")
    with configs.building(folder / "config.json"), torch.device("meta"):
        kind = getattr(diffusers, config["_class_name"])  # one of PARTS
        wanted = {name: tuple(tensor.shape) for name, tensor in kind.from_config(config).state_dict().items()}
    paths = folders.stored(folder.parent, folder.name)
    if not paths or not all(path.is_file() for path in paths):
        problem, hint = folders.why_missing(folder.parent, folder.name)
        raise InputRefused(problem, hint)
    shapes = {folders.plain_name("vae", k): v for path in paths for k, v in tensors.open_file(path).shapes.items()}
    if gone := [name for name in wanted if name not in shapes]:
        raise InputRefused(f"{folder}: {len(gone)} of its layers have no weights ({gone[0]})")
    if other := next((name for name in wanted if single_file.strip(shapes[name]) != single_file.strip(wanted[name])), None):
        raise InputRefused(f"{folder}: {other} is {shapes[other]}, the model has {wanted[other]}")


def of_vae(file: TensorFile) -> dict[str, Any]:
    """The facts about a file that is a VAE alone: whether it can be given as `vae`. Headers alone are read."""
    path = file.path
    if vae_file.config_beside(path):
        return of_part(path.parent)
    try:
        # The base tells the groups of norms, on which no shape depends: one group fits any width.
        stored = vae_file.of_file(tensors.outlined(file), str(path), like={"norm_num_groups": 1})
        autoencoder.network(stored, str(path))
        if (channels := stored.config["latent_channels"]) != 4:
            raise InputRefused(f"{path}: a VAE of {channels} latent channels, where Stable Diffusion has 4")
    except InputRefused as error:
        return {"kind": "VAE", "supported": False, **why_not(error, path)}
    named = stored.config["_class_name"]
    return {"kind": "VAE", "class": named, "supported": True, "commands": PARTS[named][1]}


def recipe_of(file: TensorFile) -> dict[str, Any]:
    """The sampling settings in the header; empty where a number there is malformed, which `outline` tells."""
    try:
        return {k: v for k, v in asdict(Recipe.from_metadata(file.metadata)).items() if v is not None}
    except ValueError:
        return {}


def look(path: Path, config: Config) -> dict[str, Any]:
    """All facts that the header of a file, or the configs of a folder, give."""
    first, *others = lora.files_of(path)
    if others:
        return of_peft_folder(path, [first, *others], config)
    return of_folder(first) if first.is_dir() else of_file(tensors.open_file(first), config)


def of_peft_folder(path: Path, paths: Sequence[Path], config: Config) -> dict[str, Any]:
    """All facts about a folder of peft that has a LoRA's components in folders of their own, as one LoRA."""
    files = [tensors.open_file(each) for each in paths]
    parts = [of_file(file, replace(config, base=None)) for file in files]
    facts = parts[0] | {"tensors": sum(map(len, files)), "modules": sum(part.get("modules", 0) for part in parts)}
    for name in ("dtypes", "layouts", "components", "scales", "unknown_keys", "bundled_embeddings"):
        facts[name] = sorted({value for part in parts for value in part.get(name, [])})
    if wrong := next((part for part in parts if not part["supported"]), None):
        return facts | {key: wrong[key] for key in ("supported", "why_not", "hint") if key in wrong}
    try:
        item = lora.outline(path)
    except InputRefused as error:
        return facts | {"supported": False, **why_not(error, path)}
    facts |= {k: v for k, v in lora.summary(item).items() if k in SUMMARY} | {"commands": takers(item)}
    return facts | ({"coverage": coverage(path, config.base)} if config.base else {})


def of_file(file: TensorFile, config: Config) -> dict[str, Any]:
    """All facts that the names, shapes and header of a file give."""
    path = file.path
    facts: dict[str, Any] = {
        "tensors": len(file),
        "dtypes": file.stored_dtypes,
        "recipe": recipe_of(file),
        "title": file.metadata.get("modelspec.title"),
        "architecture": file.metadata.get("modelspec.architecture"),
    }
    try:
        table = table_of(file)
        if any(lora.parse(key, table) for key in file):
            facts |= {"kind": "LoRA", **of_lora(file, path)}
            if config.base and facts["supported"]:
                facts["coverage"] = coverage(file, config.base)
        elif (other := layouts.other_kind(file)) and other.adapter:
            raise InputRefused(f"{path}: {other.kind} ({other.key})", other.hint)
        elif vae_file.is_alone(file):
            facts |= of_vae(file)
        else:
            facts |= {"kind": "checkpoint", **of_checkpoint(views.view(file))}
    except InputRefused as error:
        facts |= {"kind": "other", "supported": False, **why_not(error, path)}
    return facts


def of_pickle(path: Path, head: bytes, config: Config) -> InputRefused:
    """What a pickle is, as the error that its inspection ends with: a pickle is not safe, but its tensors may be read.

    Where it holds tensors and harmless leftovers of training alone, names and shapes are read as `allow_pickle` would.
    """
    try:
        names, leftovers = pickles.unsafe_globals(path), pickles.leftovers(path)
    except InputRefused as error:
        error.result = Result(metrics={"kind": "pickle", "safe": False, "safe_with_allow_pickle": False, "supported": False})
        return error
    facts: dict[str, Any] = {"kind": "pickle", "safe": False, "supported": False, "would_run": names, "leftovers": leftovers}
    hint = "convert it to safetensors"
    why = f"a pickle that wants to run {', '.join(names[:3])}" if names else "a pickle, which can run code when it is opened"
    if not names:
        try:
            facts |= of_file(tensors.open_pickle(path, head, values=False), config)
            facts |= {"content": facts["kind"], "kind": "pickle", "safe_with_allow_pickle": True}
            hint = "--allow-pickle reads its tensors alone"
        except InputRefused as error:
            why = console.worded(str(error).removeprefix(f"{path}: "))
    ending = InputRefused(f"{path}: {why}", hint)
    ending.result = Result(metrics={"safe_with_allow_pickle": False, **facts})
    return ending


def placed(ref: str) -> Path:
    """The path of what `ref` names: a file or folder, an alias, or a repository of the hub, which is downloaded.

    UsageError where there is nothing of that name.
    """
    if path := references.local(ref):
        return path
    where = references.parse(ref, "file")
    if where is None and not named(ref):
        raise UsageError(f"{ref}: no such file or folder")
    given = as_field("file", ref)
    try:
        if where is None or where.names_file or hub.holds(where, given, "model_index.json"):
            return locate.locate(ref)
        if hub.holds(where, given, "config.json"):
            return component.locate(ref, "file", "network", allow_pickle=True)
        return lora.located(ref, "file", allow_pickle=True)
    except UsageError as error:  # which call it an option, where it is the argument
        error.args = (str(error).replace(as_field("base", ref), ref).replace(given, ref),)
        raise


def run(config: Config) -> Result:
    """The `inspect` command. A safe file exits with 0, supported or not.

    An unsafe or damaged one raises InputRefused (exit code 3), whose result has all that is known.
    """
    path = placed(config.file)
    metrics: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size if path.is_file() else None, "safe": True}
    head = path.open("rb").read(64) if path.is_file() else b""
    if re.match(pickles.PICKLE, head):
        error = of_pickle(path, head, config)
        assert error.result is not None, "of_pickle gives one"
        error.result.metrics = metrics | error.result.metrics
        raise error
    try:
        metrics |= look(path, config)
    except InputRefused as error:
        error.result = Result(metrics=metrics | {"kind": "damaged", "safe": False, "supported": False})
        raise
    console.table(str(path), ["what", "value"], [[k, format_value(v)] for k, v in metrics.items() if v not in (None, [], {})])
    return Result(metrics=metrics)


def format_value(value: Any) -> str:
    """A fact as text for the table: text as it is, other values as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


COMMAND = Runnable(Config, run, examples=EXAMPLES)
