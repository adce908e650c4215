"""Files: where ours are, room on the disk, hashes, and writing a file whole or not at all."""

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdiff.runtime.errors import DoesNotFit

PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"  # what ships with the package


def format_size(size: float) -> str:
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
        raise DoesNotFit(f"{folder}: {what} need {format_size(size)}, and {format_size(free)} are free", hint)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: Path, text: str) -> None:
    """Whole or not at all: temporary file in the same folder, fsync, one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def flush_folder(folder: Path) -> None:
    """Names of files are the folder's own content: without this a rename can be lost with the power."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class HashedFile:
    """A new file that hashes what is written to it; `error` keeps what went wrong, which torch.save hides behind its own."""

    def __init__(self, path: Path) -> None:
        self.file, self.digest = path.open("wb"), hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.digest.update(data)
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        """Onto the disk."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def cache_folder() -> Path:
    return Path(os.environ.get("FASTDIFF_CACHE", Path.home() / ".cache" / "fastdiff"))
