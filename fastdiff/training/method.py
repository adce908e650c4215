"""What a method is: who trains in each phase, and a generator of {player: losses}. The trainer does everything else.

A method is one class. Public names are the contract below; a class that defines another public name is refused when Python
reads it, so that a misspelt hook is an error and not a lost one. A method's own functions are equations of its paper, marked
with `@equation("source")`, or start with an underscore.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from fastdiff.checkpoints import checkpoint, write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data.batch import Batch, Data
from fastdiff.data.open import Needs
from fastdiff.lora import adapters
from fastdiff.models.denoiser import Denoiser, trainable_copy
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.errors import Result
from fastdiff.sampling.settings import Settings
from fastdiff.training.card import Usage, usage_of_recipe
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

Losses = dict[str, Tensor]  # named, already weighted, scalar
Turn = dict[str, Losses]  # of each player that is updated now; none sees another's update of the same turn
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Phase:
    """A planned part of a run, with players and optimisers of its own. How far it has come, the trainer alone knows."""

    name: str
    steps: int
    exports: bool = True  # at its end there is something to write


@dataclass(frozen=True)
class Now:
    """What a method knows of the time. `--max-time` may shorten a phase; `fraction` then goes on to 1 without a jump."""

    step: int  # optimiser steps of the run before this one
    phase: Phase
    done: int  # optimiser steps of this phase before this one
    fraction: float  # of the phase: 0 at its first step, 1 at its last


@dataclass(frozen=True)
class Trains:
    """One player: the parameters that it trains, and how."""

    params: list[nn.Parameter]
    lr: float | None = None  # None: the config's
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    averaged: bool = False  # has an average of its weights where the config asks for one
    net: nn.Module | None = None  # the network all of whose parameters are among these: `--shard` splits it over processes


@dataclass(frozen=True)
class Load:
    """What a step holds and calls, in units of the base's UNet: what `plan` knows of a method without running it."""

    full: float = 0  # networks that train as a whole
    lora: float = 0  # adapters that train
    frozen: float = 1  # networks that do not train
    graph: float = 1  # passes whose graph is in memory at once
    grad: float = 1  # passes with gradients a step
    free: float = 0  # passes without


def relative_size(base: Checkpoint, config: dict[str, Any]) -> float:
    """Parameters of a UNet of that config, in units of the base's."""
    sizes = [sum(p.numel() for p in shaped.skeleton("unet").parameters()) for shaped in (base.shaped("unet", config), base)]
    return sizes[0] / sizes[1]


class Stateful(Protocol):
    """What a resumed run needs besides its players: a module, an average, ..."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


EQUATIONS: set[Any] = set()


def equation(source: str) -> Callable[[Function], Function]:
    """Marks a public function of a method as one of its own equations, from that place of a paper."""

    def mark(function: Function) -> Function:
        EQUATIONS.add(function)
        function.__doc__ = f"{function.__doc__ or ''} [{source}]".strip()
        return function

    return mark


class Method(ABC):
    """One paper. `losses` is its algorithm; it moves no devices, saves nothing and knows no optimiser.

    A subclass says `name`, `Config`, `players` and `losses`; it sets `student` in `__init__` (or in `players`, where that
    changes from phase to phase), and completes `recipe`, how the result is sampled. Everything else has the default below.
    """

    name: ClassVar[str] = ""  # the subcommand
    Config: ClassVar[type[TrainConfig]] = TrainConfig
    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # options by the family of the base
    examples: ClassVar[str] = ""  # command lines for the help page
    baseline: ClassVar[str] = "teacher"  # closing figures: against it in as many calls; "student": as it was before training
    keeps: ClassVar[tuple[str, ...]] = ("unet",)  # components of the base that stay in memory while it trains

    student: Any  # a Denoiser: what is sampled and exported
    teacher: Any = None  # a Denoiser: the base
    recipe: Recipe  # how the student is sampled
    controlnet: nn.Module | None = None  # worn by every role
    parent: str | None = None  # hash of the network that it is distilled from

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
        self.recipe = Recipe(method=self.name, family=base.family.name, prediction_type=base.prediction_type)
        self._figures: dict[str, Tensor] = {}
        if "unet" in self.keeps:
            self.parent = checkpoint.fingerprint(base.unet)  # before there is any adapter
            self.teacher = self.role(None)

    # ---- what a method must say

    @abstractmethod
    def players(self, phase: Any) -> dict[str, Trains]:
        """Begin a phase: who trains in it. The first player is the student's, which is averaged, measured and exported."""

    @abstractmethod
    def losses(self, batch: Batch, now: Any) -> Iterator[Turn]:
        """The algorithm: yields {player: {name: weighted scalar loss}}; all players of one turn are updated together."""

    # ---- what it may say

    @classmethod
    def check(cls, config: Any) -> Any:
        """Before anything is loaded: the config, completed, or an error for options and files that cannot work."""
        return config

    @classmethod
    def shortcut(cls, config: Any) -> Result | None:
        """The whole run, where its options ask for nothing that trains."""
        return None

    @classmethod
    def needs(cls, config: Any) -> Needs:
        """What of its data it looks at."""
        return "latents"

    @classmethod
    def teacher_loras(cls, config: Any) -> list[str]:
        """FILE=WEIGHT of the LoRAs that the teacher wears while it samples training data."""
        return []

    @classmethod
    def exhibit(cls, scene: Scene, config: Any) -> Exhibit:
        """What the run shows for itself; made before anything is encoded."""
        return Exhibit(scene, config)

    @classmethod
    def arrange(cls, scene: Scene, data: Data, exhibit: Any, config: Any) -> Data:
        """The data to train on; items that the exhibit needs can be held out of it."""
        return data

    @classmethod
    def load(cls, config: Any, base: Checkpoint) -> Load | None:
        """What a step costs; None where only a probe can tell."""
        return None

    @classmethod
    def cycle(cls, config: Any) -> int:
        """Steps until every player has trained."""
        return 1

    def phases(self) -> Sequence[Phase]:
        """The run's parts, as planned."""
        return [Phase("", self.config.steps)]

    def prepare(self, batch: Batch) -> None:  # noqa: B027  (nothing to do, unless a method says so)
        """Measure something of the data before the first step."""

    def after_update(self, now: Any) -> None:  # noqa: B027  (the same)
        """After every optimiser step."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs besides its players, by name; each is a Stateful."""
        return {}

    def networks(self) -> list[nn.Module]:
        """Every module that the losses call: they are moved to the device, and gathered to be exported where they are split."""
        return [self.teacher, self.student]

    def facts(self) -> dict[str, Any]:
        """Figures for the run's metrics that are known before it trains."""
        return {}

    def usage(self, weights: Path, base: Checkpoint) -> Usage:
        """What the model card says of drawing with these weights, of that base."""
        return usage_of_recipe(weights, base, self.recipe)

    def sample_options(self, weights: Path, base: Checkpoint) -> dict[str, str]:
        """Options of `fastdiff sample` that draw with the result."""
        options = {"base": base.ref, "lora": str(weights)} if weights.suffix == ".safetensors" else {"base": str(weights)}
        return options | ({"vae": self.config.vae} if self.config.vae else {})

    @property
    def writes_checkpoint(self) -> bool:
        """Whether the student is written as a whole checkpoint, and not as a LoRA or a network of its own."""
        return self.student.adapter is None

    def export(self, run: Run) -> None:
        """Write the student: a LoRA named after the recipe's method, or the folder `model`."""
        self.save_student(run)

    # ---- what it can use

    def role(self, adapter: str | None, net: nn.Module | None = None, kind: str | None = None) -> Denoiser:
        """The base's network, or another, with an adapter or bare; `kind` is what it predicts where that is not the base's."""
        base = self.base_model
        return Denoiser(base.unet if net is None else net, self.schedule, kind or base.prediction_type, adapter, self.controlnet)

    def copied(self) -> nn.Module:
        """All of the base's network, to train; without the adapters that it may have by now."""
        net = self.base_model.unet
        return adapters.plain(net) if adapters.is_adapted(net) else trainable_copy(net)

    def trained(self, name: str, net: nn.Module | None = None, kind: str | None = None) -> tuple[Denoiser, list[nn.Parameter]]:
        """A role with what trains of it: all of a network of its own, or without one an adapter on the shared one."""
        if net is None:
            return self.role(name, kind=kind), self.adapter(self.base_model.unet, name)
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        return self.role(None, net, kind), list(net.parameters())

    def adapter(self, net: nn.Module, name: str, layers: Sequence[str] | None = None) -> list[nn.Parameter]:
        """A fresh adapter on a network, of the config's size."""
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        layers = layers or (adapters.ATTENTION if self.config.lora_layers == "attention" else adapters.TARGETS)
        return adapters.attach(net, self.config.lora_rank, self.config.lora_alpha, name, layers)

    def log(self, **figures: Tensor) -> None:
        """Scalars to log beside the losses, until others of their names come."""
        self._figures |= figures

    def logged(self) -> dict[str, float]:
        """The scalars of the last `log`."""
        return {name: value.item() for name, value in self._figures.items()}

    def settings(self, num_steps: int | None = None) -> Settings:
        """How the student is sampled: by its recipe, in that many steps or the recipe's own."""
        usual = Settings.usual(self.base_model.family)
        return Settings.of(self.recipe, usual, num_steps=num_steps or self.recipe.num_steps)

    def save_student(self, run: Run, name: str | None = None) -> None:
        """A LoRA file in the layout that every program loads, or a diffusers folder; `name` is without suffix."""
        recipe, base, student = replace(self.recipe, parent=self.parent), self.base_model, self.student
        if student.adapter is None:
            path = run.folder / (name or "model")
            write.to_folder(base.with_unet(student.net, student.kind), path, recipe=recipe)
        else:
            path = run.folder / f"{name or recipe.method}.safetensors"
            adapters.save_adapter(student, path, recipe=recipe, alpha=self.config.lora_alpha)
        run.wrote(path)


def lacking(method: type[Method] | Method) -> list[str]:
    """What a method still has to say, by name; empty where it is complete."""
    if isinstance(method, type):
        return sorted(method.__abstractmethods__) + ([] if method.name else ["name"])
    # hasattr: `student` may be set in __init__, in `players` or by a property, so only the object itself can answer.
    return [name for name in ("student", "recipe") if not hasattr(method, name)]
