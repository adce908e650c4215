"""What several processes run in the tests: `torchrun tests/together.py KIND FOLDER ...`."""

import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

torch.set_num_threads(1)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def halves(get, done=0):
    """A batch is its number's: two processes take one each of what one process takes as two micro-batches."""
    from fastdiff.training.trainer import Trainer

    calls = [done]

    def batch(self, size, generator, shared=None):
        number = 2 * calls[0] + RANK if WORLD == 2 else calls[0]
        calls[0] += size != Trainer.PREPARED  # what a method looks at before training is nobody's half
        found = get(self, size, torch.Generator().manual_seed(number))
        object.__setattr__(found, "key", number)
        return found

    return batch


def same_noise(losses):
    """Noise of the batch's number, whatever other micro-batches draw between two turns of this one."""

    def seeded(self, batch, step):
        turns, state = losses(self, batch, step), torch.Generator().manual_seed(1000 + batch.key).get_state()
        while True:
            torch.set_rng_state(state)
            turn = next(turns, None)
            state = torch.get_rng_state()
            if turn is None:
                return
            yield turn

    return seeded


def keyed(to):
    def moved(self, device):
        found = to(self, device)
        object.__setattr__(found, "key", self.key)
        return found

    return moved


def toy_losses(self, batch, step):
    """Noise of the batch's number, so that one process draws what two do."""
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1000 + batch.key))
    self.noise.append(noise)
    y = self.student(batch.latents + noise)
    yield {"judge": {"judge": (self.judge(y.detach()) - 1).square().mean()}}
    yield {"student": {"student": (y - 0.5).square().mean() + 0.1 * self.judge(y).square().mean()}}


def toy_run(name, into, *options):
    """The toy on halves of one global batch: `shard`; `save` ends at step 3, `resume` goes on from there; `own` noise and

    items of each process, where the second one's loss is NaN at step 2; `stop` by a signal to the second; `missing`: the second
    process never gets a gradient of the student's last parameter.
    """
    import toy

    from fastdiff.data.batch import Batch
    from fastdiff.models import sharding

    before = toy.Data.batch, Batch.to, toy.Toy.losses
    try:
        if "own" not in options:
            done = 3 * 2 // WORLD if "resume" in options else 0
            toy.Data.batch, Batch.to, toy.Toy.losses = halves(toy.Data.batch, done), keyed(Batch.to), toy_losses
        bad = {(2, "student"): float("nan")} if "own" in options and RANK == 1 else None
        steps, shard = 3 if "save" in options else 5, "shard" in options
        trainer = toy.trainer_of(into, bad, steps=steps, grad_accum=2 // WORLD, batch_size=2, shard=shard, save_every=99)
        first = sharding.whole([p.detach().clone() for p in trainer.players["student"].params], everywhere=True)
        if "resume" in options:
            assert toy.go_on(trainer) == 3
        if "stop" in options and RANK == 1:
            step = trainer.train_step
            trainer.train_step = lambda: (trainer.step == 2 and os.kill(os.getpid(), signal.SIGTERM), step())[1]
        if "missing" in options and RANK == 1:
            student = trainer.players["student"]
            backward = student.backward
            student.backward = lambda *args: (backward(*args), setattr(student.params[-1], "grad", None))
        error = None
        try:
            trainer.fit()
        except Exception as found:
            error = f"{type(found).__name__}: {found}"
    finally:
        toy.Data.batch, Batch.to, toy.Toy.losses = before
    told = {
        "weights": {k: sharding.whole([p.detach() for p in v.params], everywhere=True) for k, v in trainer.players.items()},
        "ema": sharding.whole(trainer.players["student"].ema.shadow, everywhere=True),
        "split": [sharding.is_split(p) for p in trainer.players["student"].params],
        "noise": trainer.method.noise,
        "seen": trainer.method.seen,
        "first": first,
        "error": error,
        "step": trainer.step,
    }
    torch.save(told, f"{name}-{RANK}.pt")


def toy_runs(*runs):
    """Each `name:folder:option:...`, one after another in the same processes."""
    for run in runs:
        toy_run(*run.split(":"))


def command_runs(path):
    """Training commands one after another in the same processes, each on halves of one global batch; a JSON list of them."""
    import json
    from importlib import import_module

    from accelerate import Accelerator

    from fastdiff import cli
    from fastdiff.data.batch import Batch, Encoded
    from fastdiff.runtime import processes

    get, Batch.to = Encoded.batch, keyed(Batch.to)
    for module in [import_module(c.place.partition(":")[0], "fastdiff") for c in cli.COMMANDS]:
        for method in vars(module).values():
            if isinstance(method, type) and hasattr(method, "losses") and method.__module__ == module.__name__:
                method.losses = same_noise(method.losses)
    Accelerator.end_training, processes.leave = lambda self: None, lambda: None  # they would part the processes
    adam = torch.optim.AdamW
    for args in json.loads(Path(path).read_text()):
        Encoded.batch = halves(get)
        # Feature matching has gradients next to nothing, whose seventh digit Adam would make a whole step of.
        torch.optim.AdamW = partial(adam, eps=1e-4) if args[0] == "sdxs" else adam
        if code := cli.main([*args, "--json"]):
            sys.exit(code)


def elastic_run(folder):
    """The toy, of which the second process dies at step 4 when it is first started."""
    import toy

    trainer = toy.trainer_of(folder, steps=8, resume="never")
    from fastdiff.training import resume

    state = resume.find(trainer.run, trainer.config)
    if state:
        trainer.restore(state)
    sys.stdout.write(f"started at {trainer.step}\n")  # print would write in parts, between those of the other process
    real = trainer.train_step

    def step():
        if trainer.step == 4 and RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real()

    trainer.train_step = step
    trainer.fit()
    sys.stdout.write(f"ended at {trainer.step}\n")


if __name__ == "__main__":
    {"toy": toy_runs, "commands": command_runs, "elastic": elastic_run}[sys.argv[1]](*sys.argv[2:])
    from fastdiff.runtime import processes

    processes.leave()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)  # all is written; on a busy machine torch's threads can abort an interpreter that is being taken down
