"""One training command from config to files: base -> data -> method -> trainer -> weights, pictures, table, card."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Data
from fastdiff.data.images import Framing
from fastdiff.data.open import open_data
from fastdiff.lora import adapters, apply
from fastdiff.models import sharding
from fastdiff.models.denoiser import Denoiser
from fastdiff.runtime import console, disk, processes
from fastdiff.runtime.config import to_toml
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import DoesNotFit, Result, UsageError
from fastdiff.training import resume
from fastdiff.training.card import write_card
from fastdiff.training.config import TrainConfig, seconds
from fastdiff.training.method import Method, Phase
from fastdiff.training.previews import Judged, Measured, Preview
from fastdiff.training.run import Run
from fastdiff.training.trainer import Trainer


def data_of(base: Checkpoint, config: TrainConfig, device: torch.device) -> Data:
    """What the options of a training command ask for, encoded; who samples it wears a method's `teacher_loras`."""
    if worn := [lora.parse_spec(spec, 1.0) for spec in getattr(config, "teacher_loras", [])]:
        base = config.open_base(base.dtype)  # another one: the method's own stays as it is
        apply.apply(base, [(lora.load(path, allow_pickle=config.allow_pickle).of_unet(), weight) for path, weight in worn])
    data = open_data(
        base,
        config.data,
        prompts=config.prompts,
        resolution_px=config.resolution or base.resolution_px,
        pairs=config.pairs,
        seed=config.seed,
        device=device,
        sampling=config.teacher_sampling(base.family),
        wants=config.wants,
        framing=Framing(config.resolution or base.resolution_px, config.buckets, config.random_crops, config.flip),
        max_images=config.max_images,
    )
    data.empty_prompts = config.empty_prompts
    return data


def default_folder(command: str, config: TrainConfig) -> Path:
    """Where a command writes that is not told where."""
    return Path("runs") / f"{command}-{Path(config.base).stem or config.base}"


def open_run(command: str, config: TrainConfig) -> Run:
    """The run folder, and whether the options go together."""
    if not config.eval_every and (config.keep == "best" or config.patience):
        flag = "--keep best" if config.keep == "best" else f"--patience {config.patience}"
        raise UsageError(f"{flag}: nothing is measured", "give --eval-every too")
    seconds("--max-time", config.max_time)
    return Run(Path(config.output) if config.output else default_folder(command, config), command)


def find_state(run: Run, config: TrainConfig) -> dict[str, Any] | None:
    """The state to go on from; another run's folder is never overwritten by accident."""
    state = resume.find(run, config)
    if state and state["step"] > config.steps:
        raise UsageError(
            f"--steps {config.steps}: {run.folder} is already at step {state['step']}", "give more, or --resume never"
        )
    return state


def check_room(trainer: Trainer, base: Checkpoint) -> None:
    """DoesNotFit where the disk cannot take the states and the weights; told before the first step."""
    student, phases = next(iter(trainer.players.values())), [phase for phase in trainer.phases if phase.exports]
    weights = sum(p.numel() * p.element_size() for p in student.params)
    net = getattr(trainer.method.student, "net", None)
    if net is not None and weights >= sum(p.numel() * p.element_size() for p in net.parameters()):
        files = [base.path] if base.path.is_file() else base.path.rglob("*.safetensors")
        weights += sum(p.stat().st_size for p in files)  # a whole checkpoint is written
    run, keep = trainer.run, trainer.config.keep_states
    states = trainer.state_bytes * max(1, keep + 1 - len(run.states.paths()))  # the next is written before the oldest goes
    need, free = states + weights * len(phases), disk.free_bytes(run.folder)
    if need > free:
        raise DoesNotFit(
            f"--output {run.folder}: its disk has {free / 2**30:.2f} GiB free, the run needs {need / 2**30:.2f}: "
            f"{keep + 1} states of {trainer.state_bytes / 2**30:.2f} and the weights",
            "free some, choose another --output, or --keep-states 1",
        )


def start(run: Run, config: TrainConfig, resumed: bool) -> None:
    """Make the run folder: only now are the base, the data and the room known to be good."""
    if not processes.first():
        return
    (run.folder / "previews").mkdir(parents=True, exist_ok=True)
    if not resumed:
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    # Whoever gives this file again wants to go on, also after a run that was begun with --resume never.
    write_atomic(run.folder / "config.toml", to_toml(replace(config, resume="auto")))


PATIENCE = timedelta(hours=2)  # that processes wait for one that draws a sheet, or samples a longer share of the data


def open_accelerator(config: TrainConfig, run: Run) -> Any:
    from accelerate import Accelerator, InitProcessGroupKwargs

    cpu = config.device == "cpu" or (
        config.device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device on this machine")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_available() else "fp32"
    if config.shard and precision == "fp16":
        raise UsageError("--shard: not in fp16, whose scale of the loss is each process's own", "use --precision bf16")
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and not find_spec(tracker):
        raise UsageError(f"--tracker {tracker}: {tracker} is not installed", f'pip install "fastdiff[{tracker}]"')
    if not cpu and torch.cuda.is_available():
        processes.join("nccl", PATIENCE)
    elif cpu:
        processes.join("gloo", PATIENCE)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=tracker,
        project_dir=run.folder,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if tracker:
        accelerator.init_trackers("fastdiff")
    return accelerator


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_base(config: TrainConfig, accelerator: Any) -> Checkpoint:
    return config.open_base(DTYPES[accelerator.mixed_precision])


@dataclass
class Session:
    """An open run: what there is before there is a method."""

    config: TrainConfig
    run: Run
    state: dict[str, Any] | None  # to go on from
    accelerator: Any
    base: Checkpoint

    def fit(
        self,
        method: Method,
        data: Data,
        sheet: Callable[[], Any],
        measure: Callable[[], dict[str, float]] | None = None,
    ) -> Trainer:
        """Train; every phase that writes leaves weights and a contact sheet."""
        config, run = self.config, self.run
        trainer = Trainer(method, data, run, config, self.accelerator)
        check_room(trainer, self.base)
        start(run, config, resumed=self.state is not None)
        if self.state:
            console.info(f"going on from step {self.state['step']} of {config.steps}")
            trainer.restore(self.state)

        def draw(name: str) -> Path:
            path, picture = run.folder / "previews" / f"{name}.png", sheet()
            if processes.first():
                picture.save(path)
            return path

        trainer.preview = lambda step: draw(f"{step:06d}")
        trainer.measure = measure

        def write(into: Run) -> None:
            roles = [part for part in vars(method).values() if isinstance(part, Denoiser)]
            with sharding.gathered([method, *roles]) if trainer.sharded else nullcontext():
                if processes.first():
                    method.export(into)

        trainer.improved = lambda: write(Run(run.folder / "best", run.command))

        def finished(phase: Phase) -> None:
            write(run)
            alone = sum(p.exports for p in trainer.phases) == 1
            run.wrote(draw("final" if alone else phase.name))

        trainer.finished = finished
        with console.timed("training_s"):
            trainer.fit()
        self.accelerator.end_training()
        return trainer


def open_session(command: str, config: TrainConfig) -> Session:
    """Run folder, devices and base; from here on all processes draw the same initialisations."""
    run = open_run(command, config)
    accelerator = open_accelerator(config, run)
    session = Session(config, run, find_state(run, config), accelerator, load_base(config, accelerator))
    torch.manual_seed(config.seed)
    return session


def train(command: str, method_class: Callable[[Checkpoint, Any], Method], config: Any) -> Result:
    """Run a training command; returns what it wrote and measured."""
    session = open_session(command, config)
    base, run, accelerator = session.base, session.run, session.accelerator
    resolution_px = config.resolution or base.resolution_px
    with console.timed("data_s"):
        preview = Preview(base, config, resolution_px, accelerator.device)
        judged = base.family == "emoji" and config.proof > 0
        judge = Judged(base, config.proof, accelerator.device) if judged else None
        measured = Measured(base, config, resolution_px, accelerator.device) if config.eval_every else None
        data = data_of(base, config, accelerator.device)
        base.release("text_encoders", "tokenizers", "vae")
    base.unet.to(accelerator.device)
    method = method_class(base, config)
    with console.timed("data_s"):
        preview.begin(method)
        if judge:
            judge.begin(method)
    measure = (lambda: measured.measure(method)) if measured else None
    trainer = session.fit(method, data, lambda: preview.sheet(method), measure)
    metrics: dict[str, Any] = {"steps": trainer.step, **getattr(method, "facts", {})}
    if trainer.kept:
        alone = sum(phase.exports for phase in trainer.phases) == 1
        metrics["best"] = next(iter(trainer.kept.values())) if alone else trainer.kept
    if not accelerator.is_main_process:
        return Result()
    if judge:
        with console.timed("proof_s"):
            metrics |= judge.prove(run.weights(), config)
    weights = run.weights()[-1]
    is_lora = weights.suffix == ".safetensors"
    parent = config.open_student() if is_lora else base
    write_card(run, parent, method, config, metrics)
    where = f"--base {parent.ref} --lora {weights}" if is_lora else f"--base {weights}"
    if getattr(config, "vae", None):
        where += f" --vae {config.vae}"
    return Result(run.outputs, metrics, f'fastdiff sample {where} --prompt "{preview.prompts[0]}"')


def write_student(method: Method, run: Run, lora_alpha: float | None, name: str | None = None) -> None:
    """A LoRA file in the layout that every program loads, or without an alpha a diffusers folder.

    `name` without suffix; by default the method's for the file, `model` for the folder.
    """
    recipe, base = replace(method.recipe, parent=method.parent), method.base_model
    if lora_alpha is None:
        path = run.folder / (name or "model")
        write.to_folder(base.with_unet(method.student.net, method.student.kind), path, recipe=recipe)
    else:
        path = run.folder / f"{name or recipe.method}.safetensors"
        adapters.save_adapter(method.student, path, recipe=recipe, alpha=lora_alpha)
    run.wrote(path)
