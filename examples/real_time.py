"""Make the table and the picture of `real_time.sh`: every step of the chain compared with the start.

    python examples/real_time.py runs/real-time [--base emoji] [--rounds 15]

Speed is the time from a prompt to the bytes of a picture, one at a time and eight at once, as `fastdiff sample` draws. The start
is the stock diffusers pipeline with 25 guided steps and its own VAE. All ways take turns, and medians are printed. Quality, on
`emoji`, is given by the metrics of the closing table.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.checkpoints import checkpoint
from fastdiff.models import text
from fastdiff.quality.evaluation import Evaluation
from fastdiff.runtime import console
from fastdiff.sampling.assemble import pick_device, pick_dtype
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Sheet, in_calls

# Prompts like those that the small network was trained on; it does not know others.
SHOWN = [
    "red apple on pink",
    "panda on white",
    "rocket on purple",
    "pizza",
    "fox",
    "octopus on pink",
    "house",
    "sunflower on white",
]


class Way(NamedTuple):
    """An open checkpoint and the settings that it draws with."""

    sampler: Sampler
    settings: Settings
    prompts: text.Prompts

    @classmethod
    def opened(cls, folder: str, vae: str | None, device: torch.device) -> "Way":
        sampler = Sampler(folder, vae=vae, device=device)
        return cls(sampler, sampler.settings, sampler.prompts)

    def draw(self, lines: list[str], px: int) -> torch.Tensor:
        """Draw pictures (B, H, W, 3) uint8 of B prompts, which are encoded anew in every call."""
        batch = self.prompts.encode(lines), self.prompts.unconditional(), list(range(len(lines)))
        return next(iter(self.sampler.stream_batches([batch], self.settings, px)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--base", default="emoji")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    console.quiet_libraries()
    device = pick_device(args.device)
    tiny = str(args.runs / "vae" / "tiny-vae")
    small, one = (str(args.runs / name / "model") for name in ("small", "one"))
    ways = {
        "the base, 25 guided steps": Way.opened(args.base, None, device),
        "small network": Way.opened(small, None, device),
        "small network, tiny decoder": Way.opened(small, tiny, device),
        "one step": Way.opened(one, None, device),
        "one step, tiny decoder": Way.opened(one, tiny, device),
    }
    start = checkpoint.load(args.base, dtype=pick_dtype("auto", device))
    pipe = start.pipeline().to(device)
    pipe.set_progress_bar_config(disable=True)
    usual, px = Settings.usual(start.family), start.resolution_px
    prompts = SHOWN if start.family.judge_ships else ["a red apple on a table"] * 8

    def stock(n: int) -> None:
        pipe(prompts[:n], num_inference_steps=25, guidance_scale=usual.guidance, height=px, width=px)

    calls = {"stock diffusers": stock} | {name: (lambda n, way=way: way.draw(prompts[:n], px)) for name, way in ways.items()}
    times = {(name, n): [] for name in calls for n in (1, 8)}
    for i in range(args.rounds + 1):
        for (name, n), seconds in times.items():
            began = time.perf_counter()
            calls[name](n)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:  # the first round warms up
                seconds.append((time.perf_counter() - began) / n)
    median = {key: statistics.median(seconds) for key, seconds in times.items()}
    own = Evaluation.shipped(start, args.samples, device=device) if start.family.judge_ships else None
    students, lines, results = {}, [], {}
    for name in calls:
        ratio = [median["stock diffusers", n] / median[name, n] for n in (1, 8)]
        row = [name, *(f"{1e3 * median[name, n]:.1f}" for n in (1, 8)), *(f"{r:.1f}x" for r in ratio)]
        results[name] = {"ms": [1e3 * median[name, n] for n in (1, 8)], "faster": ratio}
        if own and name in ways:
            students[name] = own.row(name, ways[name].sampler, ways[name].settings)
            unseen = own.figures(students[name], bands=False)
            results[name] |= {k: unseen[k] for k in ("calls", "retrieval", "frechet", "seen")}
            row.append(str(unseen["calls"]))
            row += [f"{part[k]:.{d}f}" for part in (unseen["seen"], unseen) for k, d in (("retrieval", 3), ("frechet", 2))]
        lines.append("| " + " | ".join(row) + " |")
    judged = "seen prompts: recognised | Frechet | unseen: recognised | Frechet"
    print(f"| | ms a picture | eight at once | faster | eight at once | calls | {judged} |\n|" + " --- |" * 10)
    print("\n".join(lines))
    if own:
        for name in ("one step", "one step, tiny decoder"):
            for part in own.parts:
                for metric, gap in own.gaps(students[name], 1, part).items():
                    results[name][f"{part}_{metric}_gap"] = gap
                    gain = f"{gap['gain_low']:.3f} to {gap['gain_high']:.3f}"
                    print(f"{name}: {metric}, {part} prompts: gap closed {gap['gap_closed']:.0%}, gain {gain} ({gap['verdict']})")
    columns = []
    for name in ("the base, 25 guided steps", "small network, tiny decoder", "one step", "one step, tiny decoder"):
        pictures = ways[name].draw(prompts[:6], px).permute(0, 3, 1, 2) / 127.5 - 1
        columns.append((in_calls(name.partition(", 25")[0], ways[name].settings.calls), pictures))
    Sheet.of_columns(columns, prompts[:6]).save(args.runs / "real_time.png")
    kept = json.loads((args.runs / "control.json").read_text())["metrics"]
    results["control"] = {k: v for k, v in kept.items() if k.startswith(("edges", "change", "steered"))}
    print(f"edges of the control kept in one step: {kept['edges_student']:.2f}, by the base {kept['edges_teacher']:.2f} (F1)")
    print(f"another picture's edges are followed {kept['steered_kept']:.0%} as far as by the base")
    (args.runs / "real_time.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
