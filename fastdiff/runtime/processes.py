"""Communication between the processes of one run. With a single process, every function here returns at once."""

import gc
import os
import socket
import time
from datetime import timedelta
from typing import Any

import torch

STORE = "fastdiff/store"  # key in torchrun's store that holds the port of this attempt's store


def join(backend: str, timeout: timedelta) -> None:
    """Create the process group if torchrun may restart the processes after a failure. Otherwise leave that to accelerate.

    torchrun keeps one store for all attempts (pytorch issue 135712): a second attempt reads the addresses of dead processes
    there and waits for them. So each attempt gets a store of its own.
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
            socket.create_connection((place, port), brief.seconds).close()  # TCPStore would wait if nobody listens there
            own = torch.distributed.TCPStore(place, port, is_master=False, timeout=brief)
        except (OSError, RuntimeError):  # the port is that of the attempt before, whose process is gone
            time.sleep(0.1)
    own.set_timeout(timeout)
    torch.distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=timeout)


def leave() -> None:
    """Destroy the process group. All processes call this at the end: threads of a live group can abort a process that exits."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()  # sharded networks and their optimisers refer to the group in reference cycles
        torch.distributed.destroy_process_group()


def count() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def first() -> bool:
    """Whether this is the first process, the one that writes files."""
    return count() == 1 or torch.distributed.get_rank() == 0


def agreed(value: Any) -> Any:
    """The value of the first process, returned on every process."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def every(value: Any) -> list[Any]:
    """The values of all processes, in the order of their ranks, returned on every process."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def highest(number: int) -> int:
    """The largest number among all processes, returned on every process."""
    if count() == 1:
        return number
    from accelerate import PartialState

    result = torch.tensor(number, device=PartialState().device)
    torch.distributed.all_reduce(result, torch.distributed.ReduceOp.MAX)
    return int(result)


def launched(command: str) -> str:
    """The command with `torchrun` in front, for the same number of processes and machines as now. Alone, the command itself."""
    world, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if world == 1 or not command:
        return command
    place = f"--nnodes={world // here} --rdzv-backend=c10d --rdzv-endpoint={os.environ['MASTER_ADDR']}:29400 "
    return f"torchrun {place if world > here else ''}--nproc-per-node={here} -m {command}"
