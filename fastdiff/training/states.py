"""Saves and loads the states that a run resumes from. Each state is a numbered folder that is complete or absent.

state/000100/state.pt         everything that a resumed run needs
state/000100/manifest.json    written last: step, command, config, and the hash of every file

A state is written to a temporary folder beside the others, flushed to the disk, and appears by one rename. A crash at any
moment therefore leaves the earlier states as they were.
"""

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastdiff.runtime import console
from fastdiff.runtime.disk import FULL, HashedFile, flush_folder, sha256, write_atomic
from fastdiff.runtime.errors import DoesNotFit, Failed, InputRefused

MANIFEST = "manifest.json"
NAME = re.compile(r"(\d{6,})(?:-(\d+))?")  # the step; a second state of the same step also has a number


class States:
    """The states of one run, oldest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Damaged states, and those of a run that was started again: the next save deletes them, when a better one exists.
        self.superseded: set[Path] = set()

    def paths(self) -> list[Path]:
        """List the folders that are named like a state, oldest first."""
        matches = [(path, NAME.fullmatch(path.name)) for path in self.folder.glob("[0-9]*")]
        numbered = [(tuple(int(n or 0) for n in match.groups()), path) for path, match in matches if match]
        return [path for _, path in sorted(numbered)]

    def newest(self) -> Path | None:
        """Return the newest undamaged state, or None where there are no states.

        A damaged state causes a warning, and the one before it is tried. InputRefused where every state is damaged.
        """
        if (self.folder / MANIFEST).exists():
            raise InputRefused(f"{self.folder}: a state of an earlier fastdiff", "start again with `resume=never`")
        paths = self.paths()
        for path in reversed(paths):
            problem = damage(path)
            if problem is None:
                return path
            console.warn(f"{problem}; the state before it is taken")
            self.superseded.add(path)
        if paths:
            raise InputRefused(f"{self.folder}: no state in it is whole", "start again with `resume=never`")
        return None

    def load(self, path: Path) -> dict[str, Any]:
        """Open a state. Its tensors are memory-mapped: each is read from the disk when it is used."""
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)

    def save(self, state: dict[str, Any], keep: int, **metadata: Any) -> Path:
        """Write a state with `metadata` in its manifest, then delete all but the last `keep` states.

        A full disk raises DoesNotFit, any other error of the disk raises Failed; the earlier states stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        step = state["step"]
        staged = self.folder / f".{step:06d}.{os.getpid()}.tmp"
        try:
            staged.mkdir()
            file = HashedFile(staged / "state.pt")
            try:
                torch.save(state, file)  # type: ignore[arg-type]  # it only writes and flushes; its stub wants a whole IO[bytes]
                file.close()
            except Exception as error:
                raise (file.error or error) from error
            metadata |= {"step": step, "files": {"state.pt": file.digest.hexdigest()}}
            write_atomic(staged / MANIFEST, json.dumps(console.jsonable(metadata), indent=1))
            flush_folder(staged)
            path = self.unused(step)
            staged.rename(path)
            flush_folder(self.folder)
        except OSError as error:
            kind = DoesNotFit if error.errno in FULL else Failed
            raise kind(f"{staged}: {(error.strerror or str(error)).lower()}", self.kept()) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        old = [path for path in self.paths() if path not in self.superseded]
        for unwanted in (*self.superseded, *old[:-keep]):
            drop(unwanted)
        self.superseded.clear()
        return path

    def unused(self, step: int) -> Path:
        """Return a free path for a state of that step. States are never overwritten: a second one gets a number."""
        numbers = [int(m[2] or 0) for m in (NAME.fullmatch(path.name) for path in self.paths()) if m and int(m[1]) == step]
        return self.folder / (f"{step:06d}-{max(numbers) + 1}" if numbers else f"{step:06d}")

    def kept(self) -> str:
        """Say, for an error message, which state a failed run can resume from."""
        left = [path for path in self.paths() if path not in self.superseded]
        return f"the last good state is {left[-1]}" if left else "no state was saved before"

    def sweep(self) -> None:
        """Delete what a crash left half-written or half-deleted."""
        for path in (*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")):
            shutil.rmtree(path, ignore_errors=True)


def drop(path: Path) -> None:
    """Delete a state. It is renamed first, so that a half-deleted state does not look like a damaged one."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def manifest_of(path: Path) -> dict[str, Any]:
    """Read the manifest of a state: step, command, config, and the hash of every file."""
    return json.loads((path / MANIFEST).read_text())


def damage(path: Path) -> str | None:
    """Return what is wrong with a state, as the start of a message, or None where it is complete."""
    try:
        files = manifest_of(path)["files"]
    except (OSError, ValueError, KeyError):
        return f"{path / MANIFEST}: missing or damaged"
    for name, digest in files.items():
        if not (path / name).exists():
            return f"{path / name}: missing"
        if sha256(path / name) != digest:
            return f"{path / name}: damaged (its hash is not the manifest's)"
    return None
