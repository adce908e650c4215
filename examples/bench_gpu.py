"""Measure everything that needs an accelerator in one run of at most --minutes: sampling, training and peak memory, as JSON.

    python examples/bench_gpu.py --output bench_gpu.json                    # CUDA, bf16, full sizes, random weights
    python examples/bench_gpu.py --smoke --output smoke.json                # the same path with tiny networks, on the CPU
    python examples/bench_gpu.py --only "sdxl 4 steps against compiled" --minutes 10

One worker process measures the rows in turn, so that the libraries are imported only once. A row may use its own time and what
the rows before it left over. If it takes longer, the worker is killed and the next row gets a new one. The JSON is written after
every row; a row without figures says why. Rows with a goal come first, rows with long compilation last.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One measurement. `flags` are fields of `fastdiff bench` or arguments of `memory`; `wanted` are goals for its figures."""

    name: str
    seconds: float  # the time it may take
    flags: dict[str, Any]
    wanted: dict[str, float] = {}


FULL = dict(random_weights=True, device="cuda", precision="bf16", rounds=0)
SMOKE = dict(random_weights=True, device="cpu", calls=1, rounds=0, base="emoji", resolution=64)
SDXS = dict(work="sample", base="sd21", layout="sdxs-512", num_steps=1, resolution=512, decoder="tiny", stock_decoder="tiny")
SD15, SDXL = (dict(work="sample", base=base, num_steps=4) for base in ("sd15", "sdxl"))
COMPILED = dict(against="compiled", compile="max")
TRAIN = dict(work="train", calls=10)
ROWS = [
    Row("sdxs512 1 step, batch 1", 60, SDXS, {"ratio": 5, "ours_per_s": 350}),  # with the imports
    Row("sdxs512 1 step, batch 8", 20, SDXS | {"batch_size": 8}, {"ours_per_s": 650, "of_limit": 0.5}),
    Row("sd15 4 steps", 35, SD15, {"ratio": 3, "first_ms": -3000}),
    Row("sd15 4 steps, batch 8", 35, SD15 | {"batch_size": 8}, {"of_limit": 0.5}),
    Row("sdxl 4 steps", 60, SDXL, {"ratio": 1.8}),
    Row("train sd15 batch 1", 15, TRAIN | {"base": "sd15", "batch_size": 1}),
    Row("train sd15 batch 8", 20, TRAIN | {"base": "sd15", "batch_size": 8}),
    Row("train sdxl batch 1", 35, TRAIN | {"base": "sdxl", "batch_size": 1}, {"ratio": 2}),
    Row("memory dmd sd15 batch 8", 20, {"method": "dmd", "family": "sd15", "n": 8}),
    Row("memory dmd sdxl batch 1", 30, {"method": "dmd", "family": "sdxl", "n": 1}),
    Row("memory lightning sdxl batch 1", 30, {"method": "lightning", "family": "sdxl", "n": 1}),
    Row("sd15 4 steps against compiled", 120, SD15 | COMPILED, {"ratio": 1.15}),
]  # 480 s
MORE = [  # measured if the rows above leave enough time
    Row("sdxl 4 steps against compiled", 200, SDXL | COMPILED, {"ratio": 1.1}),
    Row("memory dmd sdxl batch 8", 40, {"method": "dmd", "family": "sdxl", "n": 8}),
    Row("memory lightning sdxl batch 8", 40, {"method": "lightning", "family": "sdxl", "n": 8}),
]


# ---- one row, in the worker


def measured(flags: dict[str, Any]) -> dict[str, Any]:
    """The figures of one row."""
    if "method" in flags:
        return memory(**flags)
    from fastdiff.commands import bench

    return bench.run(bench.Config(**flags)).metrics


def memory(method: str, family: str, n: int, device: str) -> dict[str, Any]:
    """Measure both ways of examples/memory.py in this process, and the ratios of ours to the other."""
    import memory
    import torch

    results = {}
    for way in ("ours", "three"):
        if device == "cuda":
            cleared()
            torch.cuda.reset_peak_memory_stats()
        results[way] = memory.measure(method, way, family, device, n, 2)
    return results | {f"{k}_ratio": results["ours"][k] / results["three"][k] for k in results["ours"]}


def cleared() -> None:
    """Free the memory and the compiled graphs of the last row."""
    import torch

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def worker() -> None:
    """Read the flags of each row as a line of JSON from stdin and write its figures to stdout; other output goes to stderr."""
    out, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            figures = measured(json.loads(line))
        except Exception as error:  # out of memory, or no compiler: the other rows go on
            figures = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        cleared()
        print(json.dumps(figures), file=out, flush=True)


# ---- all of them, in time


class Worker:
    """The process that measures. It is started again after a row that took too long or ended it."""

    def __init__(self, command: list[str] | None = None) -> None:
        self.command = command or [sys.executable, __file__, "--worker"]
        self.process: subprocess.Popen | None = None
        self.reader = ThreadPoolExecutor(1)

    def __call__(self, flags: dict[str, Any], limit_s: float) -> dict[str, Any]:
        if self.process is None:
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        print(json.dumps(flags), file=self.process.stdin, flush=True)
        answer = self.reader.submit(self.process.stdout.readline)
        try:
            line = answer.result(limit_s)
        except TimeoutError:
            self.end()
            return {"failed": f"not done in {limit_s:.0f} s"}
        if not line:
            code, _ = self.process.wait(), self.end()
            return {"failed": f"the worker ended with {code}"}
        return json.loads(line)

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def reached(figures: dict, wanted: dict[str, float]) -> dict[str, bool]:
    """{figure: whether it reaches its goal}. A positive bound is a lower one; a negative bound -x means at most x."""
    return {k: (figures[k] >= bound if bound > 0 else figures[k] <= -bound) for k, bound in wanted.items() if k in figures}


def in_time(rows: list[Row], more: list[Row], minutes: float, measure: Any, keep: Any) -> None:
    """Measure every row that there is time for, by `measure(flags, limit_s)`, and hand the figures to `keep(name, figures)`.

    A row may take all the time that the rows after it do not need. It starts if half of its own time is left, a row of `more`
    only if all of it is.
    """
    end = time.monotonic() + 60 * minutes
    for i, row in enumerate([*rows, *more]):
        left = end - time.monotonic() - sum(later.seconds for later in rows[i + 1 :])
        if left < row.seconds * (0.5 if i < len(rows) else 1):
            keep(row.name, {"failed": f"{max(0, left):.0f} s are left for it, it takes up to {row.seconds:.0f}"})
            continue
        figures = measure(row.flags, left)
        keep(row.name, figures | {"shown": reached(figures, row.wanted)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--only", action="append", help="a row's name; repeat it for more")
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU: that the script works")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker()
        return
    started, results, measure = time.monotonic(), {}, Worker()
    chosen = lambda rows: [row for row in rows if not args.only or row.name in args.only]
    rows, more = chosen(ROWS), chosen(MORE)
    if args.only and len(rows) + len(more) < len(set(args.only)):
        parser.error(f"--only: the rows are {', '.join(row.name for row in [*ROWS, *MORE])}")

    def sized(flags: dict[str, Any]) -> dict[str, Any]:
        if "method" in flags:
            return flags | ({"family": "emoji", "n": 2, "device": "cpu"} if args.smoke else {"device": "cuda"})
        return flags | (SMOKE if args.smoke else FULL)

    if args.smoke:  # the CPU's compiler takes minutes
        rows, more = [row for row in rows if "compiled" not in row.name], []

    def keep(name: str, value: dict) -> None:
        results[name] = value
        print(f"{time.monotonic() - started:.0f} s, {name}: {json.dumps(value)}", flush=True)
        args.output.write_text(json.dumps(results, indent=2) + "\n")  # after every row: a run that is cut short keeps its rows

    try:
        in_time(rows, more, args.minutes, lambda flags, limit_s: measure(sized(flags), limit_s), keep)
    finally:
        measure.end()


if __name__ == "__main__":
    main()
