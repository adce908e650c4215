"""Every training command in processes of its own: once to the end, once stopped by a signal and started again.

`python tests/killed.py FOLDER BASE CONTROLNET PRUNED COMMAND:SIGNAL...` prints what came of each. Everything heavy is imported
once; each run is a fork, which torch allows as long as nothing here has called backward().
"""

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch
from tiny import arguments, few_teacher_steps
from toy import child, same

torch.set_num_threads(1)
STEPS, EVERY, DIES = 12, 5, 7


def command(args, number=None):
    """The command; at the beginning of a step the process sends itself that signal."""
    from fastdiff import cli
    from fastdiff.training.trainer import Trainer

    real = Trainer.train_step

    def step(trainer):
        if number and trainer.step == DIES:
            os.kill(os.getpid(), number)
        row = real(trainer)
        Path("step").write_text(str(time.monotonic()))
        return row

    Trainer.train_step = step
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        code = cli.main([*args, "--json"])
    if code:
        raise SystemExit(code)


def left_by(folder):
    """What two runs must agree on: the files of weights, the state (weights, averages, moments), and the log but for the time."""
    from fastdiff.training.states import States

    states = States(folder / "state")
    state = states.load(states.newest())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.safetensors")}
    return {
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()},
        "log": [{k: v for k, v in row.items() if k not in {"time", "elapsed_s"}} for row in rows],
        **{k: state[k] for k in ("step", "phase", "players", "extra", "best", "latest")},
    }


def compared(name, number, *places):
    """How the processes ended, the second how long after its last step, where the third went on, and what differs in the end."""
    args = [*arguments(name, *places), "--steps", str(STEPS), "--save-every", str(EVERY), "-o"]
    codes = [child(lambda: command([*args, f"{name}-whole"])).wait()]
    codes.append(child(lambda: command([*args, f"{name}-parts"], number)).wait())
    late_s = time.monotonic() - float(Path("step").read_text())
    at = sorted(p.name for p in Path(f"{name}-parts/state").iterdir())
    codes.append(child(lambda: command([*args, f"{name}-parts"])).wait())
    a, b = (left_by(Path(f"{name}-{run}")) for run in ("whole", "parts"))
    players = a["players"].values()
    return {
        "codes": codes,
        "late_s": late_s,
        "at": at,
        "files": len(a["files"]),
        "rows": len(a["log"]),
        "players": list(a["players"]),
        "averaged": sum(player["ema"] is not None for player in players),
        "differ": [k for k in a if not same(a[k], b[k])],
    }


if __name__ == "__main__":
    import diffusers  # noqa: F401
    import peft  # noqa: F401

    from fastdiff.checkpoints import checkpoint
    from fastdiff.sampling.settings import Settings

    Settings.usual = few_teacher_steps(Settings.usual)
    folder, *places = sys.argv[1:5]
    os.chdir(folder)
    os.environ["FASTDIFF_CACHE"] = "cache"
    Path("prompts.txt").write_text("a cat\na dog\n")
    checkpoint.load(places[0]).pipeline()
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    torch.optim.AdamW([weight]).step()  # what torch imports only now would take every child seconds
    for told in sys.argv[5:]:
        name, number = told.split(":")
        print(json.dumps({"command": name, **compared(name, signal.Signals[number], *places)}), flush=True)
