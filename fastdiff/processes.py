"""What the processes of one run tell each other. Alone, each of these answers at once."""

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
