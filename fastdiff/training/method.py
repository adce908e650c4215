"""Defines a method: who trains in each phase, and a generator of {player: losses}. The trainer does everything else.

A method is one class, and its public names are the ones below. A class that defines any other public name raises a TypeError
when Python reads it, so a misspelt hook is an error and is never silently ignored. A method's own functions are either
equations of its paper, marked with `@equation("source")`, or start with an underscore.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch, Data
from fastdiff.data.open import Needs
from fastdiff.diffusion.schedule import PredictionType
from fastdiff.lora import adapters
from fastdiff.models import quantized
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.options.train import TrainConfig
from fastdiff.runtime import console
from fastdiff.runtime.errors import InputRefused, Result, as_field
from fastdiff.sampling.settings import Settings
from fastdiff.training.card import Usage, usage_of_recipe
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

Losses = dict[str, Tensor]  # {name: weighted scalar loss} of one player
Turn = dict[str, Losses]  # {player: losses}: these players are updated together, after all of their losses were computed
Function = TypeVar("Function", bound=Callable[..., Any])
Name = TypeVar("Name")


@dataclass(frozen=True)
class Phase:
    """A planned part of a run, with its own players and optimisers. It is immutable: the trainer keeps track of progress."""

    name: str
    steps: int  # optimiser steps
    exports: bool = True  # whether weights are written at its end


def planned(**lengths: int) -> list[Phase]:
    """Make phases of these names and lengths in steps, without the empty ones. Only the last one exports weights."""
    names = [name for name, steps in lengths.items() if steps]
    return [Phase(name, lengths[name], exports=name == names[-1]) for name in names]


@dataclass(frozen=True)
class Now:
    """The progress of the run, as a method sees it. `max_time` may shorten a phase; `fraction` still rises to 1 smoothly."""

    step: int  # optimiser steps of the run before this one
    phase: Phase
    done: int  # optimiser steps of this phase before this one
    fraction: float  # progress in the phase: 0 at its first step, 1 at its last


@dataclass(frozen=True)
class Trains:
    """One player: the parameters that it trains, and how."""

    params: list[nn.Parameter]
    lr: float | None = None  # learning rate; None takes the config's
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    averaged: bool = False  # whether `ema` also keeps an average of these parameters
    net: nn.Module | None = None  # the network that `shard` splits over processes: all its parameters must be in `params`


@dataclass(frozen=True)
class Load:
    """Memory and compute of one step, in units of the base's UNet. `fastdiff plan` estimates a run from it."""

    full: float = 0  # networks that train as a whole
    lora: float = 0  # adapters that train
    frozen: float = 1  # networks that do not train
    graph: float = 1  # forward passes whose autograd graphs are in memory at once
    grad: float = 1  # forward passes with gradients in one step
    free: float = 0  # forward passes without gradients in one step


def relative_size(base: Checkpoint, config: dict[str, Any]) -> float:
    """Return the number of parameters of a UNet with this config, divided by that of the base's UNet."""
    sizes = [sum(p.numel() for p in shaped.skeleton("unet").parameters()) for shaped in (base.shaped("unet", config), base)]
    return sizes[0] / sizes[1]


class Stateful(Protocol):
    """Anything that is saved and restored with a run besides its players: a module, an average, ..."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


EQUATIONS: set[Any] = set()


def equation(source: str) -> Callable[[Function], Function]:
    """Mark a public function of a method as an equation of its paper; `source` names the place, as "LCM, equation 9"."""

    def mark(function: Function) -> Function:
        EQUATIONS.add(function)
        function.__doc__ = f"{function.__doc__ or ''} [{source}]".strip()
        return function

    return mark


class Method(ABC):
    """One paper. `losses` is its algorithm: it moves nothing between devices, saves nothing and calls no optimiser.

    At the start of a phase the trainer moves the `networks`, and every tensor that is an attribute, to the device.

    A subclass defines `name`, `Config`, `players` and `losses`. It sets `student` in `__init__`, or in `players` where the
    student changes from phase to phase, and completes `recipe`, which says how the student is sampled. Everything else has
    the defaults below.
    """

    name: ClassVar[str] = ""  # the subcommand
    Config: ClassVar[type[TrainConfig]] = TrainConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # {family of the base: {option: value}}
    examples: ClassVar[str] = ""  # command lines for the help page
    # What closing figures are compared with: the undistilled teacher at as many calls, or the "student" before training.
    baseline: ClassVar[str] = "teacher"
    keeps: ClassVar[tuple[str, ...]] = ("unet",)  # components of the base that stay in memory while it trains
    embeds_guidance: ClassVar[bool] = False  # whether it can train from a UNet that takes the guidance as an input

    student: Any  # the Denoiser that is sampled and exported
    teacher: Any = None  # the Denoiser of the base
    recipe: Recipe  # how the student is sampled
    controlnet: nn.Module | None = None  # used by every role
    parent: str | None = None  # sha256 of the network that the student is distilled from

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = {name for base in cls.__mro__[1:] for name in (*vars(base), *inspect.get_annotations(base))}
        for name, value in vars(cls).items():
            if name.startswith("_") or name in known or (inspect.isfunction(value) and value in EQUATIONS):
                continue
            close = get_close_matches(name, [known_name for known_name in known if not known_name.startswith("_")], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(
                f"{cls.__module__}.{cls.__name__}.{name}: no part of a method{hint} "
                "(its own functions are marked with @equation, or start with an underscore)"
            )

    def __init__(self, base: Checkpoint, config: Any) -> None:
        self.base_model, self.config, self.schedule = base, config, base.schedule()
        self.resolution_px = config.resolution or base.resolution_px
        self.recipe = Recipe(
            method=self.name,
            family=base.family.name,
            prediction_type=base.prediction_type,
            clip_skip=base.stated_clip_skip,
        )
        self._figures: dict[str, Tensor] = {}
        if "unet" in self.keeps:
            self.parent = checkpoint.fingerprint(base.unet)  # before there is any adapter, and of the exact weights
            if config.quantize_base != "none":
                quantized.quantize(base.unet, config.quantize_base)
            self.teacher = self.role(None)
            self.teacher.guidance_rescale = config.guidance_rescale

    # ---- what every method defines

    @abstractmethod
    def players(self, phase: Any) -> dict[str, Trains]:
        """Begin a phase and return who trains in it: {player: its parameters}.

        The first player is the student: it is averaged, measured and exported.
        """

    @abstractmethod
    def losses(self, batch: Batch, now: Any) -> Iterator[Turn]:
        """Run the algorithm on one batch: yield {player: {name: weighted scalar loss}}, once for each update of a step.

        All players of one turn are updated together, and the generator goes on after that update.
        """

    # ---- what a method may define

    @classmethod
    def check(cls, config: Any) -> Any:
        """Check options and files before anything is loaded; return the config, with missing values completed.

        Options that cannot work raise UsageError, files that cannot be used raise InputRefused.
        """
        return config

    @classmethod
    def check_base(cls, config: Any, base: Checkpoint) -> None:
        """Check options against the opened base, of which no weights are loaded, before data is made.

        InputRefused where the UNet takes the guidance as an input and the method would not give it. Warns where the losses
        need an undistilled teacher and the base is a few-step checkpoint.
        """
        if base.recipe.few_steps and cls.guides(config):
            console.warn(
                f"{as_field('base', base.ref)}: a few-step checkpoint; {cls.name} learns from a teacher of many guided steps, "
                "which it no longer is; give the base that it was distilled from"
            )
        embedded = "unet" in cls.keeps and base.unet_config.get("time_cond_proj_dim") is not None
        if embedded and not cls.embeds_guidance:
            raise InputRefused(
                f"{as_field('base', base.ref)}: its UNet takes the guidance as an input, as a fully distilled LCM does; "
                f"{cls.name} trains from a UNet without it",
                "give the base that it was distilled from",
            )

    @classmethod
    def guides(cls, config: Any) -> bool:
        """Return whether the losses need a teacher that draws in many guided steps: those of a method with `guidance`."""
        return config.guidance is not None

    @classmethod
    def shortcut(cls, config: Any) -> Result | None:
        """Do the whole run and return its result where the options train nothing; None for a run that trains."""
        return None

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """Say which part of the data the losses use: prompts, latents, or pairs of noise and latents."""
        return "latents"

    @classmethod
    def teacher_loras(cls, config: Any) -> list[str]:
        """Return the LoRAs that the teacher uses while it samples training data, each as FILE=WEIGHT."""
        return []

    @classmethod
    def exhibit(cls, scene: Scene, config: Any) -> Exhibit:
        """Make what draws the contact sheets and the closing figures of a run. Called before anything is encoded."""
        return Exhibit(scene, config)

    @classmethod
    def arrange(cls, scene: Scene, data: Data, exhibit: Any, config: Any) -> Data:
        """Return the data to train on; a method may hold out items here for its exhibit."""
        return data

    @classmethod
    def load(cls, config: Any, base: Checkpoint) -> Load | None:
        """Return what one step costs, for `fastdiff plan`; None where it has to be measured."""
        return None

    @classmethod
    def cycle(cls, config: Any) -> int:
        """Return the number of steps in which every player trains at least once."""
        return 1

    def phases(self) -> Sequence[Phase]:
        """Return the planned phases of the run, in order."""
        return [Phase("", self.config.steps)]

    def paired(self, n: int, now: "Now") -> int:
        """Return how many of a batch's first rows keep their prompts under `mix_prompts`: their latents belong to them."""
        return 0

    def prepare(self, batch: Batch) -> None:  # noqa: B027  (an optional hook)
        """Measure something on a batch of the data, before the first step."""

    def after_update(self, now: Any) -> None:  # noqa: B027  (an optional hook)
        """Called after the update of every turn, with the same `now` that the turn's losses were given."""

    def state(self) -> Mapping[str, Stateful]:
        """Return, by name, what is saved and restored with the run besides the players."""
        return {}

    def networks(self) -> list[nn.Module]:
        """Return every module that the losses call. The trainer moves them to the device, and gathers split ones for export."""
        return [self.teacher, self.student]

    def facts(self) -> dict[str, Any]:
        """Return figures for the run's metrics that do not depend on training, as {name: value}."""
        return {}

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        """Return the part of the model card that explains how to draw with these weights of that base."""
        return usage_of_recipe(weights, base, self.recipe)

    def sample_options(self, weights: Path, base: Checkpoint) -> dict[str, str | bool]:
        """Return the options of `fastdiff sample` that draw with these weights, as {option: value}; True is a flag."""
        is_lora = weights.suffix == ".safetensors"
        options: dict[str, str | bool] = {"base": str(weights)}
        if is_lora:
            options = {"base": base.ref, **base.opening, "lora": str(weights)}
        if self.config.vae:
            options["vae"] = self.config.vae
            if self.config.allow_pickle:
                options["allow_pickle"] = True
        return options

    @property
    def writes_checkpoint(self) -> bool:
        """Whether the student is written as a whole checkpoint, rather than as a LoRA or a single network."""
        return self.student.adapter is None

    def export(self, run: Run) -> None:
        """Write the student into the run folder: a LoRA named after the recipe's method, or the folder `model`."""
        self.save_student(run)

    # ---- tools for methods

    def role(self, adapter: str | None, net: nn.Module | None = None, kind: PredictionType | None = None) -> Denoiser:
        """Make a Denoiser of the base's network, or of `net`, with the named adapter switched on, or with none.

        `kind` is what the network predicts, by default what the base predicts.
        """
        base = self.base_model
        return Denoiser(base.unet if net is None else net, self.schedule, kind or base.prediction_type, adapter, self.controlnet)

    def copied(self) -> nn.Module:
        """Return a trainable fp32 copy of the base's network, without its adapters."""
        net = self.base_model.unet
        return adapters.plain(net) if adapters.is_adapted(net) or quantized.is_quantized(net) else trainable_copy(net)

    def trained(
        self, name: str, net: nn.Module | None = None, kind: PredictionType | None = None
    ) -> tuple[Denoiser, list[nn.Parameter]]:
        """Make a Denoiser that trains, and return it with its trainable parameters.

        All of `net` trains; without a `net`, a fresh adapter of that name on the base's network.
        """
        if net is None:
            return self.role(name, kind=kind), self.adapter(self.base_model.unet, name)
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        return self.role(None, net, kind), list(net.parameters())

    def adapter(self, net: nn.Module, name: str, layers: Sequence[str] | None = None) -> list[nn.Parameter]:
        """Put a fresh LoRA adapter of the config's rank and alpha on a network; return its parameters."""
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        return adapters.attach(net, self.config.lora_rank, self.config.lora_alpha, name, layers or self._layers(self.config))

    @classmethod
    def _layers(cls, config: Any) -> tuple[str, ...]:
        """Return the last parts of the names of layers that get an adapter."""
        return adapters.ATTENTION if config.lora_layers == "attention" else adapters.TARGETS

    def log(self, **figures: Tensor) -> None:
        """Log scalars beside the losses. Each is repeated in every row of metrics.jsonl until it gets a new value."""
        self._figures |= figures

    def logged(self) -> dict[str, float]:
        """Return the latest value of every scalar that was logged."""
        return read(self._figures)

    def settings(self, num_steps: int | None = None) -> Settings:
        """Return how the student is sampled: by its recipe, in `num_steps` steps or the recipe's own number."""
        usual = Settings.usual(self.base_model.family)
        return Settings.of(self.recipe, usual, num_steps=num_steps or self.recipe.num_steps)

    def save_student(self, run: Run, name: str | None = None) -> None:
        """Write the student as a LoRA file, or as a diffusers folder where a whole network trained.

        `name` is without suffix, by default the recipe's method for a LoRA and `model` for a folder.
        """
        recipe, base, student = replace(self.recipe, parent=self.parent), self.base_model, self.student
        if student.adapter is None:
            path = run.folder / (name or "model")
            write.to_folder(base.with_unet(student.net, student.kind), path, recipe=recipe)
        else:
            path = run.folder / f"{name or recipe.method}.safetensors"
            adapters.save_adapter(student, path, recipe=recipe, alpha=self.config.lora_alpha)
        run.wrote(path)


def read(figures: Mapping[Name, Tensor]) -> dict[Name, float]:
    """Return scalars of a device as numbers, by the same names. They are read together: one wait for the device, not one each."""
    if not figures:
        return {}
    device = next(iter(figures.values())).device
    together = torch.stack([value.detach().to(device, torch.float32) for value in figures.values()])
    return dict(zip(figures, together.tolist(), strict=True))


def lacking(method: type[Method] | Method) -> list[str]:
    """Return the names of required parts that a method class, or a method before its first step, lacks; empty if complete."""
    if isinstance(method, type):
        return sorted(method.__abstractmethods__) + ([] if method.name else ["name"])
    # hasattr: `student` may be set in __init__, in `players` or by a property, so only the object itself can answer.
    return [name for name in ("student", "recipe") if not hasattr(method, name)]
