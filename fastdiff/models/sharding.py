"""Split networks over processes (FSDP2, torch's fully_shard): each holds a part of parameters, gradients and Adam moments.

A network is split block by block; a block is gathered only while it runs. Saved states are whole, so a run can be resumed
with another number of processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.runtime import processes

BLOCKS = ("down_blocks", "up_blocks", "transformer_blocks", "resnets")  # lists of modules that are gathered one at a time


def is_split(value: Any) -> bool:
    """Return whether a value is a DTensor, a tensor split over processes."""
    return hasattr(value, "to_local")  # importing that class takes seconds, and most runs split nothing


def local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this process's part of each tensor, sharing memory with it."""
    return [t.to_local() if is_split(t) else t for t in tensors]


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Move a tensor to the device of `like`, and split it if `like` is split."""
    if is_split(value) or not is_split(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def whole(value: Any, *, everywhere: bool = False) -> Any:
    """Gather the split tensors of a nested dict, list or tuple on the CPU. All processes must call it.

    Other processes than the first get empty tensors, unless `everywhere`. Tensors that are not split are returned as they are.
    """
    if is_split(value):
        full = value.detach().full_tensor()
        return full.cpu() if everywhere or processes.first() else full.new_empty(0)
    if isinstance(value, dict):
        return {k: whole(v, everywhere=everywhere) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(whole(v, everywhere=everywhere) for v in value)
    return value


def shard(nets: list[nn.Module], device: torch.device) -> dict[nn.Parameter, nn.Parameter]:
    """Split fully trainable networks over all processes. Returns {old parameter: split parameter}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh, moved = init_device_mesh(device.type, (processes.count(),)), {}
    for net in nets:
        before = dict(net.named_parameters())
        if isinstance(net, FSDPModule):
            continue
        for part in reversed(parts_of(net)):  # fully_shard needs inner modules first
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # The root is resharded too: before the next call its weights may change (an averaged target) without a backward pass.
        fully_shard(net, mesh=mesh, reshard_after_forward=True)
        moved |= {old: dict(net.named_parameters())[name] for name, old in before.items()}
    return moved


def parts_of(net: nn.Module) -> list[nn.Module]:
    """Return the modules to gather one at a time: a UNet's blocks, and the modules that it calls besides them.

    Weights that stay with the root are gathered for the backward pass only if the network's output is used. A discriminator
    uses only features from the middle, so no weights may stay with the root.
    """
    if "down_blocks" not in dict(net.named_children()):
        return []
    inner = [m for name, m in net.named_modules() if len(path := name.split(".")) > 1 and path[-2] in BLOCKS]
    outer = [m for m in net.children() if not isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
    return [*outer, *inner]


@contextmanager
def gathered(modules: list[nn.Module]) -> Iterator[None]:
    """Replace split networks by whole copies on the CPU during the `with`, on the first process, for export. All must call it."""
    from diffusers import ModelMixin

    places = [
        (module, name, net)
        for module in modules
        for name, net in module.named_children()
        if isinstance(net, ModelMixin) and any(map(is_split, net.parameters()))
    ]
    copies: dict[nn.Module, nn.Module] = {}
    for _, _, net in places:
        if net not in copies:
            state = whole(net.state_dict())
            copies[net] = plain(net, state) if processes.first() else net
    try:
        for holder, name, net in places:
            setattr(holder, name, copies[net])
        yield
    finally:
        for holder, name, net in places:
            setattr(holder, name, net)


def plain(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Build a network of the diffusers class that `net` had before fully_shard changed it, with the given weights."""
    kind = next(c for c in type(net).__mro__ if c.__module__.startswith("diffusers"))
    with torch.device("meta"):
        copy = kind.from_config(net.config)
    copy.load_state_dict(state, assign=True)
    return copy
