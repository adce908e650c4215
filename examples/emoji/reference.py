"""Compute the teacher's rows of the closing table, which are shipped in fastdiff/assets/emoji/reference.

    python examples/emoji/reference.py [--samples 2000] [--search 500]

Every stock solver, guided and unguided, is tried at 1, 2, 4 and 8 network calls on --search samples. The best by retrieval and
the best by Frechet distance are measured again on --samples, which decide. The reference statistics come from guided 25-step
samples with other seeds.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import save_file

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji
from fastdiff.models import perceptual
from fastdiff.models.denoiser import Denoiser
from fastdiff.quality.distances import Moments
from fastdiff.quality.drift import REFERENCE_SEED
from fastdiff.quality.emoji import REFERENCE, Prompts
from fastdiff.quality.evaluation import Evaluation
from fastdiff.quality.features import EmbeddedFeatures
from fastdiff.quality.metrics import Against, Row
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

LADDER = 500  # samples of each row of the ladder
KEPT = 500  # teacher pictures stored as latents, for comparison with students picture by picture


def candidates(calls: int, guidances: list[float]) -> list[Settings]:
    """Stock settings that use exactly `calls` network calls: unguided, or guided with half as many steps.

    Euler is not tried, because its step equals DDIM's (fastdiff/diffusion/samplers.py).
    """
    ways = []
    for solver, spacing in (
        ("ddim", "trailing"),
        ("ddim", "leading"),
        ("dpm++", "trailing"),
        ("lcm", "lcm"),
    ):
        ways.append(Settings(solver, calls, 1.0, spacing))
        if calls > 1:
            ways += [Settings(solver, calls // 2, w, spacing) for w in guidances]
    return ways


def judged(n: int, against: Against | None = None) -> Evaluation:
    """An evaluation of the first n judged prompts, without the shipped rows, which this script makes."""
    lines = Prompts.judged(n).captions
    distance = perceptual.open_distance(SHIPPED, None)
    evaluation = Evaluation(lines, [EmbeddedFeatures(lines)], distance, resolution_px=emoji.CELL_PX, device="cpu", diverse=False)
    if against is not None:
        evaluation.against = against
    return evaluation


def figures_of(evaluation: Evaluation, row: Row) -> dict[str, Any]:
    """The figures of a row that teacher.json stores."""
    figures = evaluation.figures(row, bands=False)
    return {**row.described, **{name: figures.get(name) for name in ("retrieval", "background", "frechet", "same_noise")}}


def best_of(rows: list[Row], calls: int, evaluation: Evaluation) -> dict[str, int]:
    """{metric.calls: index of the best row} at that many network calls, by retrieval and by Frechet distance."""
    figures = {i: figures_of(evaluation, row) for i, row in enumerate(rows) if row.calls == calls}
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
    teacher, samples = Settings.usual(SHIPPED), judged(args.samples).samples
    other = samples.row("reference", sampler, teacher, offset=REFERENCE_SEED)
    reference = Moments.of(other.features["embedded"])
    many = samples.row("teacher", sampler, teacher)
    many.pictures = many.pictures[:KEPT]
    against = Against({}, many, {"embedded": reference})
    full, small = judged(args.samples, against), judged(args.search, against)
    rows = [many]
    print(figures_of(full, many), flush=True)
    best = {"retrieval.50": 0, "frechet.50": 0}
    half = [(1 + teacher.guidance) / 2, teacher.guidance]
    for calls in (1, 2, 4, 8):
        tried = [small.row("teacher", sampler, s) for s in candidates(calls, half)]
        figures = [figures_of(small, row) for row in tried]
        for row in figures:
            print(row, flush=True)
        order = range(len(tried))
        finalists = {max(order, key=lambda i: figures[i]["retrieval"]), min(order, key=lambda i: figures[i]["frechet"])}
        for i in sorted(finalists):
            rows.append(full.row("teacher", sampler, tried[i].settings))
            print("finalist", figures_of(full, rows[-1]), flush=True)
        best |= best_of(rows, calls, full)
    # The ladder: the teacher's usual sampler with fewer and fewer calls. A metric must order it before it may judge. The last
    # rows are unguided, because a single guided step is over-saturated and no better than one call.
    rungs = [replace(teacher, num_steps=n) for n in (25, 8, 4, 2)]
    rungs += [replace(teacher, num_steps=n, guidance=1.0) for n in (2, 1)]
    short = judged(LADDER, against)
    ladder = [short.row("teacher", sampler, s) for s in rungs]
    table = {
        "samples": args.samples,
        "rows": [figures_of(full, row) for row in rows],
        "best": best,
        "ladder": [figures_of(short, row) for row in ladder],
    }
    REFERENCE.mkdir(exist_ok=True)
    (REFERENCE / "teacher.json").write_text(json.dumps(table, indent=1) + "\n")
    cond, uncond = full.samples.encode(base)
    parts = [slice(i, min(i + 100, KEPT, args.samples)) for i in range(0, min(KEPT, args.samples), 100)]
    seeds = lambda part: range(part.start, part.stop)
    latents = [sampler.pictures(cond[part], uncond, seeds(part), teacher, emoji.CELL_PX)[0] for part in parts]
    tensors = {"mean": reference.mean.float(), "cov": reference.cov.float(), "latents": torch.cat(latents).half()}
    tensors |= {f"features.{i}": row.features["embedded"].half().contiguous() for i, row in enumerate(rows)}
    tensors |= {f"ladder.{row.calls}": row.features["embedded"].half().contiguous() for row in ladder}
    save_file(tensors, REFERENCE / "teacher.safetensors")
    print(json.dumps(table["ladder"], indent=1))
    print(best)


if __name__ == "__main__":
    main()
