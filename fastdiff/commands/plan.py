"""`fastdiff plan COMMAND ...`: says how much memory, disk and time a training run takes, before it starts.

With a probe, some steps of the command are measured on this machine. Without one, the whole run is rehearsed on a simulated card
(`cost.rehearsal`), which needs neither the weights nor a card, and its time is calculated from the network's shapes. `memory`
plans for a card that is not in this machine. Other settings are estimated by the calculated difference to the one that was
measured or rehearsed, and the one that is proposed in the end has been measured or rehearsed itself.
"""

import os
import re
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import checkpoint, locate
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.locate import ALIASES
from fastdiff.cost import footprint
from fastdiff.cost.estimate import Estimate, data_plan, estimate
from fastdiff.cost.probe import Measured, measure
from fastdiff.cost.rehearsal import OTHERS, Rehearsal, rehearse, taken_bytes
from fastdiff.lora import adapters
from fastdiff.options.train import TrainConfig, seconds
from fastdiff.runtime import console, disk
from fastdiff.runtime.config import options
from fastdiff.runtime.disk import cache_folder
from fastdiff.runtime.errors import DoesNotFit, InputRefused, Result, UsageError, as_field
from fastdiff.sampling.assemble import pick_device, pick_dtype
from fastdiff.training.method import Method
from fastdiff.training.session import default_folder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRODUCT_PART = 0.5  # a whole pass reaches about this part of the speed of a large matrix product
FREE_PART = 0.95  # a plan may fill this part of the memory
LEAST_RANK = 4


def settings(config: Any, adapters_train: bool) -> list[Any]:
    """The config, then variants that take less and less memory for the same batch.

    First the batch is split into smaller parts, then gradient checkpointing is switched on, and what only an update uses moves
    to CPU memory. Then a run with adapters keeps the base in 8 bits and halves the rank, and a whole network trains with smaller
    moments.
    """
    whole = config.batch_size * config.grad_accum
    parts = [n for n in range(config.batch_size, 0, -1) if whole % n == 0]
    configs = []

    def offer(config: Any, **changes: Any) -> None:
        with suppress(UsageError):  # not every method takes every option
            configs.append(replace(config, **changes))

    for again in [False, True] if not config.gradient_checkpointing else [True]:
        for n in parts:
            offer(config, batch_size=n, grad_accum=whole // n, gradient_checkpointing=again)
    if not config.offload:
        offer(configs[-1], offload=True)
    if adapters_train and config.quantize_base == "none":
        offer(configs[-1], quantize_base="int8")
    if not adapters_train and config.optimizer == "adamw":
        offer(configs[-1], optimizer="adafactor")
    rank = config.lora_rank if adapters_train else 0
    while (rank := rank // 2) >= LEAST_RANK:
        offer(configs[-1], lora_rank=rank, lora_alpha=config.lora_alpha * rank / config.lora_rank)
    return configs


def shapes_of(config: TrainConfig, dtype: torch.dtype) -> Checkpoint:
    """The base in a dtype. Where it is an alias whose weights are not on this machine, the published shapes of its family."""
    try:
        return config.open_base(dtype)
    except InputRefused:
        raise
    except UsageError:
        if config.base not in ALIASES:
            raise
    family = locate.family_of(config.base)
    console.info(f"--base {config.base}: its weights are not on this machine, so the published shapes of {family} are counted")
    base = checkpoint.load(str(family.home), dtype=dtype)
    if config.base in family.epsilon_aliases:
        base = replace(base, prediction="epsilon").shaped("unet", {**base.unet_config, "sample_size": family.epsilon_latent_side})
    return base


UNITS = {"": 2**30, "g": 2**30, "gb": 2**30, "gib": 2**30, "m": 2**20, "mb": 2**20, "mib": 2**20}


def size_in_bytes(text: str) -> int:
    """Bytes of a size like 16G, 16GB, 16GiB, 12000M or 16, which is in GiB; UsageError for another text.

    Card makers mean GiB when they say GB.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?) *([a-z]*)", text.strip().lower())
    if not match or match[2] not in UNITS or not float(match[1]):
        raise UsageError(f"{as_field('memory', text)}: not a size", "write 16G, 12000M or a number of GiB")
    return int(float(match[1]) * UNITS[match[2]])


def memory_bytes(device: torch.device) -> int:
    """The bytes of memory that a run may take: what is free on a GPU, or on the CPU all memory of the machine or container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limit = Path("/sys/fs/cgroup/memory.max")
    limit_text = limit.read_text().strip() if limit.exists() else "max"
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, int(limit_text)) if limit_text.isdigit() else whole


def product_flops(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """FLOP per second of a large matrix product on this machine: the best of a few."""
    side = side if device.type != "cpu" else side // 2
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


@dataclass
class Row:
    """One setting, and how much memory and time it takes."""

    config: Any = field(repr=False)
    trains: str = ""  # the rank of adapters, or the optimiser of a whole network
    memory_bytes: float | None = None  # None: the probe ran out of memory
    step_s: float | None = None
    measured: bool = False
    rehearsed: bool = False
    fits: bool = False

    @property
    def changes(self) -> dict[str, Any]:
        """The method's options that differ between settings, with this setting's values."""
        return {name: value for name, value in vars(self.config).items() if name in CHANGED}

    def metrics(self) -> dict[str, Any]:
        """The row for the JSON object."""
        return self.changes | {k: v for k, v in vars(self).items() if k not in ("config", "trains")}

    def cells(self) -> list[str]:
        """The row for the table."""
        config, yes = self.config, lambda value: "yes" if value else "no"
        known = "" if self.measured or self.rehearsed else "~"
        return [
            f"{config.batch_size} x {config.grad_accum}",
            yes(config.gradient_checkpointing),
            yes(config.offload),
            "" if config.quantize_base == "none" else config.quantize_base,
            self.trains,
            "too much" if self.memory_bytes is None else f"{known}{self.memory_bytes / 2**30:.2f}",
            "" if self.step_s is None else f"{self.step_s:.3g}",
            yes(self.fits),
        ]


CHANGED = (
    "batch_size",
    "grad_accum",
    "gradient_checkpointing",
    "offload",
    "quantize_base",
    "lora_rank",
    "lora_alpha",
    "optimizer",
)


class Plan:
    """The settings of a command in order of preference, the first one that fits, and how much that takes."""

    def __init__(self, method: type[Method], config: TrainConfig, *, probe: bool, memory: int | None = None) -> None:
        self.command, self.method, self.config, self.probe, self.memory = method.name, method, config, probe, memory
        elsewhere = memory is not None
        self.device = torch.device("cuda") if elsewhere else pick_device(config.device)
        precision = "bf16" if elsewhere and config.precision == "auto" else config.precision
        self.dtype = pick_dtype(precision, self.device)
        self.base = config.open_base() if probe else shapes_of(config, self.dtype)
        method.check_base(config, self.base)
        self.data = data_plan(self.base, config, method.needs(config))
        self.room = memory_bytes(self.device) if memory is None else memory
        self.load = method.load(config, self.base)
        self.px = config.resolution or self.base.resolution_px
        self.estimates = self.estimated()
        lora = bool(self.load and self.load.lora)
        rows = [Row(c, f"rank {c.lora_rank}" if lora else c.optimizer) for c in settings(config, lora)]
        self.rows = rows if self.estimates else rows[:1]
        self.measured: Measured | None = None
        self.rehearsal: Rehearsal | None = None  # of the last setting that was rehearsed
        self.speed = 0.0 if probe or memory is not None else PRODUCT_PART * product_flops(self.device, self.dtype)
        self.choose()

    def estimated(self) -> list[Estimate]:
        """The calculated estimate of every setting; [] where the method does not say what a step costs."""
        load, rank = self.load, self.config.lora_rank
        layers = adapters.ATTENTION if self.config.lora_layers == "attention" else adapters.TARGETS
        self.shape = footprint.of_unet(self.base, self.px, self.dtype, rank if load and load.lora else None, layers)
        if load is None:
            return []
        estimates = []
        for config in settings(self.config, bool(load.lora)):
            ratio = config.lora_rank / rank if load.lora else 1
            shape = replace(self.shape, trained=round(self.shape.trained * ratio))
            estimates.append(estimate(load, shape, config, self.dtype))
        return estimates

    def choose(self) -> None:
        """Fill in the rows. The setting that is chosen in the end has been measured or rehearsed."""
        look = self.measure if self.probe else self.rehearse
        look(self.rows[0])
        for row, expected in zip(self.rows, self.estimates, strict=False):
            if not row.measured and not row.rehearsed:
                row.memory_bytes = self.expected_bytes(expected)
                row.step_s = self.step_s(expected)
                row.fits = row.memory_bytes <= FREE_PART * self.room
        while (best := self.chosen) is not None and not (best.measured or best.rehearsed):
            look(best)

    def expected_bytes(self, expected: Estimate) -> float:
        """Memory of a setting by the calculated difference to the first one. A picture takes the same in both."""
        first, known = self.estimates[0], self.rows[0].memory_bytes
        if known is None:  # the first one ran out of memory
            return expected.memory_bytes
        steps = expected.memory_bytes - first.memory_bytes
        if self.rehearsal is None:
            return known + steps
        pictures = expected.resident_bytes - first.resident_bytes
        peaks = [size + (pictures if part in OTHERS else steps) for part, size in self.rehearsal.peaks.items()]
        return taken_bytes(max(peaks), self.device.type)

    def step_s(self, expected: Estimate) -> float | None:
        """Seconds per step of a setting that is not measured; None where the speed is not known."""
        if self.measured:
            return (self.rows[0].step_s or 0) * expected.step_flops / self.estimates[0].step_flops
        return expected.step_flops / self.speed if self.speed else None

    def measure(self, row: Row) -> None:
        """Probe one setting and fill in its row."""
        measured = measure(self.method, row.config, pictures=self.data.pictures > 0)
        row.measured, row.memory_bytes, row.step_s, row.fits = True, None, None, False
        if measured:
            self.measured = measured
            row.memory_bytes, row.step_s = measured.peak_bytes, measured.training_s / sum(n for n, _ in measured.phases.values())
            row.fits = row.memory_bytes <= FREE_PART * self.room

    def rehearse(self, row: Row) -> None:
        """Rehearse one setting on the simulated card and fill in its row."""
        config = replace(row.config, precision={v: k for k, v in DTYPES.items()}[self.dtype])
        with console.progress(None, f"rehearsing {self.command}") as bar:
            self.rehearsal = rehearse(self.method, config, self.base, report=lambda part: bar.update(part=part))
        row.memory_bytes = taken_bytes(self.rehearsal.peak_bytes, self.device.type)
        row.rehearsed, row.fits = True, row.memory_bytes <= FREE_PART * self.room
        row.step_s = self.step_s(self.estimates[self.rows.index(row)]) if self.estimates else None

    @property
    def device_name(self) -> str:
        """What the plan is for, in words."""
        return "a CUDA card" if self.memory is not None else named(self.device)

    @property
    def chosen(self) -> Row | None:
        """The first setting that fits; None where none does."""
        return next((row for row in self.rows if row.fits), None)

    @property
    def row(self) -> Row:
        """The setting that the plan's figures describe: the first that fits, or else the config as given."""
        return self.chosen or self.rows[0]

    def data_s(self) -> float | None:
        """Seconds to make the data before training: the teacher's samples and the encoded pictures. None if not known."""
        calls, pictures = self.data.calls, self.data.pictures
        if not calls and not pictures:
            return 0.0
        if self.measured:
            return calls * self.measured.call_s + pictures * self.measured.picture_s
        encoding = footprint.encoding_flops(self.base, self.px) if pictures and self.speed else 0
        return (calls * self.shape.flops + pictures * encoding) / self.speed if self.speed else None

    def training_s(self) -> float | None:
        """Seconds of all training steps, at most `max_time`. None if not known."""
        limit_s = seconds("max_time", self.config.max_time)
        if self.row.step_s is None:
            return None
        took_s = self.row.step_s * self.config.steps
        return min(took_s, limit_s or took_s)

    def disk(self) -> dict[str, tuple[Path, float]]:
        """{what: (folder, bytes)} of the cache, the saved states and the weights.

        The states count one more than are kept, because the newest is written before the oldest is deleted.
        """
        folder = Path(self.config.output) if self.config.output else default_folder(self.command, self.config)
        expected = self.estimates[self.rows.index(self.row)] if self.estimates else None
        known = self.measured or self.rehearsal
        assert known is not None
        state = known.state_bytes
        weights = expected.output_bytes if expected else known.trained_bytes
        states = self.config.keep_states + 1
        return {"cache": (cache_folder(), self.data.bytes), "states": (folder, state * states), "weights": (folder, weights)}

    def metrics(self) -> dict[str, Any]:
        """The whole plan for the JSON object."""
        disk_metrics = {name: {"folder": str(folder), "bytes": size} for name, (folder, size) in self.disk().items()}
        return {
            "command": self.command,
            "device": self.device_name,
            "memory_free_bytes": self.room,
            "probed": self.probe,
            "peaks": self.rehearsal and self.rehearsal.peaks,
            "settings": [row.metrics() for row in self.rows],
            "proposal": self.chosen and {k: v for k, v in self.chosen.metrics().items() if k in CHANGED},
            "data": asdict(self.data),
            "data_h": hours(self.data_s()),
            "training_h": hours(self.training_s()),
            "disk": disk_metrics,
        }

    def show(self) -> None:
        """Print the settings, and the time and disk of the first that fits, as tables."""
        how = "measured on" if self.probe else "rehearsed for"
        columns = ["batch", "checkpointing", "offload", "base", "trains", "GiB", "s a step", "fits"]
        listed = [row for row in self.rows if row.fits][:3] + [row for row in self.rows if not row.fits]
        rows = [row.cells() for row in sorted(listed, key=self.rows.index)]
        notes = f"batch: images at once x parts of a step; ~ is calculated; a plan fills {FREE_PART:.0%}"
        console.table(f"{self.command}, {how} {self.device_name}, {disk.format_size(self.room)}\n{notes}", columns, rows)
        time_text = lambda took_s: "not known" if took_s is None else f"{took_s / 3600:.2f} h"
        needs = [["data", self.data.what, time_text(self.data_s())]]
        needs += [["training", f"{self.config.steps} steps", time_text(self.training_s())]]
        needs += [[name, str(folder), disk.format_size(size)] for name, (folder, size) in self.disk().items()]
        which = "the first setting that fits" if self.chosen else "the command as it is"
        console.table(f"time and disk of {which}", ["what", "of", "takes"], needs)

    def check(self) -> None:
        """DoesNotFit where no setting fits into memory, or the disks have too little room; its result has the whole plan."""
        failure = None
        if self.chosen is None:
            least = min((row.memory_bytes for row in self.rows if row.memory_bytes), default=None)
            need = f"at least {disk.format_size(least)}" if least else "more than there is"
            whole = vars(self.config).get("full") or vars(self.config).get("student") == "full"
            room = f"{disk.format_size(FREE_PART * self.room)}, {FREE_PART:.0%} of what is free"
            failure = DoesNotFit(
                f"plan {self.command}: no setting fits: {need} of memory, and a plan fills {room}",
                "a smaller --resolution" + (", a LoRA in place of full weights," if whole else "") + " or a larger device",
            )
        needed: dict[int, float] = {}
        for folder, size in self.disk().values():
            home = disk.nearest(folder)
            needed[home.stat().st_dev] = needed.get(home.stat().st_dev, 0.0) + size
            if needed[home.stat().st_dev] > disk.free_bytes(folder) and failure is None:
                need = f"{disk.format_size(needed[home.stat().st_dev])} on the disk of {home}"
                failure = DoesNotFit(
                    f"plan {self.command}: needs {need}, and {disk.format_size(disk.free_bytes(folder))} are free",
                    "FASTDIFF_CACHE and -o name other folders; fewer --pairs or --max-images need less",
                )
        if failure:
            failure.result = Result(metrics=self.metrics())
            raise failure


def hours(time_s: float | None) -> float | None:
    """Seconds as hours; None where they are not known."""
    return None if time_s is None else time_s / 3600


def named(device: torch.device) -> str:
    """The device in words: the name of the GPU, or the number of cores."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {os.cpu_count()} cores"


def run(method: type[Method], config: TrainConfig, *, probe: bool, typed: str, memory: str | None = None) -> Result:
    """Plan a training command: print how much it takes, and return the first of its settings that fits.

    `memory`, as 16G, plans for a CUDA card of that size, without a probe. `typed` is the command as the user gave it; the next
    command is the same with the changed options appended. UsageError where nothing trains; DoesNotFit where no setting fits.
    """
    if not config.steps:
        raise UsageError("--steps 0: nothing trains, so there is nothing to plan")
    if memory is not None and config.device not in {"auto", "cuda"}:
        raise UsageError(f"--memory {memory}: plans for a CUDA card, not for `device={config.device}`", "leave one of them out")
    plan = Plan(method, config, probe=probe and memory is None, memory=None if memory is None else size_in_bytes(memory))
    plan.show()
    plan.check()
    flags = {o.name: o for o in options(type(config))}
    changes = []
    for name, value in plan.row.changes.items():
        if value != vars(config)[name]:
            text = value if isinstance(value, str) else f"{value:g}"
            changes.append(flags[name].flag if value is True else f"{flags[name].flag} {text}")
    if changes:
        console.warn(f"the command does not fit as it is; with these changes it does: {' '.join(changes)}")
    return Result(metrics=plan.metrics(), next_command=" ".join([typed, *changes]))
