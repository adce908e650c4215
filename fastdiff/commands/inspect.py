"""The `inspect` command: says from a file's header what it is, whether fastdiff can read it, and whether it is safe to open."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, single_file, tensors
from fastdiff.checkpoints.detect import detect
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.lora import apply, layouts
from fastdiff.lora.file import Lora
from fastdiff.lora.kinds import Factors, Update
from fastdiff.options.inspect import EXAMPLES, Config
from fastdiff.runtime import console
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import InputRefused, Result, UsageError

KINDS = (  # (tensor of a module, kind of update); the first tensor that a module has decides its kind
    ("magnitude", "dora"), ("magnitude_out", "dora"), ("blocks", "oft"), ("a1", "glora"), ("vector", "ia3"),
    ("diff", "full"), ("kron1", "lokr"), ("kron1_a", "lokr"), ("w1_a", "loha"), ("down", "lora"),
)  # fmt: skip


def of_lora(file: TensorFile) -> dict[str, Any]:
    """Layouts, kinds, ranks and scales of a LoRA. Of its tensors only the alphas are read, which are one number each."""
    table = single_file.flat_table()
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
        if "down" in module:
            ranks.append(rank := file.layouts[module["down"]].shape[0])
            alpha = file[module["alpha"]].float().item() if "alpha" in module else rank
            scales.add(round((alpha or rank) / max(rank, 1), 6))
    parts_of = sorted({layouts.split(key)[0] for key in sides})
    named = sorted({layouts.layout_of(key, table) for key, part in parts.items() if part})
    return {
        "layouts": named,
        "modules": len(sides),
        "kinds": kinds,
        "components": parts_of,
        "rank_min": min(ranks, default=None),
        "rank_max": max(ranks, default=None),
        "scales": sorted(scales)[:8],
        "unknown_keys": [key for key, part in parts.items() if part is None],
        "bundled_embeddings": sorted({key.split(".")[1] for key in embeddings}),
        "family": family_of(file, sides),
    }


def shaped(file: TensorFile, module: Mapping[str, str]) -> Update | None:
    """A plain LoRA module with the right shapes on the meta device, without memory; None for other kinds."""
    import torch

    if set(module) - {"alpha"} != {"down", "up"}:
        return None
    down, up = (file.layouts[module[side]].shape for side in ("down", "up"))
    return Factors(torch.empty(down, device="meta"), torch.empty(up, device="meta"))


def family_of(file: TensorFile, sides: Mapping[str, Mapping[str, str]]) -> str | None:
    """The model family that a LoRA is for; None where it cannot be known."""
    family = Lora({key: update for key, m in sides.items() if (update := shaped(file, m))}, file.metadata).family
    return family and family.name


def coverage(file: TensorFile, ref: str) -> dict[str, Any]:
    """How many of a LoRA's modules match a layer of a checkpoint in name and shape. No weights are read."""
    base = checkpoint.load(ref)
    layers = base.unet_config.get("layers_per_block", 2)
    table = single_file.flat_table(layers if isinstance(layers, int) else 2)
    sides: dict[str, dict[str, str]] = {}
    for key in file:
        if part := lora.parse(key, table):
            name = re.sub(r"^lora_te1?_", apply.prefixes(len(base.text_parts))["text_encoder"], part.key)
            sides.setdefault(name, {})[part.side] = key
    places = {
        k: p
        for part, prefix in apply.prefixes(len(base.text_parts)).items()
        for k, p in apply.places(base.shapes(part), prefix).items()
    }
    alike = lambda key, module: (update := shaped(file, module)) is None or apply.fits(update, places[key].shape)
    landed = [key for key, module in sides.items() if key in places and alike(key, module)]
    missing = sorted(set(sides) - set(landed))
    return {"base": ref, "base_family": base.family.name, "applied": len(landed), "total": len(sides), "missing": missing[:20]}


def of_checkpoint(file: TensorFile) -> dict[str, Any]:
    """Family, prediction type and components of a single-file checkpoint; `unusual` says why it cannot be read, if so."""
    detected = detect(file)
    facts: dict[str, Any] = {
        "family": detected.family.name,
        "prediction_type": detected.prediction_type,
        "prediction_by": detected.why,
        "zero_snr": detected.zero_snr,
    }
    base = checkpoint.load(str(file.path))
    try:
        shapes = {part: base.shapes(part) for part in base.parts}
        wanted = {part: base.slots(part, shapes[part]) for part in base.parts}
        facts["components"] = {
            part: {"tensors": len(rows) - len(gone), "missing": gone[:5], "missing_count": len(gone)}
            for part, rows in wanted.items()
            if (gone := single_file.missing(file, rows)) is not None
        }
        left = [k for part, rows in wanted.items() for k in single_file.unknown(file, rows, [detected.family.prefixes[part]])]
        facts["unplaced"] = {"count": len(left), "first": left[:5]}
        facts["ema"] = any(key.startswith("model_ema.") for key in file)
    except InputRefused as error:
        facts["unusual"] = console.worded(str(error))
    return facts


def look(path: Path, config: Config) -> dict[str, Any]:
    """All facts that the header of a file, or the configs of a folder, give."""
    if path.is_dir():
        base = checkpoint.load(str(path))
        stored = {part: [p.name for p in base.stored(part, path)] for part in base.parts}
        return {"kind": "diffusers folder", "family": base.family.name, "prediction_type": base.prediction_type, "files": stored,
                "recipe": asdict(base.recipe), "supported": all(stored.values())}  # fmt: skip
    file = tensors.open_file(path)
    facts: dict[str, Any] = {
        "tensors": len(file),
        "dtypes": sorted({tensors.CODES[layout.dtype] for layout in file.layouts.values()}),
        "recipe": {k: v for k, v in asdict(Recipe.from_metadata(file.metadata)).items() if v is not None},
        "title": file.metadata.get("modelspec.title"),
        "architecture": file.metadata.get("modelspec.architecture"),
    }
    try:
        table = single_file.flat_table()
        if any(lora.parse(key, table) for key in file):
            facts |= {"kind": "LoRA", **of_lora(file)}
            facts["supported"] = not facts["unknown_keys"]
            if config.base:
                facts["coverage"] = coverage(file, config.base)
        else:
            facts |= {"kind": "checkpoint", **of_checkpoint(file)}
            parts = facts.get("components", {}).values()
            facts["supported"] = "unusual" not in facts and not any(part["missing_count"] for part in parts)
    except InputRefused as error:
        facts |= {"kind": "other", "supported": False, "why_not": console.worded(str(error).removeprefix(f"{path}: "))}
    return facts


def run(config: Config) -> Result:
    """The `inspect` command. A safe file exits with 0, supported or not.

    An unsafe or damaged one raises InputRefused (exit code 3), whose result has all that is known.
    """
    path = Path(config.file).expanduser()
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    metrics: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size if path.is_file() else None, "safe": True}
    head = path.open("rb").read(64) if path.is_file() else b""
    if re.match(tensors.PICKLE, head):
        names = tensors.unsafe_globals(path)
        metrics |= {"kind": "pickle", "safe": False, "supported": False, "would_run": names}
        why = f"a pickle that wants to run {', '.join(names[:3])}" if names else "a pickle, which can run code when it is opened"
        error = InputRefused(f"{path}: {why}", "convert it to safetensors" if names else "--allow-pickle reads its tensors alone")
        error.result = Result(metrics=metrics)
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
