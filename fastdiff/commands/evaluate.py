"""The `evaluate` command: judges few-step models by their pictures, compared with their teacher's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import checkpoint, locate, references
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.data.prompts import read_prompts
from fastdiff.models.remap import is_pruned
from fastdiff.options.evaluate import EXAMPLES, PRESETS, Config
from fastdiff.quality import networks, retention
from fastdiff.quality.evaluation import Evaluation, Model, known_features, prompts_of
from fastdiff.quality.features import ClipFeatures, open_distance, open_extractors
from fastdiff.quality.ways import ladder_of, teacher_row
from fastdiff.runtime import console, outputs
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling.assemble import is_lora, pick_device, pick_dtype
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.training.scene import tell_few_steps

# ---- what is sampled

FAST: dict[str, Any] = dict(compile="off", identified=True)  # `identified`: hash the weights, so that drawn rows can be cached
Opener = Callable[[Sequence[str], str | None], Sampler]  # (further LoRAs, ControlNet) -> a model, opened only when needed


def teacher_settings(config: Config, base: Checkpoint) -> Settings:
    """How the teacher is sampled: as is usual for its family, except for what the options set. A few-step one: by its recipe."""
    few, named = base.recipe.few_steps, config.reference if config.reference != Config.reference else ""
    steps = 25 if config.reference_folder else int(named.partition(":")[2] or 25)
    chosen = Settings.of(
        base.recipe,
        Settings.usual(base.family),
        scheduler=config.teacher_scheduler,
        num_steps=config.teacher_steps or (None if few and (config.reference_folder or not named) else steps),
        guidance=config.teacher_guidance,
        guidance_rescale=config.guidance_rescale,
    )
    if few:
        tell_few_steps(base, chosen)
    return chosen


def name_of(spec: str) -> str:
    """A short name for a student: its file or folder, or the run folder where the file has a standard name."""
    if not references.local(spec) and references.parse(spec, "student"):
        return references.called(spec, "student")
    path = Path(spec)
    return path.parent.name if path.stem in {"model", "pytorch_lora_weights"} and path.parent.name else path.stem


def lora_on_base(config: Config, specs: Sequence[str], dtype: torch.dtype, device: torch.device) -> Opener:
    """Opens the base with the LoRAs `specs`."""

    def opened(more: Sequence[str], guide: str | None) -> Sampler:
        base = config.open_base(dtype)
        how: dict[str, Any] = dict(remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        return Sampler(base, loras=[*specs, *more], vae=config.vae, controlnet=guide, device=device, **how, **FAST)

    return opened


def whole(config: Config, ref: str, dtype: torch.dtype, device: torch.device) -> Opener:
    """Opens a student that is a whole checkpoint."""

    def opened(more: Sequence[str], guide: str | None) -> Sampler:
        base = checkpoint.load(ref, dtype=dtype, allow_pickle=config.allow_pickle, **config.reading)
        how: dict[str, Any] = dict(remap=bool(more) and is_pruned(base), allow_pickle=config.allow_pickle)
        made = Sampler(base, loras=list(more), vae=config.vae, controlnet=guide, device=device, **how, **FAST)
        made.recipe = base.recipe  # the checkpoint's own recipe, and not the one in a style LoRA's header
        return made

    return opened


def students(config: Config, family: Family, dtype: torch.dtype, device: torch.device, base_skip: int = 0) -> list[Model]:
    """The models to judge. Only headers are read so far. UsageError where one is of another family than the base."""
    models: list[Model] = []
    for specs in [[spec] for spec in config.student] + ([config.lora] if config.lora else []):
        path = specs[0].partition("=")[0]
        if is_lora(path):
            recipe = lora.outline(lora.located(path, "lora" if config.lora else "student")).recipe
            own_family, opener = recipe.family or family.name, lora_on_base(config, specs, dtype, device)
        elif config.lora:
            raise UsageError(f"--lora {path}: not a LoRA file", "give a checkpoint with --student")
        else:
            try:
                base = checkpoint.load(path, allow_pickle=config.allow_pickle)
            except UsageError as error:  # it knows every checkpoint as `base`
                locate.renamed(error, path, "student")
                raise
            recipe, own_family, opener = base.recipe, base.family.name, whole(config, path, dtype, device)
        if not family.has_name(own_family):
            flag = "--lora" if config.lora else "--student"
            raise UsageError(f"{flag} {path}: of {own_family}, but --base is {family}", "give its own base with --base")
        if config.clip_skip is None and recipe.clip_skip not in {None, base_skip}:
            console.warn(
                f"{path}: is drawn with clip skip {recipe.clip_skip}, as its recipe says, and the teacher with {base_skip}; "
                f"--clip-skip {recipe.clip_skip} draws both so"
            )
        name, alike = name_of(path), sum(m.name.split(" #")[0] == name_of(path) for m in models)
        ladder = ladder_of(recipe, family, config.steps)
        models.append(Model(f"{name} #{alike + 1}" if alike else name, opener, ladder))
    return models


def open_evaluation(config: Config, family: Family, resolution_px: int, device: torch.device, save_to: Path | None) -> Evaluation:
    """Read the prompts and open the networks that judge the pictures."""
    lines = prompts_of(family, config.prompts, config.num_images)
    if config.protocol and (there := len(read_prompts(Path(config.prompts)))) < config.num_images:
        console.warn(f"--protocol {config.protocol}: needs {config.num_images} prompts, but {config.prompts} has {there}")
    with console.timed("load_s"):
        extractors = open_extractors(
            family,
            lines,
            resolution_px=resolution_px,
            device=device,
            asked=config.asked,
            styles=bool(config.with_lora),
            fid_px=config.fid_px,
            inception_weights=config.inception_weights,
            clip=config.clip,
        )
        distance = open_distance(family, asked=config.asked, lpips_weights=config.lpips_weights)
    if config.clip != networks.CLIP and not config.protocol and any(isinstance(e, ClipFeatures) for e in extractors):
        console.info(f"--clip {config.clip}: published CMMD figures use {networks.CLIP}")
    if not extractors and distance is None:
        console.warn("only drift is measured, because no network that judges pictures is available")
    return Evaluation(
        lines,
        extractors,
        distance,
        resolution_px=resolution_px,
        device=device,
        first_seed=config.seed,
        batch=config.batch_size,
        save_to=save_to,
    )


def run(config: Config) -> Result:
    """The `evaluate` command."""
    output = outputs.as_folder(config.output or f"runs/evaluate-{references.called(config.base)}")
    device = pick_device(config.device)
    dtype = pick_dtype(config.precision, device)
    base = config.open_base(dtype)
    family, models = base.family, students(config, base.family, dtype, device, base.skipped_layers)
    saved = output / "images" if config.save_images else None
    evaluation = open_evaluation(config, family, config.resolution or base.resolution_px, device, saved)
    guided = teacher_settings(config, base)
    reference = config.reference_folder or (f"teacher:{guided.num_steps}" if base.recipe.few_steps else config.reference)
    teacher = Model("teacher", lora_on_base(replace(config, vae=None), [], dtype, device), [guided])
    report = evaluation.compare(
        teacher,
        models,
        reference=reference,
        known=known_features(family, guided, config.prompts),
        baseline=config.baseline,
        teacher_rows=[teacher_row(row, family) for row in config.teacher_row],
    )
    metrics = report.metrics | {"reference": str(reference)}
    if config.with_lora:
        metrics["style"] = retention.style(evaluation, config.with_lora, teacher, models)
    if config.with_controlnet:
        nets = (config.with_controlnet, config.student_controlnet or config.with_controlnet)
        metrics["control"] = retention.controlled(evaluation, nets, config.control, teacher, models)
    report.metrics = metrics
    latency = zip(report.drawn, report.latency_ms, strict=True)
    console.state.timings |= {f"latency_ms/{row.title}": ms for row, ms in latency}
    report.show()
    write_atomic(output / "metrics.json", json.dumps(console.jsonable(metrics), indent=2) + "\n")
    sheets = report.save(output, f"{config.base} and its students")
    return Result([output / "report.html", output / "metrics.json", *sheets], metrics)


# Every row is cached as soon as it is drawn, so the same command goes on after a stop.
COMMAND = Runnable(Config, run, PRESETS, examples=EXAMPLES, resumes=True)
