"""Output for people and scripts: progress, tables, warnings, errors, and the JSON object of --json."""

import hashlib
import json
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from fastdiff.runtime.disk import sha256
from fastdiff.runtime.errors import Result, with_flags
from fastdiff.runtime.secrets import hidden

SCHEMA_VERSION = 1  # of the JSON object


@dataclass
class State:
    """What one command has printed and measured so far."""

    quiet: bool = False
    flags: bool = False  # True on the command line: messages name options as --flags; False in Python: as `fields`
    warnings: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)  # what `note` has said
    timings: dict[str, float] = field(default_factory=dict)  # seconds by name
    started: float = field(default_factory=time.monotonic)
    terminal: Any = None  # the rich console of stderr, made on first use


state = State()


def reset(*, quiet: bool = False, flags: bool = False) -> None:
    """Forget warnings and timings and start the clock anew. Called before every command, and by tests."""
    global state
    state = State(quiet=quiet, flags=flags)


def speaks() -> bool:
    """True on the first process of a distributed run only, so that a result appears once."""
    return os.environ.get("RANK", "0") == "0"


def quiet_libraries(*, offline: bool = False) -> None:
    """Set environment variables that make diffusers, transformers and the hub client silent, before they are imported.

    A variable that is already set keeps its value. `offline` also forbids downloads, whatever was set before.
    """
    silent = {
        "DIFFUSERS_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
    }
    for name, value in silent.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def terminal() -> Any:
    """The rich console of stderr. All output shares it, so that lines appear above a live progress bar."""
    if state.terminal is None:
        from rich.console import Console

        state.terminal = Console(stderr=True, highlight=False, markup=False)
        if not state.terminal.is_terminal:
            state.terminal.width = 160  # a log has no right edge; rich would wrap at 80
    return state.terminal


def _say(text: str, style: str | None = None, label: str = "") -> None:
    from rich.text import Text

    # Control characters in a file name or a library's message must not reach the terminal.
    clean = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in hidden(text))
    terminal().print(Text.assemble((label, style or ""), clean), soft_wrap=True)


def info(message: str) -> None:
    """Print a line on stderr, unless --quiet is set."""
    if not state.quiet and speaks():
        _say(worded(message))


def note(message: str) -> None:
    """Print a line as `info` does, but the same line only once."""
    if message not in state.notes:
        state.notes.add(message)
        info(message)


def warn(message: str) -> None:
    """Print a warning on stderr and list it in the JSON object. The same warning appears only once."""
    _warn(worded(message))


def _warn(message: str) -> None:
    message = one_line(hidden(message))
    if message not in state.warnings:
        state.warnings.append(message)
        _say(message, "yellow", "warning: ")


def error(message: str, hint: str = "") -> None:
    """Print the one line of a failure: what is wrong, then after a semicolon what to do."""
    _say("; ".join(one_line(part) for part in (message, hint) if part), "bold red", "error: ")


def trace(error: BaseException) -> None:
    """Print the traceback of an error on stderr, with the errors that it came from."""
    sys.stderr.write(hidden("".join(traceback.format_exception(error))))


def worded(message: str) -> str:
    """A message with options written as flags on the command line; in Python they stay `fields`."""
    return with_flags(message) if state.flags else message


def one_line(text: str) -> str:
    """The text with each line break, and the spaces around it, turned into one space."""
    return re.sub(r"\s*\n\s*", " ", text.strip())


def format_value(value: Any) -> str:
    """Text of a table cell or progress figure: four significant digits of a float, nothing for None."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, optional: Sequence[str] = ()) -> None:
    """Print a table on stderr, unless --quiet is set. Columns of numbers are aligned right.

    Where the terminal is too narrow, columns named in `optional` are left out, the first named first, and a line names them.
    """
    if state.quiet or not speaks():
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = [list(row) for row in rows]
    kept, left_out = list(range(len(columns))), []
    width = lambda i: 3 + max([len(columns[i]), *(len(format_value(row[i])) for row in rows)])
    for name in optional:
        if name in columns and sum(map(width, kept)) > terminal().width:
            kept.remove(columns.index(name))
            left_out.append(name)
    columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    drawn = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for i, name in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[i], int | float | NoneType) for row in rows)
        drawn.add_column(name, justify="right" if numeric else "left")
    for row in rows:
        drawn.add_row(*(Text(hidden(format_value(v))) for v in row))
    terminal().print(drawn)
    if left_out:
        info(f"left out, for the terminal is too narrow: {', '.join(left_out)}")


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Add the seconds that the block takes to the command's timings under `name`, which by custom ends in _s."""
    start = time.monotonic()
    try:
        yield
    finally:
        state.timings[name] = state.timings.get(name, 0.0) + time.monotonic() - start


class Progress:
    """Progress of a counted loop as plain lines, for output that is not a terminal.

    A line appears at every tenth of the total and at least once a minute, but never within 10 s of the last one.
    """

    QUIET_S, AT_LEAST_S = 10.0, 60.0

    def __init__(self, total: int | None, description: str) -> None:
        self.total, self.description, self.done = total, description, 0
        self.started = self.last = time.monotonic()
        self.before = 0  # steps that a resumed run had done already; the time left is computed without them
        self.reported = 0  # the count of the last line
        self.fields: dict[str, Any] = {}

    def update(self, n: int = 1, **fields: Any) -> None:
        """Count `n` more as done. `fields` are figures to print beside the count."""
        if self.done == 0 and time.monotonic() - self.started < 0.1:
            self.before = n
        self.done += n
        self.fields.update(fields)
        self.draw()

    def draw(self) -> None:
        waited = time.monotonic() - self.last
        tenth = self.total and self.done - self.reported >= self.total / 10
        if waited >= self.QUIET_S and (tenth or waited >= self.AT_LEAST_S):
            self.line()

    def line(self) -> None:
        """Print the count, the elapsed seconds, an estimate of the seconds left, and the figures."""
        self.last, self.reported = time.monotonic(), self.done
        elapsed = time.monotonic() - self.started
        count = f"{self.done}/{self.total} ({self.done / self.total:.0%})" if self.total else str(self.done)
        parts = [f"{self.description}: {count}", f"{elapsed:.0f} s"]
        fresh = self.done - self.before
        if self.total and fresh > 0 and self.done < self.total:
            parts.append(f"{elapsed * (self.total - self.done) / fresh:.0f} s left")
        info(", ".join([*parts, *(f"{k} {format_value(v)}" for k, v in self.fields.items())]))

    def close(self) -> None:
        if self.done != self.reported and time.monotonic() - self.started > 2:
            self.line()


class Bar(Progress):
    """Progress on a terminal: a rich bar with the time left."""

    def __init__(self, total: int | None, description: str) -> None:
        super().__init__(total, description)
        from rich import progress as rich

        columns = [rich.TextColumn("{task.description}", markup=False), rich.BarColumn(), rich.MofNCompleteColumn()]
        columns += [
            rich.TimeElapsedColumn(),
            rich.TimeRemainingColumn(),
            rich.TextColumn("{task.fields[figures]}", markup=False),
        ]
        self.bar = rich.Progress(*columns, console=terminal())
        self.task = self.bar.add_task(description, total=total, figures="")
        self.bar.start()

    def draw(self) -> None:
        figures = "  ".join(f"{k} {format_value(v)}" for k, v in self.fields.items())
        self.bar.update(self.task, completed=self.done, figures=figures)

    def close(self) -> None:
        self.bar.stop()


class Silent(Progress):
    """No progress at all: with --quiet, and on every process but the first."""

    def draw(self) -> None: ...
    def close(self) -> None: ...


@contextmanager
def progress(total: int | None, description: str) -> Iterator[Progress]:
    """Show the progress of a loop on stderr: a bar on a terminal, a few plain lines elsewhere."""
    kind = Silent if state.quiet or not speaks() else Bar if terminal().is_terminal else Progress
    display = kind(total, description)
    try:
        yield display
    finally:
        display.close()


@contextmanager
def stdout_guard() -> Iterator[None]:
    """Send everything that the block prints, from Python or C, to stderr, so that stdout carries only the result."""
    real = sys.stdout
    flush(real)
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # a closed stdout or stderr
        saved = None
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        flush(sys.stderr)
        flush_c()
        sys.stdout = real
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def flush(stream: Any) -> None:
    with suppress(OSError, ValueError, AttributeError):  # closed, or None
        stream.flush()


def flush_c() -> None:
    """Flush the buffers of C's stdio. Otherwise a library's printf would appear on stdout at exit."""
    import ctypes

    with suppress(OSError, TypeError, AttributeError):  # no C library by that name (Windows)
        ctypes.CDLL(None).fflush(None)


@contextmanager
def collecting_warnings() -> Iterator[None]:
    """Turn Python warnings raised in the block into warnings of ours, with the text unchanged."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, category, *_: _warn(f"{message} ({category.__name__})")
        yield


def describe(path: Path) -> dict[str, Any]:
    """An entry of the JSON object's `outputs`: path, sha256, bytes and format of a file or folder.

    The hash of a folder is taken over lines "<sha256>  <relative name>" of its files, sorted by name, as sha256sum prints them.
    """
    if path.is_dir():
        files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
        lines = "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files))
        size = sum(p.stat().st_size for p in files.values())
        return {
            "path": str(path),
            "sha256": hashlib.sha256(lines.encode()).hexdigest(),
            "bytes": size,
            "format": "folder",
        }
    suffix = path.suffix.removeprefix(".").lower()
    return {"path": str(path), "sha256": sha256(path), "bytes": path.stat().st_size, "format": suffix or "file"}


def jsonable(value: Any) -> Any:
    """The value as strict JSON allows it: NaN and infinity become null, arrays lists, dataclasses objects, the rest strings."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars too; neither is imported for it
        return jsonable(value.tolist())
    return str(value)


def json_object(command: str | None, result: Result | None, failure: Mapping[str, Any] | None = None) -> str:
    """The object that --json prints, on one line. `failure` is {kind, message, hint}; a failed command may have a result too."""
    result = result or Result()
    outputs = [describe(Path(p)) for p in result.outputs]
    timings = {"total_s": time.monotonic() - state.started, **state.timings}
    report = {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "ok": failure is None,
        "outputs": outputs,
        "metrics": result.metrics,
        "warnings": state.warnings,
        "timings": {k: round(v, 4) for k, v in timings.items()},
        "next_command": result.next_command,
    }
    return hidden(json.dumps(jsonable(report if failure is None else {**report, "error": failure}), allow_nan=False))


def fmt(value: Any) -> str:
    """Text of a measured figure: three decimals of a float, nothing for None."""
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
