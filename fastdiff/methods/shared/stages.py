"""A chain of stages a:b, each teaching b steps what a do, and its phases: who trains when, and for how many steps."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from fastdiff.diffusion.schedule import NoiseSchedule
from fastdiff.runtime.errors import UsageError
from fastdiff.training.method import Phase

PHASES = ("switch", "mse", "cond", "uncond", "full")
QUARTERS = (0.25, 0.5, 0.75, 1.0)  # of T: where students of two steps and one train (SDXL-Lightning, section 3.7)


class Chain(Protocol):
    """What is asked for."""

    stages: str  # a:b or a:b:share, comma between them
    phases: str  # of an adversarial stage: kind or kind:share
    adversarial_below: int
    lora_only: bool
    steps: int


@dataclass(frozen=True)
class Part(Phase):
    """A phase of a stage."""

    stage: int = 0
    kind: Literal["mse", "switch", "cond", "uncond", "full"] = "mse"
    a: int = 0  # steps of the stage's teacher
    b: int = 0  # and of its student

    @property
    def places(self) -> tuple[float, ...]:
        """Where the student trains, in (0, 1], 1 the last timestep."""
        return QUARTERS if self.b <= 2 else tuple((k + 1) / self.b for k in range(self.b))


def timesteps(schedule: NoiseSchedule, place: Tensor) -> Tensor:
    """Places (B,) as timesteps, 0 and below as -1, clean: with k / n those of trailing spacing."""
    return (place.clamp(min=0) * len(schedule)).round().long() - 1


def plan(config: Chain) -> list[Part]:
    """The phases of all stages with their steps; UsageError for a chain that is none."""
    try:
        split = [stage.split(":") for stage in config.stages.split(",")]
        stages = [(int(a), int(b), float(share[0]) if share else 1.0) for a, b, *share in split]
        chain = all(1 <= b < a <= 1000 and a % b == 0 and share > 0 for a, b, share in stages) and max(map(len, split)) <= 3
    except ValueError:
        chain = False
    if not chain or any(one[1] != two[0] for one, two in pairwise(stages)):
        raise UsageError(
            f"`stages={config.stages}`: not a chain", "as in 32:8,8:4: each divides, and starts where the last ended"
        )
    asked = [kind.split(":") for kind in config.phases.split(",")]
    try:
        wanted = {kind: float(weight[0]) if weight else 1.0 for kind, *weight in asked}
    except ValueError:
        wanted = {}
    known = [kind for kind, *_ in asked] == [kind for kind in PHASES if kind in wanted] and all(
        weight > 0 for weight in wanted.values()
    )
    if not known or not wanted.keys() & {"cond", "uncond"}:
        raise UsageError(
            f"`phases={config.phases}`: cond, uncond or both, then full where it is wanted", "as in mse,cond:2,uncond:2,full"
        )
    if config.lora_only:
        wanted.pop("full", None)
    parts: list[Part] = []
    weights: list[float] = []
    for i, (a, b, share) in enumerate(stages):
        kinds = {k: v for k, v in wanted.items() if k != "switch"} if b < config.adversarial_below else {"mse": 1.0}
        written = {"full", [kind for kind in kinds if kind != "full"][-1]}  # a LoRA, and full weights
        kinds = {"switch": wanted.get("switch", 1.0), **kinds} if b == 1 else kinds
        parts += [Part(f"{b}-{kind}", 0, kind in written, stage=i, kind=kind, a=a, b=b) for kind in kinds]
        weights += [share * weight / sum(kinds.values()) for weight in kinds.values()]
    ends = [round(config.steps * sum(weights[: i + 1]) / sum(weights)) for i in range(len(parts))]
    parts = [replace(part, steps=end - start) for part, start, end in zip(parts, [0, *ends], ends, strict=False)]
    if min(part.steps for part in parts) < 1:
        raise UsageError(f"`steps={config.steps}`: too few for {len(parts)} phases", "give more, or fewer `stages` or `phases`")
    return parts
