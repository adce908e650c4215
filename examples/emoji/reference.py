"""The teacher's side of the closing table, computed once and shipped: fastdiff/assets/emoji/reference.

    python examples/emoji/reference.py [--samples 2000] [--search 500]

Every stock solver, guided and not, at 1, 2, 4 and 8 network calls on --search samples; the best of each by retrieval
and by Frechet distance again on --samples. Reference statistics: guided 25-step samples with seeds of their own.
"""

import argparse
import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from fastdiff.evaluate import REFERENCE, REFERENCE_SEED, Judge, embed, moments
from fastdiff.io import checkpoint
from fastdiff.models.denoiser import Denoiser
from fastdiff.sampling import DEFAULTS, Sampler, Settings

LADDER = 500  # samples of each rung


def candidates(calls: int, guidances: list[float]) -> list[Settings]:
    """Stock ways to spend that many network calls: unguided with all of them, guided with half the steps.

    Euler's step is DDIM's (fastdiff/solvers.py), so it is not tried twice.
    """
    found = []
    for solver, spacing in (
        ("ddim", "trailing"),
        ("ddim", "leading"),
        ("dpm++", "trailing"),
        ("lcm", "lcm"),
    ):
        found.append(Settings(solver, calls, 1.0, spacing))
        if calls > 1:
            found += [Settings(solver, calls // 2, w, spacing) for w in guidances]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--search", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = checkpoint.load("emoji")
    sampler = Sampler(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)
    full, small = Judge(base, args.samples), Judge(base, args.search)
    teacher = DEFAULTS["emoji"]
    _, pixels = full.sample(sampler, teacher, first_seed=REFERENCE_SEED)
    reference = moments(embed(pixels))
    latents, pixels = full.sample(sampler, teacher)
    rows = [full.row_of("teacher", teacher, pixels, sampler)]
    print(rows[0].figures(reference), flush=True)
    best = {"retrieval.50": 0, "frechet.50": 0}
    half = [(1 + teacher.guidance) / 2, teacher.guidance]
    for calls in (1, 2, 4, 8):
        tried = [small.row("teacher", sampler, s) for s in candidates(calls, half)]
        figures = [row.figures(reference) for row in tried]
        for row in figures:
            print(row, flush=True)
        winners = {
            "retrieval": max(range(len(tried)), key=lambda i: (figures[i]["retrieval"], -figures[i]["frechet"])),
            "frechet": min(range(len(tried)), key=lambda i: figures[i]["frechet"]),
        }
        placed: dict[int, int] = {}
        for metric, i in winners.items():
            if i not in placed:
                near = latents[:500] if calls == 1 else None
                rows.append(full.row("teacher", sampler, tried[i].settings, teacher_latents=near))
                placed[i] = len(rows) - 1
                print("best", metric, rows[-1].figures(reference), flush=True)
            best[f"{metric}.{calls}"] = placed[i]
    # The ladder that a metric must order before it judges: the teacher's own way of sampling with ever fewer calls.
    rungs = [replace(teacher, num_steps=n) for n in (25, 8, 4, 2, 1)] + [replace(teacher, num_steps=1, guidance=1.0)]
    ladder = [Judge(base, LADDER).row("teacher", sampler, s) for s in rungs]
    table = {
        "samples": args.samples,
        "rows": [row.figures(reference) for row in rows],
        "best": best,
        "ladder": [row.figures(reference) for row in ladder],
    }
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "teacher.json").write_text(json.dumps(table, indent=1) + "\n")
    tensors = {"mean": reference[0].float(), "cov": reference[1].float(), "latents": latents[:500].half()}
    tensors |= {f"features.{i}": row.features.half().contiguous() for i, row in enumerate(rows)}
    tensors |= {f"ladder.{row.calls}": row.features.half().contiguous() for row in ladder}
    save_file(tensors, REFERENCE / "teacher.safetensors")
    print(json.dumps(table["ladder"], indent=1))
    print(best)


if __name__ == "__main__":
    main()
