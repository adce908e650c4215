"""Methods whose student may start from a LoRA, the file of the option `init`."""

from collections.abc import Sequence
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.lora import adapters
from fastdiff.lora.file import Lora
from fastdiff.training.method import Method


class StartsFromLora(Method):
    """Checks the file early. A subclass reads it with `_start` and puts it into its student."""

    @classmethod
    def check(cls, config: Any) -> Any:
        """Read the LoRA of `init` now, so that a wrong file fails before anything else."""
        cls._start(config)
        return config

    @classmethod
    def check_base(cls, config: Any, base: Checkpoint) -> None:
        """Refuse a LoRA of `init` that does not fit the base or the adapters; warn of modules in it that are not used."""
        super().check_base(config, base)
        if start := cls._start(config):
            adapters.check_start(start.for_unet("init"), base, cls._start_layers(config))

    @classmethod
    def _start(cls, config: Any) -> Lora | None:
        """Read the LoRA of `init`; None without one."""
        if not config.init:
            return None
        return lora.load(lora.located(config.init, "init", allow_pickle=config.allow_pickle), allow_pickle=config.allow_pickle)

    @classmethod
    def _start_layers(cls, config: Any) -> Sequence[str] | None:
        """Return the layers that the LoRA may change; None where the student trains whole, and any layer may."""
        return cls._layers(config)
