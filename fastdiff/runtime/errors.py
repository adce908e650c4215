"""Errors that people can put right, each with its exit code and its kind in the JSON object; and what a command returns.

Messages name an option as a field in backticks: `base`, `num_steps=4`, `force=True`. The command line reads `with_flags` aloud.
"""

import re
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """An option is wrong; the message names it as a field, and the fix."""

    exit_code, kind = 2, "usage"
    result: "Result | None" = None  # what was made and measured before it; told in the JSON object

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Failed(UsageError):
    """A run cannot go on, through no fault of the command line."""

    exit_code, kind = 1, "failure"


class InputRefused(UsageError):
    """A file is unsafe, corrupt or unsupported; the message names the file."""

    exit_code, kind = 3, "input"


class DoesNotFit(UsageError):
    """Memory or disk does not suffice; checked before anything starts."""

    exit_code, kind = 4, "capacity"


class GateFailed(UsageError):
    """A quality or verification gate was not passed; `result` holds the figures."""

    exit_code, kind = 5, "gate"

    def __init__(self, message: str, hint: str = "", *, result: "Result | None" = None) -> None:
        super().__init__(message, hint)
        self.result = result


class Stopped(UsageError):
    """Stopped by SIGTERM (75) or Ctrl-C (130); what is on disk can be gone on from, with `command` where it is known."""

    kind = "stopped"

    def __init__(self, message: str, command: str = "", *, exit_code: int = 75) -> None:
        super().__init__(message, f"go on with: {command}" if command else "")
        self.exit_code, self.result = exit_code, Result(next_command=command or None)


@dataclass
class Result:
    """What a command made: files (or folders), figures, and the command to type next."""

    outputs: list[Path] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    next_command: str | None = None


# `name`, `name=value`; or, where a value is not plain, in more backticks than it holds, with a space at its end.
FIELD = re.compile(r"(?<![\w`])(?:`([a-z][a-z0-9_]*)(?:=([^`]*))?`|(``+)([a-z][a-z0-9_]*)=(.*?) \3)(?![\w`])", re.DOTALL)


def as_field(name: str, value: Any = MISSING) -> str:
    """An option, and the value that it has, as messages name it; any value comes through `with_flags` as it is."""
    if value is MISSING:
        return f"`{name}`"
    text = str(value)
    if "`" not in text and (isinstance(value, bool) or text not in {"True", "False"}):
        return f"`{name}={text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=1))
    return f"{fence}{name}={text} {fence}"


def quoted(text: Any) -> str:
    """The words of another library for a message of ours: its backticks name no option of ours, so they become quotes."""
    return str(text).replace("`", "'")


def with_flags(text: str) -> str:
    """A message as the command line says it: `num_steps=4` is --num-steps 4, `force=True` is --force, `force=False` --no-force.

    A command in backticks stays as it is.
    """
    return FIELD.sub(_as_flag, text)


def _as_flag(match: re.Match[str]) -> str:
    name, value, fence, fenced_name, fenced_value = match.groups()
    flag = (name or fenced_name).replace("_", "-")
    if fence:
        return f"--{flag} {fenced_value}"
    return {None: f"--{flag}", "True": f"--{flag}", "False": f"--no-{flag}"}.get(value, f"--{flag} {value}")
