"""What several processes run in the tests: `torchrun tests/together.py KIND FOLDER ...`."""

import os
import signal
import sys

import torch

torch.set_num_threads(1)
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def halves(get):
    """A batch is its number's: two processes take one each of what one process takes as two micro-batches."""
    calls = [0]

    def batch(self, size, generator):
        number = 2 * calls[0] + RANK if WORLD == 2 else calls[0]
        calls[0] += 1
        found = get(self, size, torch.Generator().manual_seed(number))
        object.__setattr__(found, "key", number)
        return found

    return batch


def same_noise(losses):
    def seeded(self, batch, step):
        torch.manual_seed(1000 + batch.key)
        yield from losses(self, batch, step)

    return seeded


def keyed(to):
    def moved(self, device):
        found = to(self, device)
        object.__setattr__(found, "key", self.key)
        return found

    return moved


def toy_run(folder, *options):
    """The toy on halves of one global batch; `save` at step 3 and leave, or `resume` from there."""
    import toy

    from fastdiff.data import Batch

    toy.Data.batch, Batch.to = halves(toy.Data.batch), keyed(Batch.to)
    real = toy.Toy.losses

    def losses(self, batch, step):
        with torch.random.fork_rng():
            torch.manual_seed(1000 + batch.key)
            noise = torch.randn(batch.latents.shape)
        self.noise.append(noise)
        batch = type(batch)(batch.latents + noise, batch.cond, batch.uncond, items=batch.items)
        y = self.student(batch.latents)
        yield {"judge": {"judge": (self.judge(y.detach()) - 1).square().mean()}}
        yield {"student": {"student": (y - 0.5).square().mean() + 0.1 * self.judge(y).square().mean()}}

    toy.Toy.losses = losses if "noise" not in options else real
    shard = "shard" in options
    bad = {(2, "student"): float("nan")} if "nan" in options and RANK == 1 else None
    if bad:
        plain = toy.Toy.losses

        def losses(self, batch, step):
            for turn in plain(self, batch, step):
                yield {k: {n: v * self.bad.get((step, k), 1.0) for n, v in terms.items()} for k, terms in turn.items()}

        toy.Toy.losses = losses
    steps = 3 if "save" in options else 5
    trainer = toy.trainer_of(folder, bad, steps=steps, grad_accum=2 // WORLD, batch_size=2, shard=shard, save_every=99)
    if "resume" in options:
        assert toy.go_on(trainer) == 3
    if "stop" in options and RANK == 1:
        step = trainer.train_step
        trainer.train_step = lambda: (trainer.step == 2 and os.kill(os.getpid(), signal.SIGTERM), step())[1]
    first = [p.detach().clone() for p in trainer.method.student.parameters()] if not shard else []
    error = None
    try:
        trainer.fit()
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
    from fastdiff import sharding

    told = {
        "weights": {k: sharding.whole(list(p.params), everywhere=True) for k, p in trainer.players.items()},
        "ema": sharding.whole(trainer.players["student"].ema.shadow, everywhere=True),
        "split": [sharding.is_split(p) for p in trainer.players["student"].params],
        "noise": trainer.method.noise,
        "seen": trainer.method.seen,
        "first": first,
        "error": error,
        "step": trainer.step,
    }
    torch.save(told, f"{folder}-{WORLD}-{RANK}.pt")


def command_run(name, *args):
    """A training command on halves of one global batch."""
    from fastdiff import cli
    from fastdiff.data import Batch, Encoded
    from fastdiff.methods import dmd, lcm

    Encoded.batch, Batch.to = halves(Encoded.batch), keyed(Batch.to)
    for method in (lcm.LCM, dmd.DMD):
        method.losses = same_noise(method.losses)
    code = cli.main([name, *args, "--json"])
    sys.exit(code)


def elastic_run(folder):
    """The toy, of which the second process dies at step 4 when it is first started."""
    import toy

    trainer = toy.trainer_of(folder, steps=8, resume="never")
    from fastdiff import resume

    state = resume.find(trainer.run, trainer.config)
    if state:
        trainer.restore(state)
    print("started at", trainer.step, flush=True)
    real = trainer.train_step

    def step():
        if trainer.step == 4 and RANK == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return real()

    trainer.train_step = step
    trainer.fit()
    print("ended at", trainer.step, flush=True)


if __name__ == "__main__":
    {"toy": toy_run, "command": command_run, "elastic": elastic_run}[sys.argv[1]](*sys.argv[2:])
