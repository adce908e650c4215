"""One training run from config to files: scene -> data -> method -> trainer -> weights, pictures, figures, card."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdiff import lora
from fastdiff.checkpoints import references
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Data
from fastdiff.data.encode import Source
from fastdiff.data.images import Framing
from fastdiff.data.open import Needs, open_data, source_of
from fastdiff.lora import apply
from fastdiff.models import sharding
from fastdiff.options.train import TrainConfig
from fastdiff.runtime import console, disk, outputs, processes
from fastdiff.runtime.config import to_toml
from fastdiff.runtime.disk import write_atomic
from fastdiff.runtime.errors import DoesNotFit, Failed, Result, UsageError, device_errors_explained
from fastdiff.sampling.assemble import pick_device, pick_precision
from fastdiff.training import offload, optimizer, resume
from fastdiff.training.card import write_card
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.method import Method, Phase, lacking
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene
from fastdiff.training.trainer import Trainer

PATIENCE = timedelta(hours=2)  # how long processes wait for one that draws a contact sheet, or samples more of the data
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMPONENTS = ("unet", "vae", "text_encoders", "tokenizers")


def data_of(scene: Scene, config: TrainConfig, needs: Needs, teacher_loras: list[str], source: Source | None = None) -> Data:
    """Open or sample the training data of the options, and encode it.

    `teacher_loras`, each FILE=WEIGHT, are added to the teacher while it samples. `source` is as in `open_data`.
    """
    base = scene.base
    if teacher_loras:
        base = config.open_base(base.dtype)  # a second copy: the base that the method trains from must not change
        specs = [lora.parse_spec(spec, 1.0, "style_lora") for spec in teacher_loras]
        apply.apply(base, [(lora.load(path, allow_pickle=config.allow_pickle).of_unet(), weight) for path, weight in specs])
    data = open_data(
        base,
        config.data,
        prompts=config.prompts,
        resolution_px=scene.resolution_px,
        pairs=config.pairs,
        seed=scene.seed,
        device=scene.device,
        sampling=scene.teacher,
        needs=needs,
        framing=Framing(
            scene.resolution_px,
            config.buckets,
            config.random_crops,
            config.flip,
            background=config.background,
            min_size_px=config.min_size,
        ),
        max_images=config.max_images,
        caption_column=config.caption_column,
        source=source,
    )
    data.empty_prompts = config.empty_prompts
    return data


def default_folder(command: str, config: TrainConfig) -> Path:
    """Return the run folder of a command that is given no `output`: runs/COMMAND-BASE."""
    return Path("runs") / f"{command}-{references.called(config.base)}"


def open_run(command: str, config: TrainConfig) -> Run:
    """Return the run of a config; nothing is created yet. UsageError where its folder cannot be made."""
    return Run(outputs.as_folder(config.output or default_folder(command, config)), command)


def find_state(run: Run, config: TrainConfig) -> dict[str, Any] | None:
    """Load the state to resume from, or None. UsageError where the folder holds another run, or one with more steps."""
    state = resume.find(run, config)
    if state and state["step"] > config.steps:
        raise UsageError(
            f"`steps={config.steps}`: {run.folder} is already at step {state['step']}", "give more, or `resume=never`"
        )
    return state


def check_room(trainer: Trainer, base: Checkpoint) -> None:
    """Raise DoesNotFit, before the first step, where the disk has no room for the states and the weights of the run."""
    student, phases = next(iter(trainer.players.values())), [phase for phase in trainer.phases if phase.exports]
    weights = sum(p.numel() * p.element_size() for p in student.params)
    if trainer.method.writes_checkpoint:
        files = [base.path] if base.path.is_file() else base.path.rglob("*.safetensors")
        weights += sum(p.stat().st_size for p in files)
    run, keep = trainer.run, trainer.config.keep_states
    states = trainer.state_bytes * max(1, keep + 1 - len(run.states.paths()))  # the next is written before the oldest goes
    need, free = states + weights * len(phases), disk.free_bytes(run.folder)
    if need > free:
        raise DoesNotFit(
            f"`output={run.folder}`: its disk has {free / 2**30:.2f} GiB free, the run needs {need / 2**30:.2f}: "
            f"{keep + 1} states of {trainer.state_bytes / 2**30:.2f} and the weights",
            "free some space, choose another `output`, or `keep_states=1`",
        )


def make_folder(run: Run, config: TrainConfig, resumed: bool) -> None:
    """Create the run folder. This comes late, when base, data and disk space have been checked."""
    if not processes.first():
        return
    (run.folder / "previews").mkdir(parents=True, exist_ok=True)
    if not resumed:
        (run.folder / "metrics.jsonl").unlink(missing_ok=True)
    # A run that is started with this file should resume, even if it first began with `resume=never`.
    write_atomic(run.folder / "config.toml", to_toml(replace(config, resume="auto")))


def open_accelerator(config: TrainConfig, run: Run) -> Any:
    """Make accelerate's Accelerator for the config's device, precision and tracker.

    UsageError where CUDA or the tracker is not there, or where `shard` is combined with fp16.
    """
    from accelerate import Accelerator, AutocastKwargs, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState, PartialState

    cpu = config.device == "cpu" or (
        config.device == "auto" and not (torch.cuda.is_available() or torch.backends.mps.is_available())
    )
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("`device=cuda`: no CUDA device on this machine")
    precision = pick_precision(config.precision, torch.device("cpu") if cpu else pick_device(config.device))
    if config.shard and precision == "fp16":
        raise UsageError("`shard`: does not work in fp16, where every process has its own loss scale", "use `precision=bf16`")
    tracker = None if config.tracker == "none" else config.tracker
    if tracker and not find_spec(tracker):
        raise UsageError(f"`tracker={tracker}`: {tracker} is not installed", f'pip install "fastdiff[{tracker}]"')
    mps = not cpu and not torch.cuda.is_available()
    optimizer.check(config, torch.device("cpu" if cpu else "mps" if mps else "cuda"))
    if not cpu and torch.cuda.is_available():
        processes.join("nccl", PATIENCE)
    elif cpu:
        processes.join("gloo", PATIENCE)
    if PartialState._shared_state and PartialState().num_processes == 1:
        # accelerate remembers the device of the first run in this process, but this run may be on another one.
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=tracker,
        project_dir=run.folder,
        # Autocast's cache would hold half-precision copies of everything that trains until the turn ends, and hand old copies out
        # where weights change within it. Casting again at each use is cheap beside the products.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), AutocastKwargs(cache_enabled=False)],
    )
    if tracker:
        accelerator.init_trackers("fastdiff")
    return accelerator


def load_base(config: TrainConfig, accelerator: Any) -> Checkpoint:
    """Open the base in the precision that the run computes in."""
    return config.open_base(DTYPES[accelerator.mixed_precision])


@dataclass
class Session:
    """A run that is open but has no method yet."""

    config: TrainConfig
    run: Run
    state: dict[str, Any] | None  # the state to resume from
    accelerator: Any
    scene: Scene

    @classmethod
    def open(cls, command: str, config: TrainConfig) -> "Session":
        """Open run folder, devices and base, and seed torch so that all processes initialise networks alike."""
        run = open_run(command, config)
        accelerator = open_accelerator(config, run)
        state, base = find_state(run, config), load_base(config, accelerator)
        base.schedule()  # refuses a base without one before anything is made
        session = cls(config, run, state, accelerator, Scene.of(config, base, accelerator.device))
        torch.manual_seed(config.seed)
        return session

    def fit(self, method: Method, data: Data, exhibit: Exhibit) -> Trainer:
        """Train a method. Every phase with `exports` leaves weights and a contact sheet. Stopped on SIGTERM or Ctrl-C."""
        config, run = self.config, self.run
        trainer = Trainer(method, data, run, config, self.accelerator)
        check_room(trainer, self.scene.base)
        make_folder(run, config, resumed=self.state is not None)
        if self.state:
            console.info(f"resuming from step {self.state['step']} of {config.steps}")
            trainer.restore(self.state)

        def decoding(work: Callable[[], Any]) -> Any:
            """Do work that draws pictures; with `offload` the VAE leaves the device after it."""
            result = work()
            if config.offload:
                offload.set_aside(self.scene.vaes, method.networks())
            return result

        def draw(name: str) -> list[Path]:
            path, sheet = run.folder / "previews" / f"{name}.png", decoding(lambda: exhibit.sheet(method))
            return sheet.save(path) if processes.first() else sheet.paths(path)

        def write(into: Run) -> None:
            with sharding.gathered(method.networks()) if trainer.sharded else nullcontext():
                if processes.first():
                    method.export(into)

        def finished(phase: Phase) -> None:
            write(run)
            for path in trainer.spared("the contact sheet", lambda: draw("final" if alone(trainer) else phase.name)) or ():
                run.wrote(path)

        def preview(step: int) -> None:
            draw(f"{step:06d}")

        decoding(lambda: None)  # encoding the data has left it there
        trainer.preview = preview
        trainer.measure = (lambda: decoding(lambda: exhibit.measure(method))) if config.eval_every else None
        trainer.improved = lambda: write(Run(run.folder / "best", run.command))
        trainer.finished = finished
        with console.timed("training_s"):
            trainer.fit()
        self.accelerator.end_training()
        return trainer


def alone(trainer: Trainer) -> bool:
    """Whether a single phase of the run writes weights."""
    return sum(phase.exports for phase in trainer.phases) == 1


@dataclass
class Trained:
    """The outcome of a training run."""

    result: Result
    run: Run
    weights: Path  # the LoRA file, or the folder of a checkpoint or single network; the last one if there are several
    options: dict[str, str | bool]  # options of `fastdiff sample` that draw with it; empty on all but the first process


@device_errors_explained()
def train(method_class: type[Method], config: Any) -> Trained:
    """Train a method from its config to its files: weights, pictures, metrics and model card.

    Options and files are checked before anything is loaded. TypeError for an incomplete method; otherwise the errors of
    `fastdiff.runtime.errors`, such as UsageError, InputRefused, DoesNotFit, Failed and Stopped.
    """
    if missing := lacking(method_class):
        raise TypeError(f"{method_class.__name__}: does not define {', '.join(missing)}; see fastdiff.Method")
    open_run(method_class.name, config)  # refuses a folder that cannot be made before anything is loaded
    config = method_class.check(config)
    if result := method_class.shortcut(config):
        path = result.outputs[0]
        return Trained(result, Run(path.parent, method_class.name, list(result.outputs)), path, {"base": str(path)})
    session = Session.open(method_class.name, config)
    scene, run = session.scene, session.run
    base = scene.base
    method_class.check_base(config, base)
    with console.timed("data_s"):
        source = source_of(config.data, config.caption_column)  # refuses what is not there before anything is drawn
        exhibit = method_class.exhibit(scene, config)
        data = data_of(scene, config, method_class.needs(config), method_class.teacher_loras(config), source)
        data = method_class.arrange(scene, data, exhibit, config)
        base.release(*(part for part in COMPONENTS if part not in method_class.keeps))
    kept = {"unet": lambda: base.unet, "vae": lambda: base.vae}
    for part in method_class.keeps:
        kept[part]().to(scene.device)
    method = method_class(base, config)
    with console.timed("data_s"):
        exhibit.begin(method)
    trainer = session.fit(method, data, exhibit)
    if not session.accelerator.is_main_process:
        return Trained(Result(), run, run.folder, {})
    metrics: dict[str, Any] = {"steps": trainer.step, **method.facts()}
    if trainer.kept:
        metrics["best"] = next(iter(trainer.kept.values())) if alone(trainer) else trainer.kept
    trainer.players.clear()  # moments and averages: the closing figures need the room
    with console.timed("proof_s"):
        metrics |= trainer.spared("the closing figures", lambda: exhibit.figures(method, run)) or {}
    weights = written_weights(run)
    parent = config.open_student() if weights.suffix == ".safetensors" else base
    options = method.sample_options(weights, parent)
    facts = training_facts(method, config, trainer.step, parent)
    write_card(run, method.usage(weights, parent), parent, metrics, facts, method.recipe)
    return Trained(Result(run.outputs, metrics), run, weights, {**options, "prompt": exhibit.prompt})


def written_weights(run: Run) -> Path:
    """Return the LoRA or checkpoint that was exported last; without any, the first output that is no picture.

    Failed where the method's `export` recorded no output with `run.wrote`.
    """
    others = [path for path in run.outputs if path.suffix != ".png"]
    if not others:
        raise Failed(f"{run.folder}: the method's export() recorded no output; call run.wrote(path) there", run.states.kept())
    return run.weights()[-1] if run.weights() else others[0]


def training_facts(method: Method, config: TrainConfig, steps: int, parent: Checkpoint) -> dict[str, str]:
    """Return the lines of the model card about the training, as {label: text}."""
    hashed = f", UNet sha256 {method.parent[:16]}" if method.parent else ""
    return {
        "training": f"{steps} steps of {config.batch_size} x {config.grad_accum}",
        "base": f"{parent.ref}, {parent.prediction_type}{hashed}",
        "data": config.data or parent.family.default_data,
        "seed": str(config.seed),
    }
