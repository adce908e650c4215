"""Saves the state of a run, resumes from it, and refuses to resume with options that would make it another run."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff.models import sharding
from fastdiff.runtime import console, processes, rng
from fastdiff.runtime.config import options
from fastdiff.runtime.errors import Failed, InputRefused, UsageError
from fastdiff.training.run import Run
from fastdiff.training.states import manifest_of

if TYPE_CHECKING:
    from fastdiff.training.trainer import Trainer

# Options that may change when a run is resumed: where it writes, how long it trains, how it is watched, what it runs on.
FREE = {
    *("output", "resume", "save_every", "keep_states", "preview_every", "eval_every", "keep", "patience", "tracker", "proof"),
    *("steps", "max_time", "max_bad_steps", "device", "gradient_checkpointing", "offload", "shard", "allow_pickle"),
}


def values_of(config: Any) -> dict[str, Any]:
    """Return the options of a config as {name: value}, with values as they come back from JSON."""
    return console.jsonable({o.name: vars(config)[o.name] for o in options(type(config))})


def find(run: Run, config: Any) -> dict[str, Any] | None:
    """Load the state that `resume` asks for, the same on every process; None where the run starts from its beginning.

    UsageError where another run folder has no state, or where this folder holds a run of another command or other options.
    InputRefused where the state is damaged, or is not on a disk that all machines share.
    """
    if config.resume == "never" and not restarted():
        run.states.superseded |= set(run.states.paths())
        return None
    elsewhere = config.resume not in {"auto", "never"}
    source = Run(Path(config.resume)) if elsewhere else run
    name: str | None = None
    error: UsageError | None = None
    if processes.first():  # one process checks the hashes for all
        try:
            path = source.states.newest()
            if path and not elsewhere:
                refuse_changes(run, config, manifest_of(path))
            name = path.name if path else None
        except UsageError as problem:
            error = problem
    name, failed = processes.agreed((name, error and str(error)))
    if failed:
        raise error or Failed(failed)
    if elsewhere and source.state_folder != run.state_folder:
        run.states.superseded |= set(run.states.paths())
    if name is None:
        if elsewhere:
            raise UsageError(f"`resume={config.resume}`: no state in that run folder")
        return None
    path = source.state_folder / name
    if not path.exists():
        raise InputRefused(f"{path}: not on this machine", "all machines need `output` on a disk that they share")
    return source.states.load(path)


def restarted() -> bool:
    """Whether torchrun restarted these processes after a failure: then the run goes on, even with `resume=never`.

    torchrun counts restarts on each machine separately, so the highest count of all processes decides.
    """
    return processes.highest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))) > 0


def refuse_changes(run: Run, config: Any, manifest: dict[str, Any]) -> None:
    """Raise UsageError where the run in this folder is of another command, or was begun with other options."""
    if manifest["command"] != run.command:
        raise UsageError(f"{run.folder}: is a run of {manifest['command']}", "give another `output`, or `resume=never`")
    now, then = values_of(config), manifest["config"]
    changed = [k for k in now if k not in FREE and k in then and now[k] != then[k]]
    if changed:
        differences = ", ".join(f"`{k}={as_text(then[k])}` (now {as_text(now[k])})" for k in changed)
        # No optimiser can go on from the moments of another.
        with_new = "" if "optimizer" in changed else f", or `resume={run.folder}` to go on with the new ones"
        raise UsageError(
            f"{run.folder}: its run was begun with {differences}",
            f"repeat them{with_new}, or `resume=never` to begin anew",
        )


def as_text(value: Any) -> str:
    """Format an option's value for a message."""
    return value if isinstance(value, str) else json.dumps(value)


def save(trainer: "Trainer") -> None:
    """Write a trainer's state. Every process must call it, for each adds its random state and its place in the data.

    DoesNotFit where the disk is full, Failed on other errors of the disk.
    """
    method, run = trainer.method, trainer.run
    own = {"rng": rng.state_dict(), "data": trainer.data.state_dict()}
    state: dict[str, Any] = {
        "step": trainer.step,
        "players": {k: p.state_dict() for k, p in trainer.players.items()},
        "extra": {k: v.state_dict() for k, v in method.state().items()},
        "best": trainer.best,
        "kept": trainer.kept,
        "latest": trainer.latest,
        "elapsed_s": trainer.elapsed_s,
        "entered_s": trainer.entered_s,
        "phase": trainer.index,
        "lengths": [n if settled else None for n, settled in zip(trainer.lengths, trainer.settled, strict=True)],
        "length": trainer.lengths[trainer.index],
        "bend": list(trainer.bend),
        "fraction": trainer.now.fraction,
        "owed": trainer.owed,
        "outputs": run.written(),
        "rows": run.rows(),
        "parent": method.parent,
        "processes": processes.every(own),
    }
    state = sharding.whole(state)
    error: UsageError | None = None
    if processes.first():
        try:
            config = values_of(trainer.config)
            run.states.save(state, trainer.config.keep_states, command=run.command, config=config)
        except UsageError as problem:
            error = problem
    if failed := processes.agreed(error and str(error)):
        raise error or Failed(failed)


def restore(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Bring a fresh trainer to where a saved state was. InputRefused where it is of another base or of other networks."""
    method, run = trainer.method, trainer.run
    if "length" not in state:
        raise InputRefused(f"{run.folder}: a state of an earlier fastdiff", "start again with `resume=never`")
    if state["parent"] != method.parent:
        raise InputRefused(f"{run.folder}: its state is of another base", "give the same `base`, or `resume=never`")
    for i, steps in enumerate(state["lengths"]):
        if steps is not None and len(trainer.phases) > 1:
            trainer.settled[i], trainer.lengths[i] = True, steps
    if state["phase"]:
        trainer.enter(state["phase"])
    for k, part in method.state().items():
        part.load_state_dict(state["extra"][k])
    for k, player in trainer.players.items():
        try:
            player.load_state_dict(state["players"][k])
        except (KeyError, ValueError) as error:
            problem = f"{run.folder}: its state does not fit this run ({k}: {error})"
            raise InputRefused(problem, "start again with `resume=never`") from error
    for name in ("step", "best", "latest", "elapsed_s", "entered_s", "owed"):
        setattr(trainer, name, state[name])
    trainer.kept = state["kept"]
    # Schedules go on as before. If the phase now has another length, they go from the saved fraction to the new end.
    same = state["length"] == trainer.lengths[trainer.index]
    trainer.bend = tuple(state["bend"]) if same else (trainer.step - trainer.start, state["fraction"])
    if len(state["processes"]) == processes.count():
        own = state["processes"][trainer.accelerator.process_index]
        rng.load_state_dict(own["rng"])
        trainer.data.load_state_dict(own["data"])
    else:
        console.info(
            f"the state was saved by {len(state['processes'])} processes, this run has {processes.count()}: "
            "from here on it draws other random numbers than the uninterrupted run"
        )
    run.outputs = [run.folder / name for name in state["outputs"]]
    if processes.first():
        run.drop_log_after(trainer.step, state["rows"])
