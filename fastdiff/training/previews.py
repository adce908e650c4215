"""What a training run shows for itself: contact sheets, and on `emoji` the closing table, of what was written and read back."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.quality import emoji as judge
from fastdiff.quality.drift import Drift
from fastdiff.runtime import console
from fastdiff.runtime.console import fmt
from fastdiff.sampling.assemble import assemble
from fastdiff.sampling.pictures import contact_sheet
from fastdiff.sampling.sampler import DEFAULTS, Sampler, Settings
from fastdiff.training.config import TrainConfig
from fastdiff.training.method import Method

# Pictures that are told apart at a glance, on backgrounds that are not their own colour.
EMOJI_PREVIEW = ("red apple on blue", "panda on yellow", "rocket on purple", "sunflower on white", "robot on green", "pizza")


class Preview:
    """The same prompts and seeds: teacher at 25 steps | what the student is to be better than | student."""

    def __init__(self, base: Checkpoint, config: TrainConfig, resolution_px: int, device: torch.device) -> None:
        if base.family == "emoji":
            self.prompts = list(EMOJI_PREVIEW)
        elif config.prompts:
            self.prompts = read_prompts(Path(config.prompts))[:4]
        else:
            self.prompts = default_prompts(base.family)[:4]
        self.cond, self.uncond = text.encode(base, self.prompts, device=device), text.unconditional(base, device=device)
        self.base, self.vae, self.resolution_px, self.device = base, vae_of(base, config), resolution_px, device
        self.seeds = [config.seed + i for i in range(len(self.prompts))]
        self.columns: dict[Settings | str, Any] = {}  # that stay as they are

    def begin(self, method: Method) -> None:
        """Before the first step: draw what cannot be drawn later."""
        if starts_from_student(method):
            self.columns["before"] = self.draw(method.student, settings_of(method)(method.recipe.num_steps))

    def sheet(self, method: Method) -> Any:
        """The columns as one PIL picture; those that stay are drawn once."""
        student = settings_of(method)(method.recipe.num_steps)
        plain: list[Settings | str] = [DEFAULTS[self.base.family]]
        plain.append("before" if "before" in self.columns else undistilled(self.base, student.calls))
        for settings in plain:
            if settings not in self.columns:
                self.columns[settings] = self.draw(method.teacher, settings)
        scale = max(1, 128 // self.resolution_px)
        sheet = [*(self.columns[settings] for settings in plain), self.draw(method.student, student)]
        return contact_sheet(sheet, scale=scale)

    def draw(self, net: Denoiser, settings: Settings) -> Any:
        sampler = Sampler.of_networks(self.base, net, self.vae, device=self.device)
        return sampler.pixels(self.cond, self.uncond, self.seeds, settings, resolution_px=self.resolution_px, batch=4)


def watched(base: Checkpoint, config: TrainConfig) -> list[str]:
    """Sixteen prompts for the drift; 64 where a picture costs next to nothing."""
    lines = read_prompts(Path(config.prompts)) if config.prompts else default_prompts(base.family)
    n = 64 if base.family == "emoji" else 16
    return [lines[i % len(lines)] for i in range(n)]


class Measured:
    """What --eval-every measures: the drift of a few pictures, and on `emoji` the Frechet distance of a few hundred.

    `score` decides which weights are the best: the drift, and how much further the pictures are from the teacher's than other
    samples of the teacher, as a part of that distance.
    """

    JUDGED = 200

    def __init__(self, base: Checkpoint, config: TrainConfig, resolution_px: int, device: torch.device) -> None:
        self.base, self.device, self.guided = base, device, config.teacher_sampling(base.family)
        self.drift = Drift(base, watched(base, config), resolution_px, device)
        self.judge = judge.Judge(base, self.JUDGED, device=device) if base.family == "emoji" else None

    def measure(self, method: Method) -> dict[str, float]:
        settings = settings_of(method)(method.recipe.num_steps)
        found = self.drift.measure((method.teacher, self.guided), (method.student, settings))
        if self.judge is None:
            return {"score": found["drift"], **found}
        reference = judge.Reference()
        row = self.judge.row(
            "student", Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device), settings
        )
        mine, least = (r.figures(reference.moments)["frechet"] for r in (row, reference.best(50, "frechet", self.JUDGED)))
        return {"score": found["drift"] + mine / least - 1, **found, "frechet": mine, "retrieval": row.hits.mean().item()}


def settings_of(method: Method) -> Callable[[int], Settings]:
    """The student's sampling settings at a number of steps, by its own recipe."""
    return lambda num_steps: Settings.of(method.recipe, DEFAULTS[method.base_model.family], num_steps=num_steps)


def starts_from_student(method: Method) -> bool:
    """Whether the figures tell what the student gained in training, and not what it gained over the teacher in as many calls."""
    return getattr(method, "baseline", "teacher") == "student"


def undistilled(base: Checkpoint, calls: int) -> Settings:
    """The best stock solver at that many network calls: measured for `emoji`, guided DPM-Solver++ for others."""
    if base.family == "emoji":
        table = judge.Reference().table
        known = sorted(int(k.split(".")[1]) for k in table["best"] if k.startswith("retrieval."))
        row = table["rows"][table["best"][f"retrieval.{max(k for k in known if k <= max(calls, known[0]))}"]]
        return Settings(row["solver"], row["num_steps"], row["guidance"], row["spacing"])
    guided = DEFAULTS[base.family]
    return replace(guided, num_steps=calls // 2) if calls > 1 else replace(guided, num_steps=1, guidance=1.0)


def vae_of(base: Checkpoint, config: TrainConfig) -> nn.Module:
    """What turns latents into pictures: the base's VAE, or another that the method was given."""
    other = getattr(config, "vae", None)
    return autoencoder.load(other, latent_channels=base.unet_config["in_channels"]) if other else base.vae


class Judged:
    """The closing table: prompts are encoded before training frees the text encoder."""

    COLUMNS = ("model", "solver", "num_steps", "guidance", "calls", "retrieval", "frechet", "same_noise")

    def __init__(self, base: Checkpoint, n: int, device: torch.device) -> None:
        self.base, self.judge, self.device = base, judge.Judge(base, n, device=device), device
        self.before: judge.Row | None = None

    def begin(self, method: Method) -> None:
        """Judge the student as it is before training, for methods that repair a damage."""
        if starts_from_student(method):
            sampler = Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device)
            self.before = self.judge.row("before", sampler, settings_of(method)(method.recipe.num_steps))

    def prove(self, students: list[Path], config: TrainConfig) -> dict[str, Any]:
        """What was written, read back and judged: {samples, rows, gap_closed}, of several files also {file: gap_closed}."""
        tables = {path.name: self.table(path, config, "student" if len(students) == 1 else path.stem) for path in students}
        rows = {json.dumps(row): row for found in tables.values() for row in found["rows"]}  # a teacher's row once
        shown = [[fmt(row[c]) for c in self.COLUMNS] for row in rows.values()]
        found = next(iter(tables.values()))
        console.table(f"{found['samples']} samples a row", list(self.COLUMNS), shown)
        if len(students) == 1:
            return found
        gaps = {name: table["gap_closed"] for name, table in tables.items()}
        return {"samples": found["samples"], "rows": list(rows.values()), "gap_closed": gaps}

    def table(self, path: Path, config: TrainConfig, name: str) -> dict[str, Any]:
        sampler, recipe = reopened(path, config, self.device)
        if self.before:
            return judge.recovered(self.judge, sampler, self.before, name)
        settings = lambda n: Settings.of(recipe, DEFAULTS["emoji"], num_steps=n)
        calls = (recipe.num_steps,) if recipe.fixed else (1, 2, 4, 8)
        return judge.prove(self.judge, sampler, settings, calls, name)


def reopened(path: Path, config: TrainConfig, device: torch.device) -> tuple[Sampler, Recipe]:
    """Weights of a run as anybody opens them."""
    alone = path.is_dir()
    base = checkpoint.load(str(path)) if alone else config.open_student(torch.float32)
    worn = [] if alone else [(lora.load(path), 1.0)]
    made = assemble(base, worn, vae=getattr(config, "vae", None), device=device)
    return made.sampler, made.recipe
