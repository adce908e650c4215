"""Everything that only a CUDA card can show, in a few minutes: each row is a process with its own limit of seconds and memory.

    python examples/gpu/run.py --minutes 8 --output gpu            # writes gpu/results.json, gpu/table.md and gpu/log.txt
    python examples/gpu/run.py --only "emoji" --minutes 3          # rows whose name contains the text
    python examples/gpu/run.py --rehearse --only "emoji lcm"       # the same rows on the CPU

Rows of one group run side by side, groups run in turn. Group 0 runs beside all but the last group, which measures speed alone.
Results are written after every row: a run that is cut off keeps them, and a second run with the same --output repeats only those
that failed or are missing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SHORT = ["--steps", "20", "--save-every", "10", "--pairs", "16"]


class Row(NamedTuple):
    """One process. `words` are a fastdiff command, unless `program` says that they are a program's."""

    name: str
    group: int
    words: str
    limit_s: float = 100
    memory_gib: float = 0  # what the process may take of the card; 0 = all
    exit_code: int = 0
    stop_after_rows: int = 0  # send SIGTERM when metrics.jsonl has so many lines
    program: bool = False


def emoji(name: str, words: str, group: int = 1, **more: Any) -> Row:
    """A training command on the embedded checkpoint, with its folder after the row's name."""
    return Row(f"emoji {name}", group, f"{words} {' '.join(SHORT)} -o OUT/{name.replace(' ', '-')}", **more)


def full_size(name: str, words: str, memory_gib: float) -> Row:
    """A real run of a full-size base with random weights: teacher samples, steps, a contact sheet, the weights."""
    family = name.split()[0]
    words = f"{words} --base OUT/{family} --steps 6 --grad-accum 1 --pairs 2 --teacher-steps 4 --prompts OUT/prompts.txt"
    return Row(name, 3, f"{words} -o OUT/{name.replace(' ', '-')}", limit_s=150, memory_gib=memory_gib)


# fmt: off
ROWS = [
    Row("tests", 0, f"nice {sys.executable} -m pytest -q -n 6 -p no:cacheprovider", 250, program=True),
    emoji("lcm", "train-lcm-lora --proof 48 --eval-every 10 --preview-every 10"),
    emoji("lcm fp16", "train-lcm-lora --precision fp16 --proof 0"),
    emoji("lcm fp32", "train-lcm-lora --precision fp32 --proof 0"),
    emoji("lcm full", "train-lcm-lora --full --proof 0"),
    emoji("lcm edge", "train-lcm-lora --target edge --proof 0 --gradient-checkpointing"),
    emoji("lcm random", "train-lcm-lora --target random --proof 0"),
    emoji("lcm finetune", "train-lcm-lora --finetune --proof 0"),
    emoji("dmd", "dmd --proof 0"),
    emoji("dmd2", "dmd --recipe dmd2 --num-steps 4 --proof 0"),
    emoji("dmd2 full", "dmd --recipe dmd2 --student full --proof 0"),
    emoji("dmd2 fp16", "dmd --recipe dmd2 --precision fp16 --proof 0"),
    emoji("lightning", "lightning --stages 8:4,4:2 --proof 0"),
    emoji("lightning fp16", "lightning --stages 8:4 --precision fp16 --proof 0"),
    emoji("prune", "prune --layout bk-tiny --proof 0"),
    emoji("vae", "distill-vae --encoder"),
    emoji("vae fp16", "distill-vae --precision fp16"),
    Row("sdxl weights", 1, f"{sys.executable} {HERE / 'run.py'} --weights sdxl --output OUT", program=True),
    Row("sd15 weights", 1, f"{sys.executable} {HERE / 'run.py'} --weights sd15 --output OUT", program=True),
    Row(
        "emoji killed", 2,
        "train-lcm-lora --steps 4000 --save-every 10 --proof 0 -o OUT/killed", exit_code=75, stop_after_rows=3,
    ),
    emoji("sdxs", "sdxs --init OUT/prune/model --match-steps 8 --gan-steps 4 --proof 0", group=2),
    emoji("controlnet", "distill-controlnet --init OUT/prune/model --controlnet emoji", group=2),
    Row("emoji sample", 2, "sample --prompt apple --lora OUT/lcm/lcm.safetensors --num-images 40 -o OUT/pictures"),
    Row(
        "emoji sample uncompiled", 2,
        "sample --prompt apple --lora OUT/lcm/lcm.safetensors --num-images 8 --compile off -o OUT/pictures-off",
    ),
    Row(
        "emoji sample fp16", 2,
        "sample --prompt apple --base OUT/prune/model --precision fp16 --num-images 8 -o OUT/pictures-fp16",
    ),
    Row("emoji evaluate", 2, "evaluate --student OUT/lcm/lcm.safetensors --num-images 48 -o OUT/report"),
    Row("emoji merge", 2, "merge-lora --accel OUT/lcm/lcm.safetensors --base emoji -o OUT/baked"),
    Row("emoji bench sample", 2, "bench sample --calls 5"),
    Row("emoji bench train", 2, "bench train --calls 5"),
    Row("emoji plan", 2, "plan train-lcm-lora"),
    Row("emoji plan dmd2", 2, "plan dmd --recipe dmd2"),
    Row("emoji resumed", 3, "train-lcm-lora --steps 4000 --max-time 10s --save-every 10 --proof 0 -o OUT/killed"),
    full_size("sdxl lcm", "train-lcm-lora", 12),
    full_size("sdxl lightning", "lightning --stages 8:4 --d-warmup 2", 16),
    full_size("sdxl dmd2", "dmd --recipe dmd2", 24),
    full_size("sd15 dmd", "dmd", 16),
    full_size("sd15 sdxs", "sdxs --match-steps 2 --gan-steps 2", 24),
    Row(
        "sdxl sample", 3,
        "sample --base OUT/sdxl --prompt apple --num-steps 4 --num-images 2 -o OUT/sdxl-pictures", memory_gib=16,
    ),
    Row(
        "speed", 4,
        f"{sys.executable} {HERE.parent / 'bench_gpu.py'} --minutes MINUTES --output OUT/speed.json", 600, program=True,
    ),
]
# fmt: on


# ---- one row, in its own process


def one(memory_gib: float, words: list[str]) -> int:
    """Run a fastdiff command and write what it took of the card to the file that GPU_ROW names."""
    import torch

    on_card = torch.cuda.is_available()
    if on_card and memory_gib:
        torch.cuda.set_per_process_memory_fraction(memory_gib * 2**30 / torch.cuda.mem_get_info()[1])
    from fastdiff.cli import main as fastdiff

    code = fastdiff(words)
    if on_card:
        peaks = {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
        Path(os.environ["GPU_ROW"]).write_text(json.dumps({k: v / 2**30 for k, v in peaks.items()}))
    return code


def weights(family: str, folder: Path, device: str) -> None:
    """A full-size checkpoint with random weights, and two prompts."""
    import torch

    from fastdiff.checkpoints import write
    from fastdiff.commands import bench

    base = bench.opened(bench.Config(work="sample", base=family, random_weights=True, device=device), torch.device(device))
    write.to_folder(base, folder / family)
    (folder / "prompts.txt").write_text("a red apple\na rocket\n")


# ---- all of them


class Runs:
    """Rows in turn and side by side; every result is written at once."""

    def __init__(self, folder: Path, minutes: float, rehearse: bool) -> None:
        self.folder, self.rehearse, self.lock = folder, rehearse, threading.Lock()
        self.end = time.monotonic() + 60 * minutes
        self.file = folder / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def run(self, row: Row) -> None:
        left_s = self.end - time.monotonic()
        if self.results.get(row.name, {}).get("ok"):
            return
        if left_s < 5:
            self.keep(row, {"ok": False, "why": "no time was left"}, "")
            return
        words = row.words.replace("OUT", str(self.folder)).replace("MINUTES", f"{max(0.1, left_s / 60 - 0.1):.2f}").split()
        peaks = self.folder / f".{row.name.replace(' ', '-')}.json"
        if not row.program:
            words = [sys.executable, __file__, "--row", str(row.memory_gib), *words, "--json"]
            if self.rehearse and "merge-lora" not in words:
                words += ["--device", "cpu"]
        start = time.monotonic()
        environment = {"OMP_NUM_THREADS": "1"} if row.group < 4 else {}
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env={**os.environ, **environment, "GPU_ROW": str(peaks), "OMP_WAIT_POLICY": "PASSIVE"},
        )  # fmt: skip
        if row.stop_after_rows:
            threading.Thread(target=self.stop, args=(row, words, process), daemon=True).start()
        try:
            out, err = process.communicate(timeout=min(row.limit_s, left_s))
            why = "" if process.returncode == row.exit_code else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            why = f"not done in {min(row.limit_s, left_s):.0f} s"
        result: dict[str, Any] = {"ok": not why, "why": why, "seconds": round(time.monotonic() - start, 1)}
        if peaks.exists():
            result |= {f"{k}_gib": round(v, 2) for k, v in json.loads(peaks.read_text()).items()}
        if not row.program and out.strip().startswith("{"):
            answer = json.loads(out)
            result |= {"metrics": answer.get("metrics"), "timings": answer.get("timings"), "warnings": answer.get("warnings")}
            result |= {"error": answer["error"]} if answer.get("error") else {}
        self.keep(row, result, f"$ {' '.join(words)}\n{out[-6000:]}\n{err[-8000:]}")

    def stop(self, row: Row, words: list[str], process: subprocess.Popen) -> None:
        """Send SIGTERM once the run has logged enough rows."""
        log = Path(words[words.index("-o") + 1]) / "metrics.jsonl"
        while process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= row.stop_after_rows:
                process.terminate()
                return
            time.sleep(0.1)

    def keep(self, row: Row, result: dict[str, Any], text: str) -> None:
        with self.lock:
            self.results[row.name] = result
            self.file.write_text(json.dumps(self.results, indent=1) + "\n")
            (self.folder / "table.md").write_text(table(self.results))
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"\n==== {row.name}: {result}\n{text}\n")
            print(f"{'ok  ' if result['ok'] else 'FAIL'} {row.name}: {result.get('seconds')} s {result['why']}", flush=True)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        f"Card: {card()}",
        "",
        "| row | result | seconds | GiB reserved | GiB allocated |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        cells = [name, "ok" if row["ok"] else row["why"]]
        cells += [str(row.get(key, "")) for key in ("seconds", "reserved_gib", "allocated_gib")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def card() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "none"
    except FileNotFoundError:
        return "none"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu"))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--jobs", type=int, default=12, help="processes at once")
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this; repeat it for more")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    if sys.argv[1:2] == ["--row"]:
        return one(float(sys.argv[2]), sys.argv[3:])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.weights:
        weights(args.weights, args.output, "cpu" if args.rehearse else "cuda")
        return 0
    runs = Runs(args.output.resolve(), args.minutes, args.rehearse)
    rows = [row for row in ROWS if not args.only or any(text in row.name for text in args.only)]
    for groups in ((0, 1, 2, 3), (4,)):
        with ThreadPoolExecutor(args.jobs) as beside:
            aside = [beside.submit(runs.run, row) for row in rows if row.group == 0 and 0 in groups]
            for group in groups[1:] or groups:
                with ThreadPoolExecutor(args.jobs) as pool:
                    list(pool.map(runs.run, [row for row in rows if row.group == group]))
            for future in aside:
                future.result()
    return 0 if all(runs.results[row.name]["ok"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
