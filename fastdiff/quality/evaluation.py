"""The one way to judge few-step models: the closing table of training, `eval_every`, `evaluate` and `fastdiff.evaluate` use it.

Every row has the same prompts and seeds: picture i is of seed i. A student is judged beside the teacher's many guided steps, and
beside the undistilled teacher in as many network calls.
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
from fastdiff.quality.drift import REFERENCE_SEED, departures
from fastdiff.quality.features import EmbeddedFeatures, FeatureExtractor, open_distance, open_extractors
from fastdiff.quality.metrics import Against, Metric, Row, judging, measured, too_few
from fastdiff.quality.samples import Samples
from fastdiff.runtime import console
from fastdiff.runtime.errors import UsageError
from fastdiff.sampling.assemble import pick_device
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

STEPS = (1, 2, 4, 8)  # of a student whose recipe leaves them open


@dataclass
class Model:
    """Something to judge: `open(further LoRAs, ControlNet)` when its turn comes, sampled by each settings of `ladder`."""

    name: str
    open: Callable[[Sequence[str], str | None], Sampler]
    ladder: list[Settings]


@dataclass
class Report:
    """What an evaluation measured. `metrics` holds what the command's JSON does; `print(report.table)` shows it."""

    metrics: dict[str, Any]
    drawn: list[Row]  # in the table's order
    latency_ms: list[float]  # of one picture alone
    lines: list[str]  # the prompts, one a picture

    @property
    def rows(self) -> list[dict[str, Any]]:
        """{figure: value} of each way of sampling, and `band`, {metric: [low, high]}."""
        return self.metrics["rows"]

    @property
    def title(self) -> str:
        return f"{self.metrics['samples']} pictures a row; ± half of the 95 % band"

    @property
    def table(self) -> str:
        return f"{self.title}\n\n{report.plain(*report.text_table(self.rows, self.latency_ms))}"

    def show(self) -> None:
        """The table on stderr."""
        console.table(self.title, *report.text_table(self.rows, self.latency_ms))

    def save(self, folder: Path, title: str) -> Path:
        """report.html and contact.png, whose path it returns."""
        return report.write(
            folder, title=title, metrics=self.metrics, rows=self.drawn, latency_ms=self.latency_ms, lines=self.lines
        )


class Evaluation:
    """Rows of the same prompts and seeds, what they are measured against, and how much of a gap students close.

    `lines` is one prompt a picture. `distance` of pixels a, b -> (B,) is LPIPS, or what stands in for it.
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
        self.chosen: dict[tuple[str, int], Row] = {}  # the best of these by a metric in so many calls, where it is known
        self.students: list[Row] = []
        self.against: Against

    @classmethod
    def shipped(cls, base: Checkpoint, n: int, *, device: torch.device | str, quick: bool = False) -> "Evaluation":
        """On the embedded checkpoint: the judged prompts, encoded now, and the teacher's shipped rows; only students are drawn.

        `quick`: in the middle of training, without comparisons picture by picture, and with no progress on the screen.
        """
        lines, shipped = judge.Prompts.judged(n).captions, judge.shipped()
        distance = None if quick else perceptual.open_distance(base.family, None)
        how = dict(resolution_px=base.resolution_px, device=device, silent=quick)
        # Without diversity: the shipped rows have none to compare with.
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
            pixels = autoencoder.decode(base.vae.to(device), latents.to(device)).cpu()
            many.pictures = uint8(pixels)
            if len(latents) == n:
                many.features["departures"] = departures(latents, pixels)
        return self

    @property
    def teacher(self) -> Row:
        """The teacher's many guided steps."""
        return self.against.teacher

    # ---- rows

    def row(self, model: str, sampler: Sampler, settings: Settings, *, identity: Sequence[str] = ()) -> Row:
        """Draw a row beside the teacher's; with the weights' hashes in `identity` it is stored."""
        return self.samples.row(model, sampler, settings, identity=identity, beside=self.teacher)

    def row_of(self, model: str, settings: Settings) -> Row:
        """A student's row that has been drawn."""
        return next(row for row in self.students if (row.model, row.settings) == (model, settings))

    def figures(self, row: Row, *, bands: bool = True) -> dict[str, Any]:
        """How a row was drawn, and all its metrics."""
        return {**row.described, **measured(row, self.against, bands=bands)}

    # ---- gaps

    def best_undistilled(self, metric: Metric, calls: int) -> Row | None:
        """The undistilled teacher's best row by a metric in so many network calls."""
        rows = [row for row in self.undistilled if row.calls == calls and metric.computable(row, self.against)]
        if (metric.name, calls) in self.chosen or not rows:
            return self.chosen.get((metric.name, calls))
        return (max if metric.better == "higher" else min)(rows, key=lambda row: metric.value(row, self.against))

    def gap(self, metric: Metric, student: Row, teacher: Row) -> dict[str, Any]:
        """How much of the way from `teacher` to the teacher's many steps the student has gone, with its band."""
        rows = (student, teacher, self.teacher)
        n = min(map(len, rows))
        return gap_of(*(metric.redrawn(row, self.against, n) for row in rows))

    def gaps(self, student: Row, calls: int) -> dict[str, dict[str, Any]]:
        """{metric: how much of the gap to its many steps, from the teacher in so many calls, the student closes}."""
        pairs = [(metric, self.best_undistilled(metric, calls)) for metric in judging(student, self.against)]
        return {metric.name: self.gap(metric, student, row) for metric, row in pairs if row is not None}

    def recovered(self, before: Row, student: Row) -> dict[str, dict[str, Any]]:
        """{metric: (before - now) / (before - teacher)}: what training won back of what a repair started from."""
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
        """Draw all rows and measure them; one network is open at a time.

        Distributions are compared with `reference`: a folder of pictures, or the teacher's pictures of other seeds, of which
        some `moments` may be known. `baseline`: also judge the teacher in as many network calls as each student.
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
        del made  # before the next network is opened
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
        row = self.row(model, made, settings, identity=made.identity)
        latency_ms[row] = self.samples.latency_ms(made, settings)
        return row

    def references(self, made: Sampler, best: Row, reference: Path | str, moments: dict[str, Moments]) -> Against:
        """The folder's pictures, or the teacher's of other seeds."""
        if isinstance(reference, Path):
            return Against(self.samples.of_folder(reference), best)
        if len(self.samples.extractors) <= len(moments):
            return Against({}, best, moments)
        offset, identity = REFERENCE_SEED, made.identity
        other = self.samples.row("reference", made, best.settings, identity=identity, offset=offset)
        return Against(other.features, best, moments)


def warn_of_few(row: Row, against: Against) -> None:
    """Say once that a distance between distributions means nothing for so few pictures."""
    if few := too_few(row, against):
        names = " and ".join(m.label for m in few)
        console.warn(
            f"`num_images={len(row)}`: {names} mean{'s' if len(few) == 1 else ''} nothing for fewer than "
            f"{few[0].enough} pictures a row, and may order models wrongly; the other figures have wide bands"
        )


def undistilled_ways(family: Family, calls: int) -> list[Settings]:
    """How a teacher is sampled in so many network calls, guided and not: by the best stock solver, measured on `emoji`."""
    usual = Settings.usual(family)
    ways = [replace(usual, scheduler="ddim" if calls == 1 else "dpm++", num_steps=calls, guidance=1.0, spacing="trailing")]
    if calls > 1 and usual.guided:
        ways.append(replace(usual, scheduler="dpm++", num_steps=calls // 2, spacing="trailing"))
    if family.judge_ships:
        known = list(dict.fromkeys(judge.shipped().undistilled(calls).values()))
        ways = known + [way for way in ways if way.guided not in {k.guided for k in known}]
    return ways


def prompts_of(family: Family, prompts: str | Path | Sequence[str] | None, n: int) -> list[str]:
    """n prompts, one a picture, in turn: of a file, a list, or those that ship with the family, on `emoji` the judged ones."""
    if prompts is None and family.judge_ships:
        return judge.Prompts.judged(n).captions
    if prompts is None:
        lines = default_prompts(family)
    else:
        lines = read_prompts(Path(prompts)) if isinstance(prompts, str | Path) else list(prompts)
    if not lines:
        raise UsageError("`prompts`: there are none")
    return [lines[i % len(lines)] for i in range(n)]


def known_moments(family: Family, settings: Settings, prompts: Any) -> dict[str, Moments]:
    """Those of the teacher's pictures of other seeds that need not be drawn: on `emoji` they are shipped."""
    usual = family.judge_ships and settings == Settings.usual(family) and prompts is None
    return {"embedded": judge.shipped().moments} if usual else {}


def ladder_of(recipe: Any, family: Family, num_steps: Sequence[int] | None) -> list[Settings]:
    """A student's settings for each number of steps: those given, its recipe's where that is fixed, or 1, 2, 4 and 8."""
    own = (recipe.num_steps,) if recipe.fixed and recipe.num_steps else STEPS
    return [Settings.of(recipe, Settings.usual(family), num_steps=n) for n in num_steps or own]


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
    """Judge a few-step model on pictures, against its teacher: what the `evaluate` command does.

        print(fastdiff.evaluate(fast, teacher=base, num_steps=[1, 2, 4]).table)

    `student` is a sampler, whose recipe says how it is sampled; each of `num_steps` is a row. `prompts`: a file with one a line,
    or a list; they are drawn in turn, picture i from seed `seed` + i. `metrics`: of fid, patch, clip and lpips; by default those
    whose networks can be had. `reference`: a folder of pictures; by default the teacher's own of other seeds. `baseline`: also
    judge the teacher in as many network calls as the student. `device`: where the teacher draws; by default where the student
    does. UsageError where student and teacher are of two families.
    """
    family, where = teacher.family, student.device if device is None else pick_device(device)
    if student.base.family != family:
        raise UsageError(f"`student`: of {student.base.family}, but the teacher is of {family}", "give its own base")
    if num_images < 2:
        raise UsageError(f"`num_images={num_images}`: at least 2")
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
