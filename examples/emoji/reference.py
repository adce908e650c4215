"""The teacher's side of the closing table, computed once and shipped: fastdiff/assets/emoji/reference.

    python examples/emoji/reference.py [--samples 2000] [--search 500]

Every stock solver, guided and not, at 1, 2, 4 and 8 network calls on --search samples; the best by retrieval and the best
by Frechet distance again on --samples, which decide. Reference statistics: guided 25-step samples with seeds of their own.
"""

import argparse
import json
from dataclasses import replace

import torch
from safetensors.torch import save_file

from fastdiff.checkpoints import checkpoint
from fastdiff.models.denoiser import Denoiser
from fastdiff.quality.distances import Moments
from fastdiff.quality.drift import REFERENCE_SEED
from fastdiff.quality.emoji import REFERENCE, Judge, Row, embed
from fastdiff.sampling.sampler import DEFAULTS, Sampler, Settings

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


def best_of(rows: list[Row], calls: int, reference: tuple[torch.Tensor, torch.Tensor]) -> dict[str, int]:
    """The rows with the best retrieval and the best Frechet distance at that many calls, both on all samples."""
    figures = {i: row.figures(reference) for i, row in enumerate(rows) if row.calls == calls}
    return {
        f"retrieval.{calls}": max(figures, key=lambda i: figures[i]["retrieval"]),
        f"frechet.{calls}": min(figures, key=lambda i: figures[i]["frechet"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--search", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = checkpoint.load("emoji")
    sampler = Sampler.of_networks(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae)
    full, small = Judge(base, args.samples), Judge(base, args.search)
    teacher = DEFAULTS["emoji"]
    _, pixels = full.sample(sampler, teacher, first_seed=REFERENCE_SEED)
    reference = Moments.of(embed(pixels))
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
        order = range(len(tried))
        finalists = {max(order, key=lambda i: figures[i]["retrieval"]), min(order, key=lambda i: figures[i]["frechet"])}
        near = latents[:500] if calls == 1 else None
        for i in sorted(finalists):
            rows.append(full.row("teacher", sampler, tried[i].settings, teacher_latents=near))
            print("finalist", rows[-1].figures(reference), flush=True)
        best |= best_of(rows, calls, reference)
    # The ladder that a metric must order before it judges: the teacher's own sampler with ever fewer calls. Guidance goes
    # when its calls would leave a single step: guided so, that is over-saturated and no better than one call.
    rungs = [replace(teacher, num_steps=n) for n in (25, 8, 4, 2)]
    rungs += [replace(teacher, num_steps=n, guidance=1.0) for n in (2, 1)]
    ladder = [Judge(base, LADDER).row("teacher", sampler, s) for s in rungs]
    table = {
        "samples": args.samples,
        "rows": [row.figures(reference) for row in rows],
        "best": best,
        "ladder": [row.figures(reference) for row in ladder],
    }
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "teacher.json").write_text(json.dumps(table, indent=1) + "\n")
    tensors = {"mean": reference.mean.float(), "cov": reference.cov.float(), "latents": latents[:500].half()}
    tensors |= {f"features.{i}": row.features.half().contiguous() for i, row in enumerate(rows)}
    tensors |= {f"ladder.{row.calls}": row.features.half().contiguous() for row in ladder}
    save_file(tensors, REFERENCE / "teacher.safetensors")
    print(json.dumps(table["ladder"], indent=1))
    print(best)


if __name__ == "__main__":
    main()
