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
fastdiff/data/emoji.py, `SEARCH` in fastdiff/runtime/rng.py). All settings get the same ones. Two figures are optimised, each by
itself: the share of pictures in which the judge network recognises what the prompt asks for, and the Frechet distance to the
teacher's usual guided 25-step samples of the same prompts. A recognised picture can still be over-saturated, so every row shows
both figures, by the judge and by the network of the losses.

Every figure is appended at once to OUT/evaluated.jsonl, and is never computed again; a stopped search continues from there. The
end prints a table and writes OUT/winners.json: {calls: {metric: setting with its figures}}. The budget counts processor time;
with a budget of 0 the table of what is known is made. `piped` draws a setting with a stock diffusers pipeline.
"""

import argparse
import hashlib
import inspect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.data import emoji
from fastdiff.models import autoencoder, judge_net, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.fast.unet import Folded, unet_of
from fastdiff.models.feature_net import FeatureNet
from fastdiff.models.judge_net import JudgeNet
from fastdiff.quality.distances import Moments, frechet
from fastdiff.quality.emoji import Prompts, groups
from fastdiff.runtime import rng
from fastdiff.sampling.sampler import Sampler, SeededNoise
from fastdiff.sampling.settings import Settings

BATCH = 80  # pictures drawn at once
LATENT = (4, 8, 8)
SHARES = {1: 0.06, 2: 0.16, 4: 0.32, 8: 0.46}  # of the budget
SWEEP_SHARE = 0.5  # of the budget of one number of calls; the sweep stops there
WEIGHTS = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 7.0)  # guidance weights of guided evaluations
MOVES = (100, 50, 25)  # by how much coordinate search shifts a timestep
PROMOTED, STARTS, FINALISTS = 10, 3, 4  # settings by each metric: into stage 2, into stage 3, into stage 4
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

EULER, HEUN, DPM, LCM = "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "LCMScheduler"
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


@dataclass(frozen=True)
class Setting:
    """A way to sample: a diffusers scheduler, options for its config, timesteps, and guidance for every network evaluation."""

    scheduler: str  # class name
    options: tuple[tuple[str, Any], ...]
    guidance: tuple[float, ...]  # w in u + w (c - u), in the order of the evaluations; 1: unguided
    timesteps: tuple[int, ...] | None = None  # None: the scheduler spaces them

    @property
    def calls(self) -> int:
        """Network calls per picture."""
        return sum(1 if w == 1 else 2 for w in self.guidance)

    @property
    def num_steps(self) -> int:
        """Steps of the scheduler. Heun's evaluate the network twice, except the last."""
        return (len(self.guidance) + 1) // 2 if self.scheduler == HEUN else len(self.guidance)

    def unset(self, config: dict[str, Any]) -> Any:
        """Return the diffusers scheduler for a checkpoint's scheduler config, without timesteps."""
        # getattr: a setting names the diffusers class
        return getattr(diffusers, self.scheduler).from_config(config, **dict(self.options))

    def made(self, config: dict[str, Any]) -> Any:
        """Return the diffusers scheduler, ready to step."""
        made = self.unset(config)
        if self.timesteps is None:
            made.set_timesteps(self.num_steps)
        else:
            made.set_timesteps(timesteps=list(self.timesteps))
        if len(made.timesteps) != len(self.guidance):
            raise ValueError(f"{self.scheduler} evaluates {len(made.timesteps)} times, for {len(self.guidance)} guidance weights")
        return made

    @property
    def line(self) -> str:
        """The setting in one line."""
        options = " ".join(f"{k}={v}" for k, v in self.options)
        grid = "" if self.timesteps is None else f" at {','.join(map(str, self.timesteps))}"
        return f"{self.scheduler.removesuffix('Scheduler')} {options}{grid} w={','.join(f'{w:g}' for w in self.guidance)}"


def setting(scheduler: str, options: dict[str, Any], guidance: tuple[float, ...], timesteps: Any = None) -> Setting:
    """Make a setting from plain values; equal settings are equal, whatever the order of their options."""
    grid = None if timesteps is None else tuple(int(t) for t in timesteps)
    return Setting(scheduler, tuple(sorted(options.items())), tuple(float(w) for w in guidance), grid)


def piped(pipe: Any, s: Setting, prompts: list[str], **inputs: Any) -> Any:
    """Draw prompts by a setting with a stock StableDiffusionPipeline, freshly opened, since the setting changes its scheduler.

    The pipeline has one guidance weight. A callback sets the next one after every evaluation, and gives the encoded empty
    prompts only to guided evaluations, so that an unguided one costs one call.
    """
    pipe.scheduler = s.unset(pipe.scheduler.config)
    cond, uncond = pipe.encode_prompt(prompts, pipe.device, 1, True)

    def set_guidance(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = w = (*s.guidance, 1.0)[i + 1]
        return {"prompt_embeds": torch.cat([uncond, cond]) if w > 1 else cond}

    grid = {"num_inference_steps": s.num_steps} if s.timesteps is None else {"timesteps": list(s.timesteps)}
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        guidance_scale=s.guidance[0],
        callback_on_step_end=set_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **grid,
        **inputs,
    )


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


class Eye:
    """A network that judges pictures: its normalised embeddings, and the mean embedding of every real picture."""

    def __init__(self, net: nn.Module, prompts: Prompts) -> None:
        self.net, self.prompts = net, prompts

    @torch.no_grad()
    def embed(self, pixels: Tensor) -> Tensor:
        """Return embeddings (N, D) of length sqrt(D), so that each coordinate's variance is about 1."""
        parts = torch.cat([F.normalize(self.net(part), dim=1) for part in pixels.split(250)])
        return parts * parts.shape[1] ** 0.5

    @cached_property
    def real(self) -> Tensor:
        """The mean embedding of every real picture over all backgrounds: (pictures, D), normalised."""
        every = torch.arange(len(emoji.pictures()))
        columns = [self.embed(emoji.compose(every, torch.full_like(every, c))) for c in range(len(emoji.BACKGROUNDS))]
        return F.normalize(torch.stack(columns).mean(0), dim=1)

    def set_reference(self, pixels: Tensor) -> None:
        """Take the pictures whose distribution samples should have."""
        self.reference = Moments.of(self.embed(pixels))

    def figures(self, features: Tensor) -> dict[str, float]:
        """Return the share of recognised pictures (for group prompts, any of the group) and the Frechet distance."""
        prompts = self.prompts[: len(features)]
        nearest = (features @ self.real.T).argmax(1)
        in_group = groups()[nearest] == groups()[prompts.picture]
        hits = torch.where(prompts.coarse, in_group, nearest == prompts.picture).float()
        return {"recognised": round(hits.mean().item(), 4), "frechet": round(frechet(features, self.reference), 4)}


def searched_prompts(n: int) -> list[str]:
    """Return n prompts that are kept for this search: in turn one that names a picture and one that names a group."""
    kept = [line for line, part in emoji.kept_captions().items() if part == emoji.SEARCHED]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0)).tolist()
    parsed = Prompts.of(kept)
    assert parsed is not None, "every caption of the data set is known"
    kinds = [[kept[i] for i in order if bool(parsed.coarse[i]) == coarse] for coarse in (False, True)]
    return [kinds[i % 2][i // 2 % len(kinds[i % 2])] for i in range(n)]


class Bench:
    """Draws and judges pictures of any setting. `judge` is a file of weights, or "random" to try the script without one."""

    def __init__(self, out: Path, judge: str, n: int) -> None:
        self.out, self.n = out, n
        self.base = checkpoint.load("emoji")
        self.config = {k: v for k, v in self.base.scheduler_config.items() if not k.startswith("_")}
        lines = searched_prompts(n)
        prompts = Prompts.of(lines)
        assert prompts is not None, "every caption of the data set is known"
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
        self.eyes = {"judge": Eye(net, prompts), "losses": Eye(FeatureNet.embedded(), prompts)}
        reference = self.decoded(self.reference_latents())
        for eye in self.eyes.values():
            eye.set_reference(reference)

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

    def decoded(self, latents: Tensor) -> Tensor:
        """Return pixels (B, 3, 64, 64)."""
        return autoencoder.decode(self.base.vae, latents, most=BATCH)

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
        """Return {eye: embeddings (B, D)} of some of the pictures."""
        parts = [slice(i, min(i + BATCH, rows.stop)) for i in range(rows.start, rows.stop, BATCH)]
        embedded = []
        for part in parts:
            pixels = self.decoded(self.latents(s, part))
            embedded.append({name: eye.embed(pixels) for name, eye in self.eyes.items()})
        return {name: torch.cat([e[name] for e in embedded]) for name in self.eyes}


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
            began, drawn = time.process_time(), self.drawn.get(s)
            done = len(drawn["judge"]) if drawn else 0
            more = self.bench.features(s, slice(done, n))
            features = {k: torch.cat([drawn[k], v]) for k, v in more.items()} if drawn else more
            self.drawn[s] = features
            self.seconds_per_call = (time.process_time() - began) / (n - done) / (s.calls + 2)
            row: dict[str, Any] = {"calls": s.calls, **asdict(s), "options": dict(s.options), "n": n}
            row["given_timesteps"] = row.pop("timesteps")
            row["timesteps"] = [round(float(t), 2) for t in s.made(self.bench.config).timesteps]
            row |= {name: eye.figures(features[name]) for name, eye in self.bench.eyes.items()}
            row |= {"judge_id": self.bench.judge_id, "reference": self.bench.n}
            line = json.dumps(row)
            with self.path.open("a") as file:
                file.write(line + "\n")
            self.known[s, n] = json.loads(line)
            print(shown(s, row), file=sys.stderr, flush=True)
        return self.known[s, n]

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
        most = (2 * FINALISTS + len(final)) * self.levels[2]
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


def shown(s: Setting, row: dict[str, Any]) -> str:
    """Return a line of the table."""
    figures = "  ".join(f"{row[eye]['recognised']:.3f} {row[eye]['frechet']:6.2f}" for eye in ("judge", "losses"))
    return f"{s.calls}  {row['n']:5}  {figures}  {s.line}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--budget-minutes", type=float, default=35, help="processor time of the search")
    parser.add_argument(
        "--levels", type=int, nargs=3, default=[80, 240, 1000], help="pictures of the sweep, of its best, of finalists"
    )
    parser.add_argument("--judge", default=str(judge_net.WEIGHTS), help="the judge's weights, or `random` to try the script")
    parser.add_argument("--out", type=Path, default=Path("undistilled"))
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
            print(shown(s, search.figures(s, 2)), *(f"({mark})" for mark in marks))
    (args.out / "winners.json").write_text(json.dumps(winners, indent=1) + "\n")


if __name__ == "__main__":
    main()
