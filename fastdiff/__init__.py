"""fastdiff: turn a Stable Diffusion checkpoint into a fast few-step model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from fastdiff import lora as lora
    from fastdiff.checkpoints.recipe import Recipe as Recipe
    from fastdiff.commands.train import train as train
    from fastdiff.data.open import open_data as open_data
    from fastdiff.diffusion import losses as losses
    from fastdiff.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from fastdiff.models.base import load as load
    from fastdiff.models.denoiser import Denoiser as Denoiser
    from fastdiff.models.ema import EMA as EMA
    from fastdiff.quality.evaluation import evaluate as evaluate
    from fastdiff.sampling.sampler import Sampler as Sampler
    from fastdiff.training.method import Method as Method
    from fastdiff.training.trainer import Trainer as Trainer

# Looked up on first use: `fastdiff --help` and the command line's errors must not wait for torch.
PUBLIC = {
    "load": "fastdiff.models.base",
    "Denoiser": "fastdiff.models.denoiser",
    "EMA": "fastdiff.models.ema",
    "Method": "fastdiff.training.method",
    "NoiseSchedule": "fastdiff.diffusion.schedule",
    "Recipe": "fastdiff.checkpoints.recipe",
    "Sampler": "fastdiff.sampling.sampler",
    "Trainer": "fastdiff.training.trainer",
    "evaluate": "fastdiff.quality.evaluation",
    "open_data": "fastdiff.data.open",
    "train": "fastdiff.commands.train",
    "lora": "fastdiff",
    "losses": "fastdiff.diffusion",
}
MODULES = {"lora", "losses"}
__all__ = [
    "EMA",
    "Denoiser",
    "Method",
    "NoiseSchedule",
    "Recipe",
    "Sampler",
    "Trainer",
    "__version__",
    "evaluate",
    "load",
    "lora",
    "losses",
    "open_data",
    "train",
]


# A module's hook of Python for names that it has not yet.
def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    from fastdiff.runtime.requirements import check_torch

    check_torch()
    room = PUBLIC[name]
    # getattr: a name of the table
    value = import_module(f"{room}.{name}") if name in MODULES else getattr(import_module(room), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
