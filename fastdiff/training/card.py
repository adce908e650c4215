"""Writes the model card of a run folder: README.md, with everything needed to use the weights, and hashes.json.

All methods share this one template.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, locate
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import aliases, named
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.quality.report import steps_and_guidance
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import sha256, write_atomic
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import FULL
from fastdiff.training.exhibit import UNSEEN
from fastdiff.training.run import Run

# The name of each sampler of a recipe in ComfyUI and A1111.
ELSEWHERE = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM++ 2M", "dpm++sde": "DPM++ 2M SDE", "lcm": "LCM", "tcd": "TCD"}
FENCE = "```"


@dataclass
class Usage:
    """The parts of a model card that explain how to draw with the weights."""

    title: str
    tags: str
    sampling: str
    imports: str  # the names that `code` imports from diffusers
    code: str  # Python that draws a picture with stock diffusers
    picture: str  # the columns of the preview, from left to right
    elsewhere: str = ""  # how to use the weights in other programs; empty leaves the line out
    method: str = ""  # how the weights were made; empty names the recipe's method
    rows: dict[str, str] = field(default_factory=dict)  # further lines of the table at the top: {label: text}
    licence: str = "that of the base model: a distilled model is derived from it"


def usage_of_recipe(weights: Path, base: Checkpoint, recipe: Recipe) -> Usage:
    """Return the usage of weights that are sampled by their recipe: with its sampler, steps and guidance.

    Weights whose recipe names no sampler are described as sampled like the base.
    """
    if recipe.scheduler is None:
        return usage_like_base(weights, base, f"{weights.stem}: {base.ref}", recipe.method or "", "")
    is_lora, scheduler = weights.suffix == ".safetensors", SOLVERS[recipe.scheduler].stock
    call = f"num_inference_steps={recipe.num_steps}"
    if recipe.timesteps:
        call += f", timesteps={list(recipe.timesteps)}"
    if recipe.eta is not None:
        call += f", eta={recipe.eta}"
    spacing = recipe.spacing or SOLVERS[recipe.scheduler].spacing
    arguments = ', timestep_spacing="trailing"' if spacing == "trailing" and not recipe.timesteps else ""
    arguments += ', algorithm_type="sde-dpmsolver++"' if recipe.scheduler == "dpm++sde" else ""
    arguments += f', prediction_type="{recipe.prediction_type}"' if recipe.prediction_type != base.prediction_type else ""
    load = load_expression(base) if is_lora else f'DiffusionPipeline.from_pretrained("{weights.name}")'
    load = f"pipe = {load}\npipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{arguments})\n"
    if is_lora:
        load += f'pipe.load_lora_weights("{weights.name}")\n'
    return Usage(
        title=f"{weights.stem}: {base.ref} in {recipe.steps_text}",
        tags=f"{recipe.method}, {'lora, ' if is_lora else ''}few-step",
        sampling=f"{scheduler}{arguments}, {call}{also(recipe)}, guidance {recipe.guidance}",
        imports=f"DiffusionPipeline, {scheduler}",
        code=f"{load}image = pipe(prompt, {call}, guidance_scale={recipe.guidance}).images[0]",
        picture="teacher, undistilled at the student's calls, student",
        elsewhere=other_programs(recipe, is_lora, base),
    )


def also(recipe: Recipe) -> str:
    """Name the other numbers of steps that the weights were trained for; empty where there are none."""
    others = [str(n) for n in recipe.step_counts or () if n != recipe.num_steps]
    return f" (or {', '.join(others)})" if others else ""


def usage_like_base(weights: Path, base: Checkpoint, title: str, tags: str, picture: str) -> Usage:
    """Return the usage of weights that are sampled like the base: with any scheduler, and the base's steps and guidance."""
    usual, is_lora = Settings.usual(base.family), weights.suffix == ".safetensors"
    steps = f"num_inference_steps={usual.num_steps}, guidance_scale={usual.guidance}"
    load = (
        f'{load_expression(base)}\npipe.load_lora_weights("{weights.name}")'
        if is_lora
        else f'DiffusionPipeline.from_pretrained("{weights.name}")'
    )
    return Usage(
        title=title,
        tags=tags,
        sampling="as the base: any scheduler, its steps and its guidance",
        imports="DiffusionPipeline",
        code=f"pipe = {load}\nimage = pipe(prompt, {steps}).images[0]",
        picture=picture or "teacher, undistilled at the student's calls, student",
        elsewhere="put the file among the LoRAs."
        if is_lora
        else "`fastdiff export --single-file` writes one file where the layout has one, and says which programs take it.",
    )


def write_card(
    run: Run, usage: Usage, base: Checkpoint, metrics: Mapping[str, Any], facts: Mapping[str, str], recipe: Recipe
) -> None:
    """Write README.md and hashes.json into the run folder.

    `base` is the checkpoint that the weights are used with, `facts` are lines about the training ({label: text}).
    """
    weights = run.weights()
    sheets = [path for path in run.outputs if path.suffix == ".png" and not path.stem.endswith(FULL)]
    picture = next((path for path in reversed(sheets) if path.stem != UNSEEN), None)
    picture_line = f"![same prompts and seeds: {usage.picture}]({picture.relative_to(run.folder).as_posix()})" if picture else ""
    rows = {"method": usage.method or recipe.method or "", **facts, **usage.rows, "licence": usage.licence}
    if usage.sampling:
        rows = {"method": rows.pop("method"), "sampling": usage.sampling, **rows}
    sections = [
        "---",
        f"base_model: {base.ref}",
        "library_name: diffusers",
        f"tags: [{usage.tags}]",
        "---",
        f"# {usage.title}",
        "",
        *table(["", ""], rows.items()),
        "",
        picture_line,
        *files_section(weights),
        *measured_section(metrics),
        "",
        "## Use",
        "",
        f"{FENCE}python",
        f"import {'fastdiff' if embedded(base) else 'diffusers'}",
        f"from diffusers import {usage.imports}",
        usage.code,
        FENCE,
        "",
        *([f"ComfyUI, A1111, Forge: {usage.elsewhere}"] if usage.elsewhere else []),
        f"All settings: `config.toml`; the same run again: `fastdiff {run.command} --config config.toml`.",
        "",
    ]
    write_atomic(run.folder / "README.md", "\n".join(sections))
    record: dict[str, Any] = {"files": hashes(run), "recipe": asdict(recipe)}
    if len(weights) > 1:
        record["recipes"] = {path.name: asdict(stored) for path, stored in recipes(weights).items()}
    write_atomic(run.folder / "hashes.json", json.dumps(record, indent=2) + "\n")


def table(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table; each row has one cell for each column."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(columns), "|" + " --- |" * len(columns), *(line([fmt(cell) for cell in row]) for row in rows)]


def files_section(weights: Sequence[Path]) -> list[str]:
    """Return the section that lists steps and prediction type of each file; empty for a single file."""
    if len(weights) < 2:
        return []
    rows = [(f"`{path.name}`", recipe.num_steps, recipe.prediction_type) for path, recipe in recipes(weights).items()]
    return ["", "## Files", "", *table(["file", "steps", "output of the network"], rows)]


def measured_section(metrics: Mapping[str, Any]) -> list[str]:
    """Return the section with the closing table; for runs without such a table, with their own figures."""
    if "rows" in metrics:
        keys = ("calls", "retrieval", "frechet", "coverage", "diversity")
        names = [f"{row['model']}, {row['solver']}, {', guidance '.join(steps_and_guidance(row))}" for row in metrics["rows"]]
        cells = [[name, *(row.get(key) for key in keys)] for name, row in zip(names, metrics["rows"], strict=True)]
        text = f"{metrics['samples']} pictures a row; where two kinds of prompts are judged, half of them, of unseen prompts."
        return ["", "## Measured", "", text, "", *table(("model, sampler, steps", *keys), cells)]
    figures = [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    return ["", "## Measured", "", *table(["figure", "value"], figures)] if len(figures) > 1 else []


def hashes(run: Run) -> dict[str, str]:
    """Return the sha256 of every file that the run wrote, by path relative to the run folder.

    Files inside checkpoint folders count too.
    """
    files = [file for path in run.outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    return {file.relative_to(run.folder).as_posix(): sha256(file) for file in files}


def recipes(weights: Sequence[Path]) -> dict[Path, Recipe]:
    """Read the recipe that is stored in each LoRA file or checkpoint folder."""
    return {path: checkpoint.load(str(path)).recipe if path.is_dir() else lora.load(path).recipe for path in weights}


def embedded(base: Checkpoint) -> bool:
    """Whether the base is one that ships with fastdiff and is opened by its fastdiff name."""
    family = named(base.ref)
    return family is not None and family.ships_weights


def load_expression(base: Checkpoint, pipeline: str = "DiffusionPipeline", arguments: str = "") -> str:
    """Return the Python expression that opens the base with diffusers; `arguments` goes before the closing bracket."""
    if embedded(base):
        return f'{pipeline}.from_pretrained(fastdiff.load("{base.ref}").path{arguments})'
    if base.path.is_file():
        kind = base.family.pipeline if pipeline == "DiffusionPipeline" else pipeline
        return f'diffusers.{kind}.from_single_file("{base.ref}"{arguments})'
    hub_id = locate.hub_id_of(base.path) or aliases().get(base.ref, (base.ref,))[0]
    return f'{pipeline}.from_pretrained("{hub_id}"{arguments})'


def other_programs(recipe: Recipe, is_lora: bool, base: Checkpoint) -> str:
    """Say how ComfyUI, A1111 and Forge draw with these weights, or that their samplers cannot by themselves."""
    where = "put the file among the LoRAs" if is_lora else "make one file of the folder (`fastdiff export --single-file`)"
    settings = f"{recipe.steps_text}, CFG {max(1.0, recipe.guidance or 1.0)}"
    sampler = ELSEWHERE[recipe.scheduler or "ddim"]
    if recipe.timesteps and recipe.timesteps != tuple(base.schedule().grid(recipe.num_steps or 1, "trailing").tolist()):
        return f"they start at the last timestep; these weights want {list(recipe.timesteps)}, so use a node that sets timesteps."
    trailing = recipe.timesteps or recipe.spacing == "trailing" or recipe.scheduler == "euler"
    schedule = ', schedule "SGM uniform"' if trailing else ""
    x0 = ', in ComfyUI after "ModelSamplingDiscrete" set to "x0"' if recipe.prediction_type == "sample" else ""
    return f'{where}, sampler "{sampler}"{schedule}, {settings}{x0}.'
