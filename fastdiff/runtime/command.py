"""What the command line needs to know of a command: its options before it runs, and what runs it."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastdiff.runtime.errors import Result


def sample_command(options: Mapping[str, Any]) -> str:
    """The text of a `fastdiff sample` command with these options; those that are on are True. The prompt comes last, quoted."""
    words = option_words({name: value for name, value in options.items() if name != "prompt"})
    return " ".join(["fastdiff sample", *map(shlex.quote, words), f'--prompt "{options.get("prompt", "a red apple")}"'])


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; those that are on are True."""
    return [word for name, value in options.items() for word in ([flag(name)] if value is True else [flag(name), str(value)])]


def flag(name: str) -> str:
    """The flag of an option, as --base-config of `base_config`."""
    return f"--{name.replace('_', '-')}"


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
