r"""Measure how much of a style a one-step student has learned from `sdxs --style-lora`.

    one=runs/long-sdxs-0/model # of long_proof.sh
    fastdiff sdxs --init $one --style-lora fastdiff/assets/emoji/style.safetensors --match-steps 0 --steps 2000 \
        --pairs 4320 --ema 0.99 --lora-layers all --lora-rank 64 --lora-alpha 64 --lr 2e-3 -o runs/styled
    python examples/emoji/one_step_style.py --student $one --lora runs/styled/sdxs.safetensors

The result is (d(student) - d(styled student)) / (d(teacher) - d(styled teacher)). Here d is the mean feature distance between
named emoji and the same emoji drawn in the style.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data import emoji

STYLE = EMOJI / "style.safetensors"


def measured(folder: Path, prompts: Path, *flags: object) -> dict:
    """Draw the prompts by `fastdiff sample` and return its style figures, {style: {distance, nearest}}."""
    command = [sys.executable, "-m", "fastdiff", "sample", "--prompts", prompts, "--no-grid", "-o", folder, "--json", *flags]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    if not report["ok"]:
        raise SystemExit(report["error"]["message"])
    return report["metrics"]["style"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", required=True)
    parser.add_argument("--lora", required=True)
    parser.add_argument("--style", default="fluent")
    parser.add_argument("--weight", type=float, default=1.0, help="of the style on the teacher")
    args = parser.parse_args()
    colours = list(emoji.BACKGROUNDS)
    lines = [f"{p.name} on {colours[i % len(colours)]}" for i, p in enumerate(emoji.pictures())]
    with tempfile.TemporaryDirectory() as name:
        folder, prompts = Path(name), Path(name) / "prompts.txt"
        prompts.write_text("\n".join(lines) + "\n")
        rows = {
            "teacher": measured(folder / "0", prompts),
            "teacher with the style": measured(folder / "1", prompts, "--lora", f"{STYLE}={args.weight}"),
            "one step": measured(folder / "2", prompts, "--base", args.student),
            "one step with its LoRA": measured(folder / "3", prompts, "--base", args.student, "--lora", args.lora),
        }
    print("| | distance to Noto | to the style | nearest to the style |\n| --- | --- | --- | --- |")
    for label, measures in rows.items():
        figures = [measures["noto"]["distance"], measures[args.style]["distance"]]
        print(f"| {label} | {figures[0]:.3f} | {figures[1]:.3f} | {measures[args.style]['nearest']:.0%} |")
    t, t_s, s, s_s = (measures[args.style]["distance"] for measures in rows.values())
    print(f"moved {(s - s_s) / (t - t_s):.0%} of the teacher's way to {args.style}")


if __name__ == "__main__":
    main()
