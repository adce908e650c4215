"""Everything that only a CUDA card can show, in eight minutes: each row is a process with its own limit of seconds and memory.

    python examples/gpu/run.py --minutes 8 --output gpu       # writes results.json, table.md and log.txt into gpu/
    python examples/gpu/run.py --only "emoji"                 # rows whose name contains the text
    python examples/gpu/run.py --wheels .whl                  # install these wheels for the rows, for this run alone
    python examples/gpu/run.py --rehearse                     # the same rows with tiny networks, on the CPU

Groups of rows run in turn, the most telling first; the rows of a group run side by side, but one that needs the files of another
runs after it. Tests and what the compiler takes minutes for run beside all groups. Results are written after every row, so a run
that is cut off keeps them; a second run with the same --output repeats only those that failed or are missing. `row.py` is what a
row's process runs.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))

from rows import BESIDE, ROWS, Row  # noqa: E402

SLOWER = 20  # a rehearsal's limits are so many times as long: CPUs have few cores
# What the table shows of a row's figures, by the last part of their names.
FIGURES = {
    *("s_per_step", "share", "tflop", "batch", "peak_tflops", "steps_reserved_gib", "sheet_reserved_gib", "lacked"),
    *("ratio", "ours_ms", "stock_ms", "first_ms", "ours_per_s", "of_limit", "parity", "ours_peak_mib", "stock_peak_mib"),
    *("steps", "frechet", "retrieval", "training_s", "said", "error"),
}


class Runs:
    """Rows in turn and side by side; every result is written at once."""

    def __init__(self, folder: Path, minutes: float, *, jobs: int, rehearse: bool = False, path: Sequence[str] = ()) -> None:
        self.folder, self.rehearse, self.lock = folder, rehearse, threading.Lock()
        self.end, self.places = time.monotonic() + 60 * minutes, threading.Semaphore(jobs)
        self.file = folder / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *path, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "FASTDIFF_CACHE": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
            "FASTDIFF_TEST_GPU": "cpu" if rehearse else "1",
            "GPU_LOCK": str(folder / "turnstile"),
            **({"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}),
        }

    def all(self, rows: Sequence[Row]) -> bool:
        """Run the rows, group by group; returns whether all of them ended as they should."""
        (self.folder / "prompts.txt").write_text("a red apple\na rocket\n")
        with ThreadPoolExecutor(max(1, len(rows))) as pool:
            begun: dict[str, Future] = {}
            for group in sorted({row.group for row in rows}):
                for row in (row for row in rows if row.group == group):
                    begun[row.name] = pool.submit(self.run, row, begun.get(row.after))
                for row in rows:
                    if row.group == group != BESIDE:
                        begun[row.name].result()
            for future in begun.values():
                future.result()
        return all(self.results[row.name]["ok"] for row in rows)

    def run(self, row: Row, before: Future | None) -> None:
        """Run a row, after the one whose files it needs, and keep its result."""
        if before:
            before.result()
        if self.results.get(row.name, {}).get("ok"):
            return
        if row.after and not self.results.get(row.after, {}).get("ok"):
            return self.keep(row, {"ok": False, "why": f"needs {row.after}"}, "")
        with self.places:
            left_s = self.end - time.monotonic()
            if left_s < 5:
                return self.keep(row, {"ok": False, "why": "no time was left"}, "")
            limit_s = min(row.limit_s * (SLOWER if self.rehearse else 1), left_s)
            return self.keep(row, *self.measured(row, limit_s))

    def measured(self, row: Row, limit_s: float) -> tuple[dict[str, Any], str]:
        """The result of a row's process, and everything that it said."""
        known = self.folder / f".{row.name.replace(' ', '-')}.json"
        known.unlink(missing_ok=True)
        words, start = self.command(row), time.monotonic()
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            env=self.environment | {"GPU_ROW": str(known)},
        )  # fmt: skip
        if row.stop_after_rows:
            threading.Thread(target=self.stop, args=(row, words, process), daemon=True).start()
        expected = row.cpu_exit_code if self.rehearse and row.cpu_exit_code is not None else row.exit_code
        try:
            out, err = process.communicate(timeout=limit_s)
            why = "" if process.returncode == expected else f"exit {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            why = f"not done in {limit_s:.0f} s"
        result: dict[str, Any] = {"ok": not why, "why": why, "seconds": round(time.monotonic() - start, 1)}
        result |= json.loads(known.read_text()) if known.exists() else {}
        result |= answer(out, row)
        if row.wanted and not self.rehearse:
            result["goals"] = {f"{name} >= {least:g}": result.get(name, 0) >= least for name, least in row.wanted.items()}
        return result, f"$ {shlex.join(words)}\n{out[-6000:]}\n{err[-8000:]}"

    def command(self, row: Row) -> list[str]:
        """The words of a row's process."""
        words = [
            word.replace("OUT", str(self.folder)) for word in shlex.split(f"{row.words} {row.tiny if self.rehearse else ''}")
        ]
        if row.program:
            return [word.replace("PYTHON", sys.executable).replace("ROOT", str(ROOT)) for word in words]
        if self.rehearse and not row.no_device:
            words += ["--device", "cpu"]
        how = {"memory_gib": row.memory_gib, "how": row.how, "tiny": self.rehearse}
        return [sys.executable, str(HERE / "row.py"), json.dumps(how), *words, "--json"]

    def stop(self, row: Row, words: list[str], process: subprocess.Popen) -> None:
        """Send SIGTERM once the run has logged enough rows."""
        log = Path(words[words.index("-o") + 1]) / "metrics.jsonl"
        while process.poll() is None:
            if log.exists() and len(log.read_text().splitlines()) >= row.stop_after_rows:
                process.terminate()
                return
            time.sleep(0.1)

    def keep(self, row: Row, result: dict[str, Any], text: str) -> None:
        """Write a result into the three files, whole at any instant."""
        with self.lock:
            self.results[row.name] = result
            for file, content in (
                (self.file, json.dumps(self.results, indent=1)),
                (self.folder / "table.md", table(self.results)),
            ):
                new = file.with_suffix(".new")
                new.write_text(content + "\n")
                new.replace(file)
            with (self.folder / "log.txt").open("a") as log:
                log.write(f"\n==== {row.name}: {result}\n{text}\n")
            print(f"{'ok  ' if result['ok'] else 'FAIL'} {row.name}: {result.get('seconds')} s {result['why']}", flush=True)


def answer(out: str, row: Row) -> dict[str, Any]:
    """What a process said of itself: the JSON object of a fastdiff command, or the last line of a program."""
    lines = [line for line in out.splitlines() if line.strip()]
    if row.program or not lines or not lines[-1].startswith("{"):
        return {"said": lines[-1][:200]} if row.program and lines else {}
    told = json.loads(lines[-1])
    error = {"error": told["error"]["message"][:200]} if told.get("error") else {}
    return {**flat(told.get("metrics") or {}), **flat(told.get("timings") or {}), "warnings": told.get("warnings"), **error}


def flat(figures: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures by names with points."""
    rows: dict[str, Any] = {}
    for name, value in figures.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown, with the machine that they come from."""
    machines = list(dict.fromkeys(row["machine"] for row in results.values() if row.get("machine")))
    lines = [*(f"Machine: {name}" for name in machines or ["unknown"]), ""]
    if len(machines) > 1:
        lines += ["These rows come from different machines; results.json says which.", ""]
    lines += ["| row | result | seconds | GiB reserved | GiB allocated | figures |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in results.items():
        cells = [name, "ok" if row["ok"] else row["why"]]
        cells += [str(row.get(key, "")) for key in ("seconds", "reserved_gib", "allocated_gib")]
        shown = {key.removesuffix(".gap_closed"): value for key, value in row.items() if wanted(key) and value is not None}
        shown |= {f"goal {goal}": "reached" if reached else "missed" for goal, reached in row.get("goals", {}).items()}
        text = lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
        cells.append(", ".join(f"{key} {text(value)}" for key, value in shown.items()))
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines)


def wanted(name: str) -> bool:
    """Whether the table shows a figure."""
    whole = name.startswith("gap_closed.") and name.endswith(".gap_closed")
    return whole or (name.split(".")[-1] in FIGURES and not name.startswith("gap_closed."))


def longest_s(rows: Sequence[Row]) -> float:
    """Seconds that the rows can take at most, if all that run at once fit side by side: the sum of the groups' longest chains."""
    ends: dict[str, float] = {}
    groups: dict[str, float] = {}
    for row in rows:
        before = next((other for other in rows if other.name == row.after and other.group == row.group), None)
        ends[row.name] = row.limit_s + (ends[before.name] if before else 0)
        groups[row.group] = max(groups.get(row.group, 0), ends[row.name])
    beside = groups.pop(BESIDE, 0)
    return max(beside, sum(groups.values()))


def install(wheels: Path, target: Path) -> None:
    """Install all wheels of a folder into another folder, without their dependencies."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"--wheels {wheels}: no .whl file there")
    how = "install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --upgrade --target"
    subprocess.run([sys.executable, "-m", "pip", *how.split(), str(target), *files], check=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="default: gpu, for a rehearsal gpu-rehearsal")
    parser.add_argument("--minutes", type=float, help="default: 8, for a rehearsal 60")
    parser.add_argument("--jobs", type=int, help="processes at once; default: 20, for a rehearsal 1")
    parser.add_argument("--only", action="append", default=[], help="rows whose name contains this; repeat it for more")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that the rows' processes need")
    parser.add_argument("--rehearse", action="store_true", help="tiny networks on the CPU: that no row fails for another reason")
    args = parser.parse_args(argv)
    output = args.output or Path("gpu-rehearsal" if args.rehearse else "gpu")
    output.mkdir(parents=True, exist_ok=True)
    rows = [row for row in ROWS if not args.only or any(text in row.name for text in args.only)]
    with tempfile.TemporaryDirectory() as site:
        if args.wheels:
            install(args.wheels, Path(site))
        minutes, jobs = args.minutes or (60 if args.rehearse else 8), args.jobs or (1 if args.rehearse else 20)
        runs = Runs(output.resolve(), minutes, jobs=jobs, rehearse=args.rehearse, path=[site] if args.wheels else [])
        return 0 if runs.all(rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
