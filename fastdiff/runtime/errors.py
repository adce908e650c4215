"""Errors that people can put right, each with its exit code and its kind in the JSON object; and what a command returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class UsageError(ValueError):
    """The command line or config is wrong; the message names the flag and the fix."""

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
