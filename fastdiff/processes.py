"""What the processes of one run tell each other. Alone, each of these answers at once."""

import os
from typing import Any

import torch


def count() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the process that writes."""
    return count() == 1 or torch.distributed.get_rank() == 0


def agreed(value: Any) -> Any:
    """The first process's value, on all of them."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def every(value: Any) -> list[Any]:
    """Each process's value, in their order, on all of them."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def highest(number: int) -> int:
    """The largest of all processes' numbers."""
    if count() == 1:
        return number
    from accelerate import PartialState

    told = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
    return int(told)


def launched(command: str) -> str:
    """A command under the launcher that started these processes, with as many on as many machines."""
    world, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == 1 or not command:
        return command
    place = f"--nnodes={world // here} --rdzv-backend=c10d --rdzv-endpoint={os.environ['MASTER_ADDR']}:29400 "
    return f"torchrun {place if world > here else ''}--nproc-per-node={here} -m {command}"
