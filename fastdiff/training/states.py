"""Resumable states: numbered folders, each whole or not there.

state/000100/state.pt         what a run goes on from
state/000100/manifest.json    written last: step, command, config, and the hash of every file

A state is staged beside the others, flushed to the disk, and appears by one rename, so a crash at any instant leaves the
states before it as they were.
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
NAME = re.compile(r"(\d{6,})(?:-(\d+))?")  # the step, and a number where a step has several


class States:
    """The states of one run, oldest first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.superseded: set[Path] = set()  # damaged, or of a run that was begun anew: they go when there is a better one

    def paths(self) -> list[Path]:
        """All that have a state's name."""
        found = {path: NAME.fullmatch(path.name) for path in self.folder.glob("[0-9]*")}
        return sorted((p for p, m in found.items() if m), key=lambda p: tuple(int(n or 0) for n in found[p].groups()))

    def newest(self) -> Path | None:
        """The newest whole state; a damaged one is named and the one before it taken. InputRefused where none is whole."""
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
        """A state; its tensors are read from the disk as they are used."""
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)

    def save(self, state: dict[str, Any], keep: int, **told: Any) -> Path:
        """Write a state and drop those before the last `keep`; `told` goes into its manifest. DoesNotFit on a full disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        step = state["step"]
        staged = self.folder / f".{step:06d}.{os.getpid()}.tmp"
        try:
            staged.mkdir()
            file = HashedFile(staged / "state.pt")
            try:
                torch.save(state, file)
                file.close()
            except Exception as error:
                raise (file.error or error) from error
            told |= {"step": step, "files": {"state.pt": file.digest.hexdigest()}}
            write_atomic(staged / MANIFEST, json.dumps(console.jsonable(told), indent=1))
            flush_folder(staged)
            made = self.unused(step)
            staged.rename(made)
            flush_folder(self.folder)
        except OSError as error:
            kind = DoesNotFit if error.errno in FULL else Failed
            raise kind(f"{staged}: {(error.strerror or str(error)).lower()}", self.kept()) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        old = [path for path in self.paths() if path not in self.superseded]
        for path in (*self.superseded, *old[:-keep]):
            drop(path)
        self.superseded.clear()
        return made

    def unused(self, step: int) -> Path:
        """A state is never overwritten: a second one of a step gets a number."""
        numbers = [int(m[2] or 0) for m in (NAME.fullmatch(path.name) for path in self.paths()) if m and int(m[1]) == step]
        return self.folder / (f"{step:06d}-{max(numbers) + 1}" if numbers else f"{step:06d}")

    def kept(self) -> str:
        """Which state a failed run can go on from."""
        left = [path for path in self.paths() if path not in self.superseded]
        return f"the last good state is {left[-1]}" if left else "no state was saved before"

    def sweep(self) -> None:
        """What a crash left half-written or half-deleted."""
        for path in (*self.folder.glob(".*.tmp"), *self.folder.glob(".*.old")):
            shutil.rmtree(path, ignore_errors=True)


def drop(path: Path) -> None:
    """First its name: what is half-deleted must not look like a damaged state."""
    with suppress(FileNotFoundError):
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")), ignore_errors=True)


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / MANIFEST).read_text())


def damage(path: Path) -> str | None:
    """What is wrong with a state, or None."""
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
