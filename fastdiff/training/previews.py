"""Contact sheets and measurements of a training run, and for `emoji` the closing table, made of the weights as written."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff import lora
from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models import text
from fastdiff.models.denoiser import Denoiser
from fastdiff.options.train import TrainConfig
from fastdiff.quality import report
from fastdiff.quality.drift import Drift
from fastdiff.quality.emoji import shipped
from fastdiff.quality.evaluation import Evaluation
from fastdiff.quality.metrics import Row, present
from fastdiff.quality.ways import STEPS
from fastdiff.runtime import console, rng
from fastdiff.sampling.sampler import Sampler, at_once
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Sheet, in_calls
from fastdiff.training.scene import Scene

if TYPE_CHECKING:
    from fastdiff.training.method import Method

# Objects that are easy to tell apart, each on a background of another colour than the object usually has.
EMOJI_PREVIEW = ("red apple on pink", "panda on yellow", "rocket on purple", "sunflower on white", "robot on green", "pizza")


class Preview:
    """Draws contact sheets with three columns, for the same prompts and seeds.

    The columns are the teacher at 25 steps, what the student has to beat (the undistilled teacher at the student's number of
    calls, or the student before training), and the student.
    """

    def __init__(self, scene: Scene) -> None:
        base, device = scene.base, scene.device
        self.prompts = list(EMOJI_PREVIEW) if base.family.judge_ships else scene.prompts[:4]
        self.cond, self.uncond = text.encode(base, self.prompts, device=device), text.unconditional(base, device=device)
        self.base, self.vae, self.resolution_px, self.device = base, scene.vae, scene.resolution_px, device
        self.seeds = [rng.PREVIEW(scene.seed + i) for i in range(len(self.prompts))]
        # Columns that training does not change, each (N, 3, H, W): the teacher's by settings, and the student "before".
        self.columns: dict[Settings | str, Tensor] = {}

    def begin(self, method: "Method") -> None:
        """Draw the student before the first step, for methods whose baseline that is."""
        if method.baseline == "student":
            self.columns["before"] = self.draw(method.student, method.settings())

    def sheet(self, method: "Method") -> Sheet:
        """Draw the columns side by side on one sheet. Columns that do not change are drawn once."""
        student = method.settings()
        teachers = {"teacher": Settings.of_base(self.base)}
        if "before" not in self.columns:
            teachers["undistilled"] = undistilled(self.base, student.calls)
        columns = []
        for name, settings in teachers.items():
            if settings not in self.columns:
                self.columns[settings] = self.draw(method.teacher, settings)
            columns.append((in_calls(name, settings.calls), self.columns[settings]))
        if "before" in self.columns:
            columns.append((in_calls("before training", student.calls), self.columns["before"]))
        columns.append((in_calls("student", student.calls), self.draw(method.student, student)))
        return Sheet.of_columns(columns, self.prompts)

    def draw(self, net: Denoiser, settings: Settings) -> Tensor:
        """Draw the prompts with a network: (N, 3, H, W) in [-1, 1], on the CPU."""
        sampler = Sampler.of_networks(self.base, net, self.vae, device=self.device)
        n = min(4, at_once(self.resolution_px // self.base.pixels_per_latent, training=True))
        return sampler.pixels(self.cond, self.uncond, self.seeds, settings, resolution_px=self.resolution_px, batch=n)


class Measured:
    """Measures the student for `eval_every`: the drift of a few pictures, and for `emoji` the Frechet distance of 200.

    `score` decides which weights are the best; less is better. It is the drift, plus for `emoji` the student's Frechet
    distance divided by the teacher's, minus 1. Its noise is its own; its prompts are seen ones of the closing table. Figures of a
    student that is trained for several numbers of steps are means over them.
    """

    JUDGED = 200  # pictures that are compared by Frechet distance

    def __init__(self, scene: Scene) -> None:
        base, lines = scene.base, scene.prompts
        self.base, self.device, self.guided = base, scene.device, scene.teacher
        prompts = [lines[i % len(lines)] for i in range(base.family.drift_prompts)]
        self.drift = Drift(base, prompts, scene.resolution_px, scene.device)
        judged = base.family.judge_ships
        self.evaluation = Evaluation.validating(base, self.JUDGED, device=scene.device) if judged else None

    def measure(self, method: "Method") -> dict[str, float]:
        """Measure the student as it is now: `score`, the drift and its parts, and for `emoji` `frechet` and `retrieval`."""
        figures = [self.in_steps(method, n) for n in method.recipe.step_counts or (None,)]
        return {name: mean(one[name] for one in figures) for name in figures[0]}

    def in_steps(self, method: "Method", num_steps: int | None) -> dict[str, float]:
        """Measure the student in one number of sampling steps; None is its recipe's."""
        settings = method.settings(num_steps)
        drift = self.drift.measure((method.teacher, self.guided), (method.student, settings))
        if self.evaluation is None:
            return {"score": drift["drift"], **drift}
        sampler = Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device)
        row = self.evaluation.row("student", sampler, settings)
        student, teacher = (self.evaluation.figures(r, bands=False) for r in (row, self.evaluation.teacher))
        excess = student["frechet"] / teacher["frechet"] - 1
        return {"score": drift["drift"] + excess, **drift, "frechet": student["frechet"], "retrieval": student["retrieval"]}


def undistilled(base: Checkpoint, calls: int) -> Settings:
    """Return the settings that draw best with the undistilled base in that many network calls.

    They were measured for `emoji`. Other families take their usual settings in half as many steps, for a guided step costs two
    calls; a single call takes one step without guidance. A few-step base keeps its own solver and guidance.
    """
    if base.family.judge_ships:
        return shipped().undistilled(shipped().nearest(calls))["retrieval"]
    guided = Settings.of_base(base)
    if base.recipe.few_steps:
        return Settings.of(base.recipe, guided, num_steps=max(1, calls // 2 if guided.guided else calls))
    return replace(guided, num_steps=calls // 2) if calls > 1 else replace(guided, num_steps=1, guidance=1.0)


class Judged:
    """Makes the closing table of `n` samples a row. Its prompts are encoded before training frees the text encoders."""

    SHOWN = (0, 4, 8, 12, 2, 6, 10)  # pictures of the closing sheet: four named and three group prompts, all of them unseen

    def __init__(self, scene: Scene, n: int) -> None:
        self.base, self.device = scene.base, scene.device
        self.evaluation = Evaluation.shipped(scene.base, n, device=scene.device)
        self.before: Row | None = None
        self.judged: dict[int, Row] = {}  # by network calls, the students of the closing sheet

    def begin(self, method: "Method") -> None:
        """Judge the student before training, for methods whose baseline that is."""
        if method.baseline == "student":
            sampler = Sampler.of_networks(self.base, method.student, self.base.vae, device=self.device)
            self.before = self.evaluation.row("before", sampler, method.settings())

    def prove(self, students: list[Path], config: TrainConfig) -> dict[str, Any]:
        """Read back and judge the written weights; print the tables and return {samples, rows, gap_closed, seen}.

        `gap_closed` is {file: gaps} for several files, and `seen` has the same of prompts that students are trained on. Methods
        whose baseline is the student return `recovered` instead.
        """
        tables = {path.name: self.table(path, config, "student" if len(students) == 1 else path.stem) for path in students}
        distinct = {json.dumps(row): row for table in tables.values() for row in table["rows"]}  # a teacher's row once
        rows, first = list(distinct.values()), next(iter(tables.values()))
        metrics = {"samples": first["samples"], "rows": rows}
        console.table(report.title(metrics), *report.text_table(rows), optional=report.OPTIONAL)
        compared = {
            f"{name}, {steps}" if len(tables) > 1 else steps: gap
            for name, table in tables.items()
            for steps, gap in by_steps(table.get("gap_closed", {})).items()
        }
        if compared:
            console.table(report.VERDICTS, *report.verdicts(compared))
        if len(students) == 1:
            return first
        metrics["gap_closed"] = {name: table["gap_closed"] for name, table in tables.items()}
        for part in list(self.evaluation.parts)[1:]:
            metrics[part] = {"gap_closed": {name: table[part]["gap_closed"] for name, table in tables.items()}}
        return metrics

    def table(self, path: Path, config: TrainConfig, name: str) -> dict[str, Any]:
        """Judge one LoRA file or checkpoint folder; return its rows with `gap_closed`, or with `recovered`."""
        evaluation, sampler = self.evaluation, reopened(path, config, self.device)
        recipe = sampler.recipe
        if self.before:
            student = evaluation.row(name, sampler, self.before.settings)
            self.judged[student.calls] = student
            table = self.rows([evaluation.teacher, self.before, student])
            return {**table, "recovered": evaluation.recovered(self.before, student)}
        rows, judged = [evaluation.teacher], evaluation.judging()
        gaps: dict[str, dict[str, dict[str, Any]]] = {p: {metric.name: {} for metric in judged} for p in evaluation.parts}
        for num_steps in recipe.own_counts or STEPS:
            settings = Settings.of(recipe, Settings.usual(self.base.family), num_steps=num_steps)
            student = evaluation.row(name, sampler, settings)
            if num_steps <= max(STEPS):  # in more steps than these the undistilled teacher leaves no gap to close
                calls = shipped().nearest(num_steps)
                teachers = [evaluation.best_undistilled(metric, calls) for metric in judged]
                rows += dict.fromkeys(row for row in teachers if row is not None)
                for part in evaluation.parts:
                    for metric, gap in evaluation.gaps(student, calls, part).items():
                        gaps[part].setdefault(metric, {})[str(num_steps)] = gap
            rows.append(student)
            self.judged.setdefault(student.calls, student)
        first, *others = [{"gap_closed": of} for of in gaps.values()]
        return {**self.rows(rows), **first, **dict(zip(list(gaps)[1:], others, strict=True))}

    def sheet(self, config: TrainConfig) -> Sheet:
        """Show prompts that no student was trained on, drawn by the teacher and for each number of calls by what is compared."""
        samples = self.evaluation.samples
        rows = torch.tensor([i for i in self.SHOWN if i < len(samples)])
        columns = [(in_calls("teacher", self.evaluation.teacher.calls), pixels_of(self.evaluation.teacher, rows))]
        lines, seeds = [samples.lines[i] for i in rows.tolist()], [samples.block(samples.first_seed + i) for i in rows.tolist()]
        base = Sampler(config.open_base(torch.float32), device=self.device, compile="off")  # the students are closed by now
        cond, uncond = base.conds(lines)
        for calls, student in sorted(self.judged.items()):
            if self.before:
                columns.append((in_calls("before training", calls), pixels_of(self.before, rows)))
            elif calls <= max(STEPS):
                settings = undistilled(self.base, calls)
                pixels = base.pixels(cond, uncond, seeds, settings, resolution_px=samples.resolution_px)
                columns.append((in_calls("undistilled", settings.calls), pixels))
            columns.append((in_calls("student", calls), pixels_of(student, rows)))
        return Sheet.of_columns(columns, lines)

    def rows(self, drawn: list[Row]) -> dict[str, Any]:
        """Measure rows and return them as {samples, rows}; all have the same keys, with None for a metric that one lacks."""
        measured = [self.evaluation.figures(row) for row in drawn]
        names = [metric.name for metric in present(measured)]
        rows = [{**row, **{name: None for name in names if name not in row}} for row in measured]
        return {"samples": len(self.evaluation.samples), "rows": rows}


def pixels_of(row: Row, rows: Tensor) -> Tensor:
    """The pixels (N, 3, H, W) in [-1, 1] of some of a row's first pictures."""
    assert row.pictures is not None, "the pictures of judged rows are kept"
    return row.pictures[rows].float() / 127.5 - 1


def by_steps(gaps: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """{metric: {steps: gap}} as {steps: {metric: gap}}."""
    turned: dict[str, dict[str, dict[str, Any]]] = {}
    for metric, of in gaps.items():
        for steps, gap in of.items():
            turned.setdefault(f"{steps} step{'s' * (steps != '1')}", {})[metric] = gap
    return turned


def reopened(path: Path, config: TrainConfig, device: torch.device) -> Sampler:
    """Open the weights that a run wrote as a user would: a checkpoint folder, or a LoRA file on the base that it trained on."""
    is_checkpoint = path.is_dir()
    base = checkpoint.load(str(path), **config.reading) if is_checkpoint else config.open_student(torch.float32)
    loras = [] if is_checkpoint else [(lora.load(path), 1.0)]
    return Sampler(base, loras=loras, vae=config.vae, device=device, compile="off", allow_pickle=config.allow_pickle)
