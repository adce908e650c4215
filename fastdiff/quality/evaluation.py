"""Judges few-step models. The closing table of training, `eval_every`, `evaluate` and `fastdiff.evaluate` all use this code.

Every row has the same prompts and seeds. A student is compared with the teacher in many guided steps, and with the undistilled
teacher in as many network calls as the student.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.data.prompts import default_prompts, read_prompts
from fastdiff.models import autoencoder, perceptual
from fastdiff.quality import emoji as judge
from fastdiff.quality import report
from fastdiff.quality.distances import Moments, gap_of
from fastdiff.quality.drift import departures
from fastdiff.quality.features import EmbeddedFeatures, FeatureExtractor, open_distance, open_extractors
from fastdiff.quality.metrics import Against, Metric, Row, judging, measured, too_few
from fastdiff.quality.samples import Samples
from fastdiff.runtime import console, rng
from fastdiff.runtime.errors import UsageError, device_errors_explained
from fastdiff.sampling.assemble import pick_device
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler, drawing
from fastdiff.sampling.settings import Settings

STEPS = (1, 2, 4, 8)  # judged where neither the caller nor the student's recipe fixes the steps


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
        return f"{self.metrics['samples']} pictures a row; ± half of the 95 % band"

    @property
    def table(self) -> str:
        """The table as plain text."""
        return f"{self.title}\n\n{report.plain(*report.text_table(self.rows, self.latency_ms))}"

    def show(self) -> None:
        """Print the table on stderr."""
        console.table(self.title, *report.text_table(self.rows, self.latency_ms))

    def save(self, folder: Path, title: str) -> Path:
        """Write report.html and contact.png to a folder; returns the path of contact.png."""
        return report.write(
            folder, title=title, metrics=self.metrics, rows=self.drawn, latency_ms=self.latency_ms, lines=self.lines
        )


class Evaluation:
    """Draws rows of the same prompts and seeds, measures them, and computes how much of a gap each student closes.

    `lines` has one prompt per picture. `distance` maps two batches of pixels (B, 3, H, W) to (B,): LPIPS or its substitute.
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
        batch: int | None = None,
        save_to: Path | None = None,
        diverse: bool = True,
        silent: bool = False,
    ) -> None:
        self.samples = Samples(
            lines, first_seed, resolution_px, extractors, distance, device, batch, save_to, diverse=diverse, silent=silent
        )
        self.undistilled: list[Row] = []  # the teacher in few network calls
        self.chosen: dict[tuple[str, int], Row] = {}  # (metric, calls) -> the best of these rows, where it is known already
        self.students: list[Row] = []
        self.against: Against

    @classmethod
    def shipped(cls, base: Checkpoint, n: int, *, device: torch.device | str, quick: bool = False) -> "Evaluation":
        """An evaluation on the embedded checkpoint with the teacher's shipped rows, so that only students have to be drawn.

        The first `n` judged prompts are encoded now. `quick` is for the middle of training: it leaves out the comparisons
        picture by picture and shows no progress.
        """
        lines, shipped = judge.Prompts.judged(n).captions, judge.shipped()
        distance = None if quick else perceptual.open_distance(base.family, None)
        how = dict(resolution_px=base.resolution_px, device=device, silent=quick)
        # No diversity is measured: the shipped rows hold none to compare with.
        self = cls(lines, [EmbeddedFeatures(lines)], distance, diverse=False, **how)
        self.samples.encode(base)
        rows = {index: shipped.row(index, n) for index in shipped.table["best"].values()}
        for key, index in shipped.table["best"].items():
            metric, calls = key.split(".")
            self.chosen[metric, int(calls)] = rows[index]
        many = self.chosen["retrieval", shipped.calls[-1]]
        self.undistilled = [row for row in rows.values() if row is not many]
        self.against = Against({}, many, {"embedded": shipped.moments})
        if not quick:
            latents = shipped.latents[:n]
            pixels = autoencoder.decode(drawing(base, base.vae, device), latents.to(device)).cpu()
            many.pictures = uint8(pixels)
            if len(latents) == n:
                many.features["departures"] = departures(latents, pixels)
        return self

    @property
    def teacher(self) -> Row:
        """The row of the teacher in many guided steps."""
        return self.against.teacher

    # ---- rows

    def row(self, model: str, sampler: Sampler, settings: Settings, *, identity: Sequence[str] = ()) -> Row:
        """Draw a row and compare it with the teacher's. With the hashes of the weights in `identity` it is cached on disk."""
        return self.samples.row(model, sampler, settings, identity=identity, beside=self.teacher)

    def row_of(self, model: str, settings: Settings) -> Row:
        """The row of a student that has been drawn with these settings."""
        return next(row for row in self.students if (row.model, row.settings) == (model, settings))

    def figures(self, row: Row, *, bands: bool = True) -> dict[str, Any]:
        """How a row was drawn (model, solver, steps, ...), and all metrics that it has."""
        return {**row.described, **measured(row, self.against, bands=bands)}

    # ---- gaps

    def best_undistilled(self, metric: Metric, calls: int) -> Row | None:
        """The undistilled teacher's best row by a metric in `calls` network calls; None where there is none."""
        rows = [row for row in self.undistilled if row.calls == calls and metric.computable(row, self.against)]
        if (metric.name, calls) in self.chosen or not rows:
            return self.chosen.get((metric.name, calls))
        return (max if metric.better == "higher" else min)(rows, key=lambda row: metric.value(row, self.against))

    def gap(self, metric: Metric, student: Row, teacher: Row) -> dict[str, Any]:
        """How much of the gap between `teacher` and the teacher's many steps the student closes, with a 95 % band."""
        rows = (student, teacher, self.teacher)
        n = min(map(len, rows))
        return gap_of(*(metric.redrawn(row, self.against, n) for row in rows))

    def gaps(self, student: Row, calls: int) -> dict[str, dict[str, Any]]:
        """{metric: the student's `gap`}, where the gap starts at the undistilled teacher's best row in `calls` network calls."""
        pairs = [(metric, self.best_undistilled(metric, calls)) for metric in judging(student, self.against)]
        return {metric.name: self.gap(metric, student, row) for metric, row in pairs if row is not None}

    def recovered(self, before: Row, student: Row) -> dict[str, dict[str, Any]]:
        """{metric: (before - student) / (before - teacher), with a band}: the part of a damage that training has repaired.

        `before` is the row of the network before training, for example just after blocks were cut out.
        """
        figures = {}
        for metric in judging(student, self.against):
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
        moments: dict[str, Moments] | None = None,
        baseline: bool = True,
    ) -> Report:
        """Draw all rows and measure them, with one network in memory at a time.

        FID, KID and the like compare with `reference`: a folder of pictures, or the teacher's pictures of other seeds, whose
        `moments` may be known already. `baseline`: also judge the teacher in as many network calls as each student.
        """
        made, guided = teacher.open([], None), teacher.ladder[0]
        best = self.samples.row(teacher.name, made, guided, identity=made.identity)
        self.against = self.references(made, best, reference, moments or {})
        warn_of_few(best, self.against)
        latency_ms = {best: self.samples.latency_ms(made, guided)}
        family = made.base.family
        for calls in sorted({settings.calls for model in students for settings in model.ladder}) if baseline else []:
            for settings in undistilled_ways(family, calls):
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
        return Report(measurements, order, [latency_ms[row] for row in order], self.samples.lines)

    def timed(self, model: str, made: Sampler, settings: Settings, latency_ms: dict[Row, float]) -> Row:
        """Draw a row and add its latency to `latency_ms`."""
        row = self.row(model, made, settings, identity=made.identity)
        latency_ms[row] = self.samples.latency_ms(made, settings)
        return row

    def references(self, made: Sampler, best: Row, reference: Path | str, moments: dict[str, Moments]) -> Against:
        """The references to measure against: features of the folder's pictures, or of the teacher's pictures of other seeds."""
        if isinstance(reference, Path):
            return Against(self.samples.of_folder(reference), best)
        if len(self.samples.extractors) <= len(moments):
            return Against({}, best, moments)
        other = self.samples.row("reference", made, best.settings, identity=made.identity, block=rng.REFERENCE)
        return Against(other.features, best, moments)


def warn_of_few(row: Row, against: Against) -> None:
    """Warn once where a row has too few pictures for a distance between distributions."""
    if few := too_few(row, against):
        names = " and ".join(m.label for m in few)
        console.warn(
            f"`num_images={len(row)}`: {names} need{'s' if len(few) == 1 else ''} at least {few[0].enough} pictures per row "
            f"and may rank models wrongly with fewer; the other figures have wide bands"
        )


def undistilled_ways(family: Family, calls: int) -> list[Settings]:
    """The ways to sample an undistilled teacher in `calls` network calls, with guidance and without.

    The solvers are the stock ones that measured best on `emoji`. For `emoji` itself they are the shipped best settings.
    """
    usual = Settings.usual(family)
    ways = [replace(usual, scheduler="ddim" if calls == 1 else "dpm++", num_steps=calls, guidance=1.0, spacing="trailing")]
    if calls > 1 and usual.guided:
        ways.append(replace(usual, scheduler="dpm++", num_steps=calls // 2, spacing="trailing"))
    if family.judge_ships:
        known = list(dict.fromkeys(judge.shipped().undistilled(calls).values()))
        ways = known + [way for way in ways if way.guided not in {k.guided for k in known}]
    return ways


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


def known_moments(family: Family, settings: Settings, prompts: Any) -> dict[str, Moments]:
    """The shipped feature moments of the teacher's pictures, which then need not be drawn; {} where none are shipped.

    They exist for `emoji` with its usual settings and prompts.
    """
    usual = family.judge_ships and settings == Settings.usual(family) and prompts is None
    return {"embedded": judge.shipped().moments} if usual else {}


def ladder_of(recipe: Any, family: Family, num_steps: Sequence[int] | None) -> list[Settings]:
    """A student's settings for each number of steps: `num_steps`, or the one its recipe fixes, or 1, 2, 4 and 8."""
    own = (recipe.num_steps,) if recipe.fixed and recipe.num_steps else STEPS
    return [Settings.of(recipe, Settings.usual(family), num_steps=n) for n in num_steps or own]


@device_errors_explained()
def evaluate(
    student: Any,
    *,
    teacher: Checkpoint,
    num_steps: int | Sequence[int] | None = None,
    prompts: str | Path | Sequence[str] | None = None,
    num_images: int = 500,
    metrics: Sequence[str] = (),
    reference: str | Path | None = None,
    teacher_steps: int = 25,
    baseline: bool = True,
    resolution_px: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str | None = None,
) -> Report:
    """Judge a few-step model by its pictures, compared with its teacher's. It does what the `evaluate` command does.

        print(fastdiff.evaluate(fast, teacher=base, num_steps=[1, 2, 4]).table)

    `student` is a Sampler, and its recipe says how it is sampled; each number in `num_steps` is a row of the table. `prompts`: a
    list, or a file with one prompt per line; they are used in turn, and picture i has seed `seed` + i. `metrics`: any of fid,
    patch, clip and lpips; by default all whose networks are available. `reference`: a folder of pictures that FID and the like
    compare with; by default the teacher's pictures of other seeds. `baseline`: also judge the teacher in as many network calls
    as the student. `device`: where the teacher draws; by default where the student does. UsageError where student and teacher
    are of different families, `num_images` is below 2, or there are no prompts.
    """
    family, where = teacher.family, student.device if device is None else pick_device(device)
    if student.base.family != family:
        raise UsageError(f"`student`: of {student.base.family}, but the teacher is of {family}", "give its own base as teacher")
    if num_images < 2:
        raise UsageError(f"`num_images={num_images}`: must be at least 2")
    px, lines = resolution_px or teacher.resolution_px, prompts_of(family, prompts, num_images)
    ladder = ladder_of(student.recipe, family, (num_steps,) if isinstance(num_steps, int) else num_steps)
    guided = replace(Settings.usual(family), num_steps=teacher_steps)
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
        reference=f"teacher:{teacher_steps}" if reference is None else Path(reference),
        moments=known_moments(family, guided, prompts),
        baseline=baseline,
    )
