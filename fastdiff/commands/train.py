"""Any Method as a command: its config to a run, and the command to type next."""

import shlex
from dataclasses import replace
from typing import Any

from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import Result
from fastdiff.training.method import Method
from fastdiff.training.session import train


def runnable(method: type[Method]) -> Runnable:
    """What the command line needs to know of a method."""
    return Runnable(method.Config, lambda config: run(method, config), method.presets, method.examples, method, resumes=True)


def run(method: type[Method], config: Any) -> Result:
    """Train, and say how to draw with the result."""
    trained = train(method, config)
    return replace(trained.result, next_command=sample_command(trained.options) if trained.options else None)


def sample_command(options: dict[str, str]) -> str:
    """`fastdiff sample` with these options; the prompt comes last, in double quotes."""
    prompt = options.pop("prompt", "a red apple")
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    return " ".join(["fastdiff sample", *map(shlex.quote, words), f'--prompt "{prompt}"'])
