"""Make the README's pictures and the style table from a trained few-step LoRA and the shipped style.

    python examples/emoji/showcase.py --accel runs/train-lcm-lora-emoji/lcm.safetensors [--out examples/emoji]

`fastdiff sample` draws every picture. The table shows `metrics.style` of its --json: the mean feature distance to the same emoji
in each drawing style, and the share of images for which that style is the closest.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from fastdiff.checkpoints.locate import EMOJI
from fastdiff.data import emoji
from fastdiff.sampling.sheet import Sheet, in_calls

STYLE = EMOJI / "style.safetensors"
SHOWN = ("red apple", "fox", "rocket", "pizza", "octopus", "house", "basketball", "mushroom")


def fastdiff(*args: object) -> dict:
    """Run a fastdiff command and return its JSON object. Exits with the error message if it fails."""
    done = subprocess.run([sys.executable, "-m", "fastdiff", *map(str, args), "--json"], stdout=subprocess.PIPE, text=True)
    report = json.loads(done.stdout)
    if not report["ok"]:
        raise SystemExit(report["error"]["message"])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accel", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    names, colours = [p.name for p in emoji.pictures()], list(emoji.BACKGROUNDS)
    missing = [name for name in SHOWN if name not in names]
    assert not missing, missing
    ordered = [*SHOWN, *(name for name in names if name not in SHOWN)]
    prompts = [f"{name} on {colours[i % len(colours)]}" for i, name in enumerate(ordered)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
        merged = folder / "lcm-style.safetensors"
        fastdiff("merge-lora", "--accel", args.accel, "--style", STYLE, "--output", merged)
        variants = {
            "teacher, 25 guided steps": [],
            "teacher with the style at 0.8, 25 guided steps": ["--lora", f"{STYLE}=0.8"],
            "few-step LoRA, 4 steps": ["--lora", args.accel],
            "merged with the style, 4 steps": ["--lora", merged],
        }
        pictures, rows = [], []
        print("| | network calls | distance to Noto | to Fluent | nearest to Fluent | images / s |\n|" + " --- |" * 6)
        for i, (label, flags) in enumerate(variants.items()):
            out = folder / str(i)
            report = fastdiff(
                "sample", *flags, "--prompts", folder / "prompts.txt", "--batch-size", 60, "--no-grid", "--output", out
            )
            style, speed = report["metrics"]["style"], len(prompts) / report["timings"]["sampling_s"]
            noto, fluent = style["noto"]["distance"], style["fluent"]["distance"]
            share = 100 * style["fluent"]["nearest"]
            calls = report["metrics"]["calls"]
            print(f"| {label} | {calls} | {noto:.3f} | {fluent:.3f} | {share:.0f} % | {speed:.0f} |", flush=True)
            rows.append(in_calls(label.rpartition(", ")[0], calls))
            pictures.append([Image.open(path).convert("RGB") for path in sorted(out.glob("*.png"))])
    count, every = len(SHOWN), max(1, len(prompts) // 60)
    Sheet([p for row in pictures for p in row[:count]], prompts[:count], rows).save(args.out / "style.png")
    Sheet(pictures[0][::every][:60], [""] * 12, captions=prompts[::every][:60]).save(args.out / "teacher.png")


if __name__ == "__main__":
    main()
