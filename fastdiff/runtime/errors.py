"""Errors that users can fix, each with an exit code and a `kind` for the JSON object; and the result of a command.

Messages write an option as a field in backticks: `base`, `num_steps=4`, `force=True`. The command line shows these as flags,
by `with_flags`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.runtime.secrets import hidden


class UsageError(ValueError):
    """An option is wrong. The message names the field, `hint` says how to fix it."""

    exit_code, kind = 2, "usage"
    result: "Result | None" = None  # what was made and measured before the error; part of the JSON object

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Failed(UsageError):
    """A run cannot go on, though its options are right."""

    exit_code, kind = 1, "failure"


class InputRefused(UsageError):
    """An input file is unsafe, corrupt or unsupported. The message names the file."""

    exit_code, kind = 3, "input"


class DoesNotFit(UsageError):
    """There is too little memory or disk space. Where possible this is checked before the work starts."""

    exit_code, kind = 4, "capacity"


class OutOfMemory(DoesNotFit):
    """The memory of the device, or of the machine, ran out during the work."""


class GateFailed(UsageError):
    """A check of quality or of a written file failed. `result` holds the figures."""

    exit_code, kind = 5, "gate"

    def __init__(self, message: str, hint: str = "", *, result: "Result | None" = None) -> None:
        super().__init__(message, hint)
        self.result = result


class Stopped(UsageError):
    """The run was stopped: exit code 75 after SIGTERM, 130 after Ctrl-C. `command`, if known, continues it."""

    kind = "stopped"

    def __init__(self, message: str, command: str = "", *, exit_code: int = 75) -> None:
        super().__init__(message, f"go on with: {command}" if command else "")
        self.exit_code, self.result = exit_code, Result(next_command=command or None)


@dataclass
class Result:
    """What a command returns: the files or folders it wrote, its figures, and the command to type next."""

    outputs: list[Path] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    next_command: str | None = None


# What libraries write where memory ran out. cuBLAS and cuDNN fail to start where they cannot allocate their workspace.
NO_MEMORY = re.compile(
    r"out of memory|can't allocate memory|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    r"|CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED|INTERNAL_ERROR)",
    re.IGNORECASE,
)
LESS = (
    "a smaller `batch_size` or `resolution`, or `gradient_checkpointing=True`, takes less; "
    "`fastdiff plan COMMAND` says how much a run takes"
)
BUILDS = "https://pytorch.org/get-started/locally"
# Faults of driver and device: what libraries write, what that means, and the fix.
DEVICE_FAULTS = (
    (
        r"driver version is insufficient|driver on your system is too old",
        "the NVIDIA driver is older than this torch needs",
        f"update the driver, or install a torch for an older CUDA: {BUILDS}",
    ),
    (r"no kernel image is available", "this torch has no code for this GPU", f"install one that has: {BUILDS}"),
    (
        r"found no NVIDIA driver|no CUDA-capable device|busy or unavailable",
        "the GPU cannot be used",
        "see whether `nvidia-smi` lists it, and whether another process holds it",
    ),
)


def device_error(error: BaseException) -> UsageError | None:
    """The clear error for one that a library raised because memory ran out or driver and device do not fit; None for others."""
    if isinstance(error, OutOfMemory):
        return error
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    line = next(iter(quoted(error).strip().splitlines()), "")
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or NO_MEMORY.search(str(error)):
        return OutOfMemory(f"out of memory: {line}" if line else "out of memory", LESS)
    for pattern, meaning, fix in DEVICE_FAULTS:
        if re.search(pattern, str(error), re.IGNORECASE):
            return Failed(f"{meaning}: {line}", fix)
    return None


@contextmanager
def device_errors_explained() -> Iterator[None]:
    """Inside the block, or in a function that this decorates, raise the clear error of `device_error` for a library's own."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if clear := device_error(error):
            raise clear from error
        raise


# `name` or `name=value`. A value that has backticks, or is the text True or False, stands in longer fences: ``name=value ``.
FIELD = re.compile(r"(?<![\w`])(?:`([a-z][a-z0-9_]*)(?:=([^`]*))?`|(``+)([a-z][a-z0-9_]*)=(.*?) \3)(?![\w`])", re.DOTALL)


def as_field(name: str, value: Any = MISSING) -> str:
    """An option as messages write it, `name` or `name=value`. `with_flags` recovers any value unchanged."""
    if value is MISSING:
        return f"`{name}`"
    text = str(value)
    if "`" not in text and (isinstance(value, bool) or text not in {"True", "False"}):
        return f"`{name}={text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=1))
    return f"{fence}{name}={text} {fence}"


def quoted(text: Any) -> str:
    """Another library's message for use in ours, without access tokens.

    Backticks become quotes, so that nothing in it is taken for an option.
    """
    return hidden(str(text)).replace("`", "'")


def with_flags(text: str) -> str:
    """A message with fields as flags: `num_steps=4` becomes --num-steps 4, `force=True` --force, `force=False` --no-force.

    Other text in backticks, such as a command, stays as it is.
    """
    return FIELD.sub(_as_flag, text)


def _as_flag(match: re.Match[str]) -> str:
    name, value, fence, fenced_name, fenced_value = match.groups()
    flag = (name or fenced_name).replace("_", "-")
    if fence:
        return f"--{flag} {fenced_value}"
    return {None: f"--{flag}", "True": f"--{flag}", "False": f"--no-{flag}"}.get(value, f"--{flag} {value}")
