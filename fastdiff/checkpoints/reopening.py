"""The options that open again what a command wrote, where a single file does not tell all that is needed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint, load
from fastdiff.runtime.errors import InputRefused

# Entries of configs that say nothing of what a network computes, or that vary between copies of one network.
COSMETIC = {"sample_size", "transformers_version", "dtype", "torch_dtype", "architectures", "bos_token_id", "eos_token_id"}


def opening(base: Checkpoint, path: Path) -> dict[str, Any]:
    """The options, beside `base`, that open what was written from `base` to `path`: {option: value}, empty for a folder.

    A single file has no configs. Those of published networks ship with fastdiff; others are taken from the base's own folder.
    """
    if path.is_dir():
        return {}
    how: dict[str, Any] = {}
    if not (base.own_config or opens_alone(base, path)):
        how["base_config"] = str(base.config) if base.path.is_file() else base.ref
    reopened = load(str(path), config=how.get("base_config"), allow_pickle=base.allow_pickle)
    kind = reopened.file.metadata["fastdiff.prediction_type"]
    if reopened.prediction_type != kind:
        how["prediction_type"] = kind
    if base.ends_in_noise and not reopened.ends_in_noise:
        how["zero_snr"] = True
    return how


def opens_alone(base: Checkpoint, path: Path) -> bool:
    """Whether a single file written from `base` opens without further configs, as networks with the same configs."""
    try:
        reopened = load(str(path))
        for part in base.parts:
            reopened.weights(part)
    except InputRefused:
        return False

    def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        shared = {key for key in one.keys() & other.keys() - COSMETIC if not key.startswith("_")}
        return all(one[key] == other[key] for key in shared)

    return all(alike(write.config_of(base, part), reopened.config_of(part)) for part in base.parts)
