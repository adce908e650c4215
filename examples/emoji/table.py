"""Print the gaps that training results close, as a Markdown table: python examples/emoji/table.py LABEL=RESULT.json ...

RESULT.json is what a training command prints with --json --proof 4000. Unseen prompts come first. A cell without a figure says
only whether the student is ahead of the undistilled teacher at as many network calls, behind it, or not clearly different: the
share of a gap has no meaning there.
"""

import argparse
import json
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


def label_and_file(argument: str) -> tuple[str, Path]:
    """Read LABEL=RESULT.json. Raises ArgumentTypeError if it has another form or the file is not there."""
    label, _, path = argument.partition("=")
    if not path or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{argument}: write LABEL=RESULT.json, with a file that exists")
    return label, Path(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="LABEL=RESULT.json", type=label_and_file)
    results = parser.parse_args().results
    heads = [f"{part}: {name} | gap closed" for part in ("unseen", "seen") for name in METRICS.values()]
    print(f"| | calls | {' | '.join(heads)} |\n|" + " --- |" * 10)
    for label, path in results:
        try:
            rows = lines(label, json.loads(path.read_text())["metrics"])
        except (ValueError, KeyError, IndexError):
            parser.error(f"{path}: not what a training command prints with --json and a closing table")
        print("\n".join(rows))
