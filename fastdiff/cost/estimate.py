"""Estimate memory, disk and time of a training run by arithmetic, from network shapes and the method's `Load`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import SHIPPED
from fastdiff.cost import footprint
from fastdiff.cost.footprint import Footprint
from fastdiff.data.folder import Folder
from fastdiff.data.open import STREAMED, Needs, in_full
from fastdiff.options.train import TrainConfig
from fastdiff.training.method import Load
from fastdiff.training.scene import teacher_sampling

TRAINED = 8  # bytes per trained parameter: the value and its gradient, each fp32
MOMENTS = {"adamw": 8, "adamw8bit": 2, "adafactor": 0, "muon": 4}  # and what the optimiser keeps
RECOMPUTED = 1.33  # a step with gradient checkpointing takes this many times as long


@dataclass(frozen=True)
class Estimate:
    """What one setting takes: memory, FLOP of a step, and bytes of a saved state and of the exported weights.

    The memory of two settings is compared; what a setting takes in the end is measured or rehearsed.
    """

    memory_bytes: float
    resident_bytes: float  # of it, what stays between two steps
    step_flops: float
    state_bytes: float
    output_bytes: float


def estimate(load: Load, shape: Footprint, config: Any, dtype: torch.dtype) -> Estimate:
    """Estimate one setting: weights, optimiser states, averages, and the autograd graphs of one micro-batch.

    `load` says how many base UNets the method holds and calls; `shape` is counted with an adapter of the config's own rank.
    """
    adapter = load.lora * shape.trained if shape.trained != shape.parameters else 0
    whole = load.full * shape.parameters
    student = min(whole, shape.parameters) or adapter / max(load.lora, 1)
    averaged = 4 * student if config.ema else 0
    graph = shape.checkpointed_bytes if config.gradient_checkpointing else shape.saved_bytes
    stored = dtype.itemsize if config.quantize_base == "none" else 1
    updating = averaged + (adapter + whole) * MOMENTS[config.optimizer]  # what only an update uses
    held = load.frozen * shape.parameters * stored + (adapter + whole) * TRAINED
    fixed = held + (0 if config.offload else updating)
    backward = 2 * (RECOMPUTED if config.gradient_checkpointing else 1)
    return Estimate(
        max(fixed + graph * load.graph * config.batch_size, held + updating),
        fixed,
        shape.flops * (load.grad * (1 + backward) + load.free) * config.batch_size * config.grad_accum,
        (adapter + whole) * (TRAINED - 4 + MOMENTS[config.optimizer]) + averaged,
        student * (dtype.itemsize if whole else 4),
    )


@dataclass(frozen=True)
class DataPlan:
    """The data that is made before the first step, and what making it takes."""

    what: str
    bytes: float = 0.0  # on disk
    calls: int = 0  # network calls of the teacher's sampling
    pictures: int = 0  # to encode with the VAE


def data_plan(base: Checkpoint, config: TrainConfig, needs: Needs) -> DataPlan:
    """The data that `config.data` will make: nothing for the shipped set, teacher samples, or encoded images of a source."""
    spec = in_full(config.data) or base.family.default_data
    side = (config.resolution or base.resolution_px) // base.pixels_per_latent
    latent = 2 * base.unet_config["in_channels"] * side**2  # fp16
    if spec.partition(":")[0] == SHIPPED.data:
        return DataPlan(spec)
    if spec == "teacher":
        n = 0 if needs == "prompts" else config.pairs
        description = f"{n} samples of the teacher" if n else "prompts alone"
        return DataPlan(description, n * 2 * latent, n * teacher_sampling(config, base).calls)
    cond = footprint.condition(base, 1)
    text = 2 * (cond.tokens.numel() + (0 if cond.pooled is None else cond.pooled.numel()))
    n = len(Folder(Path(spec), config.caption_column).images) if Path(spec).is_dir() else STREAMED
    n = min(n, config.max_images) if config.max_images and Path(spec).is_dir() else config.max_images or n
    views = max(1, config.random_crops) * (2 if config.flip else 1)
    return DataPlan(f"{n} images of {spec}", n * (2 * latent * views + text), 0, n * views)
