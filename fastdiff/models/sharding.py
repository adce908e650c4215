"""Full weights split over the processes (FSDP2, torch's fully_shard): each holds its part of parameters, gradients and moments.

A network is sharded block by block; a block is whole only while it runs. States are saved whole, so any number of processes
goes on from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.runtime import processes

BLOCKS = ("down_blocks", "up_blocks", "transformer_blocks", "resnets")  # lists of modules that are gathered one at a time


def is_split(value: Any) -> bool:
    """Whether it is a DTensor; asked without importing that class."""
    return hasattr(value, "to_local")  # importing that class takes seconds, and most runs split nothing


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This process's parts, which share their memory."""
    return [t.to_local() if is_split(t) else t for t in tensors]


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and split as that one is."""
    if is_split(value) or not is_split(like):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def whole(value: Any, *, everywhere: bool = False) -> Any:
    """A nested value with its split tensors gathered on the CPU; empty on all but the first process, unless wanted there.

    All processes must call it.
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
    """Split networks all of whose parameters train, over all processes; returns {old parameter: split one}."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh, moved = init_device_mesh(device.type, (processes.count(),)), {}
    for net in nets:
        before = dict(net.named_parameters())
        if isinstance(net, FSDPModule):
            continue
        for part in reversed(parts_of(net)):  # the innermost first
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # The root too: its weights may be others at the next call (an averaged target), with no backward pass between.
        fully_shard(net, mesh=mesh, reshard_after_forward=True)
        moved |= {old: dict(net.named_parameters())[name] for name, old in before.items()}
    return moved


def parts_of(net: nn.Module) -> list[nn.Module]:
    """The modules that are gathered by themselves: of a UNet its blocks, and what it calls besides them.

    Whatever is left to the root is gathered for the backward pass only where the network's output is used: a discriminator
    that looks at its middle uses none.
    """
    if "down_blocks" not in dict(net.named_children()):
        return []
    inner = [m for name, m in net.named_modules() if len(path := name.split(".")) > 1 and path[-2] in BLOCKS]
    outer = [m for m in net.children() if not isinstance(m, nn.ModuleList) and any(True for _ in m.parameters())]
    return [*outer, *inner]


@contextmanager
def gathered(modules: list[nn.Module]) -> Iterator[None]:
    """Plain whole copies on the CPU in the places of split networks, on the first process, to be exported. All must call it."""
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
    """A network of the same class, before fully_shard changed it, with these weights."""
    kind = next(c for c in type(net).__mro__ if c.__module__.startswith("diffusers"))
    with torch.device("meta"):
        copy = kind.from_config(net.config)
    copy.load_state_dict(state, assign=True)
    return copy
