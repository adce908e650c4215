"""Print what training results measured, as a Markdown table.

    python examples/emoji/table.py LABEL=RESULT.json ...
    python examples/emoji/table.py LABEL=SEED0.json,SEED1.json,SEED2.json ...

RESULT.json is what a training command prints with --json --proof 4000. Unseen prompts come first. For single results the table
shows the gap that each closes, with a 95 % band. A cell without a figure says only whether the student is ahead of the
undistilled teacher at as many network calls, behind it, or not clearly different: the share of a gap has no meaning there. For
results of several seeds it shows their mean, with the lowest and the highest.
"""

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

METRICS = {"retrieval": "recognised", "frechet": "Frechet"}


def by_file(gaps: dict[str, Any]) -> dict[str, Any]:
    """Return {weight file: gaps}; "" is the only file of a run that wrote one."""
    return {"": gaps} if METRICS.keys() <= gaps.keys() else gaps


def cells(gaps: list[dict[str, Any]]) -> str:
    """Return two cells: a student's figure and the gap that it closes; or the mean of several seeds, and their range."""
    figures = [gap["student"] for gap in gaps]
    if len(gaps) > 1:
        return f"{mean(figures):.3f} | {min(figures):.3f} to {max(figures):.3f}"
    gap = gaps[0]
    if gap["verdict"] != "ahead" or gap["low"] is None:
        return f"{gap['student']:.3f} | {gap['verdict']}"
    closed, low, high = (round(100 * gap[key]) for key in ("gap_closed", "low", "high"))
    return f"{gap['student']:.3f} | {closed} % [{low}, {high}]"


def lines(label: str, seeds: list[dict[str, Any]]) -> list[str]:
    """Return the rows of one training result, or of the same training with several seeds, fewest network calls first.

    `seeds` holds the metrics of each. KeyError where one lacks a row that the first has.
    """
    parts = [
        [by_file(part["gap_closed"]) for part in (metrics, metrics.get("seen", {})) if "gap_closed" in part] for metrics in seeds
    ]
    rows = []
    for file, gaps in parts[0][0].items():
        name = f"{label}, full weights" if file.endswith("-full") else label
        for calls in gaps["retrieval"]:
            figures = [
                cells([part[i][file][metric][calls] for part in parts]) for i in range(len(parts[0])) for metric in METRICS
            ]
            rows.append((int(calls), f"| {' | '.join([name, calls, *figures])} |"))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


def label_and_file(argument: str) -> tuple[str, Path]:
    """Read LABEL=RESULT.json. Raises ArgumentTypeError if it has another form or the file is not there."""
    label, _, path = argument.partition("=")
    if not path or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{argument}: write LABEL=RESULT.json, with a file that exists")
    return label, Path(path)


def label_and_files(argument: str) -> tuple[str, list[Path]]:
    """Read LABEL=RESULT.json[,RESULT.json ...]. Raises ArgumentTypeError as `label_and_file` does."""
    label, _, paths = argument.partition("=")
    return label, [label_and_file(f"{label}={path}")[1] for path in paths.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="LABEL=RESULT.json[,...]", type=label_and_files)
    results = parser.parse_args().results
    if len({len(paths) > 1 for _, paths in results}) > 1:
        parser.error("give one result to each label, or several to each")
    beside = "lowest to highest" if len(results[0][1]) > 1 else "gap closed"
    heads = [f"{part}: {name} | {beside}" for part in ("unseen", "seen") for name in METRICS.values()]
    print(f"| | calls | {' | '.join(heads)} |\n|" + " --- |" * 10)
    for label, paths in results:
        try:
            rows = lines(label, [json.loads(path.read_text())["metrics"] for path in paths])
        except (ValueError, KeyError, IndexError):
            parser.error(f"{', '.join(map(str, paths))}: not what a training command prints with --json and a closing table")
        print("\n".join(rows))
