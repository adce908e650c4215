"""The options of `lightning`, their presets, and how a chain of stages is written."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args

from fastdiff.checkpoints.family import Presets
from fastdiff.options.train import TrainConfig
from fastdiff.runtime.config import Range
from fastdiff.runtime.errors import UsageError

# Paper: 1e-5 for mse, 1e-6 with LoRA, 5e-7 full, 512 images a step. Ours for one card: larger, for far smaller batches.
# A distance first and the paired loss are what small batches took on `emoji`.
# fmt: off
CARD = dict(
    lr=1e-4, adversarial_lr=1e-5, full_lr=1e-6, phases="mse,cond,uncond,full", gan="paired", gradient_checkpointing=True,
    lora_only=True, warmup=20,
)
PRESETS = Presets(
    # Measured (examples/emoji/README.md): distance does most here, and a discriminator has something to see in one step only.
    emoji=dict(
        stages="32:8:8,8:4:2,4:2:2.4,2:1:9.6", phases="switch:1,mse:7,cond:1,uncond:2,full:1", lora_rank=32, lora_alpha=32,
        lr=2e-3, adversarial_lr=1e-4, full_lr=5e-5, discriminator="full", d_lr=3e-4, d_warmup=10, d_features="every",
        gan="paired", late_detail_at=0, lr_schedule="cosine", warmup=10, ema=0.98, batch_size=24, steps=1100, guidance=3.75,
        adversarial_below=8, eval_every=100,
    ),
    sd15=dict(**CARD, batch_size=4, grad_accum=4, steps=10_000, guidance=7.5),
    sd21=dict(**CARD, batch_size=4, grad_accum=4, steps=10_000, guidance=7.5),
    # guidance: section 3.6; offload: for 12 GiB, and over 16 micro-batches the copies cost little
    sdxl=dict(**CARD, batch_size=1, grad_accum=16, steps=10_000, guidance=6.0, offload=True),
)
# fmt: on
EXAMPLES = """fastdiff lightning
fastdiff lightning --base sdxl --prompts prompts.txt --max-time 20h
fastdiff lightning --base sdxl --stages 8:4 --init lightning-8step.safetensors --phases cond"""


@dataclass
class Config(TrainConfig):
    PANEL: ClassVar[str] = "Progressive adversarial distillation"
    ESSENTIALS: ClassVar[str] = "base stages phases data prompts output steps guidance batch_size max_time"

    stages: Annotated[str, "chain of teacher:student sampling steps; a third number weighs the stage's share of --steps"] = (
        "128:32,32:8,8:4,4:2,2:1"
    )
    phases: Annotated[str, "phases of an adversarial stage, as mse,cond:2,uncond:2,full; a number weighs the phase's share"] = (
        "cond,uncond,full"
    )
    lora_only: Annotated[bool, "leave out the full phase, which trains a second whole network"] = False
    adversarial_below: Annotated[
        int, "stages to fewer steps than this are adversarial, the others use mse; 1 = all use mse", Range(1)
    ] = 32
    init: Annotated[str | None, "a LoRA of the same base that already samples well in the first teacher's steps"] = None
    guidance: Annotated[float, "guidance w of the first teacher, u + w (c - u); not used with --init", Range(1)] = 6.0
    lora_rank: Annotated[int, "rank of the adapters", Range(1)] = 64
    lora_alpha: Annotated[float, "scale of the adapters is alpha / rank", Range(above=0)] = 64
    adversarial_lr: Annotated[float, "learning rate of student and discriminator in adversarial phases", Range(above=0)] = 1e-6
    d_lr: Annotated[float | None, "learning rate of the discriminator; default the student's", Range(above=0)] = None
    full_lr: Annotated[float, "learning rate of the full phase", Range(above=0)] = 5e-7
    discriminator: Annotated[
        Literal["full", "lora"], "what trains of the discriminator below its head: all weights, or an adapter on the base"
    ] = "lora"
    d_features: Annotated[
        Literal["mid", "every"], "where the discriminator has heads: after the mid block, or after every block"
    ] = "mid"
    d_steps_per_gen: Annotated[
        int, "updates of the discriminator per update of the student; --steps counts the former", Range(1)
    ] = 1
    d_warmup: Annotated[int, "steps in which a new discriminator trains alone", Range(0)] = 0
    gan: Annotated[
        Literal["plain", "paired"],
        "plain: real and fake are judged separately (paper); paired: against each other, for small batches",
    ] = "plain"
    r1: Annotated[float, "weight of the R1 gradient penalty on real latents; 0 = none", Range(0)] = 0.0
    skip_teacher: Annotated[bool, "in uncond and full phases of 2 steps and 1, learn from the teacher one stage further back"] = (
        True
    )
    late_detail_at: Annotated[
        int, "in one-step adversarial phases, the step from which low noise levels weigh more", Range(0)
    ] = 1000
    proof: Annotated[
        int, "pictures per row of the closing table (emoji only), half of prompts never trained on; 0 = no table", Range(0, 4000)
    ] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        read_chain(self)

    @property
    def trains_whole(self) -> str | None:
        if any(part.kind == "full" for part in read_chain(self)):
            return "phase full (see `lora_only`)"
        return "`discriminator=full`" if self.discriminator == "full" else None


Kind = Literal["switch", "mse", "cond", "uncond", "full"]  # of a phase, in the order of a stage


class StagePhase(NamedTuple):
    """A phase of a stage: who trains, against what, and for how many steps."""

    name: str
    kind: Kind
    exports: bool  # its weights are written
    stage: int
    a: int  # sampling steps of the stage's teacher
    b: int  # sampling steps of its student
    steps: int = 0  # optimiser steps


def read_chain(config: Config) -> list[StagePhase]:
    """The phases of all stages, with the optimiser steps of each; UsageError where `stages` or `phases` is no chain."""
    try:
        split = [stage.split(":") for stage in config.stages.split(",")]
        stages = [(int(a), int(b), float(share[0]) if share else 1.0) for a, b, *share in split]
        chain = (
            all(1 <= b < a <= 1000 and a % b == 0 and 0 < share < math.inf for a, b, share in stages)
            and max(map(len, split)) <= 3
        )
    except ValueError:
        chain = False
    if not chain or any(one[1] != two[0] for one, two in pairwise(stages)):
        raise UsageError(
            f"`stages={config.stages}`: not a chain", "as in 32:8,8:4: each divides, and starts where the last ended"
        )
    shares = read_phases(config.phases)
    if config.lora_only:
        shares.pop("full", None)
    rows: list[StagePhase] = []
    weights: list[float] = []
    for i, (a, b, share) in enumerate(stages):
        kinds: dict[Kind, float] = {"mse": 1.0}
        if b < config.adversarial_below:
            kinds = {kind: weight for kind, weight in shares.items() if kind != "switch"}
        exported = {"full", [kind for kind in kinds if kind != "full"][-1]}  # a LoRA, and full weights
        if b == 1:
            kinds = {"switch": shares.get("switch", 1.0), **kinds}
        rows += [StagePhase(f"{b}-{kind}", kind, kind in exported, i, a, b) for kind in kinds]
        weights += [share * weight / sum(kinds.values()) for weight in kinds.values()]
    ends = [round(config.steps * sum(weights[: i + 1]) / sum(weights)) for i in range(len(rows))]
    rows = [row._replace(steps=end - start) for row, start, end in zip(rows, [0, *ends], ends, strict=False)]
    if min(row.steps for row in rows) < 1:
        raise UsageError(f"`steps={config.steps}`: too few for {len(rows)} phases", "give more, or fewer `stages` or `phases`")
    return rows


def read_phases(text: str) -> dict[Kind, float]:
    """Each kind of an adversarial stage's phases with its share of the stage; UsageError for another text."""
    words = [kind.split(":") for kind in text.split(",")]
    try:
        shares = {kind: float(weight[0]) if weight else 1.0 for kind, *weight in words}
    except ValueError:
        shares = {}
    ordered: list[Kind] = [kind for kind in get_args(Kind) if kind in shares]
    known = [kind for kind, *_ in words] == ordered and all(0 < weight < math.inf for weight in shares.values())
    if not known or not shares.keys() & {"cond", "uncond"}:
        raise UsageError(f"`phases={text}`: cond, uncond or both, then full where it is wanted", "as in mse,cond:2,uncond:2,full")
    return {kind: shares[kind] for kind in ordered}
