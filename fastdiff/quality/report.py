"""Shows an evaluation: as a text table, and as one self-contained HTML page with table, curves and pictures."""

import base64
import io
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.quality import emoji as judge
from fastdiff.quality.metrics import METRICS, Metric, Row, present
from fastdiff.runtime.console import fmt
from fastdiff.runtime.disk import ASSETS, write_atomic
from fastdiff.sampling.settings import listed
from fastdiff.sampling.sheet import MOST_PX, Sheet, in_calls

TEMPLATE = ASSETS / "report.html"
PICTURES = 6  # of each row
VERDICTS = "is the student better than the best undistilled sampler in as many network calls? (unseen prompts; 95 % bands)"
COLOURS = ("#57606a", "#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bc4c00", "#116329")
LEFT, RIGHT, TOP, BOTTOM = 52, 302, 30, 176  # the area of the curves in an SVG, in its units


def title(metrics: dict[str, Any]) -> str:
    """The title of a table: how many pictures a row has, and of what prompts."""
    n, second = metrics["samples"], next((name for name in (judge.SEEN, judge.UNSEEN) if name in metrics["rows"][0]), None)
    if second is None:
        return f"{n} pictures a row; ± half of the 95 % band"
    halves = f"{n} pictures a row: half of prompts that no student was trained on, half of others"
    return f"{halves} (columns that say {second}); ± half of the 95 % band"


# Columns that a narrow terminal does without, the first ones first.
OPTIONAL = ("density", "diversity", "background", "to teacher", "drift", "solver", "coverage", "guidance", "Frechet, seen",
            "recognised, seen")  # fmt: skip


def half_band(row: dict[str, Any], name: str) -> str:
    """Half of the width of a metric's band as text; empty where there is no band."""
    low, high = row.get("band", {}).get(name, (0.0, 0.0))
    return f"{(high - low) / 2:.2g}" if high > low else ""


def columns_of(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, Metric]]:
    """The columns of a table of measured rows: (heading, part of the row, metric).

    All metrics of the first part of the pictures, whose figures are in the row itself (part ""), then of a second part those that
    judge.
    """
    columns = [(metric.label, "", metric) for metric in present(rows)]
    for name in (judge.UNSEEN, judge.SEEN):
        second = [row[name] for row in rows if isinstance(row.get(name), dict)]
        columns += [(f"{metric.label}, {name}", name, metric) for metric in present(second) if metric.judges]
    return columns


def steps_and_guidance(row: dict[str, Any]) -> tuple[str, str]:
    """The cells of a measured row: its steps, with the timesteps if they are explicit, and the guidance of each step."""
    at = f" at {listed(row['timesteps'])}" if row.get("timesteps") else ""
    return fmt(row["num_steps"]) + at, listed(row["step_guidance"]) if row.get("step_guidance") else fmt(row["guidance"])


def text_table(rows: Sequence[dict[str, Any]], latency_ms: Sequence[float] | None = None) -> tuple[list[str], list[list[str]]]:
    """The columns and the cells of a table of measured rows. Each figure has ± half of the width of its band."""
    metrics = columns_of(rows)

    def cell(row: dict[str, Any], part: str, name: str) -> str:
        figures = row.get(part) or {} if part else row
        half = half_band(figures, name)
        return fmt(figures.get(name)) + (f" ±{half}" if half else "")

    columns = ["model", "solver", "steps", "guidance", "calls", *(heading for heading, *_ in metrics)]
    cells = [
        [row["model"], row["solver"], *steps_and_guidance(row), fmt(row["calls"])]
        + [cell(row, part, metric.name) for _, part, metric in metrics]
        for row in rows
    ]
    if latency_ms is not None:
        columns.append("ms")
        cells = [[*line, f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}"] for line, ms in zip(cells, latency_ms, strict=True)]
    return columns, cells


def verdicts(gaps: dict[str, dict[str, dict[str, Any]]]) -> tuple[list[str], list[list[str]]]:
    """A table of what the pictures can tell: {student and steps: {metric: gap}} to columns and cells.

    The gain is how much better the student is than the best undistilled sampler at equal calls, in the metric's own units.
    """
    lines = []
    for name, of in gaps.items():
        for metric in [m for m in METRICS if m.name in of]:
            gap = of[metric.name]
            band = "" if gap["gain_low"] is None else f"{fmt(gap['gain_low'])} to {fmt(gap['gain_high'])}"
            lines.append([name, metric.label, fmt(gap["teacher"]), fmt(gap["student"]), band, gap["verdict"]])
    return ["student", "metric", "undistilled", "student", "gain (above 0: student better)", "verdict"], lines


def plain(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table as plain text for `print`, with aligned columns."""
    lines = [columns, *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def is_finite(row: dict[str, Any], metric: Metric) -> bool:
    return row.get(metric.name) is not None and math.isfinite(row[metric.name])


def curve(metric: Metric, rows: Sequence[dict[str, Any]], colours: dict[str, str]) -> dict[str, Any]:
    """One metric over network calls, with one line per model. Where a model has several rows at equal calls, the best counts."""
    rows = [row for row in rows if is_finite(row, metric)]
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["model"], row["calls"])
        pick = max if metric.better == "higher" else min
        best[key] = pick([row, best.get(key, row)], key=lambda r: r[metric.name])
    ends = [v for row in best.values() for v in (row[metric.name], *row["band"].get(metric.name, ()))]
    low, high = min(ends), max(ends)
    calls = sorted({c for _, c in best})
    x = lambda c: LEFT + (RIGHT - LEFT) * (math.log2(c / calls[0]) / max(1e-9, math.log2(calls[-1] / calls[0])))
    y = lambda v: BOTTOM - (BOTTOM - TOP) * (v - low) / max(1e-9, high - low)
    lines = []
    for model, colour in colours.items():
        mine = sorted((row for (m, _), row in best.items() if m == model), key=lambda row: row["calls"])
        if not mine:
            continue
        marks = []
        for row in mine:
            value, (a, b) = row[metric.name], row["band"].get(metric.name, (row[metric.name],) * 2)
            marks.append([round(n, 1) for n in (x(row["calls"]), y(value), y(a), y(b))])
        lines.append(dict(colour=colour, marks=marks, points=" ".join(f"{m[0]},{m[1]}" for m in marks)))
    ticks = [(round(x(c), 1), c) for c in calls]
    return dict(label=metric.label, better=metric.better, top=f"{high:.3g}", bottom=f"{low:.3g}", ticks=ticks, lines=lines)


def encoded(picture: Tensor) -> str:
    """A picture (3, H, W) uint8 as base64 PNG, reduced to what a page of many pictures can show."""
    from PIL import Image

    buffer, image = io.BytesIO(), Image.fromarray(picture.permute(1, 2, 0).numpy())
    image.thumbnail((MOST_PX, MOST_PX), Image.Resampling.LANCZOS)
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def label(row: Row) -> str:
    """Return the label of a row's pictures: its model, settings and network calls, a line each."""
    return in_calls(row.title.replace(f"{row.model}, ", f"{row.model}\n", 1), row.calls)


def style_table(figures: dict[str, Any]) -> tuple[str, str, list[str], list[list[str]]]:
    """Heading, text, columns and cells of the page's table about style LoRAs."""
    students = {k: v for k, v in figures.items() if isinstance(v, dict) and "kept" in v}
    moved = any("moved" in v for v in students.values())
    lines = [
        [name, f"{v['kept']:.0%}", f"[{v['low']:.0%}, {v['high']:.0%}]", *([f"{v['moved']:.0%}"] if moved else [])]
        for name, v in students.items()
    ]
    text = f"With {', '.join(figures['loras'])}: the part of the style's change to the teacher's pictures that the student shows."
    return "Style", text, ["model and steps", "kept", "95 % band", *(["moved to its drawings"] if moved else [])], lines


def control_table(figures: dict[str, Any]) -> tuple[str, str, list[str], list[list[str]]]:
    """Heading, text, columns and cells of the page's table about a ControlNet."""
    students = {k: v for k, v in figures.items() if isinstance(v, dict) and "kept" in v}
    lines = [["teacher", fmt(figures["teacher"]["agreement"]), "", ""]]
    lines += [[name, fmt(v["agreement"]), fmt(v["off"]), f"{v['kept']:.0%}"] for name, v in students.items()]
    text = f"With {figures['controlnet']}: how well the drawn pictures agree with the control picture."
    return "Control", text, ["model and steps", "agreement", "without control", "of the teacher's"], lines


def write(
    folder: Path, *, title: str, metrics: dict[str, Any], rows: Sequence[Row], latency_ms: Sequence[float], lines: list[str]
) -> list[Path]:
    """Write report.html and a sheet of pictures to a folder.

    Returns the paths of the sheet: contact.png, and of large pictures contact-full.png.
    """
    from jinja2 import Environment

    figures, columns = metrics["rows"], present(metrics["rows"])
    headed = columns_of(figures)
    within = lambda row, part: row.get(part) or {} if part else row
    cells_of = lambda row: [(fmt(within(row, p).get(m.name)), half_band(within(row, p), m.name)) for _, p, m in headed]
    kept = min(len(row.pictures) for row in rows)
    # The first prompts are often alike. An odd stride reaches every kind of prompt where kinds alternate.
    stride = max(1, (kept // PICTURES - 1) | 1)
    chosen = [i * stride for i in range(min(PICTURES, kept))]
    models = list(dict.fromkeys(row["model"] for row in figures))
    colours = dict(zip(models, (COLOURS * len(models))[: len(models)], strict=True))
    table = [
        [drawn.title, (row["calls"], ""), *cells_of(row), (f"{ms:.1f}", "")]
        for row, drawn, ms in zip(figures, rows, latency_ms, strict=True)
    ]
    closed = [m for m in columns if any(m.name in gap for gap in metrics["gap_closed"].values())]
    ends = lambda gap: "" if gap["low"] is None else f" [{gap['low']:.0%}, {gap['high']:.0%}]"
    band = lambda gap: f"{gap['gap_closed']:.0%}{ends(gap)}"
    gaps = [(k, [band(gap[m.name]) if m.name in gap else "" for m in closed]) for k, gap in metrics["gap_closed"].items() if gap]
    more = [style_table(metrics["style"])] if "style" in metrics else []
    more += [control_table(metrics["control"])] if "control" in metrics else []
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    stacks = [(label(row), row.pictures[chosen].float() / 127.5 - 1) for row in rows]
    sheets = Sheet.of_columns(stacks, [lines[i] for i in chosen]).save(folder / "contact.png")
    page = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title,
        samples=metrics["samples"],
        reference=metrics["reference"],
        machine=f"ms: one picture alone, {machine}.",
        columns=["calls", *(heading for heading, *_ in headed), "ms"],
        table=table,
        gap_names=[m.label for m in closed],
        gaps=gaps,
        more=more,
        curves=[curve(m, figures, colours) for m in columns if any(is_finite(row, m) for row in figures)],
        legend=list(colours.items()),
        prompts=[lines[i] for i in chosen],
        sheet=sheets[-1].name,
        pictures=[(label(row), [encoded(p) for p in row.pictures[chosen]]) for row in rows],
    )  # fmt: skip
    write_atomic(folder / "report.html", page)
    return sheets
