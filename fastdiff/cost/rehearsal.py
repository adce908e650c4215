"""Rehearse a training run on the simulated card: real data, steps, contact sheets and measurements, without weights or numbers.

`fastdiff plan --no-probe` takes its memory from here, and so do the tests of memory. Every part of a run has its own peak:
`data` (text encoders, the teacher's samples or the VAE's encoder), `begin` (making the method's networks, and what is made anew
between two phases), each phase by name, `sheet`, `measure` and `figures`.
"""

import gc
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fastdiff.checkpoints import checkpoint, tensors
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.cost.probe import go_to_end
from fastdiff.cost.simulation import Card, Simulated
from fastdiff.data import encode as data_encode
from fastdiff.data import teacher as data_teacher
from fastdiff.data.prompts import training_prompts
from fastdiff.models import controlnet, perceptual
from fastdiff.options.train import TrainConfig
from fastdiff.runtime import console, disk
from fastdiff.sampling.sampler import at_once
from fastdiff.sampling.settings import Settings
from fastdiff.training import offload, optimizer
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.method import Method
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene
from fastdiff.training.session import COMPONENTS, data_of, open_accelerator
from fastdiff.training.trainer import Trainer

OTHERS = ("data", "begin", "sheet", "measure", "figures")  # parts of a run besides its phases
FEW = 2  # micro-batches and sampling steps: more of them take no more memory
# What a run takes beside its tensors, in GiB: CUDA's context and the workspaces of cuBLAS; elsewhere the libraries.
RUNTIME_GIB = {"cuda": 0.7, "mps": 0.5, "cpu": 0.6}
FRAGMENTS = 1.05  # the allocator's blocks are larger than the tensors in them
PROMPTS = 64  # prompts that the text encoders take at once
UNKNOWN = "0" * 64  # stands for the hash of weights that are not there
Part = Callable[[str], AbstractContextManager[None]]  # measures a part of a run by its name


@dataclass
class Rehearsal:
    """What a rehearsed run takes of the card, in bytes of live tensors."""

    peaks: dict[str, int] = field(default_factory=dict)  # {part of the run: peak bytes}
    places: dict[str, list[str]] = field(default_factory=dict)  # {part of the run: file:line at the peak, innermost first}
    syncs: dict[str, Counter[str]] = field(default_factory=dict)  # {phase: waits of the host in one step, by file:line}
    state_bytes: int = 0  # size of a state that a run can resume from
    trained_bytes: int = 0  # of the student's own parameters

    @property
    def peak_bytes(self) -> int:
        return max(self.peaks.values())


def taken_bytes(peak_bytes: float, device: str) -> float:
    """Return the memory of a device that a run with this peak of live tensors takes."""
    return FRAGMENTS * peak_bytes + RUNTIME_GIB[device] * 2**30


def hollow(base: Checkpoint, dtype: torch.dtype | None = None) -> Checkpoint:
    """Return a copy of a checkpoint, in its own or another dtype, whose networks have shapes but no weights (meta device)."""
    own = copy(base)
    own.__dict__ = dict(base.__dict__)
    own.dtype = dtype or base.dtype

    def network(part: str, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            net = own.skeleton(part).to("meta")
        return net.to(dtype).eval().requires_grad_(False)

    own.__dict__ |= {
        "unet": network("unet", own.dtype),
        "vae": network("vae", torch.float32),
        "text_encoders": [network(part, torch.float32) for part in base.text_parts],
    }
    return own


@contextmanager
def without_weights(config: TrainConfig, base: Checkpoint, folder: Path) -> Iterator[None]:
    """Let a run find hollow networks, no hashes to compute, and a cache of its own."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(console, "state", console.State(quiet=True)))
        stack.enter_context(patch.object(console, "speaks", lambda: False))
        stack.enter_context(patch.object(console, "warn", lambda message: None))
        stack.enter_context(patch.dict(os.environ, FASTDIFF_CACHE=str(folder / "cache")))
        for module in (checkpoint, data_teacher, data_encode):
            stack.enter_context(patch.object(module, "fingerprint", lambda net: UNKNOWN))
        stack.enter_context(patch.object(type(config), "open_base", lambda self, dtype=None: hollow(base, dtype)))
        stack.enter_context(patch.object(disk, "require", lambda *_: None))
        stack.enter_context(patch.object(controlnet, "load", controlnet.skeleton))
        stack.enter_context(patch.object(tensors, "raw", filled(tensors.raw)))
        stack.enter_context(patch.object(perceptual, "open_distance", distance(base)))
        stack.enter_context(patch.object(optimizer, "check", lambda *_: None))
        stack.enter_context(patch.object(optimizer, "opened", opened(optimizer.opened)))
        stack.enter_context(patch.object(nn.Module, "to", moved(nn.Module.to)))
        nowhere = lambda _, tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        stack.enter_context(patch.object(offload.Parking, "place_for", nowhere))
        usual = Settings.usual
        stack.enter_context(patch.object(Settings, "usual", lambda family: replace(usual(family), num_steps=FEW)))
        yield


def filled(real: Any) -> Any:
    """Return a stand-in for `tensors.raw`: a tensor without numbers is written as zeros."""
    return lambda tensor: real(torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor)


def moved(real: Any) -> Any:
    """Return a stand-in for `nn.Module.to`: a network on the card has no weights that could come to the CPU."""

    def to(net: nn.Module, *args: Any, **how: Any) -> nn.Module:
        away = args and str(args[0]) == "cpu" and any(isinstance(p, Simulated) for p in net.parameters())
        return real(net, *(("meta", *args[1:]) if away else args), **how)

    return to


def opened(real: Any) -> Any:
    """Return a stand-in for `optimizer.opened`: bitsandbytes' kernels need the memory of a real device."""

    def opened(config: Any, params: list[nn.Parameter], device: torch.device, **how: Any) -> torch.optim.Optimizer:
        return Sized(params, config.optimizer) if config.optimizer == "adamw8bit" else real(config, params, device, **how)

    return opened


class Sized(torch.optim.Optimizer):
    """An optimiser whose moments have the right size and that does nothing."""

    def __init__(self, params: list[nn.Parameter], kind: str) -> None:
        super().__init__(params, dict(lr=0.0))
        self.kind = kind

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # nothing here takes a closure
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and p not in self.state:
                size = optimizer.moment_bytes(self.kind, p)
                self.state[p] = {"moments": torch.zeros(size, dtype=torch.uint8, device=p.device)}


def distance(base: Checkpoint) -> Any:
    """Return a stand-in for `perceptual.open_distance` that needs no file with VGG-16."""
    real = perceptual.open_distance

    def opened(family: Any, weights: str | None, **how: Any) -> perceptual.PixelDistance:
        if weights == perceptual.EMBEDDED or (weights is None and family.judge_ships):
            return real(family, weights, **how)
        with torch.device("meta"):
            net = perceptual.lpips_net(heads=False)
        return perceptual.PixelDistance(net.eval().requires_grad_(False))

    return opened


def rehearse(
    method_class: type[Method], config: TrainConfig, base: Checkpoint, *, report: Callable[[str], None] = lambda part: None
) -> Rehearsal:
    """Run the parts of a training run on a simulated card. `base` needs no weights; its `dtype` is the run's precision.

    `report` gets the name of each part before it runs. At full size a part takes from seconds to a minute.
    """
    card, result, outside = Card(), Rehearsal(), (console.state, console.speaks)

    def report_outside(part: str) -> None:
        with patch.object(console, "state", outside[0]), patch.object(console, "speaks", outside[1]):
            report(part)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = training_prompts(base.family, config.prompts)
        (folder / "prompts.txt").write_text("\n".join(lines[:PROMPTS]) + "\n")
        most = at_once((config.resolution or base.resolution_px) // base.pixels_per_latent)
        base = copy(base)
        base.family = replace(base.family, drift_prompts=min(FEW * most, base.family.drift_prompts))
        # More pictures of a folder or stream take no more memory, only time.
        own = config.data and config.data.partition(":")[0] not in {"teacher", SHIPPED.data}
        proof: Any = {"proof": min(config.proof, FEW * most)} if "proof" in vars(config) else {}  # not every method has a table
        small = replace(
            config, device="cuda", prompts=str(folder / "prompts.txt"), pairs=max(4, FEW * most),
            max_images=max(4, FEW * most) if own else None,
            tracker="none", output=str(folder / "run"), grad_accum=min(FEW, config.grad_accum), teacher_steps=FEW, **proof,
        )  # fmt: skip
        with card, without_weights(small, base, folder):
            run_parts(method_class, small, hollow(base), Run(folder / "run", method_class.name), card, result, report_outside)
    return result


def held(card: Card) -> int:
    """Return the memory that is in use, in MiB."""
    gc.collect()
    return card.live_bytes // 2**20


def run_parts(
    method_class: type[Method],
    config: Any,
    base: Checkpoint,
    run: Run,
    card: Card,
    result: Rehearsal,
    report: Callable[[str], None],
) -> None:
    """Run data, every phase, a contact sheet and the measurements, and note the peak of each."""
    card.watched = True

    @contextmanager
    def part(name: str) -> Iterator[None]:
        report(name)
        gc.collect()
        card.reset_peak()
        yield
        if card.peak_bytes > result.peaks.get(name, -1):
            result.peaks[name], result.places[name] = card.peak_bytes, card.peak_place

    accelerator = open_accelerator(config, run)
    scene = Scene.of(config, base, accelerator.device)
    with part("data"):
        exhibit = method_class.exhibit(scene, config)
        data = data_of(scene, config, method_class.needs(config), method_class.teacher_loras(config))
        data = method_class.arrange(scene, data, exhibit, config)
        base.release(*(name for name in COMPONENTS if name not in method_class.keeps))
    base.__dict__ |= {k: v for k, v in hollow(base).__dict__.items() if k in ("unet", "vae")}
    networks = {"unet": base.unet, "vae": base.vae}
    for name in method_class.keeps:
        networks[name].to(scene.device)
    with part("begin"):
        method = method_class(base, config)
    with part("data"):
        exhibit.begin(method)
    known: set[Any] = set()
    with part("begin"):
        trainer = Trainer(method, data, run, config, accelerator)
    length = method_class.cycle(config)
    for index in range(len(trainer.phases)):
        if index:
            with part("begin"):
                trainer.leave()
                trainer.enter(index)
        # A phase with the same players and the same memory before it takes what the other took.
        sizes = tuple((who, sum(p.numel() for p in player.params)) for who, player in trainer.players.items())
        same = (sizes, trainer.phase.exports, held(card))
        if same in known:
            continue
        known.add(same)
        run_phase(trainer, length, card, part, result)
        if trainer.phase.exports:
            if config.offload:
                offload.set_aside(scene.vaes, method.networks())
            with part("sheet"), trainer.averaged():
                trainer.leading(lambda: exhibit.sheet(method))
            if config.eval_every:
                with part("measure"), trainer.averaged():
                    trainer.leading(lambda: exhibit.measure(method))
    if exhibit.judged or type(exhibit).figures is not Exhibit.figures:
        run.folder.mkdir(parents=True, exist_ok=True)
        trainer.players.clear()
        with part("figures"):
            method.export(run)
            exhibit.figures(method, run)


def run_phase(trainer: Trainer, length: int, card: Card, part: Part, result: Rehearsal) -> None:
    """Run the steps at the end of the current phase: a first one, and `length` more of which the waits are counted."""
    name = trainer.phase.name or "steps"
    go_to_end(trainer, length)
    with part(name), patch.object(trainer, "config", replace(trainer.config, grad_accum=1)):
        trainer.train_step()  # makes the optimiser's moments
    card.syncs.clear()
    with part(name):
        for _ in range(length):
            trainer.train_step()
            trainer.step += 1
    result.syncs[name] = Counter(card.syncs)
    result.state_bytes = max(result.state_bytes, trainer.state_bytes)
    result.trained_bytes = sum(p.numel() * p.element_size() for p in next(iter(trainer.players.values())).params)
