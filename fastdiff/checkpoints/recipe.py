"""The sampling settings of a few-step model, stored in the header of its weights file and used by `sample`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.diffusion.schedule import PredictionType

PREFIX = "fastdiff."


@dataclass(frozen=True)
class Recipe:
    """Sampling settings of a distilled model; None where the file does not say."""

    method: str | None = None  # lcm, pcm, tcd, dmd, ...
    family: str | None = None  # the name of the checkpoints' family
    scheduler: str | None = None  # a name in samplers.SOLVERS
    spacing: str | None = None  # trailing, leading, linspace, lcm
    num_steps: int | None = None
    timesteps: tuple[int, ...] | None = None  # descending, at which the network is called; None: those of the spacing
    guidance: float | None = None  # w of u + w (c - u); 1: the conditional prediction alone
    eta: float | None = None  # TCD's gamma: 0 is deterministic, 1 is LCM
    prediction_type: str | None = None  # epsilon, v_prediction, sample
    parent: str | None = None  # sha256 of the base UNet's weights
    any_steps: bool | None = None  # whether the weights work with other numbers of steps, too

    @property
    def fixed(self) -> bool:
        """Whether the weights work with one number of steps only.

        A file that does not say: those with timesteps of their own do, and those for Euler steps, as SDXL-Lightning's.
        """
        return not self.any_steps and (self.timesteps is not None or self.scheduler == "euler")

    def predicts(self, base: "PredictionType") -> "PredictionType":
        """What the network outputs with these weights: "sample" if the recipe says so, else as the base, `base`."""
        return "sample" if self.prediction_type == "sample" else base

    def to_metadata(self) -> dict[str, str]:
        """The recipe as entries `fastdiff.<field>` of a safetensors header, whose values must be strings."""
        text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
        return {PREFIX + k: text(v) for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "Recipe":
        """Read a recipe from the entries of a file's header. Other entries are ignored; a malformed number raises ValueError."""
        numbers = lambda text: tuple(int(x) for x in text.split(","))  # noqa: E731
        readers: dict[str, Callable[[str], Any]] = {
            "num_steps": int,
            "guidance": float,
            "eta": float,
            "timesteps": numbers,
            "any_steps": lambda text: text == "True",
        }
        texts = {f.name: (metadata or {}).get(PREFIX + f.name) for f in fields(cls)}
        return cls(**{name: readers.get(name, str)(text) for name, text in texts.items() if text is not None})
