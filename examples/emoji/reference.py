"""Draw the teacher's rows of the closing table, which are shipped in fastdiff/assets/emoji/reference.

    python examples/emoji/undistilled.py                    # first: searches the best sampling without distillation
    python examples/emoji/reference.py --winners runs/undistilled/winners.json

All rows have the judged prompts and seeds: half of the prompts are ones that no student is trained on. The search has chosen the
finalists on other prompts and other noise. Of these the best on the judged prompts ship, so that the bar is rather too high than
too low. The reference are guided 25-step samples of the same prompts with other seeds. Rows that are drawn already are kept.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.checkpoint import Checkpoint, fingerprint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji
from fastdiff.models import autoencoder
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.fast.unet import unet_of
from fastdiff.models.feature_net import FeatureNet
from fastdiff.quality import emoji as judge
from fastdiff.quality import metrics
from fastdiff.quality.distances import Moments, frechet
from fastdiff.quality.drift import departures
from fastdiff.quality.metrics import Against, Row, coverage, density
from fastdiff.runtime import rng
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings

BATCH = 64
LADDER, STORED = 2000, 600  # pictures of each row of the ladder, and how many of them are stored
LATENTS = 512  # teacher pictures that are stored as latents, to show them beside a student's
# What anyone would try: the same solvers that the search tries, as usual.
USUAL = [
    Settings("ddim", 1, 1.0, "trailing"),
    Settings("ddim", 1, 1.0, timesteps=(749,)),
    Settings("ddim", 2, 1.0, "trailing"),
    Settings("dpm++", 4, 1.0, "trailing"),
    Settings("ddim", 2, 3.0, "trailing"),
    Settings("euler", 3, 3.0, timesteps=(999, 666, 333), step_guidance=(1.0, 3.0, 1.0)),
    Settings("dpm++", 4, 2.0, "trailing"),
    Settings("lcm", 4, 3.0, "lcm"),
    Settings("dpm++", 5, 3.0, "trailing", step_guidance=(1.0, 3.0, 3.0, 3.0, 1.0)),
]


# Classes of diffusers, with their algorithm where they have several, and our solvers.
STOCK = {
    ("DDIMScheduler", ""): "ddim",
    ("EulerDiscreteScheduler", ""): "euler",
    ("DPMSolverMultistepScheduler", ""): "dpm++",
    ("DPMSolverMultistepScheduler", "dpmsolver++"): "dpm++",
    ("DPMSolverMultistepScheduler", "sde-dpmsolver++"): "dpm++sde",
    ("LCMScheduler", ""): "lcm",
    ("TCDScheduler", ""): "tcd",
}


class Rows:
    """Draws rows of judged pictures and keeps their latents on disk, and how the judge and the network of the losses see them."""

    def __init__(self, base: Checkpoint, folder: Path, n: int) -> None:
        self.base, self.folder, self.prompts = base, folder, judge.Prompts.judged(n)
        net = Denoiser(unet_of(base, device="cpu"), base.schedule(), base.prediction_type)
        self.sampler = Sampler.of_networks(base, net, base.vae)
        self.cond, self.uncond = self.sampler.conds(self.prompts.captions)
        self.losses_net = FeatureNet.embedded()
        folder.mkdir(parents=True, exist_ok=True)

    def kept(self, name: str, key: Any, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors from a file, which is made if it is not there."""
        path = self.folder / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            save_file({k: v.contiguous() for k, v in make().items()}, path)
        return load_file(path)

    def latents(self, settings: Settings, block: rng.Block, n: int) -> Tensor:
        """Latents (n, C, h, w) of the first n judged prompts."""
        side = emoji.CELL_PX // self.base.pixels_per_latent

        def draw() -> dict[str, Tensor]:
            parts = []
            for i in range(0, n, BATCH):
                rows = slice(i, min(i + BATCH, n))
                seeds = [block(k) for k in range(rows.start, rows.stop)]
                parts.append(self.sampler.latents(self.cond[rows], self.uncond, seeds, settings, (side, side)))
            return {"latents": torch.cat(parts)}

        return self.kept("latents", [given(settings), block.first, n], draw)["latents"]

    def of(self, settings: Settings, block: rng.Block = rng.USERS, n: int | None = None) -> dict[str, Tensor]:
        """{embedded, losses, background, departures, latents} of the first n judged prompts, drawn or read."""
        n = n or len(self.prompts)
        z = self.latents(settings, block, n)

        def look() -> dict[str, Tensor]:
            parts = [self.look(z[i : i + BATCH], slice(i, min(i + BATCH, n))) for i in range(0, n, BATCH)]
            return {k: torch.cat([part[k] for part in parts]) for k in parts[0]}

        return {"latents": z, **self.kept("features", [given(settings), block.first, n, fingerprint(judge.judge_net())], look)}

    def look(self, z: Tensor, rows: slice) -> dict[str, Tensor]:
        """Features of the pictures of latents (B, C, h, w), judged as picture files are: in bytes."""
        pixels = autoencoder.decode(self.base.vae, z)
        seen = uint8(pixels).float() / 127.5 - 1
        return {
            "embedded": judge.embed(seen),
            "losses": judge.embed(seen, self.losses_net),
            "background": judge.backgrounds(seen, self.prompts[rows]),
            "departures": departures(z, pixels).float(),
        }


def given(settings: Settings) -> dict[str, Any]:
    """The settings without those that are not used."""
    return {k: v for k, v in asdict(settings).items() if v is not None}


class Yardstick:
    """The reference as both networks see it: what rows of one part of the prompts are measured against."""

    def __init__(self, reference: dict[str, Tensor], prompts: judge.Prompts, losses_net: FeatureNet) -> None:
        self.reference, self.prompts, self.nets = reference, prompts, {"embedded": None, "losses": losses_net}
        self.parts = judge.parts(prompts.captions)

    def figures(self, row: dict[str, Tensor], part: str) -> dict[str, float]:
        """Recognised and Frechet distance by both networks, and by the judge coverage, density and diversity, of one part."""
        rows = self.parts[part]
        rows = rows[rows < len(row["embedded"])]
        prompts = judge.Prompts.of([self.prompts.captions[i] for i in rows.tolist()])
        figures: dict[str, float] = {}
        for name, net in self.nets.items():
            features, real = row[name][rows].float(), self.reference[name][self.parts[part]].float()
            suffix = "" if name == "embedded" else f"_{name}"
            figures[f"retrieval{suffix}"] = judge.recognised(features, prompts, net).mean().item()
            figures[f"frechet{suffix}"] = frechet(features, Moments.of(real))
        features = row["embedded"][rows].float()
        view = Row("", Settings(), {"embedded": features}, len(rows))
        against, every = (
            Against({"embedded": self.reference["embedded"][self.parts[part]].float()}, view),
            torch.arange(len(rows)),
        )
        figures |= {"coverage": coverage(view, every, against), "density": density(view, every, against)}
        figures["diversity"] = judge.diversity(features, prompts).nanmean().item()
        return figures


def finalists(winners: Path) -> list[Settings]:
    """The settings that the search chose, and the usual ones, each once."""
    chosen = [row for of in json.loads(winners.read_text()).values() for row in of.values()]
    return list(dict.fromkeys([*map(as_settings, chosen), *USUAL]))


def as_settings(row: dict[str, Any]) -> Settings:
    """What the search calls a diffusers scheduler with options as our settings. ValueError where we have no such solver."""
    options, at = row["options"], row["given_timesteps"] and tuple(row["given_timesteps"])
    name, spacing = STOCK.get((row["scheduler"], options.get("algorithm_type", ""))), options.get("timestep_spacing")
    others = options.keys() - {"timestep_spacing", "algorithm_type", "solver_order"}
    order, n = options.get("solver_order", 2), len(row["guidance"])
    # Up to four steps the third order equals the second: diffusers takes the first and the last two steps in lower orders.
    other_order = name in {"dpm++", "dpm++sde"} and not (order == 2 or n == 1 or (order == 3 and n <= 4))
    if name is None or others or other_order:
        raise ValueError(f"no solver of fastdiff equals {row['scheduler']} with {options}")
    if at and name == "euler" and spacing == "leading":
        name = "ddim"  # the same steps, and the noise is not scaled
    spacing = spacing if name == "euler" or not at else None
    weights = tuple(row["guidance"])
    eta = 0.3 if name == "tcd" else 0.0  # what TCDScheduler steps with, if it is not told
    return Settings(name, len(weights), max(weights), spacing, eta, timesteps=at, step_guidance=weights)


def described(settings: Settings) -> dict[str, Any]:
    """The settings of a row as teacher.json stores them."""
    return Row("teacher", settings, {}, 0).described


def best_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """{metric.calls: index of the best row} by the figures of unseen prompts; the first row is the teacher in many steps."""
    best = {}
    for calls in sorted({row["calls"] for row in rows[1:]}):
        of = [i for i, row in enumerate(rows) if i and row["calls"] == calls]
        best[f"retrieval.{calls}"] = max(
            of, key=lambda i: (rows[i][judge.UNSEEN]["retrieval"], -rows[i][judge.UNSEEN]["frechet"])
        )
        best[f"frechet.{calls}"] = min(of, key=lambda i: rows[i][judge.UNSEEN]["frechet"])
    return best


def printed(rows: list[dict[str, Any]], best: dict[str, int]) -> str:
    """All finalists as a Markdown table of unseen prompts; the best at their number of calls are marked."""
    names = ["retrieval", "frechet", "coverage", "density", "diversity", "retrieval_losses", "frechet_losses"]
    lines = ["| calls | sampling | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 2)]
    for i, row in sorted(enumerate(rows), key=lambda pair: pair[1]["calls"]):
        marks = " ".join(key.partition(".")[0] for key, index in best.items() if index == i)
        figures = [f"{row[judge.UNSEEN][name]:.3f}" for name in names]
        way = metrics.title("teacher", judge.settings_of(row)) + (f" **best {marks}**" if marks else "")
        lines.append(f"| {row['calls']} | {way} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--winners", type=Path, default=Path("runs/undistilled/winners.json"))
    parser.add_argument("--samples", type=int, default=judge.JUDGED)
    parser.add_argument("--work", type=Path, default=Path("runs/reference"))
    parser.add_argument("--out", type=Path, default=judge.REFERENCE, help="what is written; default: the files that ship")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.winners.is_file():
        parser.error(f"{args.winners}: no such file; run undistilled.py first")
    torch.set_num_threads(args.threads)
    teacher = Settings.usual(SHIPPED)
    ways = [teacher, *finalists(args.winners)]
    drawn = Rows(checkpoint.load("emoji"), args.work, args.samples)
    reference = drawn.of(teacher, rng.REFERENCE)
    yardstick = Yardstick(reference, drawn.prompts, drawn.losses_net)
    rows, tensors = [], list[dict[str, Tensor]]()
    for settings in ways:
        tensors.append(drawn.of(settings))
        rows.append(described(settings) | {part: yardstick.figures(tensors[-1], part) for part in yardstick.parts})
        print(json.dumps(rows[-1]), flush=True)
    best = best_of(rows)
    print(printed(rows, best))
    # The ladder: the teacher's usual sampler with fewer and fewer calls. A network must order it before it may judge. The last
    # rows are unguided: one and two guided steps are over-saturated. Two are recognised more often than two unguided ones and
    # are no nearer (Frechet 2.85 against 2.79), so which are better is not known.
    rungs = [replace(teacher, num_steps=n) for n in (25, 8, 4, 3)]
    rungs += [replace(teacher, num_steps=n, guidance=1.0) for n in (2, 1)]
    n = min(LADDER, args.samples)
    ladder = [{k: v[:n] for k, v in tensors[0].items()}, *(drawn.of(settings, n=n) for settings in rungs[1:])]
    seen_by = {"judge": "embedded", "losses": "losses"}
    every = {name: (key, Moments.of(reference[key].float())) for name, key in seen_by.items()}
    distances = [{name: {"frechet": frechet(row[key].float(), m)} for name, (key, m) in every.items()} for row in ladder]
    kept = [0, *sorted(set(best.values()))]  # only the best ship
    place = {old: new for new, old in enumerate(kept)}
    table = {
        "samples": args.samples,
        "rows": [rows[i] for i in kept],
        "best": {key: place[index] for key, index in best.items()},
        "ladder": [described(settings) | of for settings, of in zip(rungs, distances, strict=True)],
    }
    args.out.mkdir(exist_ok=True)
    (args.out / "teacher.json").write_text(json.dumps(table, indent=1) + "\n")
    losses = every["losses"][1]
    shipped = {"reference": reference["embedded"].half(), "latents": tensors[0]["latents"][:LATENTS].half()}
    shipped |= {"departures": tensors[0]["departures"], "losses.mean": losses.mean.float(), "losses.cov": losses.cov.float()}
    for new, old in enumerate(kept):
        shipped |= {f"features.{new}": tensors[old]["embedded"].half(), f"background.{new}": tensors[old]["background"].half()}
    for i, row in enumerate(ladder):
        shipped |= {f"ladder.{i}": row["embedded"][:STORED].half(), f"ladder.losses.{i}": row["losses"][:STORED].half()}
    save_file({k: v.contiguous() for k, v in shipped.items()}, args.out / "teacher.safetensors")


if __name__ == "__main__":
    main()
