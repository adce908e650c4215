"""Prune the embedded checkpoint to every layout that fits it, and print what each costs and how much quality training recovers.

    python examples/emoji/layouts.py runs/layouts [--steps 300] [--seed 0]

Runs that exist already are read, not repeated. The networks take turns in one process when their calls are timed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import FAMILIES
from fastdiff.methods.shared import cutting
from fastdiff.models import unet

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", type=Path)
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
args.folder.mkdir(parents=True, exist_ok=True)

layouts = [name for name, layout in unet.LAYOUTS.items() if layout.fits(FAMILIES["emoji"])]
for name in layouts:
    result = args.folder / f"{name}.json"
    if not result.exists():
        command = ["prune", "--layout", name, f"--steps={args.steps}", f"--seed={args.seed}", "-o", str(args.folder / name)]
        done = subprocess.run(
            [sys.executable, "-m", "fastdiff", *command, "--json"], check=True, stdout=subprocess.PIPE, text=True
        )
        result.write_text(done.stdout)
nets = {"emoji": checkpoint.load("emoji").unet}
nets |= {name: checkpoint.load(str(args.folder / name / "model")).unet for name in layouts}
times = {name: [] for name in nets}
for _ in range(5):
    for name, net in nets.items():
        times[name].append(cutting.latency_s(net, "cpu"))
print("| layout | million parameters | MMAC | time of a call | Frechet: cut | trained | teacher | won back |")
print("|" + " --- |" * 8)
for name in layouts:
    metrics = json.loads((args.folder / f"{name}.json").read_text())["metrics"]
    size, recovered = metrics["pruned"], metrics["recovered"]["frechet"]
    ratio = statistics.median(a / b for a, b in zip(times[name], times["emoji"], strict=True))
    band = f"{recovered['recovered']:.0%} [{100 * recovered['low']:.0f}, {100 * recovered['high']:.0f}]".replace("%", " %", 1)
    cells = [name, f"{size['parameters'] / 1e6:.2f}", f"{1000 * size['gmac']:.0f}", f"{ratio:.2f}x"]
    cells += [f"{recovered[k]:.2f}" for k in ("before", "student", "teacher")]
    print("| " + " | ".join([*cells, band]) + " |")
