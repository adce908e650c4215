"""fastdiff: turn a Stable Diffusion checkpoint into a fast few-step model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastdiff.checkpoints.checkpoint import load as load
    from fastdiff.diffusion.schedule import NoiseSchedule as NoiseSchedule
    from fastdiff.models.denoiser import Denoiser as Denoiser
    from fastdiff.quality.evaluation import evaluate as evaluate
    from fastdiff.sampling.sampler import Sampler as Sampler
    from fastdiff.training.trainer import Trainer as Trainer

# Looked up on first use: `fastdiff --help` and the command line's errors must not wait for torch.
PUBLIC = {
    "load": "fastdiff.checkpoints.checkpoint",
    "Denoiser": "fastdiff.models.denoiser",
    "NoiseSchedule": "fastdiff.diffusion.schedule",
    "Sampler": "fastdiff.sampling.sampler",
    "Trainer": "fastdiff.training.trainer",
    "evaluate": "fastdiff.quality.evaluation",
}
__all__ = ["Denoiser", "NoiseSchedule", "Sampler", "Trainer", "__version__", "evaluate", "load"]


# A module's hook of Python for names that it has not yet.
def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
