"""A method of two players on a few numbers, for tests of the trainer: a step takes milliseconds."""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch
from fastdiff.models.denoiser import Cond
from fastdiff.options.train import TrainConfig
from fastdiff.training.method import Method, Trains
from fastdiff.training.run import Run
from fastdiff.training.session import open_accelerator
from fastdiff.training.trainer import Trainer


class Data:
    """Items are numbers; the position counts batches, as a stream's does."""

    def __init__(self):
        self.position = 0

    def batch(self, size, generator, shared=None):
        self.position += 1
        items = torch.randint(1000, (size,), generator=generator)
        x = items[:, None] / 1000 + torch.randn(size, 8, generator=generator)
        nothing = Cond(torch.zeros(size, 1, 1))
        return Batch(x, nothing, nothing, items=[f"item{i}" for i in items.tolist()])

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Toy(Method):
    """`bad` {(step, player): value} replaces a loss; `width` of the layers."""

    name, parent, recipe, _phases = "toy", "none", Recipe(), None

    def __init__(self, config, bad=None):
        self.config, width = config, config.width
        self._figures = {}
        make = lambda: nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 8))
        self.student, self.judge = make(), make()
        self.bad, self.noise, self.seen = bad or {}, [], []

    def phases(self):
        return self._phases or super().phases()

    def players(self, phase):
        return {
            "student": Trains(list(self.student.parameters()), averaged=True, net=self.student),
            "judge": Trains(list(self.judge.parameters()), net=self.judge),
        }

    def networks(self):
        return [self.student, self.judge]

    def losses(self, batch, now):
        x, step = batch.latents, now.step
        noise = torch.randn_like(x) + random.random() + np.random.rand()
        self.noise.append(noise)
        self.seen.append(batch.items)
        y = self.student(x + noise)
        loss = (self.judge(y.detach()) - x).square().mean()
        yield {"judge": {"judge": loss * self.bad.get((step, "judge"), 1.0)}}
        loss = (y - x).square().mean() + 0.1 * self.judge(y).square().mean()
        yield {"student": {"student": loss * self.bad.get((step, "student"), 1.0)}}

    def export(self, run): ...


@dataclass
class Config(TrainConfig):
    width: int = 16


def trainer_of(folder, bad=None, data=None, method=None, **changes):
    """A fresh trainer of the toy in that run folder."""
    config = Config(**{"steps": 12, "batch_size": 4, "device": "cpu", "ema": 0.9, "lr": 1e-2, "save_every": 1, **changes})
    torch.manual_seed(config.seed), random.seed(config.seed), np.random.seed(config.seed)
    run = Run(Path(folder), "toy")
    return Trainer((method or Toy)(config, bad), data or Data(), run, config, open_accelerator(config, run))


def go_on(trainer):
    """From the newest state, where there is one; returns at which step."""
    state = trainer.run.load_state()
    if state:
        trainer.restore(state)
    return trainer.step


def result(trainer):
    """What two runs of one config must agree on."""
    players = {k: [p.detach().clone() for p in player.params] for k, player in trainer.players.items()}
    return {"players": players, "ema": trainer.players["student"].ema.state_dict(), "position": trainer.data.position}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def child(work):
    """Run it in a fork of this process; returns how that ended (minus the signal's number), and kills with `kill`."""
    pid = os.fork()
    if pid:
        return SimpleNamespace(pid=pid, wait=lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    try:
        work()
        os._exit(0)
    except SystemExit as told:
        os._exit(told.code if isinstance(told.code, int) else int(told.code is not None))
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def crashes(folder, instants, seed=0):
    """Kill a run at so many random instants while it trains and saves at every step, go on, and tell of each.

    To be run by a process that has never called backward(): forks of one that has cannot.
    """
    folder, made = Path(folder), random.Random(seed)
    steps, told = 40, []

    def train(where):
        trainer = trainer_of(where, steps=steps, width=64)
        go_on(trainer)
        trainer.fit()
        torch.save(result(trainer), where / "result.pt")

    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()  # what torch imports only now would take every child seconds
    assert child(lambda: train(folder / "whole")).wait() == 0
    run = Run(folder / "parts", "toy")
    newest, rounds = 0, 0
    while len(told) < instants:
        known = run.states.paths()[-1:]
        one = child(lambda run=run: train(run.folder))
        while run.states.paths()[-1:] == known:  # until it has something of its own to lose
            time.sleep(0.001)
        before = int(run.states.paths()[-1].name[:6])
        time.sleep(made.random() * 0.3)
        os.kill(one.pid, signal.SIGKILL)
        code = one.wait()
        state = run.load_state()
        assert state is not None, told
        assert state["step"] >= max(newest, before), (told, state["step"], newest, before)
        newest = state["step"]
        if code:
            told.append((code, 1000 * rounds + newest))
        if newest >= steps - 8:  # the run has ended before it was killed, or nearly: a new one
            rounds, newest = rounds + 1, 0
            run = Run(folder / f"parts{rounds}", "toy")
    assert child(lambda: train(run.folder)).wait() == 0
    whole, parts = (torch.load(f / "result.pt", weights_only=True) for f in (folder / "whole", run.folder))
    assert same(whole, parts)
    print(told)


if __name__ == "__main__":
    torch.set_num_threads(1)
    crashes(sys.argv[1], int(sys.argv[2]))
