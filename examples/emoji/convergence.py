"""Draw how fast methods learn: the score of each over the minutes of its training, from the runs of `equal_minutes.sh`.

    pip install matplotlib
    python examples/emoji/convergence.py TDM=10-tdm-1.json Lightning=10-lightning-1.json --out convergence.png

Each argument is a name and the JSON that a training command with `--eval-every` printed; its run folder must still be there.
Minutes are those of the training steps alone. Stages (Lightning) are measured in their own number of steps.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from table import label_and_file

FIGURES = {"retrieval": "recognised", "frechet": "Frechet distance"}  # of 200 pictures of seen prompts, with noise of their own


def curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Return {figure: [(minutes, value)]} of one training run.

    ValueError where the run has no measurement or no times, KeyError or OSError where the file is no training result or its run
    is gone.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    run = Path(result["outputs"][0]["path"]).parent
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {name: [row for row in rows if name in row] for name in FIGURES}
    if not all(measured.values()):
        raise ValueError(f"{run}: nothing was measured; train with --eval-every")
    if any("elapsed_s" not in row for found in measured.values() for row in found):
        raise ValueError(f"{run}: an older version trained it, which noted no times; train again")
    return {name: [(row["elapsed_s"] / 60, row[name]) for row in found] for name, found in measured.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", metavar="LABEL=RESULT.json", type=label_and_file)
    parser.add_argument("--out", type=Path, default=Path("convergence.png"))
    args = parser.parse_args()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(12, 5), layout="constrained")
    for label, path in args.results:
        try:
            found = curves(path)
        except (ValueError, KeyError, IndexError, OSError) as error:
            parser.error(f"{path}: {error}")
        for axis, name in zip(axes, FIGURES, strict=True):
            axis.plot(*zip(*found[name], strict=True), marker="o", label=label)
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        axis.set(xlabel="minutes of training", ylabel=title, yscale="log" if name == "frechet" else "linear")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
