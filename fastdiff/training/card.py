"""The model card of a run folder: README.md with everything needed to use the weights, and hashes.json."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.checkpoints.locate import ALIASES
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import sha256, write_atomic
from fastdiff.sampling.sampler import Settings
from fastdiff.training.config import TrainConfig
from fastdiff.training.method import Method
from fastdiff.training.run import Run


class Usage(NamedTuple):
    """What the card says of drawing with the weights."""

    title: str
    tags: str
    sampling: str
    imports: str
    code: str
    picture: str  # what the preview's columns are
    elsewhere: str


def few_step(weights: Path, base: Checkpoint, recipe: Recipe, config: TrainConfig) -> Usage:
    """Of weights that want the scheduler, steps and guidance of their recipe."""
    is_lora = weights.suffix == ".safetensors"
    scheduler = {"lcm": "LCM", "tcd": "TCD", "ddim": "DDIM", "euler": "EulerDiscrete"}[recipe.scheduler or ""] + "Scheduler"
    steps = f"num_inference_steps={recipe.num_steps}"
    if recipe.timesteps:
        steps += f", timesteps={list(recipe.timesteps)}"
    how = ', timestep_spacing="trailing"' if recipe.spacing == "trailing" and not recipe.timesteps else ""
    how += f', prediction_type="{recipe.prediction_type}"' if recipe.prediction_type != base.prediction_type else ""
    load = opened(base) if is_lora else f'DiffusionPipeline.from_pretrained("{weights.name}")'
    load = f"pipe = {load}\npipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{how})\n"
    if is_lora:
        load += f'pipe.load_lora_weights("{weights.name}")\n'
    return Usage(
        f"{weights.stem}: {base.ref} in {recipe.num_steps} step{'s' if recipe.num_steps != 1 else ''}",
        f"{recipe.method}, {'lora, ' if is_lora else ''}few-step",
        f"{scheduler}{how}, {steps}, guidance {recipe.guidance}",
        f"DiffusionPipeline, {scheduler}",
        f"{load}image = pipe(prompt, {steps}, guidance_scale={recipe.guidance}).images[0]",
        "teacher, undistilled at the student's calls, student",
        elsewhere(recipe, is_lora, base),
    )


def small(weights: Path, base: Checkpoint, title: str) -> Usage:
    """Of a checkpoint of another shape that is sampled like its parent."""
    usual = Settings.usual(base.family)
    steps = f"num_inference_steps={usual.num_steps}, guidance_scale={usual.guidance}"
    return Usage(
        title,
        "pruned",
        "as the base: any scheduler, its steps and its guidance",
        "DiffusionPipeline",
        f'pipe = DiffusionPipeline.from_pretrained("{weights.name}")\nimage = pipe(prompt, {steps}).images[0]',
        "base, cut and not trained, trained",
        "`fastdiff export --single-file` writes one file where the layout has one, and says which programs take it.",
    )


def write_card(run: Run, base: Checkpoint, method: Method, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """README.md of the run folder: a model card with everything needed to use the weights."""
    recipe, weights, every = method.recipe, run.weights()[-1], run.weights()
    title = getattr(method, "title", "")
    usage = few_step(weights, base, recipe, config) if recipe.scheduler else small(weights, base, title)
    table = ""
    if len(every) > 1:
        lines = [f"| `{path.name}` | {told.num_steps} | {told.prediction_type} |" for path, told in recipes(every).items()]
        table = "\n".join(["\n## Files\n", "| file | steps | output of the network |", "| --- " * 3 + "|", *lines, ""])
    if "rows" in metrics:
        keys = ("model", "solver", "calls", "retrieval", "frechet", "same_noise")
        lines = ["| " + " | ".join(fmt(row[k]) for k in keys) + " |" for row in metrics["rows"]]
        table += "\n".join(["\n## Measured\n", "| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys), *lines, ""])
    picture = next(path for path in reversed(run.outputs) if path.suffix == ".png").relative_to(run.folder).as_posix()
    fence = "```"
    card = f"""---
base_model: {base.ref}
library_name: diffusers
tags: [{usage.tags}]
---
# {usage.title}

| | |
| --- | --- |
| method | {recipe.method}, {metrics["steps"]} steps of {config.batch_size} x {config.grad_accum} |
| base | {base.ref}, {base.prediction_type}, UNet sha256 {method.parent[:16]} |
| sampling | {usage.sampling} |
| data | {config.data or base.family.default_data} |
| seed | {config.seed} |
| licence | that of the base model: a distilled model is derived from it |

![same prompts and seeds: {usage.picture}]({picture})
{table}
## Use

{fence}python
import {"fastdiff" if base.ref == SHIPPED.name else "diffusers"}
from diffusers import {usage.imports}
{usage.code}
{fence}

ComfyUI, A1111, Forge: {usage.elsewhere}
All settings: `config.toml`; the same run again: `fastdiff {run.command} --config config.toml`.
"""
    write_atomic(run.folder / "README.md", card)
    told: dict[str, Any] = {"files": hashes(run), "recipe": asdict(recipe)}
    if len(every) > 1:
        told["recipes"] = {path.name: asdict(found) for path, found in recipes(every).items()}
    write_atomic(run.folder / "hashes.json", json.dumps(told, indent=2) + "\n")


def write_vae_card(run: Run, base: Checkpoint, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """README.md of a tiny VAE."""
    lines = [f"| {k} | {fmt(v)} |" for k, v in metrics.items() if isinstance(v, int | float)]
    table, fence = "\n".join(lines), "```"
    card = f"""---
base_model: {config.base}
library_name: diffusers
tags: [vae, AutoencoderTiny]
---
# tiny-vae: a small decoder for {config.base}

| | |
| --- | --- |
| method | L1 at an eighth of the size and a discriminator, against the VAE's own pictures (SDXS), {metrics["steps"]} steps |
| latents | those of {config.base}, scaled; also of every checkpoint that shares its VAE |
| licence | that of the base model: a distilled model is derived from it |

![the VAE's own picture, this decoder's, four times their difference](previews/final.png)

## Measured

| against the VAE's own decoder | |
| --- | --- |
{table}

## Use

{fence}python
import {"fastdiff" if base.ref == SHIPPED.name else "diffusers"}
from diffusers import AutoencoderTiny, DiffusionPipeline
pipe = {opened(base)}
pipe.vae = AutoencoderTiny.from_pretrained("tiny-vae")
{fence}

All settings: `config.toml`; the same run again: `fastdiff {run.command} --config config.toml`.
"""
    write_atomic(run.folder / "README.md", card)
    write_atomic(run.folder / "hashes.json", json.dumps({"files": hashes(run)}, indent=2) + "\n")


def write_controlnet_card(run: Run, base: Checkpoint, config: TrainConfig, settings: Settings, metrics: dict[str, Any]) -> None:
    """README.md of a ControlNet for another UNet."""
    lines = [f"| {k} | {fmt(v)} |" for k, v in metrics.items()]
    table, fence, of = "\n".join(lines), "```", config.open_student()
    kind = base.family.controlnet_pipeline
    pipe = opened(of).replace("DiffusionPipeline", kind).removesuffix(")") + ", controlnet=controlnet)"
    trained = f"{metrics['steps']} steps of {config.batch_size} x {config.grad_accum}"
    sampling = f"{settings.scheduler}, steps: {settings.num_steps}, guidance {settings.guidance}"
    card = f"""---
base_model: {of.ref}
library_name: diffusers
tags: [controlnet]
---
# controlnet: {getattr(config, "control", "")} for {of.ref}

| | |
| --- | --- |
| method | distilled from {getattr(config, "controlnet", "")} (SDXS), {trained} |
| sampling | {sampling} |
| seed | {config.seed} |
| licence | that of the base model and of the ControlNet that it was distilled from |

![control, the base with its ControlNet, this one](previews/final.png)

## Measured

| edges: F1 of the control's and the picture's; change: mean difference of pictures in [-1, 1] | |
| --- | --- |
{table}

## Use

{fence}python
import {"fastdiff" if of.ref == SHIPPED.name else "diffusers"}
from diffusers import ControlNetModel, {kind}
controlnet = ControlNetModel.from_pretrained("controlnet")
pipe = {pipe}
{fence}

All settings: `config.toml`; the same run again: `fastdiff {run.command} --config config.toml`.
"""
    write_atomic(run.folder / "README.md", card)
    write_atomic(run.folder / "hashes.json", json.dumps({"files": hashes(run)}, indent=2) + "\n")


def hashes(run: Run) -> dict[str, str]:
    """sha256 of every file that was written, those in checkpoint folders too, by place in the run folder."""
    files = [file for path in run.outputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()]
    return {file.relative_to(run.folder).as_posix(): sha256(file) for file in files}


def recipes(weights: list[Path]) -> dict[Path, Recipe]:
    """What each file or folder says of itself."""
    return {path: checkpoint.load(str(path)).recipe if path.is_dir() else lora.load(path).recipe for path in weights}


def opened(base: Checkpoint) -> str:
    """The diffusers expression that opens the base."""
    if base.ref == SHIPPED.name:
        return 'DiffusionPipeline.from_pretrained(fastdiff.load("emoji").path)'
    if base.path.is_file():
        kind = base.family.pipeline
        return f'diffusers.{kind}.from_single_file("{base.ref}")'
    return f'DiffusionPipeline.from_pretrained("{ALIASES.get(base.ref, base.ref)}")'


def elsewhere(recipe: Recipe, is_lora: bool, base: Checkpoint) -> str:
    """How programs with samplers of their own draw with these weights, or that they cannot."""
    where = "put the file among the LoRAs" if is_lora else "make one file of the folder (`fastdiff export --single-file`)"
    settings = f"{recipe.num_steps} step{'s' if recipe.num_steps > 1 else ''}, CFG {max(1.0, recipe.guidance)}"
    if recipe.scheduler == "euler":
        x0 = ', in ComfyUI after "ModelSamplingDiscrete" set to "x0"' if recipe.prediction_type == "sample" else ""
        return f'{where}, sampler "Euler", schedule "SGM uniform", {settings}{x0}.'
    if recipe.timesteps is None:
        return f'{where}, sampler "LCM", {settings}.'
    if recipe.timesteps != tuple(base.schedule().grid(recipe.num_steps, "trailing").tolist()):
        return f"they start at the last timestep; these weights want {list(recipe.timesteps)}, so use a node that sets timesteps."
    return f'{where}, sampler "LCM", schedule "SGM uniform", {settings}.'
