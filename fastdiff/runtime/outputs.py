"""Checks the place that a command is told to write to, before anything is loaded: it must be possible, and no input."""

from collections.abc import Iterable
from pathlib import Path

from fastdiff.runtime.errors import UsageError, as_field


def as_folder(path: str | Path) -> Path:
    """The path of a folder to write into, with `~` resolved. UsageError where it is a file, or lies under one."""
    path = Path(path).expanduser()
    _refuse_file_above(path)
    if path.is_file():
        raise UsageError(f"{as_field('output', path)}: is a file; give the name of a folder")
    return path


def as_file(path: str | Path) -> Path:
    """The path of a file to write, with `~` resolved. UsageError where it is a folder, or lies under a file."""
    path = Path(path).expanduser()
    _refuse_file_above(path)
    if path.is_dir():
        raise UsageError(f"{as_field('output', path)}: is a folder; give the name of a file")
    return path


def _refuse_file_above(path: Path) -> None:
    for parent in path.parents:
        if parent.is_file():
            raise UsageError(f"{as_field('output', path)}: {parent} is a file, and nothing can be written under it")


def spare(output: Path, inputs: Iterable[str | Path | None], *, written: Iterable[Path] = ()) -> None:
    """Raise UsageError where writing `output` would overwrite an input: a file or folder, or a file of such a folder.

    `inputs` are paths as the user gave them; those that do not exist, as aliases and hub ids, are passed over. A folder that is
    written is replaced as a whole, and with it what lies in it; where only some files in it are, `written` names them.
    """
    files = list(written)
    for given in inputs:
        source = Path(given).expanduser() if given else None
        if source is None or not source.exists():
            continue
        if any(_overwrites(path, source) for path in files or [output]):
            raise UsageError(f"{as_field('output', output)}: would overwrite the input {source}; choose another name")


def _overwrites(path: Path, source: Path) -> bool:
    """Whether writing `path` changes `source`: it is it, holds it, or is an existing part of it."""
    if not path.exists():
        return False
    target, read = path.resolve(), source.resolve()
    if path.samefile(source) or read.is_relative_to(target):
        return True
    if not (path.is_file() and target.is_relative_to(read)):
        return False
    # Beside the components of a checkpoint folder there may lie an earlier output, which is no part of it.
    return target.parent != read or not (read / "model_index.json").exists() or path.name == "model_index.json"
