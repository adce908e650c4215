"""Files and disks: where ours are, free space, hashes, and writes that leave a whole file or none."""

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastdiff.runtime.errors import DoesNotFit
from fastdiff.runtime.secrets import hidden

PACKAGE = Path(__file__).parent.parent
ASSETS = PACKAGE / "assets"  # what ships with the package


def format_size(size: float) -> str:
    """A size in bytes as text for people: 12.3 GiB, 345 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.{1 if size < 2**27 else 0}f} MiB"


def nearest(folder: Path) -> Path:
    """The folder itself, or its closest parent that exists already."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that holds the folder, or that will hold it."""
    return shutil.disk_usage(nearest(folder)).free


def require(folder: Path, size: float, what: str, hint: str = "") -> None:
    """Raise DoesNotFit if fewer than `size` bytes are free for the folder. `what` names, in the plural, what needs the space."""
    if (free := free_bytes(folder)) < size:
        raise DoesNotFit(f"{folder}: {what} need {format_size(size)}, and {format_size(free)} are free", hint)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


FULL = {errno.ENOSPC, errno.EDQUOT}


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all: a temporary file in the same folder, fsync, then one rename.

    Access tokens in it are left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with staged.open("w", encoding="utf-8") as file:
        file.write(hidden(text))
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def flush_folder(folder: Path) -> None:
    """Put a folder's list of names onto the disk. Without this, a power cut can undo a rename in it."""
    with suppress(PermissionError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class HashedFile:
    """A new file that hashes what is written to it. `error` keeps the first OSError, which torch.save hides."""

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
        """Put the file's content onto the disk and close it."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        finally:
            self.file.close()


def cache_folder() -> Path:
    """The folder of cached data: $FASTDIFF_CACHE, or ~/.cache/fastdiff."""
    return Path(os.environ.get("FASTDIFF_CACHE", Path.home() / ".cache" / "fastdiff"))
