"""Measure speed: seconds of ways that take turns, and the least time that the machine needs for the same work.

    limit = sum over matrix products, convolutions and attentions of max(FLOP / F, bytes / B)

F and B are the measured FLOP/s of this machine's best matrix product and bytes/s of the best copy. All other operations count
as free, so the limit is a lower bound that real code may not reach.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.runtime.disk import PACKAGE

WATCH = """
import json, os, resource, subprocess, sys, time
start = time.time()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
wall, cpu = time.time() - start, used.ru_utime + used.ru_stime
print(json.dumps([wall, cpu, used.ru_maxrss / 1024, done.returncode, done.stderr[-2000:]]))
"""


def synchronize(device: torch.device | str) -> None:
    """Wait until a CUDA device has finished all work; other devices need no wait."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def interleaved(
    ways: Mapping[str, Callable[[], Any]], calls: int, *, device: torch.device | str = "cpu", warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each of `calls` calls of every way. The ways take turns, so that other load on the machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(warmup + calls):
        for name, way in ways.items():
            synchronize(device)
            start = time.perf_counter()
            way()
            synchronize(device)
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


@dataclass
class Process:
    """What a command took: wall-clock seconds, processor seconds and peak memory in MiB."""

    wall_s: float
    cpu_s: float
    peak_mib: float


def process(command: Sequence[str]) -> Process:
    """Run a command in its own process and measure it. Raises RuntimeError with the last line of stderr if it fails."""
    home = os.pathsep.join([str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": home}  # this very package, also where it is not installed
    done = subprocess.run([sys.executable, "-c", WATCH, *command], check=True, capture_output=True, text=True, env=env)
    wall, cpu, peak, code, error = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}: {error.strip().splitlines()[-1] if error.strip() else ''}")
    return Process(wall, cpu, peak)


def processes(ways: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Process]:
    """Medians of what each command took, over `rounds` rounds in which the commands take turns."""
    runs: dict[str, list[Process]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, command in ways.items():
            runs[name].append(process(command))
    middle = lambda rows, key: statistics.median(vars(row)[key] for row in rows)
    return {name: Process(*(middle(rows, k) for k in ("wall_s", "cpu_s", "peak_mib"))) for name, rows in runs.items()}


@dataclass
class Ceiling:
    """The highest speeds measured on this machine."""

    flops: float  # FLOP a second of a matrix product
    bytes: float  # bytes a second that a copy reads and writes


def ceiling(device: torch.device | str, dtype: torch.dtype, *, rounds: int = 7, least: Ceiling | None = None) -> Ceiling:
    """Measure the ceiling: the fastest of `rounds` products and copies, and no less than `least`, an earlier result."""
    n, size = (8192, 2**28) if torch.device(device).type == "cuda" else (1024, 2**25)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, rounds, device=device)
    seen = Ceiling(2 * n**3 / min(seconds["product"]), 2 * size / min(seconds["copy"]))
    return Ceiling(max(seen.flops, least.flops), max(seen.bytes, least.bytes)) if least else seen


class Cost(TorchDispatchMode):
    """Counts FLOP (2 per multiply-add) and moved bytes of the products, convolutions and attentions inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from torch.utils.flop_counter import flop_registry

        out = func(*args, **(kwargs or {}))
        packet, name = func._overloadpacket, func.__name__
        if "scaled_dot_product" in name:
            q, k, v = args[:3]
            flops = 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        elif "_convolution_pointwise" in name:  # a fused convolution; the weight is the argument after the one or two inputs
            weight = args[2 if "binary" in name else 1]
            flops = 2 * out.numel() * weight[0].numel()
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        else:
            return out
        result = out[0] if isinstance(out, tuple) else out
        moved = [t for t in (*args, result) if isinstance(t, Tensor)]
        self.rows.append((flops, sum(t.numel() * t.element_size() for t in moved)))
        return out

    @property
    def flops(self) -> int:
        return sum(f for f, _ in self.rows)

    @property
    def bytes(self) -> int:
        return sum(b for _, b in self.rows)

    def limit_s(self, most: Ceiling) -> float:
        """The least seconds that the counted work can take at these speeds."""
        return sum(max(f / most.flops, b / most.bytes) for f, b in self.rows)


@torch.no_grad()
def cost(work: Callable[[], Any]) -> Cost:
    """Count the FLOP and bytes of calling `work`."""
    with Cost() as counted:
        work()
    return counted
