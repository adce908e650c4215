"""What the processes of one run tell each other. Alone, each of these answers at once."""

import gc
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch

STORE = "fastdiff/store"  # where torchrun's own store names the one of this attempt


def join(backend: str, timeout: timedelta) -> None:
    """Meet the other processes, where torchrun may start them again after a failure.

    It keeps one store for all attempts (pytorch issue 135712), in which the second finds the addresses of dead processes and
    waits for them: each attempt gets a store of its own. Elsewhere accelerate does all that is needed.
    """
    env = os.environ
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) == 0 or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if count() > 1 or env["WORLD_SIZE"] == "1":
        return
    place, rank, world = env["MASTER_ADDR"], int(env["RANK"]), int(env["WORLD_SIZE"])
    agents, own = torch.distributed.TCPStore(place, int(env["MASTER_PORT"]), is_master=False, timeout=timeout), None
    if rank == 0:
        own = torch.distributed.TCPStore(place, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agents.set(STORE, str(own.port))
    while own is None:
        try:
            port, brief = int(agents.get(STORE)), timedelta(seconds=5)
            socket.create_connection((place, port), brief.seconds).close()  # TCPStore waits where nobody listens
            own = torch.distributed.TCPStore(place, port, is_master=False, timeout=brief)
        except (OSError, RuntimeError):  # nobody is there any more: what it names is of the attempt before
            time.sleep(0.1)
    own.set_timeout(timeout)
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


def leave() -> None:
    """Part from the others, at an end that all come to: threads of a group that is still there can abort an ending process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # split networks and their optimisers hold the group in cycles
        torch.distributed.destroy_process_group()


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

    result = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX)
    return int(result)


def launched(command: str) -> str:
    """A command under the launcher that started these processes, with as many on as many machines."""
    world, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == 1 or not command:
        return command
    place = f"--nnodes={world // here} --rdzv-backend=c10d --rdzv-endpoint={os.environ['MASTER_ADDR']}:29400 "
    return f"torchrun {place if world > here else ''}--nproc-per-node={here} -m {command}"
