"""Runs any Method, as a command and as the function `fastdiff.train`."""

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from os import PathLike
from pkgutil import iter_modules
from typing import Any

from fastdiff import methods
from fastdiff.checkpoints import locate
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import DEFAULT_BASE
from fastdiff.runtime.command import Runnable, sample_command
from fastdiff.runtime.config import options as options_of
from fastdiff.runtime.config import resolve, suggestion
from fastdiff.runtime.errors import Result, UsageError, as_field
from fastdiff.training import session
from fastdiff.training.method import Method
from fastdiff.training.session import Trained


def train(method: type[Method] | str, base: Checkpoint | str | PathLike[str] = DEFAULT_BASE, **options: Any) -> Trained:
    """Distil `base` with a method, as the method's command does. The returned run has `weights`: a LoRA file or a folder.

        run = fastdiff.train("lcm", fastdiff.load("sdxl"), steps=1000, lora_rank=64)

    `method` is a class, the name of a file in fastdiff/methods (lcm, dmd, ...) or the name of a command. `options` are fields of
    the method's Config; fields that are not given come from the preset for the family of `base`. `base` itself is not changed.
    UsageError where `method` or an option is unknown.
    """
    if isinstance(method, str):
        method = named(method)
    base = str(base) if isinstance(base, PathLike) else base
    options = {name: str(value) if isinstance(value, PathLike) else value for name, value in options.items()}
    source: dict[str, Any] = {"base": base}
    if isinstance(base, Checkpoint):
        source = {"base": base.ref, **base.opening}
    known = [option.name for option in options_of(method.Config)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(f"{as_field(unknown[0])}: not an option of {method.name}", suggestion(unknown[0], known))
    family = lambda values: locate.family_of(values["base"], allow_pickle=values.get("allow_pickle", False)).name
    config = resolve(method.Config, {**source, **options}, presets=method.presets, family_of=family, environ={})
    return session.train(method, config)


def named(name: str) -> type[Method]:
    """The method with that file name or command. UsageError where there is none."""
    methods = {key: method for method in shipped() for key in (method.name, method.__module__.rpartition(".")[2])}
    if name not in methods:
        known = suggestion(name, list(methods)) or f"one of {', '.join(methods)}"
        raise UsageError(f"{as_field('method', name)}: there is no such method", known)
    return methods[name]


def shipped() -> Iterator[type[Method]]:
    """All methods that have a file in fastdiff/methods."""
    for info in iter_modules(methods.__path__):
        if not info.ispkg:
            module = import_module(f"{methods.__name__}.{info.name}")
            own = (value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__)
            yield from (value for value in own if issubclass(value, Method))


def runnable(method: type[Method]) -> Runnable:
    """A method as a command for the command line."""
    return Runnable(method.Config, lambda config: run(method, config), method.presets, method.examples, method, resumes=True)


def run(method: type[Method], config: Any) -> Result:
    """Train, and return a result whose next command draws with the new weights."""
    trained = session.train(method, config)
    return replace(trained.result, next_command=sample_command(trained.options) if trained.options else None)
