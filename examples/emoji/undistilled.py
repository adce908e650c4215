"""Search the best ways to sample the undistilled embedded checkpoint in 1, 2, 4 and 8 network calls, with stock diffusers.

    python examples/emoji/undistilled.py [--calls 1 2 4 8] [--budget-minutes 35] [--out undistilled]

A distilled student has to beat its teacher at the same cost, so the teacher must be sampled as well as anyone can. A setting is
a diffusers scheduler, its options, its timesteps and a guidance weight for every network evaluation. A guided evaluation costs
two calls (with and without the prompt), an unguided one costs one. For each number of calls there are four stages:

1. sweep: every scheduler x spacing x Karras sigmas x start timestep x order of guided and unguided steps, on few pictures;
2. the best of them on more pictures;
3. coordinate search from the best of these: one timestep, guidance weight, the order or the scheduler is changed at a time;
4. the finalists, and well-known settings for comparison, on all pictures.

The prompts and start noises are kept for this search: nothing is trained on them or judged by them (`SEARCHED` in
fastdiff/data/held_out.py, `SEARCH` in fastdiff/runtime/rng.py). All settings get the same ones. Two figures are optimised, each
by itself: the share of pictures in which the judge network recognises what the prompt asks for, and the Frechet distance to the
teacher's usual guided 25-step samples of the same prompts. A recognised picture can still be over-saturated, so every row shows
both figures, by the judge and by the network of the losses.

Every figure is appended at once to OUT/evaluated.jsonl, and is never computed again; a stopped search continues from there. The
end prints a table and writes OUT/winners.json: {calls: {metric: setting with its figures}}. The budget counts processor time;
with a budget of 0 the table of what is known is made. `piped` in stock.py draws a setting with a stock diffusers pipeline.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file
from stock import HEUN, Setting, setting
from torch import Tensor

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import held_out
from fastdiff.models import autoencoder, judge_net, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.fast.unet import Folded, unet_of
from fastdiff.models.feature_net import FeatureNet
from fastdiff.models.judge_net import JudgeNet
from fastdiff.quality.distances import Moments, frechet
from fastdiff.quality.emoji import Prompts, embed, listed, recognised
from fastdiff.runtime import rng
from fastdiff.sampling.sampler import Sampler, SeededNoise
from fastdiff.sampling.settings import Settings

BATCH = 80  # pictures drawn at once
LATENT = (4, 8, 8)
SHARES = {1: 0.06, 2: 0.16, 4: 0.32, 8: 0.46}  # of the budget
SWEEP_SHARE = 0.4  # of the budget of one number of calls; the sweep stops there
WEIGHTS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0)  # guidance weights of guided evaluations
MOVES = (100, 50, 25)  # by how much coordinate search shifts a timestep
PROMOTED, STARTS, FINALISTS = 10, 3, 3  # settings by each metric: into stage 2, into stage 3, into stage 4
METRICS: dict[str, Callable[[dict[str, Any]], tuple[float, float]]] = {  # smaller is better; ties are decided by the other
    "recognised": lambda row: (-row["judge"]["recognised"], row["judge"]["frechet"]),
    "frechet": lambda row: (row["judge"]["frechet"], -row["judge"]["recognised"]),
}
# How much worse than the best so far a setting may be on few pictures and still be tried on more.
SLACK = {"recognised": lambda key: (key[0] + 0.025, float("inf")), "frechet": lambda key: (key[0] * 1.03, float("inf"))}
# Whether coordinate search takes the step from figures `old` to `new`. Smaller gains in Frechet distance are chance.
GAINS = {
    "recognised": lambda new, old: new[0] < old[0] or (new[0] == old[0] and new[1] < 0.995 * old[1]),
    "frechet": lambda new, old: new[0] < 0.995 * old[0],
}

EULER, DPM, LCM = "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"
SINGLE, TCD = "DPMSolverSinglestepScheduler", "TCDScheduler"
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Schedulers that take free timesteps. Euler's step is DDIM's; the spacing only says how it scales the start noise: "leading"
# as DDIM does, "trailing" to the noise level of the first timestep.
FREE: list[tuple[str, dict[str, Any]]] = [
    (EULER, {"timestep_spacing": "leading"}),
    (EULER, {"timestep_spacing": "trailing"}),
    (DPM, {"solver_order": 2}),
    (DPM, {"solver_order": 3}),
    (DPM, {"solver_order": 2, **SDE}),
    (DPM, {"solver_order": 1, **SDE}),
    (SINGLE, {"solver_order": 2, "lower_order_final": True}),
    (LCM, {}),
    (TCD, {}),
    (HEUN, {"timestep_spacing": "leading"}),
]


# ---- stage 1 and the well-known settings


def orders(calls: int, weights: tuple[float, ...]) -> list[tuple[float, ...]]:
    """Return the orders of guided and unguided evaluations that cost `calls`, the guided ones side by side (an interval)."""
    rows = [(1.0,) * calls]
    for guided in range(1, calls // 2 + 1):
        unguided = calls - 2 * guided
        before = range(unguided + 1) if calls <= 4 else ([0, 1] if unguided == 2 else [min(1, unguided)])
        rows += [(1.0,) * k + (w,) * guided + (1.0,) * (unguided - k) for k in before for w in weights]
    return rows


def sweep(calls: int) -> list[Setting]:
    """Return the settings of stage 1. Those of one scheduler are spread over the list, which may be cut short."""
    if calls == 1:  # every solver's only step is the same but for its start timestep and noise level
        grids = [(t,) for t in range(999, 450, -50)]
        return [setting(*free, (1.0,), grid) for grid in grids for free in FREE[:3]]
    stock: list[tuple[str, dict[str, Any]]] = [("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"})]
    for spacing in ("trailing", "leading", "linspace"):
        kinds = [("DDIMScheduler", {}), (EULER, {}), (HEUN, {}), (DPM, {}), (DPM, SDE), (DPM, {"solver_order": 3})]
        kinds += [("UniPCMultistepScheduler", {}), ("DEISMultistepScheduler", {})]
        stock += [(name, {"timestep_spacing": spacing, **options}) for name, options in kinds]
    for name, options in [(EULER, {}), (HEUN, {}), (DPM, {}), (DPM, SDE), ("UniPCMultistepScheduler", {})]:
        stock.append((name, {"use_karras_sigmas": True, "timestep_spacing": "trailing", **options}))
    stock += [(LCM, {}), (TCD, {})]
    rows = []
    for guidance in orders(calls, (2.0, 3.5) if calls == 2 else (2.5,)):
        n = len(guidance)
        if n == 1:  # a single guided step
            rows += [setting(*free, guidance, (t,)) for t in range(999, 550, -50) for free in FREE[:3]]
            continue
        rows += [setting(*kind, guidance) for kind in stock if kind[0] != HEUN or n % 2]
        for start in (899, 799, 699, 599) if calls == 2 else (899, 749):
            grid = [round(start * (n - i) / n) for i in range(n)]
            rows += [setting(*free, guidance, grid) for free in FREE if free[0] != HEUN]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return list(dict.fromkeys(rows[i] for i in order))


def well_known(calls: int) -> list[Setting]:
    """Return settings that a diffusers user would type without a search, and those that beat the rows shipped before."""
    w, trailing = Settings.usual(SHIPPED).guidance, {"timestep_spacing": "trailing"}
    rows = [setting("DDIMScheduler", trailing, (1,) * calls)]
    if calls == 1:
        rows.append(setting(EULER, {"timestep_spacing": "leading"}, (1,), (749,)))
    else:
        rows += [setting(name, trailing, (w,) * (calls // 2)) for name in ("DDIMScheduler", DPM)]
    if calls == 4:
        rows += [setting(name, trailing, (1, 3, 1), (999, 666, 333)) for name in (EULER, DPM)]
    if calls == 8:
        rows += [setting(DPM, trailing, (1, 3, 3, 3, 1)), setting(LCM, {}, (w,) * 4)]
    return rows


# ---- stage 3


def shifted(s: Setting, place: int, by: int) -> Setting | None:
    """Return the setting with one timestep moved, or None where the timesteps would no longer descend from 999 to 1."""
    if s.timesteps is None:
        return None
    grid = [*s.timesteps]
    grid[place] = min(999, grid[place] + by)
    ends = [1000, *grid, 0]
    return replace(s, timesteps=tuple(grid)) if all(a > b for a, b in itertools.pairwise(ends)) else None


def reweighted(s: Setting, place: int, by: int) -> Setting | None:
    """Return the setting with one guidance weight moved up or down the list of weights, or None where it has no next one."""
    w = s.guidance[place]
    if w == 1:
        return None
    near = min(range(len(WEIGHTS)), key=lambda i: abs(WEIGHTS[i] - w)) + by
    if not 0 <= near < len(WEIGHTS):
        return None
    return replace(s, guidance=(*s.guidance[:place], WEIGHTS[near], *s.guidance[place + 1 :]))


def swapped(s: Setting, place: int) -> Setting | None:
    """Return the setting with the guidance of two neighbouring evaluations exchanged, or None if one of them has no guidance."""
    g = [*s.guidance]
    if (g[place] == 1) == (g[place + 1] == 1):
        return None
    g[place], g[place + 1] = g[place + 1], g[place]
    return replace(s, guidance=tuple(g))


def rescheduled(s: Setting, free: tuple[str, dict[str, Any]]) -> Setting | None:
    """Return the setting with another scheduler at the same timesteps, or None where that is not possible."""
    if s.timesteps is None or HEUN in (s.scheduler, free[0]):
        return None
    return setting(*free, s.guidance, s.timesteps)


def moves(s: Setting, step: int, *, coarse: bool) -> Iterator[Callable[[Setting], Setting | None]]:
    """Yield the changes of one coordinate that the search tries; `coarse` also tries other schedulers."""
    n = len(s.guidance)
    for k, sign in itertools.product(range(len(s.timesteps or ())), (-1, 1)):
        yield lambda s, k=k, by=sign * step: shifted(s, k, by)
    for k, by in itertools.product(range(n), (-1, 1)):
        yield lambda s, k=k, by=by: reweighted(s, k, by)
    for k in range(n - 1):
        yield lambda s, k=k: swapped(s, k)
    if coarse:
        for free in FREE:
            yield lambda s, free=free: rescheduled(s, free)


def freed(s: Setting, config: dict[str, Any]) -> Setting | None:
    """Return the setting with its timesteps written out, so that they can move; None if they already are, or if two are equal.

    A scheduler that takes no free timesteps becomes one with the same or a similar step that does.
    """
    if s.timesteps is not None:
        return None
    options = {k: v for k, v in s.options if k != "use_karras_sigmas"}
    grid = sorted({min(999, max(1, round(float(t)))) for t in s.made(config).timesteps}, reverse=True)
    if len(grid) != s.num_steps:
        return None
    if s.scheduler == "DDIMScheduler":
        return setting(EULER, {"timestep_spacing": "leading"}, s.guidance, grid)
    if s.scheduler in {"UniPCMultistepScheduler", "DEISMultistepScheduler"}:
        return setting(DPM, {"solver_order": 2}, s.guidance, grid)
    if s.scheduler == "EulerAncestralDiscreteScheduler":
        return setting(DPM, {"solver_order": 1, **SDE}, s.guidance, grid)
    return setting(s.scheduler, options, s.guidance, grid)


# ---- pictures and figures


def searched_prompts(n: int) -> list[str]:
    """Return n prompts that are kept for this search: in turn one that names a picture and one that names a group."""
    kinds = [listed(held_out.SEARCHED, coarse, seed) for coarse, seed in ((False, 5), (True, 6))]
    return [kinds[i % 2][i // 2 % len(kinds[i % 2])] for i in range(n)]


class Bench:
    """Draws and judges pictures of any setting. `judge` is a file of weights, or "random" to try the script without one."""

    def __init__(self, out: Path, judge: str, n: int) -> None:
        self.out, self.n = out, n
        self.base = checkpoint.load("emoji")
        self.config = {k: v for k, v in self.base.scheduler_config.items() if not k.startswith("_")}
        lines = searched_prompts(n)
        self.prompts = Prompts.of(lines)
        self.cond, self.uncond = text.encode_unique(self.base, lines, "cpu"), text.unconditional(self.base)
        self.net = unet_of(self.base)
        first = torch.tensor([0])
        self.kv = self.net.fold(first, self.cond.tokens).kv  # of all prompts, computed once
        self.no_kv = self.net.fold(first, self.uncond.tokens).kv
        torch.manual_seed(0)
        net = JudgeNet().eval()
        if judge != "random":
            net.load_state_dict({k: v.float() for k, v in load_file(judge).items()})
        self.judge_id = judge if judge == "random" else hashlib.sha256(Path(judge).read_bytes()).hexdigest()[:12]
        self.nets = {"judge": net, "losses": FeatureNet.embedded()}
        self.reference = {name: Moments.of(x) for name, x in self.embedded(self.reference_latents()).items()}

    def reference_latents(self) -> Tensor:
        """Return the teacher's usual samples of the same prompts from other noises, drawn once and kept in OUT."""
        path = self.out / f"reference-{self.n}.safetensors"
        if not path.exists():
            print(f"drawing {self.n} reference pictures", file=sys.stderr)
            denoiser = Denoiser(self.net, self.base.schedule(), self.base.prediction_type)
            sampler = Sampler.of_networks(self.base, denoiser, self.base.vae)
            seeds = [rng.REFERENCE(i) for i in range(self.n)]
            parts = [slice(i, i + BATCH) for i in range(0, self.n, BATCH)]
            usual, size = Settings.usual(SHIPPED), LATENT[1:]
            drawn = [sampler.latents(self.cond[p], self.uncond, seeds[p], usual, size) for p in parts]
            save_file({"latents": torch.cat(drawn)}, path)
        return load_file(path)["latents"]

    def embedded(self, latents: Tensor) -> dict[str, Tensor]:
        """Return {network: embeddings (B, D)} of the pictures of latents (B, C, h, w)."""
        pixels = autoencoder.decode(self.base.vae, latents, most=BATCH)
        return {name: embed(pixels, net) for name, net in self.nets.items()}

    def figures(self, name: str, features: Tensor) -> dict[str, float]:
        """Return the share of recognised pictures and the Frechet distance of the first pictures, as a network sees them."""
        hits = recognised(features, self.prompts[: len(features)], self.nets[name])
        return {"recognised": round(hits.mean().item(), 4), "frechet": round(frechet(features, self.reference[name]), 4)}

    def predicted(self, x: Tensor, t: Tensor, rows: slice, w: float) -> Tensor:
        """Return the network's answer for x at timestep t, guided by w."""
        shift = self.net.fold(t.reshape(1), self.uncond.tokens).shift
        cond = self.net.step(x, Folded(self.kv[rows], shift), 0)
        if w == 1:
            return cond
        uncond = self.net.step(x, Folded(self.no_kv.expand(len(x), -1, -1), shift), 0)
        return uncond + w * (cond - uncond)

    @torch.no_grad()
    def latents(self, s: Setting, rows: slice) -> Tensor:
        """Draw some of the pictures as latents (B, C, h, w), by the loop of every diffusers pipeline."""
        scheduler = s.made(self.config)
        noise = SeededNoise([rng.SEARCH(i) for i in range(self.n)[rows]], LATENT, "cpu")
        x = noise() * scheduler.init_noise_sigma
        # As pipelines do: only schedulers that may draw noise know the argument.
        draws = "generator" in inspect.signature(scheduler.step).parameters
        extra = {"generator": noise.generators} if draws else {}
        for t, w in zip(scheduler.timesteps, s.guidance, strict=True):
            answer = self.predicted(scheduler.scale_model_input(x, t), t, rows, w)
            x = scheduler.step(answer, t, x, return_dict=False, **extra)[0]
        return x.nan_to_num(0, 0, 0)  # some solvers divide by 0 in few steps; a grey picture is judged as badly as it should be

    def features(self, s: Setting, rows: slice) -> dict[str, Tensor]:
        """Return {network: embeddings (B, D)} of some of the pictures."""
        parts = [slice(i, min(i + BATCH, rows.stop)) for i in range(rows.start, rows.stop, BATCH)]
        embedded = [self.embedded(self.latents(s, part)) for part in parts]
        return {name: torch.cat([e[name] for e in embedded]) for name in self.nets}


class Search:
    """The search of one or several numbers of calls, with all figures known so far."""

    def __init__(self, bench: Bench, levels: tuple[int, int, int]) -> None:
        self.bench, self.levels, self.path = bench, levels, bench.out / "evaluated.jsonl"
        self.known: dict[tuple[Setting, int], dict[str, Any]] = {}
        self.drawn: dict[Setting, dict[str, Tensor]] = {}  # embeddings of this run, to go on from with more pictures
        self.seconds_per_call = 0.002
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            row = json.loads(line)
            if row["judge_id"] == bench.judge_id and row["reference"] == bench.n:
                key = setting(row["scheduler"], row["options"], row["guidance"], row["given_timesteps"])
                self.known[key, row["n"]] = row

    def figures(self, s: Setting, level: int) -> dict[str, Any]:
        """Return the figures of a setting over the pictures of a level (0, 1 or 2)."""
        n = self.levels[level]
        if (s, n) not in self.known:
            features = {name: x[:n] for name, x in self.more(s, n).items()}
            row: dict[str, Any] = {"calls": s.calls, **asdict(s), "options": dict(s.options), "n": n}
            row["given_timesteps"] = row.pop("timesteps")
            row["timesteps"] = [round(float(t), 2) for t in s.made(self.bench.config).timesteps]
            row |= {name: self.bench.figures(name, x) for name, x in features.items()}
            row |= {"judge_id": self.bench.judge_id, "reference": self.bench.n}
            line = json.dumps(row)
            with self.path.open("a") as file:
                file.write(line + "\n")
            self.known[s, n] = json.loads(line)
            print(line_of(s, row), file=sys.stderr, flush=True)
        return self.known[s, n]

    def more(self, s: Setting, n: int) -> dict[str, Tensor]:
        """Return the embeddings of at least n pictures of a setting, and draw only those that this run has not drawn yet."""
        drawn = self.drawn.get(s)
        done = len(drawn["judge"]) if drawn else 0
        if done < n:
            began = time.process_time()
            new = self.bench.features(s, slice(done, n))
            self.drawn[s] = {name: torch.cat([drawn[name], x]) for name, x in new.items()} if drawn else new
            self.seconds_per_call = (time.process_time() - began) / (n - done) / (s.calls + 2)
        return self.drawn[s]

    def rows(self, calls: int, level: int, metric: str) -> list[Setting]:
        """Return the settings of so many calls with figures of a level, the best by the metric first."""
        n = self.levels[level]
        every = [(METRICS[metric](row), s) for (s, m), row in self.known.items() if m == n and s.calls == calls]
        return [s for _, s in sorted(every, key=lambda pair: pair[0])]

    def beats(self, s: Setting, best: Setting, metric: str) -> bool:
        """Whether a setting is better on level 1. One that is far behind on level 0 is not drawn any further."""
        key = METRICS[metric]
        if key(self.figures(s, 0)) > SLACK[metric](key(self.figures(best, 0))):
            return False
        return GAINS[metric](key(self.figures(s, 1)), key(self.figures(best, 1)))

    def climb(self, best: Setting, metric: str, deadline: float) -> None:
        """Coordinate search from a setting: keep every change that is better, and go on in the same direction."""
        for step in MOVES:
            better = True
            while better:
                better = False
                for move in moves(best, step, coarse=step == MOVES[0]):
                    while (new := move(best)) not in (None, best) and time.process_time() < deadline:
                        if not self.beats(new, best, metric):
                            break
                        best, better = new, True
                if time.process_time() >= deadline:
                    return

    def run(self, calls: int, deadline: float) -> None:
        """Search one number of calls until the processor time `deadline`; the last stage may end a little later."""
        began, final = time.process_time(), well_known(calls)
        most = 2 * FINALISTS * (self.levels[2] - self.levels[1]) + len(final) * self.levels[2]  # pictures of the last stage
        candidates, end = sweep(calls), began + SWEEP_SHARE * (deadline - began)
        print(f"{calls} calls: {len(candidates)} settings in the sweep", file=sys.stderr)
        for s in candidates:
            if time.process_time() > end:
                break
            self.figures(s, 0)
        for metric in METRICS:
            for s in self.rows(calls, 0, metric)[:PROMOTED]:
                self.figures(s, 1)
        end = deadline - most * (calls + 2) * self.seconds_per_call
        leaders = {metric: varied(self.rows(calls, 1, metric), STARTS, alike=1) for metric in METRICS}
        for k, metric in itertools.product(range(STARTS), METRICS):
            for start in leaders[metric][k : k + 1]:
                for s in (freed(start, self.bench.config), start):
                    if s is not None and time.process_time() < end:
                        self.climb(s, metric, end)
        finalists = [s for metric in METRICS for s in varied(self.rows(calls, 1, metric), FINALISTS, alike=2)]
        for s in dict.fromkeys([*final, *finalists]):
            self.figures(s, 2)

    def winner(self, calls: int, metric: str) -> Setting:
        """Return the best setting on all pictures."""
        return self.rows(calls, 2, metric)[0]


def varied(settings: list[Setting], n: int, *, alike: int) -> list[Setting]:
    """Return the first n settings, of which at most `alike` have the same scheduler, options and number of evaluations."""
    chosen: list[Setting] = []
    kind = lambda s: (s.scheduler, s.options, len(s.guidance))
    for s in settings:
        if len(chosen) < n and sum(kind(s) == kind(other) for other in chosen) < alike:
            chosen.append(s)
    return chosen


def line_of(s: Setting, row: dict[str, Any]) -> str:
    """Return a line of the table."""
    figures = "  ".join(f"{row[net]['recognised']:.3f} {row[net]['frechet']:6.2f}" for net in ("judge", "losses"))
    return f"{s.calls}  {row['n']:5}  {figures}  {s.line}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--budget-minutes", type=float, default=35, help="processor time of the search")
    parser.add_argument(
        "--levels", type=int, nargs=3, default=[80, 240, 1000], help="pictures of the sweep, of its best, of finalists"
    )
    parser.add_argument("--judge", default=str(judge_net.WEIGHTS), help="the judge's weights, or `random` to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/undistilled"))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    diffusers.utils.logging.set_verbosity_error()  # LCM warns of every timestep that is not on its own grid
    args.out.mkdir(parents=True, exist_ok=True)
    search = Search(Bench(args.out, args.judge, args.levels[2]), tuple(args.levels))
    began, share = time.process_time(), 0.0
    for calls in args.calls:
        share += SHARES[calls] / sum(SHARES[c] for c in args.calls)
        search.run(calls, began + 60 * args.budget_minutes * share)
    winners: dict[str, dict[str, Any]] = {}
    print("calls    n  judge: recognised, Frechet  losses: the same  setting")
    for calls in args.calls:
        best = {metric: search.winner(calls, metric) for metric in METRICS}
        winners[str(calls)] = {metric: search.figures(s, 2) for metric, s in best.items()}
        for s in search.rows(calls, 2, "frechet"):
            marks = [metric for metric, winner in best.items() if winner == s]
            marks += ["well known"] if s in well_known(calls) else []
            print(line_of(s, search.figures(s, 2)), *(f"({mark})" for mark in marks))
    (args.out / "winners.json").write_text(json.dumps(winners, indent=1) + "\n")


if __name__ == "__main__":
    main()
