"""What a training run shows for itself: contact sheets, and on `emoji` the closing table, of what was written and read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models import text
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.train import TrainConfig
from fastdiff.quality import report
from fastdiff.quality.drift import Drift
from fastdiff.quality.emoji import shipped
from fastdiff.quality.evaluation import STEPS, Evaluation
from fastdiff.quality.metrics import Row, judging, present
from fastdiff.runtime import console
from fastdiff.sampling.pictures import contact_sheet
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.training.scene import Scene

if TYPE_CHECKING:
    from fastdiff.training.method import Method

# Pictures that are told apart at a glance, on backgrounds that are not their own colour.
EMOJI_PREVIEW = ("red apple on blue", "panda on yellow", "rocket on purple", "sunflower on white", "robot on green", "pizza")


class Preview:
    """The same prompts and seeds: teacher at 25 steps | what the student is to be better than | student."""

    def __init__(self, scene: Scene) -> None:
        base, device = scene.base, scene.device
        self.prompts = list(EMOJI_PREVIEW) if base.family.judge_ships else scene.prompts[:4]
        self.cond, self.uncond = text.encode(base, self.prompts, device=device), text.unconditional(base, device=device)
        self.base, self.vae, self.resolution_px, self.device = base, scene.vae, scene.resolution_px, device
        self.seeds = [scene.seed + i for i in range(len(self.prompts))]
        self.columns: dict[Settings | str, Any] = {}  # that stay as they are

    def begin(self, method: "Method") -> None:
        """Before the first step: draw what cannot be drawn later."""
        if method.baseline == "student":
            self.columns["before"] = self.draw(method.student, method.settings())

    def sheet(self, method: "Method") -> Any:
        """The columns as one PIL picture; those that stay are drawn once."""
        student = method.settings()
        plain: list[Settings | str] = [Settings.usual(self.base.family)]
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


class Measured:
    """What `eval_every` measures: the drift of a few pictures, and on `emoji` the Frechet distance of a few hundred.

    `score` decides which weights are the best: the drift, and how much further the pictures are from the teacher's than other
    samples of the teacher, as a part of that distance.
    """

    JUDGED = 200

    def __init__(self, scene: Scene) -> None:
        base, lines = scene.base, scene.prompts
        self.base, self.device, self.guided = base, scene.device, scene.teacher
        watched = [lines[i % len(lines)] for i in range(base.family.drift_prompts)]
        self.drift = Drift(base, watched, scene.resolution_px, scene.device)
        judged = base.family.judge_ships
        self.evaluation = Evaluation.shipped(base, self.JUDGED, device=scene.device, quick=True) if judged else None

    def measure(self, method: "Method") -> dict[str, float]:
        settings = method.settings()
        found = self.drift.measure((method.teacher, self.guided), (method.student, settings))
        if self.evaluation is None:
            return {"score": found["drift"], **found}
        sampler = Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device)
        row = self.evaluation.row("student", sampler, settings)
        student, teacher = (self.evaluation.figures(r, bands=False) for r in (row, self.evaluation.teacher))
        excess = student["frechet"] / teacher["frechet"] - 1
        return {"score": found["drift"] + excess, **found, "frechet": student["frechet"], "retrieval": student["retrieval"]}


def undistilled(base: Checkpoint, calls: int) -> Settings:
    """The best stock solver at that many network calls: measured for `emoji`, guided DPM-Solver++ for others."""
    if base.family.judge_ships:
        return shipped().undistilled(shipped().nearest(calls))["retrieval"]
    guided = Settings.usual(base.family)
    return replace(guided, num_steps=calls // 2) if calls > 1 else replace(guided, num_steps=1, guidance=1.0)


class Judged:
    """The closing table: prompts are encoded before training frees the text encoder."""

    def __init__(self, scene: Scene, n: int) -> None:
        self.base, self.device = scene.base, scene.device
        self.evaluation = Evaluation.shipped(scene.base, n, device=scene.device)
        self.before: Row | None = None

    def begin(self, method: "Method") -> None:
        """Judge the student as it is before training, for methods that repair a damage."""
        if method.baseline == "student":
            sampler = Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device)
            self.before = self.evaluation.row("before", sampler, method.settings())

    def prove(self, students: list[Path], config: TrainConfig) -> dict[str, Any]:
        """What was written, read back and judged: {samples, rows, gap_closed}, of several files also {file: gap_closed}."""
        tables = {path.name: self.table(path, config, "student" if len(students) == 1 else path.stem) for path in students}
        distinct = {json.dumps(row): row for table in tables.values() for row in table["rows"]}  # a teacher's row once
        rows, first = list(distinct.values()), next(iter(tables.values()))
        console.table(f"{first['samples']} samples a row; ± half of the 95 % band", *report.text_table(rows))
        if len(students) == 1:
            return first
        gaps = {name: table["gap_closed"] for name, table in tables.items()}
        return {"samples": first["samples"], "rows": rows, "gap_closed": gaps}

    def table(self, path: Path, config: TrainConfig, name: str) -> dict[str, Any]:
        """The rows of one file, and the gap that it closes or what training won back."""
        sampler = reopened(path, config, self.device)
        recipe = sampler.recipe
        if self.before:
            student = self.evaluation.row(name, sampler, self.before.settings)
            table = self.rows([self.evaluation.teacher, self.before, student])
            return {**table, "recovered": self.evaluation.recovered(self.before, student)}
        rows, judged = [self.evaluation.teacher], judging(self.evaluation.teacher, self.evaluation.against)
        gaps: dict[str, dict[str, Any]] = {metric.name: {} for metric in judged}
        for num_steps in (recipe.num_steps,) if recipe.fixed else STEPS:
            settings = Settings.of(recipe, Settings.usual(self.base.family), num_steps=num_steps)
            student = self.evaluation.row(name, sampler, settings)
            if num_steps <= max(STEPS):  # above, the teacher has no gap to close
                calls = shipped().nearest(num_steps)
                teachers = [self.evaluation.best_undistilled(metric, calls) for metric in judged]
                rows += dict.fromkeys(row for row in teachers if row is not None)
                for metric, gap in self.evaluation.gaps(student, calls).items():
                    gaps.setdefault(metric, {})[str(num_steps)] = gap
            rows.append(student)
        return {**self.rows(rows), "gap_closed": gaps}

    def rows(self, drawn: list[Row]) -> dict[str, Any]:
        """The measured rows, all with the same keys; None where a row lacks a metric."""
        measured = [self.evaluation.figures(row) for row in drawn]
        names = [metric.name for metric in present(measured)]
        rows = [{**row, **{name: None for name in names if name not in row}} for row in measured]
        return {"samples": len(self.evaluation.samples), "rows": rows}


def reopened(path: Path, config: TrainConfig, device: torch.device) -> Sampler:
    """Weights of a run as anybody opens them."""
    alone = path.is_dir()
    base = checkpoint.load(str(path)) if alone else config.open_student(torch.float32)
    worn = [] if alone else [(lora.load(path), 1.0)]
    return Sampler(base, loras=worn, vae=config.vae, device=device, compile="off")
