"""Judges few-step models. The closing table of training, `eval_every`, `evaluate` and `fastdiff.evaluate` all use this code.

Every row has the same prompts and seeds. A student is compared with the teacher in many guided steps, and with the undistilled
teacher in as many network calls as the student.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder
from fastdiff.quality import emoji as judge
from fastdiff.quality import report
from fastdiff.quality.distances import gap_of
from fastdiff.quality.features import FeatureExtractor, JudgeFeatures, open_distance, open_extractors
from fastdiff.quality.metrics import Against, Features, Metric, Row, judging, measured, title, too_few
from fastdiff.quality.samples import Samples
from fastdiff.quality.ways import ladder_of, teacher_row, teacher_ways
from fastdiff.runtime import console, rng
from fastdiff.runtime.errors import UsageError, device_errors_explained
from fastdiff.sampling.assemble import pick_device
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, drawing
from fastdiff.sampling.settings import Settings


@dataclass
class Model:
    """A model to judge, once with each settings of `ladder`.

    `open(further LoRAs, ControlNet)` loads it. It is called only when the model's turn comes, so one network is in memory at a
    time.
    """

    name: str
    open: Callable[[Sequence[str], str | None], Sampler]
    ladder: list[Settings]


@dataclass
class Report:
    """The result of an evaluation. `metrics` is what the command writes as JSON; `print(report.table)` prints the table."""

    metrics: dict[str, Any]
    drawn: list[Row]  # in the table's order
    latency_ms: list[float]  # of one picture drawn alone, a number per row
    lines: list[str]  # the prompts, one per picture

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One dict per row of the table: {metric: figure}, and `band`, {metric: [low, high]}."""
        return self.metrics["rows"]

    @property
    def title(self) -> str:
        return report.title(self.metrics)

    @property
    def table(self) -> str:
        """The table as plain text."""
        return f"{self.title}\n\n{report.plain(*report.text_table(self.rows, self.latency_ms))}"

    def show(self) -> None:
        """Print the table on stderr."""
        console.table(self.title, *report.text_table(self.rows, self.latency_ms), optional=report.OPTIONAL)

    def save(self, folder: Path, title: str) -> list[Path]:
        """Write report.html and a sheet of pictures to a folder; returns the paths of the sheet."""
        return report.write(
            folder, title=title, metrics=self.metrics, rows=self.drawn, latency_ms=self.latency_ms, lines=self.lines
        )


class Evaluation:
    """Draws rows of the same prompts and seeds, measures them, and computes how much of a gap each student closes.

    `lines` has one prompt per picture. `distance` maps two batches of pixels (B, 3, H, W) to (B,): LPIPS. Where `extractors` hold
    the embedded judge, prompts that no student was trained on are measured apart from the others: see `parts`.
    """

    def __init__(
        self,
        lines: list[str],
        extractors: Sequence[FeatureExtractor],
        distance: nn.Module | None,
        *,
        resolution_px: int,
        device: torch.device | str,
        first_seed: int = 0,
        block: rng.Block = rng.USERS,
        batch: int | None = None,
        save_to: Path | None = None,
        silent: bool = False,
    ) -> None:
        self.samples = Samples(
            lines, first_seed, resolution_px, extractors, distance, device, batch, save_to, block=block, silent=silent
        )
        judged = any(isinstance(extractor, JudgeFeatures) for extractor in extractors)
        # {name: indices of its pictures}; the figures of the first part come first. Without a judge there is one part, "".
        self.parts: dict[str, Tensor] = judge.parts(lines) if judged else {"": torch.arange(len(lines))}
        self.undistilled: list[Row] = []  # the teacher in few network calls
        self.chosen: dict[tuple[str, int], Row] = {}  # (metric, calls) -> the best of these rows, where it is known already
        self.students: list[Row] = []
        self.teacher: Row  # in many guided steps
        self.against: dict[str, Against]  # by part
        self.views: dict[tuple[Row, str], Row] = {}  # the part of each row, kept because figures are remembered by row

    @classmethod
    def shipped(cls, base: Checkpoint, n: int, *, device: torch.device | str) -> "Evaluation":
        """An evaluation on the embedded checkpoint with the teacher's shipped rows, so that only students have to be drawn.

        It has the first `n` judged prompts, half of which no student was trained on. They are encoded now.
        """
        lines, shipped = judge.Prompts.judged(n).captions, judge.shipped()
        self = cls(lines, [JudgeFeatures(lines)], None, resolution_px=base.resolution_px, device=device)
        self.samples.encode(base)
        of = {index: shipped.first(index, n) for index in shipped.table["best"].values()}
        for key, index in shipped.table["best"].items():
            metric, calls = key.split(".")
            self.chosen[metric, int(calls)] = of[index]
        self.undistilled = list(of.values())
        self.compare_with(shipped.reference, shipped.first(0, n), shipped.lines)
        warn_of_few(self.part(self.teacher, self.main), self.against[self.main], n, "proof")
        pixels = autoencoder.decode(drawing(base, base.vae, device), shipped.latents[:n].to(device)).cpu()
        self.teacher.pictures = uint8(pixels)
        return self

    @classmethod
    def validating(cls, base: Checkpoint, n: int, *, device: torch.device | str) -> "Evaluation":
        """An evaluation for the middle of training: the first n seen prompts, and noise that no closing table uses.

        The judge measures it. So where `keep=best` chose the weights, the judge chose them, but by no unseen prompt. It shows no
        progress.
        """
        shipped = judge.shipped()
        seen = judge.parts(shipped.lines)[judge.SEEN][:n]
        lines = [shipped.lines[i] for i in seen.tolist()]
        px, judges = base.resolution_px, [JudgeFeatures(lines)]
        self = cls(lines, judges, None, resolution_px=px, device=device, block=rng.VALIDATION, silent=True)
        self.samples.encode(base)
        self.compare_with(shipped.reference, shipped.teacher.part(seen), shipped.lines)
        return self

    def compare_with(self, reference: Features, teacher: Row, lines: Sequence[str] = ()) -> None:
        """Set what rows are compared with: the teacher's row, and features of a reference of pictures with the prompts `lines`.

        Unseen prompts are compared with the reference's unseen ones, and seen with seen; without `lines` all with all of it.
        """
        self.teacher, parts = teacher, judge.parts(lines) if "" not in self.parts and lines else {}
        of = lambda name: {k: v[parts[name]] for k, v in reference.items()} if name in parts else reference
        self.against = {name: Against(of(name), teacher.part(rows)) for name, rows in self.parts.items()}

    # ---- rows

    def row(self, model: str, sampler: Sampler, settings: Settings, *, identity: Sequence[str] = ()) -> Row:
        """Draw a row and compare it with the teacher's. With the hashes of the weights in `identity` it is cached on disk."""
        return self.samples.row(model, sampler, settings, identity=identity, beside=self.teacher)

    def row_of(self, model: str, settings: Settings) -> Row:
        """The row of a student that has been drawn with these settings."""
        return next(row for row in self.students if (row.model, row.settings) == (model, settings))

    @property
    def main(self) -> str:
        """The part whose figures come first: of prompts that no student was trained on, where there are such."""
        return next(iter(self.parts))

    def part(self, row: Row, name: str) -> Row:
        """The pictures of a row that are of one part. The row itself where there is one part."""
        if len(self.parts) == 1:
            return row
        if (row, name) not in self.views:
            self.views[row, name] = row.part(self.parts[name])
        return self.views[row, name]

    def figures(self, row: Row, *, bands: bool = True) -> dict[str, Any]:
        """How a row was drawn (model, solver, steps, ...), and all metrics that it has; those of a second part under its name."""
        first, *others = [(name, measured(self.part(row, name), against, bands=bands)) for name, against in self.against.items()]
        return {**row.described, **first[1], **dict(others)}

    # ---- gaps

    def judging(self) -> list[Metric]:
        """The metrics with which gaps are measured."""
        return judging(self.part(self.teacher, self.main), self.against[self.main])

    def best_undistilled(self, metric: Metric, calls: int) -> Row | None:
        """The undistilled teacher's best row by a metric in `calls` network calls; None where there is none."""
        if (metric.name, calls) in self.chosen:
            return self.chosen[metric.name, calls]
        against = self.against[self.main]
        rows = {row: self.part(row, self.main) for row in self.undistilled if row.calls == calls}
        values = {row: metric.value(view, against) for row, view in rows.items() if metric.computable(view, against)}
        return (max if metric.better == "higher" else min)(values, key=values.__getitem__) if values else None

    def gap(self, metric: Metric, student: Row, teacher: Row, part: str | None = None) -> dict[str, Any]:
        """How much of the gap between `teacher` and the teacher's many steps the student closes, with a 95 % band.

        It is measured on one part of the pictures, by default the first.
        """
        name = self.main if part is None else part
        rows = [self.part(row, name) for row in (student, teacher, self.teacher)]
        n = min(map(len, rows))
        student_figures, teacher_figures, best = (metric.redrawn(row, self.against[name], n) for row in rows)
        return gap_of(student_figures, teacher_figures, best, metric.better)

    def gaps(self, student: Row, calls: int, part: str | None = None) -> dict[str, dict[str, Any]]:
        """{metric: the student's `gap`}, where the gap starts at the undistilled teacher's best row in `calls` network calls."""
        pairs = [(metric, self.best_undistilled(metric, calls)) for metric in self.judging()]
        return {metric.name: self.gap(metric, student, row, part) for metric, row in pairs if row is not None}

    def recovered(self, before: Row, student: Row) -> dict[str, dict[str, Any]]:
        """{metric: (before - student) / (before - teacher), with a band}: the part of a damage that training has repaired.

        `before` is the row of the network before training, for example just after blocks were cut out.
        """
        figures = {}
        for metric in self.judging():
            gap = self.gap(metric, student, before)
            figures[metric.name] = {"recovered": gap["gap_closed"], "low": gap["low"], "high": gap["high"]}
            figures[metric.name] |= {"before": gap["teacher"], "student": gap["student"], "teacher": gap["teacher_50"]}
        return figures

    # ---- an evaluation from end to end

    def compare(
        self,
        teacher: Model,
        students: Sequence[Model],
        *,
        reference: Path | str,
        known: Features | None = None,
        baseline: bool = True,
        teacher_rows: Sequence[Settings] = (),
    ) -> Report:
        """Draw all rows and measure them, with one network in memory at a time.

        FID, KID and the like compare with `reference`: a folder of pictures, or the teacher's pictures of other seeds, whose
        features may be `known` already. `baseline`: also judge the teacher in as many network calls as each student. It is judged
        with the settings `teacher_rows` in any case.
        """
        made, guided = teacher.open([], None), teacher.ladder[0]
        if made.denoiser.guidance_embedded and any(way.step_guidance for way in teacher_rows):
            raise UsageError("`teacher_row`: the base takes one guidance for all steps, as an input", "give one guidance a row")
        best = self.samples.row(teacher.name, made, guided, identity=made.identity)
        self.set_reference(made, best, reference, known or {})
        warn_of_few(self.part(best, self.main), self.against[self.main], len(self.samples))
        latency_ms = {best: self.samples.latency_ms(made, guided)}
        few = sorted({settings.calls for model in students for settings in model.ladder}) if baseline else []
        ways = [way for calls in few for way in teacher_ways(made.base, calls)]
        if made.denoiser.guidance_embedded:  # such a network is told one w for all steps
            ways = [way for way in ways if way.step_guidance is None]
        for settings in {title(teacher.name, way): way for way in [*ways, *teacher_rows]}.values():
            self.undistilled.append(self.timed(teacher.name, made, settings, latency_ms))
        del made  # frees its memory before the next network is opened
        for model in students:
            made = model.open([], None)
            for settings in model.ladder:
                self.students.append(self.timed(model.name, made, settings, latency_ms))
            del made
        order = [best, *sorted([*self.undistilled, *self.students], key=lambda row: row.calls)]
        with console.timed("figures_s"):
            rows = [self.figures(row) for row in order]
            gaps = {f"{row.model} {row.settings.num_steps}": self.gaps(row, row.calls) for row in self.students}
            measurements = {"samples": len(self.samples), "reference": str(reference), "rows": rows, "gap_closed": gaps}
            for name in list(self.parts)[1:]:
                measurements[name] = {
                    "gap_closed": {
                        f"{row.model} {row.settings.num_steps}": self.gaps(row, row.calls, name) for row in self.students
                    }
                }
        return Report(measurements, order, [latency_ms[row] for row in order], self.samples.lines)

    def timed(self, model: str, made: Sampler, settings: Settings, latency_ms: dict[Row, float]) -> Row:
        """Draw a row and add its latency to `latency_ms`."""
        row = self.row(model, made, settings, identity=made.identity)
        latency_ms[row] = self.samples.latency_ms(made, settings)
        return row

    def set_reference(self, made: Sampler, best: Row, reference: Path | str, known: Features) -> None:
        """Compare with features of the folder's pictures, or of the teacher's pictures of other seeds; `known`: those shipped."""
        if isinstance(reference, Path):
            return self.compare_with(self.samples.of_folder(reference), best)
        if not self.samples.extractors:  # nothing compares distributions
            return self.compare_with({}, best)
        if known and len(self.samples.extractors) == 1:
            return self.compare_with(known, best, judge.shipped().lines)
        other = self.samples.row("reference", made, best.settings, identity=made.identity, block=rng.REFERENCE)
        return self.compare_with(other.features, best, self.samples.lines)


def warn_of_few(row: Row, against: Against, n: int, option: str = "num_images") -> None:
    """Warn once where a row, or the first part of its n pictures, is too small for a distance between distributions."""
    if few := too_few(row, against):
        names, least = listed_in_words([m.label for m in few]), few[0].enough * round(n / len(row))
        console.warn(
            f"`{option}={n}`: {names} need{'s' if len(few) == 1 else ''} at least {least} pictures per row "
            f"and may rank models wrongly with fewer; the other figures have wide bands"
        )


def listed_in_words(names: Sequence[str]) -> str:
    """Names as in a sentence: a, b and c."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def prompts_of(family: Family, prompts: str | Path | Sequence[str] | None, n: int) -> list[str]:
    """n prompts, one per picture, taken in turn from a file, a list, or by default from the prompts that ship with the family.

    `emoji` has its judged prompts as the default. UsageError where there is no prompt.
    """
    if prompts is None and family.judge_ships:
        return judge.Prompts.judged(n).captions
    if prompts is None:
        lines = default_prompts(family)
    else:
        lines = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    if not lines:
        raise UsageError("`prompts`: it has no prompts", "give at least one")
    return [lines[i % len(lines)] for i in range(n)]


def known_features(family: Family, settings: Settings, prompts: Any) -> Features:
    """The shipped features of the teacher's pictures, which then need not be drawn; {} where none are shipped.

    They exist for `emoji` with its usual settings and prompts.
    """
    usual = family.judge_ships and settings == Settings.usual(family) and prompts is None
    return judge.shipped().reference if usual else {}


@device_errors_explained()
def evaluate(
    student: Any,
    *,
    teacher: Checkpoint,
    num_steps: int | Sequence[int] | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    num_images: int | None = None,
    metrics: Sequence[str] = (),
    reference: str | Path | None = None,
    teacher_steps: int | None = None,
    baseline: bool = True,
    teacher_rows: Sequence[Settings | str] = (),
    resolution_px: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Report:
    """Judge a few-step model by its pictures, compared with its teacher's. It does what the `evaluate` command does.

        print(fastdiff.evaluate(fast, teacher=base, num_steps=[1, 2, 4]).table)

    `student` is a Sampler, and its recipe says how it is sampled; each number in `num_steps` is a row of the table. `prompts`: a
    list, or a file with one prompt per line; they are used in turn, and picture i has seed `seed` + i. `num_images`: pictures a
    row, by default 500, and for `emoji` 1000, half of them of prompts that no student was trained on. `metrics`: any of fid,
    patch, clip and lpips; by default all whose networks are available. `reference`: a folder of pictures that FID and the like
    compare with; by default the teacher's pictures of other seeds. `teacher_steps`: the teacher's sampling steps, by default 25,
    and of a few-step checkpoint those of its own recipe. `baseline`: also judge the teacher in as many network calls as the
    student. `teacher_rows`: further ways to judge the teacher, each Settings or text such as
    "scheduler=dpm++ steps=5 guidance=1,3,3,3,1"; keys are scheduler, steps, timesteps=999,666,333, start=749, guidance (one
    number, or one for each step) and spacing. A student's gap starts at the best row with as many calls. `device`: where the
    teacher draws; by default where the student does. UsageError where student and teacher are of different families,
    `num_images` is below 2, there are no prompts, or a row is not understood.
    """
    family, where = teacher.family, student.device if device is None else pick_device(device)
    if student.base.family != family:
        raise UsageError(f"`student`: of {student.base.family}, but the teacher is of {family}", "give its own base as teacher")
    if num_images is None:
        num_images = 1000 if family.judge_ships else 500
    if num_images < 2:
        raise UsageError(f"`num_images={num_images}`: must be at least 2")
    rows = [teacher_row(row, family) for row in teacher_rows]
    px, lines = resolution_px or teacher.resolution_px, prompts_of(family, prompts, num_images)
    ladder = ladder_of(student.recipe, family, (num_steps,) if isinstance(num_steps, int) else num_steps)
    steps = teacher_steps or (None if teacher.recipe.few_steps else 25)
    guided = Settings.of(teacher.recipe, Settings.usual(family), num_steps=steps)
    evaluation = Evaluation(
        lines,
        open_extractors(family, lines, resolution_px=px, device=where, asked=metrics),
        open_distance(family, asked=metrics),
        resolution_px=px,
        device=where,
        first_seed=seed,
        batch=batch_size,
    )
    opened = lambda loras, controlnet: Sampler(copy(teacher), device=where, compile="off", identified=True)
    return evaluation.compare(
        Model("teacher", opened, [guided]),
        [Model("student", lambda loras, controlnet: student, ladder)],
        reference=f"teacher:{guided.num_steps}" if reference is None else Path(reference).expanduser(),
        known=known_features(family, guided, prompts),
        baseline=baseline,
        teacher_rows=rows,
    )
