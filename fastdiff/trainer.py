"""The one training loop. A method is a generator of {player: losses}; everything else happens here."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from fastdiff import console
from fastdiff.config import Range
from fastdiff.console import Stopped, UsageError
from fastdiff.data import Batch, Data, Wants
from fastdiff.io.checkpoint import BaseConfig, Checkpoint
from fastdiff.io.recipe import Recipe
from fastdiff.io.run import Run
from fastdiff.models.denoiser import Denoiser
from fastdiff.models.ema import EMA, swapped
from fastdiff.sampling import DEFAULTS, Settings

Losses = dict[str, Tensor]  # named, already weighted, scalar
Turn = dict[str, Losses]  # of each player that is updated now; none sees another's update of the same turn


@dataclass
class TrainConfig(BaseConfig):
    """What every training command takes."""

    PANEL: ClassVar[str] = "Training"

    data: Annotated[str | None, "emoji, emoji:STYLE, teacher, a folder of images and captions, wds:SHARDS or hf:ID[:SPLIT]"] = (
        None
    )
    max_images: Annotated[
        int | None, "images that are encoded at most; default: all of a folder, 10000 of wds: and hf:", Range(1)
    ] = None
    buckets: Annotated[bool, "keep the shape of pictures: sizes of SDXL's list, about --resolution squared each"] = False
    random_crops: Annotated[int, "encode so many crops of each picture, at random places; 0 = one at the centre", Range(0)] = 0
    flip: Annotated[bool, "encode pictures mirrored, too"] = False
    prompts: Annotated[str | None, "prompts for --data teacher, one a line"] = None
    pairs: Annotated[int, "pairs of noise and latents that --data teacher samples", Range(1)] = 256
    teacher_steps: Annotated[int | None, "sampling steps of each; default: the family's", Range(1, 1000)] = None
    teacher_guidance: Annotated[float | None, "guidance of each; default: --guidance, or the family's", Range(1)] = None
    output: Annotated[str | None, "run folder"] = field(default=None, metadata={"flags": ["-o"]})
    steps: Annotated[int, "optimiser steps", Range(1)] = 1000
    max_time: Annotated[str | None, "train no longer than this: 90s, 25m, 2h; fewer steps where they would not fit"] = None
    batch_size: Annotated[int, "images a step and device", Range(1)] = 12
    grad_accum: Annotated[int, "micro-batches an optimiser step", Range(1)] = 1
    lr: Annotated[float, "learning rate", Range(above=0)] = 1e-4
    lr_schedule: Annotated[Literal["constant", "cosine"], "after the warm-up"] = "constant"
    warmup: Annotated[int, "steps of linear learning rate warm-up", Range(0)] = 0
    weight_decay: Annotated[float, "AdamW weight decay", Range(0)] = 0.0
    max_grad_norm: Annotated[float, "gradient clipping", Range(above=0)] = 1.0
    ema: Annotated[float, "decay of the averaged weights that are exported; 0 = none", Range(0, below=1)] = 0.0
    empty_prompts: Annotated[float, "share of items trained with an empty prompt", Range(0, 1)] = 0.0
    resolution: Annotated[int | None, "pixels a side; default: the family's own", Range(8, multiple_of=8)] = None
    seed: Annotated[int, "of everything random", Range(0, 2**31 - 1)] = 0
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to train"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA, else fp32"] = "auto"
    gradient_checkpointing: Annotated[bool, "less memory, a third more time"] = False
    resume: Annotated[str, "auto (go on from the run folder's state), never, or another run folder"] = "auto"
    save_every: Annotated[int, "steps between resumable states", Range(1)] = 200
    preview_every: Annotated[int, "steps between contact sheets; 0 = only at the end", Range(0)] = 0
    eval_every: Annotated[int, "steps between measurements of the drift from the teacher; 0 = never", Range(0)] = 0
    keep: Annotated[Literal["last", "best"], "which weights are exported; best: of the least drift (--eval-every)"] = "last"
    patience: Annotated[int, "stop after so many measurements without a better one; 0 = never", Range(0)] = 0
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], "besides metrics.jsonl"] = "none"

    @property
    def wants(self) -> Wants:
        """What the method needs of its data."""
        return "latents"

    def open_student(self, dtype: torch.dtype = torch.float32) -> Checkpoint:
        """The checkpoint that an exported LoRA is of: the base, unless a method trains another network."""
        return self.open_base(dtype)

    def teacher_sampling(self, family: str) -> Settings:
        """How the teacher makes its samples: the family's way, at the method's guidance where it has one."""
        given = {"num_steps": self.teacher_steps, "guidance": self.teacher_guidance or getattr(self, "guidance", None)}
        return replace(DEFAULTS[family], **{k: v for k, v in given.items() if v is not None})


@dataclass
class Phase:
    """A part of a run, with players and optimisers of its own."""

    name: str
    steps: int
    exports: bool = True  # at its end there is something to write
    start: int = 0  # its first step
    settled: bool = False  # its length has been measured, or it has ended


class Method(Protocol):
    """One paper. `losses` is its algorithm; it moves no devices, saves nothing and knows no optimiser.

    Besides these it may have `rates` {player: learning rate} and `betas` {player: of Adam} where they are not the usual,
    `baseline` "student" where the closing figures start from the student before training and not from the teacher in as many
    calls, `title` for the card and `facts` for the metrics,
    `prepare(batch)` to measure something of the data before the first step, `figures` {name: scalar tensor} to log beside the
    losses, and `extra_state` {name: object with a state_dict} that a resumed run needs. A method of several `phases` is told
    by `enter(phase)` which one begins, and sets its players then; a resumed run enters the phase that it was in.
    """

    players: dict[str, nn.Module]  # what trains, one optimiser each; the first is the student's, which alone is averaged
    student: Denoiser  # what is sampled and exported
    teacher: Denoiser
    base_model: Checkpoint
    recipe: Recipe
    parent: str  # hash of the base network

    def losses(self, batch: Batch, step: int) -> Iterator[Turn]: ...
    def updated(self, step: int) -> None: ...  # after every optimiser step
    def export(self, run: Run) -> None: ...


def seconds(flag: str, text: str | None) -> float | None:
    """90s, 25m, 2h or plain seconds."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in "smh" else (text, "s")
    try:
        found = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        found = 0.0
    if not found > 0:
        raise UsageError(f"{flag} {text}: not a duration", "write 90s, 25m or 2h")
    return found


def seed_for(seed: int, rank: int, step: int) -> int:
    """Noise of one step on one process: the same after a resume, different on every rank."""
    return (seed * 1_000_003 + rank) * 1_000_003 + step


class StopRequest:
    """SIGTERM and Ctrl-C become a flag that the loop reads once a step; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.exit_code: int | None = None

    @contextmanager
    def watching(self) -> Iterator["StopRequest"]:
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        codes = {signal.SIGTERM: 75, signal.SIGINT: 130}
        old = {s: signal.getsignal(s) for s in codes}

        def note(number: int, frame: Any) -> None:
            if self.exit_code == 130 and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.exit_code = codes[signal.Signals(number)]

        for s in codes:
            signal.signal(s, note)
        try:
            yield self
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


class Player:
    """What trains of a role, with its optimiser, average and gradient scale."""

    def __init__(
        self,
        net: nn.Module,
        config: TrainConfig,
        device: torch.device,
        *,
        lr: float,
        betas: tuple[float, float],
        averaged: bool,
        fp16: bool,
    ) -> None:
        self.params, self.lr = [p for p in net.parameters() if p.requires_grad], lr
        self.optimizer = torch.optim.AdamW(
            self.params, lr=lr, betas=betas, weight_decay=config.weight_decay, fused=device.type != "mps"
        )
        self.ema = EMA(self.params, config.ema) if config.ema and averaged else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=fp16)

    def state_dict(self) -> dict[str, Any]:
        return {
            "params": [p.detach() for p in self.params],
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for p, saved in zip(self.params, state["params"], strict=True):
                p.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])


class Trainer:
    """for step: for turn in method.losses(batch, step): for who in turn: backward into who; sync; clip; step; average; log."""

    MAX_BAD_STEPS = 10  # in a row
    PREPARED = 48  # samples that a method may look at before training
    PACED = 5  # steps that tell a phase's pace

    def __init__(self, method: Method, data: Data, run: Run, config: TrainConfig, accelerator: Any) -> None:
        self.method, self.data, self.run, self.config, self.accelerator = method, data, run, config, accelerator
        self.device = accelerator.device
        self.step, self.bad_steps = 0, 0
        self.latest: dict[str, float] = {}  # of every logged figure: not every player trains at every step
        self.preview: Callable[[int], None] | None = None
        self.measure: Callable[[], dict[str, float]] | None = None  # has `drift`, the figure that decides
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
            torch.manual_seed(seed_for(config.seed, 7_919, index))  # new networks are the same on every process
            enter(self.phase)
        for part in vars(method).values():
            if isinstance(part, nn.Module):
                part.to(self.device)
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
        self.best: dict[str, Any] = {"step": 0, "drift": float("inf"), "params": [], "worse": 0}
        self.entered_s = self.elapsed_s

    @property
    def end(self) -> int:
        return self.phase.start + self.phase.steps

    @property
    def total(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def fit(self) -> None:
        """Train through all phases; on SIGTERM or Ctrl-C save and raise Stopped."""
        with StopRequest().watching() as stop, console.progress(self.total, "training") as bar:
            bar.update(self.step)
            for index in range(self.index, len(self.phases)):
                if index > self.index:
                    self.enter(index)
                self.fit_phase(stop, bar)
                self.leave()
        self.save()

    def fit_phase(self, stop: StopRequest, bar: Any) -> None:
        while self.step < self.end:
            began = time.monotonic()
            row = self.train_step()
            self.step += 1
            self.elapsed_s += time.monotonic() - began
            self.fit_budget()
            bar.update(1, loss=row["loss"])
            self.latest |= row
            if self.step % 10 == 0 or self.step == self.end:
                self.log(self.latest)
            if stop.exit_code is not None:
                self.save()
                raise Stopped(
                    f"stopped at step {self.step} of {self.total}; the state is in {self.run.state_folder}",
                    f"go on with: fastdiff {self.run.command} --config {self.run.folder / 'config.toml'}",
                    exit_code=stop.exit_code,
                )
            if self.step % self.config.save_every == 0 and self.step < self.total:
                self.save()
            if self.preview and self.config.preview_every and self.step % self.config.preview_every == 0:
                with self.averaged():
                    self.preview(self.step)
            if self.config.eval_every and self.step % self.config.eval_every == 0 and self.evaluate():
                self.phase.steps = self.step - self.phase.start

    def fit_budget(self) -> None:
        """Once a phase, when its pace is known: as many steps as fit in its part of the time that is left."""
        phase, done = self.phase, self.step - self.phase.start
        if self.budget_s is None or phase.settled or done < self.PACED:
            return
        left = (self.budget_s - self.entered_s) * phase.steps / sum(p.steps for p in self.phases[self.index :])
        fits = torch.tensor(int(left / ((self.elapsed_s - self.entered_s) / done)), device=self.device)
        phase.settled = True
        if self.accelerator.num_processes > 1:  # one clock decides for all
            from accelerate.utils import broadcast

            fits = broadcast(fits)
        if fits < phase.steps:
            phase.steps = max(int(fits), done)
            console.info(f"--max-time {self.config.max_time}: {phase.steps} steps {phase.name}".rstrip())

    def leave(self) -> None:
        """The phase is over: what it made is written, and the next one goes on from that."""
        with self.exported():
            if self.measure and self.phase.exports and self.config.eval_every and self.step % self.config.eval_every:
                found = self.measure()
                self.log({"step": self.step - 1, **found})
                console.info(f"{self.phase.name or 'end'}: drift {found['drift']:.3f}")
            if self.finished and self.phase.exports:
                self.finished(self.phase)
            params = next(iter(self.players.values())).params
            made = [p.detach().clone() for p in params] if self.index + 1 < len(self.phases) else []
        with torch.no_grad():
            for p, value in zip(params, made, strict=False):
                p.copy_(value)
        self.phase.settled = True

    def train_step(self) -> dict[str, float]:
        """One pass over all turns of the method, micro-batches in lock-step: their generators advance together,

        so that a turn's update is made before any micro-batch starts the next turn. Returns the logged figures.
        """
        seed = seed_for(self.config.seed, self.accelerator.process_index, self.step)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        n, shared = self.config.grad_accum, torch.Generator().manual_seed(seed_for(self.config.seed, 15_485_863, self.step))
        batches = [self.data.batch(self.config.batch_size, generator, shared).to(self.device) for _ in range(n)]
        turns = [self.method.losses(batch, self.step) for batch in batches]
        row: dict[str, float] = {"step": self.step, "loss": 0.0}
        while True:
            moved: list[str] = []
            for turn in turns:
                with self.accelerator.autocast():
                    players = next(turn, {})
                moved = list(players)
                for who in moved:
                    player, terms = self.players[who], players.pop(who)  # nothing may hold a graph longer than it is needed
                    loss = sum(terms.values()) / n
                    player.scaler.scale(loss).backward(inputs=player.params)
                    for name, value in terms.items():
                        row[f"{who}/{name}"] = row.get(f"{who}/{name}", 0.0) + value.item() / n
                    row["loss"] += loss.item()
                    del terms, loss
            if not moved:
                return row
            for who in moved:
                row[f"{who}/grad_norm"] = self.update(self.players[who])
            self.method.updated(self.step)

    def update(self, player: Player) -> float:
        """Average gradients over processes, clip, step; a non-finite step is skipped, ten in a row end the run."""
        config = self.config
        done = self.step - self.phase.start
        rate = player.lr * min(1.0, (done + 1) / max(1, config.warmup))
        if config.lr_schedule == "cosine":
            rate *= 0.5 + 0.5 * torch.cos(torch.tensor(done / self.phase.steps * torch.pi)).item()
        for group in player.optimizer.param_groups:
            group["lr"] = rate
        player.scaler.unscale_(player.optimizer)
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(torch.cat([p.grad.flatten() for p in player.params]), "mean")
            for p, g in zip(player.params, flat.split([p.numel() for p in player.params]), strict=True):
                p.grad.copy_(g.view_as(p))
        norm = nn.utils.clip_grad_norm_(player.params, config.max_grad_norm)
        if norm.isfinite():
            self.bad_steps = 0
            player.scaler.step(player.optimizer)
            if player.ema:
                player.ema.update()
        elif not player.scaler.is_enabled():  # with fp16 an overflow is how the scale is found
            self.bad_steps += 1
            console.warn(f"step {self.step}: the gradient is not finite; skipped")
            if self.bad_steps >= self.MAX_BAD_STEPS:
                raise RuntimeError(f"{self.bad_steps} bad steps in a row; the last good state is in {self.run.state_folder}")
        player.scaler.update()
        player.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def evaluate(self) -> bool:
        """Measure the student as it would be exported and keep it if it is the best so far; True where it is time to stop."""
        assert self.measure is not None
        player, best = next(iter(self.players.values())), self.best
        with self.averaged():
            found = self.measure()
            if found["drift"] < best["drift"]:
                best |= {"step": self.step, "drift": found["drift"], "worse": 0}
                best["params"] = [p.detach().cpu().clone() for p in player.params]
            else:
                best["worse"] += 1
        self.log({"step": self.step - 1, **found})
        if best["worse"]:
            more = 100 * (found["drift"] / best["drift"] - 1)
            console.info(f"drift {found['drift']:.3f}; best at {best['step']}, now worse by {more:.0f} %")
        else:
            console.info(f"drift {found['drift']:.3f}, the least so far")
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
        if self.accelerator.is_main_process:
            extra = {k: v.state_dict() for k, v in getattr(self.method, "extra_state", {}).items()}
            players = {k: p.state_dict() for k, p in self.players.items()}
            state = {"step": self.step, "players": players, "extra": extra, "best": self.best, "elapsed_s": self.elapsed_s}
            state |= {"phase": self.index, "entered_s": self.entered_s, "outputs": self.run.written()}
            state["lengths"] = [phase.steps if phase.settled else None for phase in self.phases]
            self.run.save_state(state)
        self.accelerator.wait_for_everyone()

    def restore(self, state: dict[str, Any]) -> None:
        for phase, steps in zip(self.phases, state["lengths"], strict=True):
            phase.settled = steps is not None and len(self.phases) > 1
            phase.steps = steps if phase.settled else phase.steps
        if state["phase"]:
            self.enter(state["phase"])
        for k, part in getattr(self.method, "extra_state", {}).items():
            part.load_state_dict(state["extra"][k])
        for k, player in self.players.items():
            player.load_state_dict(state["players"][k])
        self.step, self.best = state["step"], state["best"]
        self.elapsed_s, self.entered_s = state["elapsed_s"], state["entered_s"]
        self.run.outputs = [self.run.folder / name for name in state["outputs"]]
        self.run.drop_log_after(self.step)
