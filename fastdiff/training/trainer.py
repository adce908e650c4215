"""The one training loop. A method is a generator of {player: losses}; everything else happens here."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data.batch import Batch, Data
from fastdiff.models import sharding
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.ema import EMA, swapped
from fastdiff.runtime import console, processes, rng, stop
from fastdiff.runtime.errors import Failed, Stopped
from fastdiff.training import resume
from fastdiff.training.config import TrainConfig, seconds
from fastdiff.training.method import Method, Phase
from fastdiff.training.player import Player
from fastdiff.training.run import Run


class Trainer:
    """for step: for turn in method.losses(batch, step): for who in turn: backward into who; sync; clip; step; average; log."""

    PREPARED = 48  # samples that a method may look at before training
    PACED = 5  # steps that tell a phase's pace

    def __init__(self, method: Method, data: Data, run: Run, config: TrainConfig, accelerator: Any) -> None:
        self.method, self.data, self.run, self.config, self.accelerator = method, data, run, config, accelerator
        self.device = accelerator.device
        self.step, self.owed = 0, False  # owed: preview and measurement of the last step are still to be made
        self.saved: tuple[int, int] | None = None  # step and phase of the last state
        self.latest: dict[str, float] = {}  # of every logged figure: not every player trains at every step
        self.preview: Callable[[int], None] | None = None
        self.measure: Callable[[], dict[str, float]] | None = None  # has `score`, which decides: less is better
        self.improved: Callable[[], None] | None = None  # called with the best weights so far in place
        self.kept: dict[str, dict[str, Any]] = {}  # step and score of the best weights of each phase that is over
        self.shown: dict[str, Any] = {}  # of the last measurement, beside the loss
        self.finished: Callable[[Phase], None] | None = None  # called with the weights to export in place
        self.phases: list[Phase] = getattr(method, "phases", None) or [Phase("", config.steps)]
        self.budget_s = seconds("--max-time", config.max_time)
        self.elapsed_s, self.entered_s = 0.0, 0.0
        self.enter(0)
        if prepare := getattr(method, "prepare", None):
            torch.manual_seed(config.seed)
            prepare(data.batch(self.PREPARED, torch.Generator().manual_seed(config.seed)).to(self.device))

    def enter(self, index: int) -> None:
        """Begin a phase: fresh optimisers and averages over what trains in it."""
        method, config = self.method, self.config
        self.index, self.phase = index, self.phases[index]
        self.phase.start = sum(phase.steps for phase in self.phases[:index])
        if enter := getattr(method, "enter", None):
            torch.manual_seed(rng.seed_for(config.seed, 7_919, index))  # new networks are the same on every process
            enter(self.phase)
        for part in vars(method).values():
            if isinstance(part, nn.Module):
                part.to(self.device)
        self.sharded = self.shard()
        rates, betas, first = getattr(method, "rates", {}), getattr(method, "betas", {}), next(iter(method.players))
        self.players = {
            k: Player(
                net,
                config,
                self.device,
                lr=rates.get(k, config.lr),
                betas=betas.get(k, (0.9, 0.999)),
                averaged=k == first,
                fp16=self.accelerator.mixed_precision == "fp16",
            )
            for k, net in method.players.items()
        }
        self.best: dict[str, Any] = {"step": 0, "score": float("inf"), "params": [], "worse": 0}
        self.entered_s = self.elapsed_s

    def shard(self) -> bool:
        """Split what trains whole, where that is wanted and there is anybody to share with."""
        if not self.config.shard or processes.count() == 1:
            return False
        held, players = list(vars(self.method).values()), self.method.players
        called = [net for net in players.values() if not isinstance(net, nn.ParameterList | nn.ModuleList)]
        called += [net for part in held if isinstance(part, Denoiser) for net in part.networks()]
        lists = [part for part in held if isinstance(part, nn.ParameterList) or is_parameters(part)]
        n = sharding.shard(called, players, self.device, lists=lists, followers=[p for p in held if isinstance(p, EMA)])
        if not n and self.index == 0:
            where = f" in phase {self.phase.name}" if self.phase.name else ""
            console.warn(f"--shard: no network trains whole{where}, none is split")
        return n > 0

    @property
    def end(self) -> int:
        return self.phase.start + self.phase.steps

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @property
    def state_bytes(self) -> int:
        """Of a state of this phase."""
        players = list(self.players.values())
        best = sum(p.numel() * p.element_size() for p in players[0].params) if self.config.keep == "best" else 0
        parts = getattr(self.method, "extra_state", {}).values()
        extra = sum(t.numel() * t.element_size() for part in parts for t in tensors_in(part.state_dict()))
        return sum(player.state_bytes for player in players) + best + extra

    def fit(self) -> None:
        """Train through all phases; on SIGTERM or Ctrl-C save and raise Stopped."""
        with stop.watching(), console.progress(self.total, "training") as bar:
            stop.request.command = self.run.resume_command
            bar.update(self.step)
            for index in range(self.index, len(self.phases)):
                if index > self.index:
                    self.enter(index)
                self.fit_phase(bar)
                self.leave()
        self.save()

    def fit_phase(self, bar: Any) -> None:
        if self.owed:
            self.watch()
            self.halt()
        while self.step < self.end:
            began = time.monotonic()
            row = self.train_step()
            self.step, self.owed = self.step + 1, True
            self.elapsed_s += time.monotonic() - began
            self.fit_budget()
            bar.update(1, loss=row["loss"], **self.shown)
            self.latest |= row
            if self.step % 10 == 0 or self.step == self.end:
                self.log(self.latest)
            if self.step % self.config.save_every == 0 and self.step < self.total:
                self.save()
            self.watch()
            self.halt()

    def watch(self) -> None:
        """Preview and measurement after a step; what a stop cuts short, the resumed run makes again."""
        due = lambda every: every and self.step % every == 0
        if self.preview and due(self.config.preview_every):
            with self.averaged():
                if not self.leading(lambda: self.preview(self.step) or True):
                    return
        if due(self.config.eval_every):
            over = self.evaluate()
            if over is None:
                return
            if over:
                self.phase.steps = self.step - self.phase.start
        self.owed = False

    def halt(self) -> None:
        """Where any process was asked to stop, all save and stop."""
        try:
            stop.meet()
        except Stopped:
            if self.saved != (self.step, self.index):
                self.save()
            told = f"stopped at step {self.step} of {self.total}; the state is in {self.run.state_folder}"
            raise stop.stopped(told) from None

    def leading(self, work: Callable[[], Any]) -> Any:
        """What the first process finds, told to all; None where a stop cut it short.

        A split network needs all to work; then all do so in every phase, that each has drawn what the others have.
        """
        found, all_work = None, self.config.shard and processes.count() > 1
        if all_work or processes.first():
            with suppress(Stopped), stop.together() if all_work else nullcontext():
                found = work()
        return processes.agreed(found)

    def fit_budget(self) -> None:
        """Once a phase, when its pace is known: as many steps as fit in its part of the time that is left."""
        phase, done = self.phase, self.step - self.phase.start
        if self.budget_s is None or phase.settled or done < self.PACED:
            return
        left = (self.budget_s - self.entered_s) * phase.steps / sum(p.steps for p in self.phases[self.index :])
        fits = processes.agreed(int(left / ((self.elapsed_s - self.entered_s) / done)))  # one clock decides for all
        phase.settled = True
        if fits < phase.steps:
            phase.steps = max(fits, done)
            console.info(f"--max-time {self.config.max_time}: {phase.steps} steps {phase.name}".rstrip())

    def leave(self) -> None:
        """The phase is over: what it made is written, and the next one goes on from that."""
        with self.exported():
            late = self.config.eval_every and self.step % self.config.eval_every
            if self.measure and self.phase.exports and late and (found := self.leading(self.measure)):
                self.log({"step": self.step - 1, **found})
                console.info(f"{self.phase.name or 'end'}: {told(found)}")
            if self.finished and self.phase.exports:
                self.leading(lambda: self.finished(self.phase))
            if self.best["params"] and self.phase.exports:
                self.kept[self.phase.name] = {k: self.best[k] for k in ("step", "score")}
            params = next(iter(self.players.values())).params
            made = [p.detach().clone() for p in params] if self.index + 1 < len(self.phases) else []
        self.halt()
        with torch.no_grad():
            for p, value in zip(params, made, strict=False):
                p.copy_(value)
        self.phase.settled = True

    def train_step(self) -> dict[str, float]:
        """One pass over all turns of the method, micro-batches in lock-step: their generators advance together,

        so that a turn's update is made before any micro-batch starts the next turn. Returns the logged figures.
        """
        seed = rng.seed_for(self.config.seed, self.accelerator.process_index, self.step)
        rng.reseed(seed)
        generator = torch.Generator().manual_seed(seed)
        n, shared = self.config.grad_accum, torch.Generator().manual_seed(rng.seed_for(self.config.seed, 15_485_863, self.step))
        batches = [self.data.batch(self.config.batch_size, generator, shared).to(self.device) for _ in range(n)]
        turns = [self.method.losses(batch, self.step) for batch in batches]
        row: dict[str, float] = {"step": self.step, "loss": 0.0}
        bad: dict[str, str] = {}
        while True:
            moved: list[str] = []
            found: dict[str, float] = {}
            for turn in turns:
                with self.accelerator.autocast():
                    players = next(turn, {})
                moved = list(players)
                for who in moved:
                    player, terms = self.players[who], players.pop(who)  # nothing may hold a graph longer than it is needed
                    loss = sum(terms.values()) / n
                    player.backward(loss, self.players.values())
                    for name, value in terms.items():
                        row[f"{who}/{name}"] = row.get(f"{who}/{name}", 0.0) + value.item() / n
                    found[who] = found.get(who, 0.0) + loss.item()
                    row["loss"] += loss.item()
                    del terms, loss
            if not moved:
                break
            for who in moved:
                row[f"{who}/grad_norm"], problem = self.update(self.players[who], found[who])
                bad |= {who: problem} if problem else {}
            self.method.updated(self.step)
        if bad:
            self.skipped(bad, batches)
        return row

    def update(self, player: Player, loss: float) -> tuple[float, str]:
        """Average gradients over processes, clip, step, unless loss or norm is not finite on any: (norm, what is not)."""
        player.set_rate(self.step - self.phase.start, self.phase.steps)
        player.synchronise(self.accelerator)
        norm = player.clip().item()
        wrong = ("", "gradient", "loss")  # a loss goes before the gradient that it makes
        problem = wrong[processes.highest(2 if not math.isfinite(loss) else 1 if not math.isfinite(norm) else 0)]
        if not problem:
            player.step()
        elif problem == "gradient" and player.finding_scale:
            problem = ""
        player.finish()
        return norm, problem

    def skipped(self, bad: dict[str, str], batches: list[Batch]) -> None:
        """Tell what was wrong with a step, and on which items; so many in a row end the run."""
        mine = [name for batch in batches for name in batch.items or ()]
        items = [key for keys in processes.every(mine) for key in keys]
        what = ", ".join(f"{problem} of {who}" for who, problem in bad.items())
        console.warn(f"step {self.step}: {what} not finite; skipped; items {' '.join(items)}")
        if self.accelerator.is_main_process:
            self.run.log({"step": self.step, "skipped": bad, "items": items, "time": round(time.time(), 3)})
        for who in bad:
            player = self.players[who]
            player.bad_steps += 1
            if player.bad_steps >= self.config.max_bad_steps:
                raise Failed(
                    f"step {self.step}: {player.bad_steps} bad steps of {who} in a row (--max-bad-steps)",
                    f"{self.run.states.kept()}; go on from it with a lower --lr and --resume {self.run.folder}",
                )

    def evaluate(self) -> bool | None:
        """Measure the student as it would be exported and keep it if it is the best so far; True where it is time to end,

        None where a stop cut it short.
        """
        assert self.measure is not None
        player, best = next(iter(self.players.values())), self.best
        with self.averaged():
            found = self.leading(self.measure)
            if found is None:
                return None
            if found["score"] < best["score"]:
                best |= {"step": self.step, "score": found["score"], "worse": 0}
                best["params"] = [sharding.whole(p.detach(), everywhere=True).cpu().clone() for p in player.params]
                if self.improved and self.phase.exports:
                    self.leading(self.improved)
            else:
                best["worse"] += 1
        self.log({"step": self.step - 1, **found})
        since = f"best at {best['step']}, now worse by {100 * (found['score'] / best['score'] - 1):.0f} %"
        console.info(f"step {self.step}: {told(found)}; {since if best['worse'] else 'the best so far'}")
        self.shown = {"score": found["score"], "best_at": best["step"]}
        if over := 0 < self.config.patience <= best["worse"]:
            console.info(f"stopped at step {self.step}: {best['worse']} measurements without a better one")
        return over

    @contextmanager
    def exported(self) -> Iterator[None]:
        """The weights to export in place: the averaged ones, or the best that were measured."""
        player = next(iter(self.players.values()))
        if self.config.keep == "last" or not self.best["params"]:
            with self.averaged():
                yield
            return
        console.info(f"kept the weights of step {self.best['step']}")
        with swapped(player.params, self.best["params"]):
            yield

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Every player's averaged weights in place, where there are any."""
        with ExitStack() as stack:
            for player in self.players.values():
                if player.ema:
                    stack.enter_context(player.ema.swapped())
            yield

    def log(self, row: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            row = row | {k: v.item() for k, v in getattr(self.method, "figures", {}).items()}
            self.run.log({**row, "time": round(time.time(), 3)})
            self.accelerator.log(row, step=self.step)

    def save(self) -> None:
        """Write a state, the same whichever process asks."""
        resume.save(self)
        self.saved = self.step, self.index

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; InputRefused where it is of another network."""
        resume.restore(self, state)


def is_parameters(value: Any) -> bool:
    """Whether it is a list of parameters."""
    return isinstance(value, list) and all(isinstance(p, nn.Parameter) for p in value)


def told(found: dict[str, float]) -> str:
    """A measurement in a line: the deciding figure, and what it is made of."""
    parts = ", ".join(f"{name} {found[name]:.3f}" for name in ("drift", "frechet") if name in found)
    return f"score {found['score']:.3f}" + (f" ({parts})" if parts else "")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
