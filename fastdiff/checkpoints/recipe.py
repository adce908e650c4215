"""How a few-step model wants to be sampled: carried in the header of its weights, obeyed by `sample`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastdiff.diffusion.schedule import PredictionType

PREFIX = "fastdiff."


@dataclass(frozen=True)
class Recipe:
    """Sampling settings of a distilled model; None where the file says nothing."""

    method: str | None = None  # lcm, pcm, tcd, dmd, ...
    family: str | None = None  # the name of the checkpoints' family
    scheduler: str | None = None  # a name in solvers.SOLVERS
    spacing: str | None = None  # trailing, leading, linspace, lcm
    num_steps: int | None = None
    timesteps: tuple[int, ...] | None = None  # where the network is called, descending; None: the spacing's
    guidance: float | None = None  # u + w (c - u); 1 = the conditional network alone
    eta: float | None = None  # TCD's gamma: 0 deterministic, 1 = LCM
    prediction_type: str | None = None  # epsilon, v_prediction, sample
    parent: str | None = None  # sha256 of the base UNet's weights

    @property
    def fixed(self) -> bool:
        """The weights know one number of steps, and not any."""
        return self.timesteps is not None or self.scheduler == "euler"

    def predicts(self, base: "PredictionType") -> "PredictionType":
        """What the network outputs with these weights, on a base that outputs `base`: only x0 is a change."""
        return "sample" if self.prediction_type == "sample" else base

    def to_metadata(self) -> dict[str, str]:
        """Safetensors header entries `fastdiff.<field>`; all strings, as the format wants."""
        text = lambda v: ",".join(map(str, v)) if isinstance(v, tuple) else str(v)  # noqa: E731
        return {PREFIX + k: text(v) for k, v in asdict(self).items() if v is not None}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None) -> "Recipe":
        """Read `to_metadata`'s entries back; unknown ones are left alone, broken numbers raise ValueError."""
        numbers = lambda text: tuple(int(x) for x in text.split(","))  # noqa: E731
        readers = {"num_steps": int, "guidance": float, "eta": float, "timesteps": numbers}
        found = {f.name: (metadata or {}).get(PREFIX + f.name) for f in fields(cls)}
        return cls(**{k: readers.get(k, str)(v) for k, v in found.items() if v is not None})
