"""The sampling settings of a few-step model, stored in the header of its weights file and used by `sample`."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.diffusion.schedule import PredictionType

PREFIX = "fastdiff."
SPACINGS = ("trailing", "leading", "linspace", "lcm")  # of NoiseSchedule.grid
MOST_STEPS = 1000  # the timesteps of Stable Diffusion's schedule


@dataclass(frozen=True)
class Recipe:
    """Sampling settings of a distilled model; None where the file does not say."""

    method: str | None = None  # lcm, pcm, tcd, dmd, ...
    family: str | None = None  # the name of the checkpoints' family
    scheduler: str | None = None  # a name in samplers.SOLVERS
    spacing: str | None = None  # one of SPACINGS
    num_steps: int | None = None
    timesteps: tuple[int, ...] | None = None  # descending, at which the network is called; None: those of the spacing
    guidance: float | None = None  # w of u + w (c - u); 1: the conditional prediction alone
    eta: float | None = None  # TCD's gamma: 0 is deterministic, 1 is LCM
    prediction_type: str | None = None  # epsilon, v_prediction, sample
    parent: str | None = None  # sha256 of the base UNet's weights
    step_counts: tuple[int, ...] | None = None  # the numbers of steps that one file was trained for, where there are several
    clip_skip: int | None = None  # last layers of the text encoders that are left out, as diffusers counts

    @property
    def own_counts(self) -> tuple[int, ...]:
        """The numbers of steps that the weights were trained for; () where any number may be taken.

        Weights with a list of timesteps, or for Euler's steps as SDXL-Lightning's, draw in `num_steps` alone.
        """
        one = self.num_steps is not None and (self.timesteps is not None or self.scheduler == "euler")
        return self.step_counts or ((self.num_steps,) if one and self.num_steps else ())

    @property
    def few_steps(self) -> bool:
        """Whether these are the settings of weights that were distilled to draw in few steps."""
        return self.num_steps is not None or self.timesteps is not None or self.scheduler is not None

    @property
    def steps_text(self) -> str:
        """The numbers of steps in words: "1 step", "4 steps", "1, 2 or 4 steps"."""
        *others, last = self.step_counts or (self.num_steps,)
        return f"{', '.join(map(str, others))} or {last} steps" if others else f"{last} step{'s' if last != 1 else ''}"

    def predicts(self, base: "PredictionType") -> "PredictionType":
        """What the network outputs with these weights: "sample" if the recipe says so, else as the base, `base`."""
        return "sample" if self.prediction_type == "sample" else base

    def to_metadata(self) -> dict[str, str]:
        """The recipe as entries `fastdiff.<field>` of a safetensors header, whose values must be strings."""
        text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
        return {PREFIX + k: text(v) for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "Recipe":
        """Read a recipe from the entries of a file's header. Other entries are ignored.

        ValueError for a malformed number, and for a value that nothing can be sampled with, which would else be told as if the
        user had given it.
        """
        numbers = lambda text: tuple(int(x) for x in text.split(","))  # noqa: E731
        readers: dict[str, Callable[[str], Any]] = {
            "num_steps": int,
            "clip_skip": int,
            "guidance": float,
            "eta": float,
            "timesteps": numbers,
            "step_counts": numbers,
        }
        texts = {f.name: (metadata or {}).get(PREFIX + f.name) for f in fields(cls)}
        read: dict[str, Any] = {}
        for name, text in texts.items():
            if text is not None:
                try:
                    read[name] = readers.get(name, str)(text)
                except ValueError as error:
                    raise malformed(name, text) from error
        recipe = cls(**read)
        for name, sound in recipe.soundness():
            if not sound:
                raise malformed(name, texts[name])
        return recipe

    def soundness(self) -> Iterator[tuple[str, bool]]:
        """Yield the name of every field that is set and limited to some values, and whether its value is one of them."""
        from fastdiff.diffusion.samplers import SOLVERS  # imports torch, which options do not load

        steps = lambda n: 1 <= n <= MOST_STEPS
        limits: dict[str, Callable[[Any], bool]] = {
            "scheduler": SOLVERS.__contains__,
            "spacing": SPACINGS.__contains__,
            "num_steps": steps,
            "step_counts": lambda counts: all(map(steps, counts)),
            "timesteps": lambda ts: min(ts) >= 0 and ts == tuple(sorted(set(ts), reverse=True)),
            "guidance": math.isfinite,
            "clip_skip": lambda layers: layers >= 0,
            "eta": lambda eta: 0 <= eta <= 1,
        }
        for name, limit in limits.items():
            if (value := vars(self)[name]) is not None:
                yield name, limit(value)


def malformed(name: str, text: str | None) -> ValueError:
    """The error for the entry of a header that a recipe cannot have."""
    return ValueError(f"{PREFIX}{name} is {ascii(text)[:80]}")
