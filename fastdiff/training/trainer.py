"""The one training loop. A method only generates {player: losses}; this module does everything else."""

import gc
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.data.batch import Batch, Data
from fastdiff.models import sharding
from fastdiff.models.ema import EMA, swapped
from fastdiff.options.train import TrainConfig, seconds
from fastdiff.runtime import console, processes, rng, stop
from fastdiff.runtime.errors import Failed, OutOfMemory, Stopped, UsageError, device_error
from fastdiff.training import resume
from fastdiff.training.method import Method, Now, Phase, Trains, lacking, read
from fastdiff.training.player import Player
from fastdiff.training.run import Run


class Trainer:
    """Trains a method through all of its phases.

    Each step draws a batch and iterates over `method.losses(batch, now)`. For every player of a turn it computes the
    gradients, averages them over processes, clips them, and updates parameters and average. The trainer alone tracks
    progress, because `max_time` may shorten a phase and `patience` may end it; the method gets a `Now` at each step.
    """

    PREPARED = 48  # samples in the batch that `Method.prepare` gets
    PACED = 5  # a phase's pace counts as known after at least so many steps, besides its first one, in which all is slow

    def __init__(self, method: Method, data: Data, run: Run, config: TrainConfig, accelerator: Any) -> None:
        self.method, self.data, self.run, self.config, self.accelerator = method, data, run, config, accelerator
        self.device = accelerator.device
        self.step, self.owed = 0, False  # owed: preview and measurement of the last step have not been made yet
        self.saved: tuple[int, int] | None = None  # step and phase of the last state
        self.latest: dict[str, float] = {}  # latest value of every logged figure: not every player trains at every step
        self.preview: Callable[[int], None] | None = None  # draws a contact sheet of the step
        self.measure: Callable[[], dict[str, float]] | None = None  # returns figures, among them `score`: less is better
        self.improved: Callable[[], None] | None = None  # called while the network holds the best weights so far
        self.kept: dict[str, dict[str, Any]] = {}  # {finished phase: step and score of its best weights}
        self.progress: dict[str, Any] = {}  # figures of the last measurement, for the progress bar
        self.finished: Callable[[Phase], None] | None = None  # called while the network holds the weights to export
        self.phases = list(method.phases())
        self.lengths = [phase.steps for phase in self.phases]  # steps of each phase, as currently planned
        self.settled = [False] * len(self.phases)  # whether `max_time` has fixed the length, or the phase has ended
        self.bend = (0, 0.0)  # steps and fraction of the current phase when its length last changed
        self.budget_s = seconds("max_time", config.max_time)
        self.elapsed_s, self.entered_s = 0.0, 0.0
        self.paced_from: tuple[int, float] | None = None  # steps of this phase, and seconds, after the first one in this process
        if min(self.lengths, default=0) < 1:
            raise UsageError(f"`steps={config.steps}`: too few for {len(self.phases)} phases", "give more")
        self.enter(0)
        if type(method).prepare is not Method.prepare:  # without the hook, a stream would read data for nothing
            seed = rng.seed_for(config.seed, 6_700_417, 0)
            torch.manual_seed(seed)
            method.prepare(data.batch(self.PREPARED, torch.Generator().manual_seed(seed)).to(self.device))

    def enter(self, index: int) -> None:
        """Begin a phase, with fresh optimisers and averages of the parameters that train in it."""
        method, config = self.method, self.config
        self.index, self.phase, self.bend = index, self.phases[index], (0, 0.0)
        torch.manual_seed(rng.seed_for(config.seed, 7_919, index))  # so that every process initialises networks alike
        trains = method.players(self.phase)
        if missing := lacking(method):
            raise TypeError(f"{type(method).__name__}: {', '.join(missing)} not set; set it in __init__() or in players()")
        for net in method.networks():
            net.to(self.device)
        vars(method).update({name: v.to(self.device) for name, v in vars(method).items() if isinstance(v, Tensor)})
        moved = self.shard(trains)
        self.players = {
            name: Player(
                [moved.get(p, p) for p in trains_of.params if p.requires_grad],
                config,
                self.device,
                lr=config.lr if trains_of.lr is None else trains_of.lr,
                betas=trains_of.betas,
                averaged=trains_of.averaged,
                fp16=self.accelerator.mixed_precision == "fp16",
            )
            for name, trains_of in trains.items()
        }
        self.best: dict[str, Any] = {"step": 0, "score": float("inf"), "params": [], "worse": 0}
        self.entered_s, self.paced_from = self.elapsed_s, None

    def shard(self, trains: dict[str, Trains]) -> dict[nn.Parameter, nn.Parameter]:
        """Split networks that train whole over the processes, if `shard` is set; return {old parameter: split parameter}."""
        self.sharded = self.config.shard and processes.count() > 1
        if not self.sharded:
            return {}
        moved = sharding.shard([one.net for one in trains.values() if one.net is not None], self.device)
        for part in self.method.state().values():
            if isinstance(part, EMA):
                part.repoint(moved)
        self.sharded = bool(moved) or any(sharding.is_split(p) for one in trains.values() for p in one.params)
        if not self.sharded and self.index == 0:
            where = f" in phase {self.phase.name}" if self.phase.name else ""
            console.warn(f"`shard`: no network trains whole{where}, so none is split")
        return moved

    @property
    def start(self) -> int:
        """First step of the current phase."""
        return sum(self.lengths[: self.index])

    @property
    def end(self) -> int:
        """Step after the last one of the current phase."""
        return self.start + self.lengths[self.index]

    @property
    def total(self) -> int:
        """Steps of all phases, as currently planned."""
        return sum(self.lengths)

    @property
    def now(self) -> Now:
        """The progress that the method gets at this step."""
        done, (since, fraction) = self.step - self.start, self.bend
        fraction += (1 - fraction) * (done - since) / max(1, self.lengths[self.index] - 1 - since)
        return Now(self.step, self.phase, done, fraction)

    def shorten(self, steps: int) -> None:
        """Change the current phase to that many steps. `Now.fraction` goes on from its present value without a jump."""
        now = self.now
        self.bend, self.lengths[self.index] = (now.done, now.fraction), steps

    @property
    def state_bytes(self) -> int:
        """Size in bytes of a state that is saved in this phase."""
        players = list(self.players.values())
        best = sum(p.numel() * p.element_size() for p in players[0].params) if self.config.keep == "best" else 0
        extra = sum(t.numel() * t.element_size() for part in self.method.state().values() for t in tensors_in(part.state_dict()))
        return sum(player.state_bytes for player in players) + best + extra

    def fit(self) -> None:
        """Train through all phases. On SIGTERM or Ctrl-C it saves a state and raises Stopped.

        Failed where too many steps in a row were not finite, DoesNotFit where the disk is full.
        """
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
        """Train the current phase to its end, with previews, measurements and states in between."""
        if self.owed:
            self.watch()
            self.halt()
        while self.step < self.end:
            began = time.monotonic()
            row = self.train_step()
            self.step, self.owed = self.step + 1, True
            self.elapsed_s += time.monotonic() - began
            self.fit_budget()
            bar.update(1, loss=row["loss"], **self.progress)
            self.latest |= row
            if self.step % 10 == 0 or self.step == self.end:
                self.log(self.latest)
            if self.step % self.config.save_every == 0 and self.step < self.total:
                self.save()
            self.watch()
            self.halt()

    def watch(self) -> None:
        """Draw the preview and measure the student, if they are due at this step.

        If the user stops the run meanwhile, `owed` stays set and the resumed run repeats both.
        """
        due = lambda every: every and self.step % every == 0
        if (preview := self.preview) and due(self.config.preview_every):
            with self.averaged():
                if not self.leading(lambda: self.spared("a contact sheet", lambda: preview(self.step)) or True):
                    return
        if due(self.config.eval_every):
            over = self.evaluate()
            if over is None:
                return
            if over:
                self.shorten(self.step - self.start)
        self.owed = False

    def halt(self) -> None:
        """Save a state and raise Stopped on all processes if any process was asked to stop."""
        try:
            stop.meet()
        except Stopped:
            if self.saved != (self.step, self.index):
                self.save()
            message = f"stopped at step {self.step} of {self.total}; the state is in {self.run.state_folder}"
            raise stop.stopped(message) from None

    def leading(self, work: Callable[[], Any]) -> Any:
        """Do some work on the first process and return its result on all; None where a stop interrupted it.

        With `shard` all processes work, because a split network needs them all. They do so in every phase, so that all have
        the same pictures from earlier work.
        """
        result, all_work = None, self.config.shard and processes.count() > 1
        if all_work or processes.first():
            with ExitStack() as stack:
                for player in self.players.values():
                    stack.enter_context(player.resting())
                with suppress(Stopped), stop.together() if all_work else nullcontext():
                    result = work()
        return processes.agreed(result)

    def measured(self) -> dict[str, float] | None:
        """Return the figures of a measurement: {} where it does not fit in memory, None where a stop interrupted it."""
        measure = self.measure
        assert measure is not None
        return self.leading(lambda: self.spared("a measurement", measure) or {})

    def spared(self, what: str, work: Callable[[], Any]) -> Any:
        """Do some work that a run can go on without. None, and a warning, where it does not fit in memory.

        Else a run would end at its first contact sheet, and a resumed one at the same place. With `shard` the error is raised,
        because the other processes wait for this one.
        """
        try:
            return work()
        except (RuntimeError, MemoryError, OutOfMemory) as error:
            problem = device_error(error)
            if not isinstance(problem, OutOfMemory) or self.sharded:
                raise
            console.warn(f"step {self.step}: {what} does not fit in memory and is left out; training goes on ({problem})")
        gc.collect()  # the traceback held what the work had allocated
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def fit_budget(self) -> None:
        """Shorten the current phase to its share of the time that `max_time` leaves; once, when its pace is known.

        The pace is that of whole cycles of the method, for some steps of a cycle may take longer than others.
        """
        done, cycle = self.step - self.start, self.method.cycle(self.config)
        if self.budget_s is None or self.settled[self.index]:
            return
        if self.paced_from is None:
            self.paced_from = done, self.elapsed_s
        since, since_s = self.paced_from
        if done - since < math.ceil(self.PACED / cycle) * cycle:
            return
        planned, pace_s = self.lengths[self.index], (self.elapsed_s - since_s) / (done - since)
        left_s = (self.budget_s - self.entered_s) * planned / sum(self.lengths[self.index :]) - (self.elapsed_s - self.entered_s)
        fits = processes.agreed(done + int(left_s / pace_s))  # the first process's clock decides
        self.settled[self.index] = True
        if fits < planned:
            self.shorten(max(fits, done))
            console.info(f"`max_time={self.config.max_time}`: {self.lengths[self.index]} steps {self.phase.name}".rstrip())

    def leave(self) -> None:
        """End the phase: measure and write its weights, and let the next phase start from them."""
        with self.exported():
            late = self.config.eval_every and self.step % self.config.eval_every
            if self.measure and self.phase.exports and late and (measured := self.measured()):
                self.log({"step": self.step - 1, **measured})
                console.info(f"{self.phase.name or 'end'}: {score_text(measured)}")
            if (finished := self.finished) and self.phase.exports:
                self.leading(lambda: finished(self.phase))
            if self.best["params"] and self.phase.exports:
                self.kept[self.phase.name] = {k: self.best[k] for k in ("step", "score")}
            params = next(iter(self.players.values())).params
            exported = [p.detach().clone() for p in params] if self.index + 1 < len(self.phases) else []
        self.halt()
        with torch.no_grad():
            for p, value in zip(params, exported, strict=False):
                p.copy_(value)
        self.settled[self.index] = True

    def train_step(self) -> dict[str, float]:
        """Go through all turns of the method once and return the figures to log.

        The generators of all micro-batches advance together, so that a turn is updated before any micro-batch starts the next
        one. Each micro-batch has its own random numbers, which do not depend on the number of micro-batches.
        """
        n, now = self.config.grad_accum, self.now
        batches, streams = self.draw(n)
        turns = [self.method.losses(batch, now) for batch in batches]
        row: dict[str, float] = {"step": self.step, "loss": 0.0}
        bad: dict[str, str] = {}
        while True:
            moved: list[str] | None = None
            sums: dict[str, dict[str, Tensor]] = {}  # of each player, by the name of the loss; still on the device
            for turn, stream in zip(turns, streams, strict=True):
                with stream.current(), self.accelerator.autocast():
                    players = next(turn, {})
                if moved is not None and moved != list(players):
                    raise TypeError(
                        f"{type(self.method).__name__}.losses yields other players for one micro-batch than for another"
                    )
                moved = list(players)
                if unknown := [who for who in moved if who not in self.players]:
                    who, there = unknown[0], ", ".join(self.players)
                    raise TypeError(f"{type(self.method).__name__}.losses yields {who!r}, but what trains now is {there}")
                for who in moved:
                    player, terms = self.players[who], players.pop(who)  # popped, so that its graph is freed after backward
                    loss: Tensor = reduce(operator.add, terms.values()) / n
                    player.backward(loss, self.players.values())
                    own = sums.setdefault(who, {})
                    for name, value in terms.items():
                        own[name] = own.get(name, 0.0) + value.detach().float() / n
                    del terms, loss
            if not moved:
                break
            for who, figures in self.figures(sums).items():
                problem = self.update(self.players[who], figures)
                row |= {f"{who}/{name}": figure for name, figure in figures.items()}
                row["loss"] += sum(figure for name, figure in figures.items() if name != "grad_norm")
                bad |= {who: problem} if problem else {}
            self.method.after_update(now)
        if bad:
            self.report_skipped(bad, batches)
        return row

    def draw(self, n: int) -> tuple[list[Batch], list[rng.Stream]]:
        """Draw the `n` micro-batches of this step, and a random stream for each."""
        seed = rng.seed_for(self.config.seed, self.accelerator.process_index, self.step)
        rng.reseed(seed)
        generator = torch.Generator().manual_seed(seed)
        shared = torch.Generator().manual_seed(rng.seed_for(self.config.seed, 15_485_863, self.step))
        batches = [self.data.batch(self.config.batch_size, generator, shared) for _ in range(n)]
        if share := self.config.mix_prompts:
            batches = [batch.mixed(share, generator, self.method.paired(len(batch.latents), self.now)) for batch in batches]
        return [batch.to(self.device) for batch in batches], rng.streams(seed, n)

    def figures(self, losses: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, float]]:
        """Average and clip the gradients of the players of a turn; return their losses and `grad_norm`, by player and name.

        All figures of the turn are read at once: reading one waits until the device has done all its work.
        """
        for who in losses:
            self.players[who].synchronise()
        flat = {(who, name): value for who, own in losses.items() for name, value in own.items()}
        flat |= {(who, "grad_norm"): self.players[who].clip() for who in losses}
        result: dict[str, dict[str, float]] = {who: {} for who in losses}
        for (who, name), figure in read(flat).items():
            result[who][name] = figure
        return result

    def update(self, player: Player, figures: dict[str, float]) -> str:
        """Update a player whose gradients are ready, and return what was not finite.

        The update is skipped where a loss or the norm is not finite on any process; the result then is "loss" or "gradient",
        and otherwise empty.
        """
        player.set_rate(self.step - self.start, self.lengths[self.index])
        wrong = {name for name, figure in figures.items() if not math.isfinite(figure)}
        problems = ("", "gradient", "loss")  # a bad loss makes a bad gradient, so it is the one to report
        problem = problems[processes.highest(2 if wrong - {"grad_norm"} else len(wrong))]
        if not problem:
            player.step()
        elif problem == "gradient" and player.finding_scale:
            problem = ""
        player.finish()
        return problem

    def report_skipped(self, bad: dict[str, str], batches: list[Batch]) -> None:
        """Report a skipped step: {player: what was not finite}, and the items of its batch.

        Failed after `max_bad_steps` skipped steps of a player in a row.
        """
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
                    f"step {self.step}: {player.bad_steps} bad steps of {who} in a row (`max_bad_steps`)",
                    f"{self.run.states.kept()}; go on from it with a lower `lr` and `resume={self.run.folder}`",
                )

    def evaluate(self) -> bool | None:
        """Measure the student as it would be exported, and keep its weights if they are the best so far.

        Returns True where `patience` ends the phase, None where a stop interrupted the measurement, and otherwise False.
        """
        player, best = next(iter(self.players.values())), self.best
        with self.averaged():
            measured = self.measured()
            if not measured:
                return None if measured is None else False
            if measured["score"] < best["score"]:
                best |= {"step": self.step, "score": measured["score"], "worse": 0}
                best["params"] = [sharding.whole(p.detach(), everywhere=True).cpu().clone() for p in player.params]
                if self.improved and self.phase.exports:
                    self.leading(self.improved)
            else:
                best["worse"] += 1
        self.log({"step": self.step - 1, **measured})
        worse = f" by {100 * (measured['score'] / best['score'] - 1):.0f} %" if best["score"] else ""
        since = f"best at {best['step']}, now worse{worse}"
        console.info(f"step {self.step}: {score_text(measured)}; {since if best['worse'] else 'the best so far'}")
        self.progress = {"score": measured["score"], "best_at": best["step"]}
        if over := 0 < self.config.patience <= best["worse"]:
            console.info(f"stopped at step {self.step}: {best['worse']} measurements without a better one")
        return over

    @contextmanager
    def exported(self) -> Iterator[None]:
        """Put the weights to export into the networks: the averaged ones, or with `keep=best` the best that were measured."""
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
        """Put the averaged weights of every player that has them into the networks."""
        with ExitStack() as stack:
            for player in self.players.values():
                if player.ema:
                    stack.enter_context(player.ema.swapped())
            yield

    def log(self, row: dict[str, float]) -> None:
        """Write a row, with the method's own figures, to metrics.jsonl and to the tracker.

        The file also has the time, and how many seconds training took so far, without what draws and measures.
        """
        if self.accelerator.is_main_process:
            row = row | self.method.logged()
            self.run.log({**row, "elapsed_s": round(self.elapsed_s, 3), "time": round(time.time(), 3)})
            self.accelerator.log(row, step=self.step)

    def save(self) -> None:
        """Write a state. All processes must call it."""
        resume.save(self)
        self.saved = self.step, self.index

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. InputRefused where it is of another base or other networks."""
        resume.restore(self, state)


def score_text(figures: dict[str, float]) -> str:
    """Format a measurement for one line: the score, with the drift and the Frechet distance that it is made of."""
    parts = ", ".join(f"{name} {figures[name]:.3f}" for name in ("drift", "frechet") if name in figures)
    return f"score {figures['score']:.3f}" + (f" ({parts})" if parts else "")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a nested state."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
