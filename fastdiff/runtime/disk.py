"""Room on disk: asked for before anything starts."""

import shutil
from pathlib import Path

from fastdiff.runtime.console import DoesNotFit


def shown(size: float) -> str:
    """A size for people: 12.3 GiB, 345 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.{1 if size < 2**27 else 0}f} MiB"


def nearest(folder: Path) -> Path:
    """The folder, or where it will be made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """What is free where the folder is, or will be."""
    return shutil.disk_usage(nearest(folder)).free


def require(folder: Path, size: float, what: str, hint: str = "") -> None:
    """DoesNotFit where fewer bytes than that are free."""
    if (free := free_bytes(folder)) < size:
        raise DoesNotFit(f"{folder}: {what} need {shown(size)}, and {shown(free)} are free", hint)
