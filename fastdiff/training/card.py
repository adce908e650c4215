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
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.quality.report import steps_and_guidance
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import sha256, write_atomic
from fastdiff.sampling import other_programs
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import FULL
from fastdiff.sampling.stock_code import stock_call, stock_code
from fastdiff.training.base_code import FP32, load_expression, note, openers
from fastdiff.training.exhibit import UNSEEN
from fastdiff.training.run import Run

FENCE = "```"


@dataclass
class Usage:
    """The parts of a model card that explain how to draw with the weights."""

    title: str
    tags: str
    sampling: str
    code: str  # Python that draws a picture with stock diffusers, complete: from its imports to a file
    picture: str  # the columns of the preview, from left to right
    elsewhere: Sequence[str] = ()  # how to use the weights in other programs, a line each
    method: str = ""  # how the weights were made; empty names the recipe's method
    rows: dict[str, str] = field(default_factory=dict)  # further lines of the table at the top: {label: text}
    licence: str = "that of the base model: a distilled model is derived from it"


def usage_of_recipe(weights: Path, base: Checkpoint, recipe: Recipe) -> Usage:
    """Return the usage of weights that are sampled by their recipe: with its sampler, steps and guidance.

    Weights whose recipe names no sampler are described as sampled like the base.
    """
    if recipe.scheduler is None:
        return usage_like_base(weights, base, f"{weights.stem}: {base.ref}", recipe.method or "", "")
    is_lora, settings = weights.suffix == ".safetensors", Settings.of(recipe, Settings.usual(base.family))
    drawn = drawn_with(weights, base)
    call = stock_call(drawn, settings, recipe.predicts(base.prediction_type) if is_lora else None)
    return Usage(
        title=f"{weights.stem}: {base.ref} in {recipe.steps_text}",
        tags=f"{recipe.method}, {'lora, ' if is_lora else ''}few-step",
        sampling=f"{call.scheduler}{call.config}, {call.steps}{also(recipe)}, guidance {settings.guidance:g}",
        code=code_of(weights, base, recipe),
        picture="teacher, undistilled at the student's calls, student",
        elsewhere=other_programs.lines(drawn, recipe, settings, is_lora=is_lora, command=one_file(weights)),
    )


def drawn_with(weights: Path, base: Checkpoint) -> Checkpoint:
    """Return the checkpoint that a pipeline with these weights is opened from: the base of a LoRA, or the written folder."""
    return checkpoint.load(str(weights)) if (weights / "model_index.json").exists() else base


def code_of(
    weights: Path,
    base: Checkpoint,
    recipe: Recipe,
    *,
    opening: Sequence[str] = (),
    imports: Sequence[str] = (),
    modules: Sequence[str] = (),
    arguments: str = "",
) -> str:
    """Return Python code that draws a picture with the weights in stock diffusers, with the settings of a recipe.

    It runs in the folder of the weights. `opening` are the lines that make `pipe` of the base and the weights, with names from
    diffusers, `imports`, and of `modules`; by default they open the base and load the LoRA, or open the checkpoint folder.
    `arguments` are further keyword arguments of the pipeline's call (`, image=control`).
    """
    is_lora = weights.suffix == ".safetensors"
    if opening:
        opening = [*note(base, weights.parent), *opening]
    elif is_lora:
        opening = [*note(base, weights.parent), f"pipe = {load_expression(base, weights.parent)}"]
        opening, imports = [*opening, f'pipe.load_lora_weights("{weights.name}")'], openers(base)
    else:
        opening = [f'pipe = DiffusionPipeline.from_pretrained("{weights.name}"{FP32})']
        imports = ["DiffusionPipeline"]
    counts = f"  # trained for {recipe.steps_text}" if recipe.step_counts else ""
    code = stock_code(
        drawn_with(weights, base),
        Settings.of(recipe, Settings.usual(base.family)),
        kind=recipe.predicts(base.prediction_type) if is_lora else None,
        opening=[f'prompt, seed = "{base.family.example_prompt}", 0{counts}', *opening, '# with a GPU: pipe.to("cuda")'],
        imports=imports,
        modules=[*modules, *(["fastdiff"] if any("fastdiff." in line for line in opening) else [])],
        arguments=arguments,
    )
    return f'{code}image.save("picture.png")'


def one_file(folder: Path) -> str:
    """Return the command that makes one file of a checkpoint folder, for other programs."""
    return f"fastdiff export --base {folder.name} --single-file -o {folder.name}.safetensors"


def also(recipe: Recipe) -> str:
    """Name the other numbers of steps that the weights were trained for; empty where there are none."""
    others = [str(n) for n in recipe.step_counts or () if n != recipe.num_steps]
    return f" (or {', '.join(others)})" if others else ""


def usage_like_base(weights: Path, base: Checkpoint, title: str, tags: str, picture: str) -> Usage:
    """Return the usage of weights that are sampled like the base: with any scheduler, and the base's steps and guidance."""
    is_lora, recipe, drawn = weights.suffix == ".safetensors", Recipe(), drawn_with(weights, base)
    return Usage(
        title=title,
        tags=tags,
        sampling="as the base: any scheduler, its steps and its guidance",
        code=code_of(weights, base, recipe),
        picture=picture or "teacher, undistilled at the student's calls, student",
        elsewhere=other_programs.lines(drawn, recipe, Settings.usual(base.family), is_lora=is_lora, command=one_file(weights)),
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
    skipped, usual = base.skipped_layers, base.family.clip_skip_elsewhere
    skip = {"clip skip": f"{skipped} as diffusers counts, {usual + skipped} in other programs"} if skipped else {}
    rows = {"method": usage.method or recipe.method or "", **skip, **facts, **usage.rows, "licence": usage.licence}
    if usage.sampling:
        rows = {"method": rows.pop("method"), "sampling": usage.sampling, **rows}
    sections = [
        "---",
        f"base_model: {locate.hub_id_of(base.path) or base.ref}",
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
        "In the folder of this file:",
        "",
        *use_section(usage, weights, base),
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


def use_section(usage: Usage, weights: Sequence[Path], base: Checkpoint) -> list[str]:
    """Return the code, and how other programs are set; of several weights, those of each under its name."""
    if len(weights) < 2:
        return use_lines(usage)
    rows = []
    for path, recipe in recipes(weights).items():
        rows += [f"### {path.name}", "", *use_lines(usage_of_recipe(path, base, recipe))]
    return rows


def use_lines(usage: Usage) -> list[str]:
    """Return the code of a usage as a block, and a line for each kind of other program."""
    return [f"{FENCE}python", usage.code, FENCE, "", *(line for text in usage.elsewhere for line in (text, ""))]


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
