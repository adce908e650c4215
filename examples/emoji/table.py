"""Print the gaps that training results close, as a Markdown table: python examples/emoji/table.py LABEL=RESULT.json ...

RESULT.json is what a training command prints with --json --proof 4000. Unseen prompts come first. A cell without a figure says
that the student is behind the undistilled teacher at as many network calls, or that the pictures cannot tell them apart.
"""

import json
import sys
from pathlib import Path
from typing import Any

METRICS = {"retrieval": "recognised", "frechet": "Frechet"}


def by_file(gaps: dict[str, Any]) -> dict[str, Any]:
    """Return {weight file: gaps}; "" is the only file of a run that wrote one."""
    return {"": gaps} if METRICS.keys() <= gaps.keys() else gaps


def cells(gap: dict[str, Any]) -> str:
    """Return the student's figure and the gap that it closes with a 95 % band, or the verdict where it is not ahead."""
    if gap["verdict"] != "ahead" or gap["low"] is None:
        return f"{gap['student']:.3f} | {gap['verdict']}"
    closed, low, high = (round(100 * gap[key]) for key in ("gap_closed", "low", "high"))
    return f"{gap['student']:.3f} | {closed} % [{low}, {high}]"


def lines(label: str, metrics: dict[str, Any]) -> list[str]:
    """Return the rows of one training result, fewest network calls first."""
    parts = [by_file(part["gap_closed"]) for part in (metrics, metrics.get("seen", {})) if "gap_closed" in part]
    rows = []
    for file, gaps in parts[0].items():
        name = f"{label}, full weights" if file.endswith("-full") else label
        for calls in gaps["retrieval"]:
            figures = [cells(part[file][metric][calls]) for part in parts for metric in METRICS]
            rows.append((int(calls), f"| {' | '.join([name, calls, *figures])} |"))
    return [row for _, row in sorted(rows, key=lambda row: row[0])]


if __name__ == "__main__":
    heads = [f"{part}: {name} | gap closed" for part in ("unseen", "seen") for name in METRICS.values()]
    print(f"| | calls | {' | '.join(heads)} |\n|" + " --- |" * 10)
    for label, path in (argument.split("=", 1) for argument in sys.argv[1:]):
        print("\n".join(lines(label, json.loads(Path(path).read_text())["metrics"])))
