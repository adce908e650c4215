"""What the command line needs to know of a command: its options before it runs, and what runs it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdiff.runtime.errors import Result


@dataclass(frozen=True)
class Description:
    """What a help page and a usage error need. A module in fastdiff/options gives it without loading torch."""

    Config: type
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options by the family of `base`
    examples: str = ""  # command lines for the help page


@dataclass(frozen=True)
class Runnable:
    """A module of a command has one as `COMMAND`; a training method gives one by `commands.train.runnable`."""

    Config: type
    run: Callable[[Any], Result]
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # options by the family of `base`
    examples: str = ""  # command lines for the help page
    method: Any = None  # the class, where it trains: `plan` asks it what a run takes
    resumes: bool = False  # the same command goes on after a stop
