"""The model card of a run folder: README.md with everything needed to use the weights, and hashes.json. One template for all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import aliases, named
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.solvers import SOLVERS
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import sha256, write_atomic
from fastdiff.sampling.settings import Settings
from fastdiff.training.run import Run

# What stock diffusers calls each sampler that a recipe may name, and what ComfyUI and A1111 call it.
DIFFUSERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
ELSEWHERE = {"ddim": "DDIM", "euler": "Euler", "dpm++": "DPM++ 2M", "lcm": "LCM", "tcd": "TCD"}
FENCE = "```"


@dataclass
class Usage:
    """What a card says of using the weights."""

    title: str
    tags: str
    sampling: str
    imports: str  # from diffusers
    code: str  # Python in stock diffusers
    picture: str  # what the preview's columns are
    elsewhere: str = ""  # other programs; empty: nothing is said of them
    method: str = ""  # how it was made; empty: the recipe's method
    rows: dict[str, str] = field(default_factory=dict)  # more lines of the table at the top
    licence: str = "that of the base model: a distilled model is derived from it"


def usage_of_recipe(weights: Path, base: Checkpoint, recipe: Recipe) -> Usage:
    """Of weights that want the sampler, steps and guidance of their recipe; a recipe without a sampler wants the base's."""
    if recipe.scheduler is None:
        return usage_like_base(weights, base, f"{weights.stem}: {base.ref}", recipe.method or "", "")
    is_lora, scheduler = weights.suffix == ".safetensors", DIFFUSERS[recipe.scheduler]
    call = f"num_inference_steps={recipe.num_steps}"
    if recipe.timesteps:
        call += f", timesteps={list(recipe.timesteps)}"
    if recipe.eta is not None:
        call += f", eta={recipe.eta}"
    spacing = recipe.spacing or SOLVERS[recipe.scheduler].spacing
    how = ', timestep_spacing="trailing"' if spacing == "trailing" and not recipe.timesteps else ""
    how += f', prediction_type="{recipe.prediction_type}"' if recipe.prediction_type != base.prediction_type else ""
    load = opened(base) if is_lora else f'DiffusionPipeline.from_pretrained("{weights.name}")'
    load = f"pipe = {load}\npipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{how})\n"
    if is_lora:
        load += f'pipe.load_lora_weights("{weights.name}")\n'
    return Usage(
        title=f"{weights.stem}: {base.ref} in {recipe.num_steps} step{'s' if recipe.num_steps != 1 else ''}",
        tags=f"{recipe.method}, {'lora, ' if is_lora else ''}few-step",
        sampling=f"{scheduler}{how}, {call}, guidance {recipe.guidance}",
        imports=f"DiffusionPipeline, {scheduler}",
        code=f"{load}image = pipe(prompt, {call}, guidance_scale={recipe.guidance}).images[0]",
        picture="teacher, undistilled at the student's calls, student",
        elsewhere=other_programs(recipe, is_lora, base),
    )


def usage_like_base(weights: Path, base: Checkpoint, title: str, tags: str, picture: str) -> Usage:
    """Of weights that are sampled like the base."""
    usual, is_lora = Settings.usual(base.family), weights.suffix == ".safetensors"
    steps = f"num_inference_steps={usual.num_steps}, guidance_scale={usual.guidance}"
    load = (
        f'{opened(base)}\npipe.load_lora_weights("{weights.name}")'
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
    """README.md of the run folder. `base`: what the weights are used with; `facts`: lines about the training."""
    weights = run.weights()
    picture = next((path for path in reversed(run.outputs) if path.suffix == ".png"), None)
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
        record["recipes"] = {path.name: asdict(own) for path, own in recipes(weights).items()}
    write_atomic(run.folder / "hashes.json", json.dumps(record, indent=2) + "\n")


def table(columns: Sequence[str], rows: Any) -> list[str]:
    """Lines of a Markdown table."""
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return [line(columns), "|" + " --- |" * len(columns), *(line([fmt(cell) for cell in row]) for row in rows)]


def files_section(weights: Sequence[Path]) -> list[str]:
    """What each of several files is sampled with."""
    if len(weights) < 2:
        return []
    rows = [(f"`{path.name}`", recipe.num_steps, recipe.prediction_type) for path, recipe in recipes(weights).items()]
    return ["", "## Files", "", *table(["file", "steps", "output of the network"], rows)]


def measured_section(metrics: Mapping[str, Any]) -> list[str]:
    """The closing table, or the run's own figures where it has none."""
    if "rows" in metrics:
        keys = ("model", "solver", "calls", "retrieval", "frechet", "same_noise")
        return ["", "## Measured", "", *table(keys, [[row[key] for key in keys] for row in metrics["rows"]])]
    figures = [(name, value) for name, value in metrics.items() if isinstance(value, int | float)]
    return ["", "## Measured", "", *table(["figure", "value"], figures)] if len(figures) > 1 else []


def hashes(run: Run) -> dict[str, str]:
    """sha256 of every file that was written, those in checkpoint folders too, by place in the run folder."""
    files = [file for path in run.outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    return {file.relative_to(run.folder).as_posix(): sha256(file) for file in files}


def recipes(weights: Sequence[Path]) -> dict[Path, Recipe]:
    """What each file or folder says of itself."""
    return {path: checkpoint.load(str(path)).recipe if path.is_dir() else lora.load(path).recipe for path in weights}


def embedded(base: Checkpoint) -> bool:
    """Whether the base ships with us, and is found by our own name for it."""
    family = named(base.ref)
    return family is not None and family.ships_weights


def opened(base: Checkpoint, pipeline: str = "DiffusionPipeline", arguments: str = "") -> str:
    """The diffusers expression that opens the base."""
    if embedded(base):
        return f'{pipeline}.from_pretrained(fastdiff.load("{base.ref}").path{arguments})'
    if base.path.is_file():
        kind = base.family.pipeline if pipeline == "DiffusionPipeline" else pipeline
        return f'diffusers.{kind}.from_single_file("{base.ref}"{arguments})'
    return f'{pipeline}.from_pretrained("{aliases().get(base.ref, base.ref)}"{arguments})'


def other_programs(recipe: Recipe, is_lora: bool, base: Checkpoint) -> str:
    """How programs with samplers of their own draw with these weights, or that they cannot."""
    where = "put the file among the LoRAs" if is_lora else "make one file of the folder (`fastdiff export --single-file`)"
    settings = f"{recipe.num_steps} step{'s' if recipe.num_steps != 1 else ''}, CFG {max(1.0, recipe.guidance or 1.0)}"
    sampler = ELSEWHERE[recipe.scheduler or "ddim"]
    if recipe.timesteps and recipe.timesteps != tuple(base.schedule().grid(recipe.num_steps or 1, "trailing").tolist()):
        return f"they start at the last timestep; these weights want {list(recipe.timesteps)}, so use a node that sets timesteps."
    trailing = recipe.timesteps or recipe.spacing == "trailing" or recipe.scheduler == "euler"
    schedule = ', schedule "SGM uniform"' if trailing else ""
    x0 = ', in ComfyUI after "ModelSamplingDiscrete" set to "x0"' if recipe.prediction_type == "sample" else ""
    return f'{where}, sampler "{sampler}"{schedule}, {settings}{x0}.'
