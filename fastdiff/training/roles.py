"""Who plays in a method: teacher, student and others as adapters on the base's one network, or as networks of their own."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.lora import adapters
from fastdiff.models.denoiser import Denoiser, trainable_copy


class Roles:
    """What methods of several roles have in common; the config names the adapters' size, and where it may be chosen, layers."""

    controlnet: nn.Module | None = None  # worn by every role

    def __init__(self, base: Checkpoint, config: Any) -> None:
        self.base_model, self.config, self.schedule = base, config, base.schedule()
        self.teacher = self.role(None)
        self.figures: dict[str, Tensor] = {}

    def role(self, adapter: str | None, net: nn.Module | None = None, kind: str | None = None) -> Denoiser:
        """The base's network, or another, with an adapter or bare; `kind` is what it predicts where that is not the base's."""
        base = self.base_model
        return Denoiser(base.unet if net is None else net, self.schedule, kind or base.prediction_type, adapter, self.controlnet)

    def copied(self) -> nn.Module:
        """All of the base's network, to train; without the adapters that it may have by now."""
        net = self.base_model.unet
        return adapters.plain(net) if adapters.is_adapted(net) else trainable_copy(net)

    def trained(self, name: str, net: nn.Module | None = None, kind: str | None = None) -> tuple[Denoiser, list[nn.Parameter]]:
        """A role with what trains of it: all of a network of its own, or without one an adapter on the shared one."""
        if net is None:
            return self.role(name, kind=kind), self.adapter(self.base_model.unet, name)
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        return self.role(None, net, kind), list(net.parameters())

    def adapter(self, net: nn.Module, name: str, layers: Sequence[str] | None = None) -> list[nn.Parameter]:
        """A fresh adapter on a network, of the config's size."""
        if self.config.gradient_checkpointing:
            adapters.checkpoint_gradients(net)
        narrow = getattr(self.config, "lora_layers", "all") == "attention"
        layers = layers or (adapters.ATTENTION if narrow else adapters.TARGETS)
        return adapters.attach(net, self.config.lora_rank, self.config.lora_alpha, name, layers)
