"""One training command from config to files: base -> data -> method -> trainer -> weights, pictures, table, card."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff import console, evaluate
from fastdiff.card import write_card
from fastdiff.config import to_toml
from fastdiff.console import Result, UsageError
from fastdiff.data import Data, Framing, open_data
from fastdiff.io import export, fitting, lora
from fastdiff.io.checkpoint import Checkpoint
from fastdiff.io.run import Run, write_atomic
from fastdiff.models import adapters
from fastdiff.proof import Judged, Preview, settings_of, watched
from fastdiff.trainer import Method, Phase, TrainConfig, Trainer, seconds


def data_of(base: Checkpoint, config: TrainConfig, device: torch.device) -> Data:
    """What the options of a training command ask for, encoded; who samples it wears a method's `teacher_loras`."""
    if worn := [lora.parse_spec(spec, 1.0) for spec in getattr(config, "teacher_loras", [])]:
        base = config.open_base(base.dtype)  # another one: the method's own stays as it is
        fitting.apply(base, [(lora.load(path, allow_pickle=config.allow_pickle).of_unet(), weight) for path, weight in worn])
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


def open_run(command: str, config: TrainConfig) -> tuple[Run, dict[str, Any] | None]:
    """The run folder and the state to go on from; another run's folder is never overwritten by accident."""
    if not config.eval_every and (config.keep == "best" or config.patience):
        flag = "--keep best" if config.keep == "best" else f"--patience {config.patience}"
        raise UsageError(f"{flag}: nothing is measured", "give --eval-every too")
    seconds("--max-time", config.max_time)
    run = Run(Path(config.output) if config.output else default_folder(command, config))
    run.command = command
    source = run if config.resume in {"auto", "never"} else Run(Path(config.resume))
    state = None if config.resume == "never" else source.load_state()
    if config.resume not in {"auto", "never"} and state is None:
        raise UsageError(f"--resume {config.resume}: no state in that run folder")
    if state and state["step"] > config.steps:
        raise UsageError(
            f"--steps {config.steps}: {run.folder} is already at step {state['step']}", "give more, or --resume never"
        )
    return run, state


def start(run: Run, config: TrainConfig, resumed: bool) -> None:
    """Make the run folder: only now are the base and the data known to be good."""
    (run.folder / "previews").mkdir(parents=True, exist_ok=True)
    if not resumed:
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    # Whoever gives this file again wants to go on, also after a run that was begun with --resume never.
    write_atomic(run.folder / "config.toml", to_toml(replace(config, resume="auto")))


def open_accelerator(config: TrainConfig, run: Run) -> Any:
    from accelerate import Accelerator

    cpu = config.device == "cpu" or (
        config.device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device on this machine")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if not cpu and torch.cuda.is_available() else "fp32"
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and not find_spec(tracker):
        raise UsageError(f"--tracker {tracker}: {tracker} is not installed", f'pip install "fastdiff[{tracker}]"')
    accelerator = Accelerator(
        cpu=cpu, mixed_precision="no" if precision == "fp32" else precision, log_with=tracker, project_dir=run.folder
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
        sheet: Callable[[Path], None],
        measure: Callable[[], dict[str, float]] | None = None,
    ) -> Trainer:
        """Train; every phase that writes leaves weights and a contact sheet."""
        config, run = self.config, self.run
        start(run, config, resumed=self.state is not None)
        trainer = Trainer(method, data, run, config, self.accelerator)
        if self.state:
            console.info(f"going on from step {self.state['step']} of {config.steps}")
            trainer.restore(self.state)
        trainer.preview = lambda step: sheet(run.folder / "previews" / f"{step:06d}.png")
        trainer.measure = measure

        def finished(phase: Phase) -> None:
            if self.accelerator.is_main_process:
                method.export(run)
                alone = sum(p.exports for p in trainer.phases) == 1
                picture = run.folder / "previews" / ("final.png" if alone else f"{phase.name}.png")
                sheet(picture)
                run.wrote(picture)

        trainer.finished = finished
        with console.timed("training_s"):
            trainer.fit()
        self.accelerator.end_training()
        return trainer


def open_session(command: str, config: TrainConfig) -> Session:
    """Run folder, devices and base; from here on all processes draw the same initialisations."""
    run, state = open_run(command, config)
    accelerator = open_accelerator(config, run)
    session = Session(config, run, state, accelerator, load_base(config, accelerator))
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
        drift = evaluate.Drift(base, watched(base, config), resolution_px, accelerator.device) if config.eval_every else None
        data = data_of(base, config, accelerator.device)
        base.release("text_encoders", "tokenizers", "vae")
    base.unet.to(accelerator.device)
    method = method_class(base, config)
    with console.timed("data_s"):
        preview.begin(method)
        if judge:
            judge.begin(method)
    measure = None
    if drift:
        guided = config.teacher_sampling(base.family)
        measure = lambda: drift.measure((method.teacher, guided), (method.student, settings_of(method)(method.recipe.num_steps)))
    trainer = session.fit(method, data, lambda path: preview.sheet(method, path), measure)
    metrics: dict[str, Any] = {"steps": trainer.step, **getattr(method, "facts", {})}
    if trainer.best["params"]:
        metrics["best"] = {k: trainer.best[k] for k in ("step", "drift")}
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
        export.to_folder(base.with_unet(method.student.net, method.student.kind), path, recipe=recipe)
    else:
        modules = adapters.factors(method.student.net, lora_alpha, method.student.adapter)
        path = run.folder / f"{name or recipe.method}.safetensors"
        lora.save(lora.Lora(modules, {**recipe.to_metadata(), **lora.layers_told(method.student.net.config)}), path)
    run.wrote(path)
