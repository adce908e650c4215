"""All measurements that need an accelerator, in one run of at most --minutes, to JSON: pictures, training, peak memory.

    python examples/bench_gpu.py --output bench_gpu.json                    # CUDA, bf16, full sizes, random weights
    python examples/bench_gpu.py --smoke --output smoke.json                # the same path with tiny networks, on the CPU

Each row is `fastdiff bench` in a process of its own, so that one that runs out of memory or time ends alone; its reason is
then in the row. What must be shown comes first, rows that compile long come last. A row starts only while there is time for it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

FULL = ["--random-weights", "--device", "cuda", "--precision", "bf16", "--calls", "20", "--rounds", "0"]
SMOKE = ["--random-weights", "--device", "cpu", "--calls", "1", "--rounds", "0", "--base", "emoji", "--resolution", "64"]
SDXS = ["--base", "sd21", "--layout", "sdxs-512", "--num-steps", "1", "--resolution", "512"]
TINY = ["--decoder", "tiny", "--stock-decoder", "tiny"]
# name, seconds that it may take, flags, what must be shown: (figure, at least)
ROWS = [
    ("sdxs512 1 step, batch 1", 60, ["sample", *SDXS, *TINY], {"ratio": 5, "ours_per_s": 350}),
    ("sdxs512 1 step, batch 8", 60, ["sample", *SDXS, *TINY, "--batch-size", "8"], {"ours_per_s": 650, "of_limit": 0.5}),
    ("sd15 4 steps", 70, ["sample", "--base", "sd15", "--num-steps", "4"], {"ratio": 3, "first_ms": -3000}),
    ("sd15 4 steps, batch 8", 70, ["sample", "--base", "sd15", "--num-steps", "4", "--batch-size", "8"], {"of_limit": 0.5}),
    ("sdxl 4 steps", 110, ["sample", "--base", "sdxl", "--num-steps", "4", "--calls", "20"], {"ratio": 1.8}),
    ("train sd15 batch 1", 60, ["train", "--base", "sd15", "--batch-size", "1", "--calls", "10"], {}),
    ("train sd15 batch 8", 60, ["train", "--base", "sd15", "--batch-size", "8", "--calls", "10"], {}),
    ("train sdxl batch 1", 90, ["train", "--base", "sdxl", "--batch-size", "1", "--calls", "10"], {"ratio": 2}),
    ("sd15 4 steps against compiled", 200, ["sample", "--base", "sd15", "--num-steps", "4", "--against", "compiled",
                                            "--compile", "max"], {"ratio": 1.15}),
    ("sdxl 4 steps against compiled", 300, ["sample", "--base", "sdxl", "--num-steps", "4", "--against", "compiled",
                                            "--compile", "max"], {"ratio": 1.1}),
]  # fmt: skip
# Peak memory of the methods, by examples/memory.py: method, families, batches.
MEMORY = [(method, family, n) for family in ("sd15", "sdxl") for method in ("dmd", "lightning") for n in (1, 8)]


def row(flags: list[str], limit_s: float) -> dict:
    """One `fastdiff bench --json`; what went wrong where it did."""
    command = [sys.executable, "-m", "fastdiff", "bench", *flags, "--json"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
        told = json.loads(done.stdout)
        return told["metrics"] if told["ok"] else {"failed": told["error"]["message"]}
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit_s:.0f} s"}
    except json.JSONDecodeError:
        return {"failed": done.stderr.strip().splitlines()[-1:]}


def memory(method: str, family: str, n: int, limit_s: float, device: str) -> dict:
    script = Path(__file__).parent / "memory.py"
    flags = ["--method", method, "--family", family, "--batch", str(n), "--device", device, "--rounds", "1", "--steps", "2"]
    try:
        done = subprocess.run([sys.executable, str(script), *flags], capture_output=True, text=True, timeout=limit_s)
        return {"told": done.stdout.strip().splitlines()}
    except subprocess.TimeoutExpired:
        return {"failed": f"not done in {limit_s:.0f} s"}


def shown(found: dict, wanted: dict[str, float]) -> dict[str, bool]:
    """Whether each figure is at least what is wanted; a negative bound is an upper one."""
    return {k: (found[k] >= bound if bound > 0 else found[k] <= -bound) for k, bound in wanted.items() if k in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--smoke", action="store_true", help="tiny networks on the CPU: that the script works")
    args = parser.parse_args()
    end, found = time.monotonic() + 60 * args.minutes, {}

    def keep(name: str, value: dict) -> None:
        found[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n")  # after every row: a run that is cut short keeps its rows

    jobs = [(name, seconds, lambda left, f=flags: row([*f, *(SMOKE if args.smoke else FULL)], left), wanted)
            for name, seconds, flags, wanted in ROWS]  # fmt: skip
    if args.smoke:  # the CPU's compiler takes minutes
        jobs = [job for job in jobs if "compiled" not in job[0]]
    places = MEMORY[:1] if args.smoke else MEMORY
    device = "cpu" if args.smoke else "cuda"
    tables = [(f"memory {m} {f} batch {n}", 40,
               lambda left, m=m, f=f, n=n: memory(m, "emoji" if args.smoke else f, 2 if args.smoke else n, left, device), {})
              for m, f, n in places]  # fmt: skip
    for name, seconds, job, wanted in [*jobs[:8], *tables, *jobs[8:]]:
        left = end - time.monotonic()
        if left < seconds / 2:
            keep(name, {"failed": f"{left:.0f} s left, it takes about {seconds}"})
            continue
        value = job(left)
        keep(name, value | {"shown": shown(value, wanted)})


if __name__ == "__main__":
    main()
