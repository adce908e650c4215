"""What a training run takes by arithmetic: parameters, what a pass keeps for backward, and the data that is made first."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.cost import footprint
from fastdiff.cost.footprint import Footprint
from fastdiff.data.folder import Folder
from fastdiff.data.open import STREAMED
from fastdiff.models import unet
from fastdiff.training.config import TrainConfig

OPTIMISER = 16  # bytes of a parameter that trains: itself, its gradient and two moments in fp32
RECOMPUTED = 1.33  # time of a training step with gradient checkpointing
RUNTIME_GIB = {"cuda": 0.6, "mps": 0.5, "cpu": 0.6}  # taken before a tensor is made: CUDA's context, the libraries


@dataclass(frozen=True)
class Load:
    """What a method holds and calls, in units of the base's UNet; the arithmetic's whole knowledge of it."""

    full: float = 0  # networks that train as a whole
    lora: float = 0  # adapters that train
    frozen: float = 1  # networks that do not train
    graph: float = 1  # passes whose graph is in memory at once
    grad: float = 1  # passes with gradients a step
    free: float = 0  # passes without


def size_of(base: Checkpoint, config: dict[str, Any]) -> float:
    """A UNet of that config, in units of the base's."""
    sizes = [sum(p.numel() for p in shaped.skeleton("unet").parameters()) for shaped in (base.shaped("unet", config), base)]
    return sizes[0] / sizes[1]


def lcm_load(config: Any, base: Checkpoint) -> Load:
    return Load(full=1, free=3) if config.full else Load(lora=1, free=1 if config.finetune else 3)


def dmd_load(config: Any, base: Checkpoint) -> Load:
    full, turn = (config.student == "full") + (config.fake == "full"), 1 / config.fake_steps_per_gen
    gan = 1.5 if config.gan_weight else 0.0
    return Load(full, 2 - full, 1, 2 + gan / 2, 1 + turn + gan, 2 * turn + (config.num_steps - 1) / 2)


def lightning_load(config: Any, base: Checkpoint) -> Load:
    """The largest phase: discriminator and student, in the full phase a network of its own."""
    a, b = (int(n) for n in config.stages.split(",")[0].split(":")[:2])
    own = 0.5 if config.discriminator == "full" else 0.0  # the encoder alone
    full = own + (0 if config.lora_only else 1)
    return Load(full, 2.0 if own else 2.5, graph=1.5, grad=2.5, free=1 + 2 * a / b)


def sdxs_load(config: Any, base: Checkpoint) -> Load:
    student = size_of(base, config.open_student().unet_config) if config.init else 1.0
    full = student * (config.student == "full" and not config.style_lora) + (config.fake == "full")
    return Load(full, 2 - (full > 0) - (full > 1), 1, 1.5 + student, 1.5 + student, 2.5)


def prune_load(config: Any, base: Checkpoint) -> Load:
    student = size_of(base, unet.student_config(base.unet_config, config.layout, base.family))
    return Load(full=student, graph=student, grad=student, free=1)


def controlnet_load(config: Any, base: Checkpoint) -> Load:
    """The encoder again, with its two small networks; teacher and student are two UNets where there is an --init."""
    student = size_of(base, config.open_student().unet_config) if config.init else 0.0
    return Load(0.4, config.one_step + 0.0, 1.4 + student, (student or 1) + 0.4, (student or 1) + 0.4, 1.4)


LOADS: dict[str, Callable[[Any, Checkpoint], Load]] = {
    "train-lcm-lora": lcm_load,
    "dmd": dmd_load,
    "lightning": lightning_load,
    "sdxs": sdxs_load,
    "prune": prune_load,
    "distill-controlnet": controlnet_load,
}


@dataclass(frozen=True)
class Estimate:
    """The arithmetic's answer for one setting."""

    memory_bytes: float
    step_flops: float
    state_bytes: float
    output_bytes: float


def estimate(load: Load, shape: Footprint, config: Any, dtype: torch.dtype, device: str) -> Estimate:
    """Weights, optimisers, averages and the graphs of one micro-batch. `shape` is of an adapter of the config's own rank."""
    adapter = load.lora * shape.trained if shape.trained != shape.parameters else 0
    whole = load.full * shape.parameters
    student = min(whole, shape.parameters) or adapter / max(load.lora, 1)
    averaged = 4 * student if config.ema else 0
    graph = shape.checkpointed_bytes if config.gradient_checkpointing else shape.saved_bytes
    fixed = load.frozen * shape.parameters * dtype.itemsize + (adapter + whole) * OPTIMISER + averaged
    backward = 2 * (RECOMPUTED if config.gradient_checkpointing else 1)
    return Estimate(
        fixed + graph * load.graph * config.batch_size + RUNTIME_GIB[device] * 2**30,
        shape.flops * (load.grad * (1 + backward) + load.free) * config.batch_size * config.grad_accum,
        (adapter + whole) * (OPTIMISER - 4) + averaged,
        student * (dtype.itemsize if whole else 4),
    )


@dataclass(frozen=True)
class DataPlan:
    """What is made before the first step."""

    what: str
    bytes: float = 0.0
    calls: int = 0  # of the UNet
    pictures: int = 0  # that the VAE encodes


def data_plan(base: Checkpoint, config: TrainConfig) -> DataPlan:
    spec = config.data or base.family.default_data
    side = (config.resolution or base.resolution_px) // base.pixels_per_latent
    latent = 2 * base.unet_config["in_channels"] * side**2  # fp16
    if spec.partition(":")[0] == SHIPPED.data:
        return DataPlan(spec)
    if spec == "teacher":
        n = 0 if config.wants == "prompts" else config.pairs
        told = f"{n} samples of the teacher" if n else "prompts alone"
        return DataPlan(told, n * 2 * latent, n * config.teacher_sampling(base.family).calls)
    cond = footprint.condition(base, 1)
    text = 2 * (cond.tokens.numel() + (0 if cond.pooled is None else cond.pooled.numel()))
    n = len(Folder(Path(spec)).images) if Path(spec).is_dir() else STREAMED
    n = min(n, config.max_images) if config.max_images and Path(spec).is_dir() else config.max_images or n
    views = max(1, config.random_crops) * (2 if config.flip else 1)
    return DataPlan(f"{n} images of {spec}", n * (2 * latent * views + text), 0, n * views)
