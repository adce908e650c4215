"""The files of a folder and its sub-folders: which are pictures, which can be captions, and which are left out, by kind."""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from fastdiff.runtime.counts import Counts, Kind
from fastdiff.runtime.picture_file import suffixes, unreadable

WORDS = (".txt", ".caption", ".json")  # suffixes of the caption of one picture; the first that is there wins
TABLES = ("metadata.jsonl", "metadata.csv")  # captions of all pictures of a folder; the first one wins

HIDDEN = Kind("file", "left out, hidden (the name begins with a dot)", warns=False)
HIDDEN_FOLDER = Kind("folder", "left out, hidden (the name begins with a dot)", warns=False)
NOTES = Kind("file", "left out, macOS's notes on a file (the name begins with ._)", warns=False)
SYSTEM = Kind("file", "left out, written by a system for itself", warns=False)
SYSTEM_FOLDER = Kind("folder", "left out, thumbnails or a system's own files (give the folder itself to use it)")
TWICE = Kind("folder", "left out, a link to a folder that is read already", warns=False)
OUTWARDS = Kind("folder", "a link that leads out of the folder; the pictures behind it are read too")
CLOSED = Kind("folder", "left out, cannot be opened")
BROKEN_LINK = Kind("file", "left out, a link to nothing")
SPECIAL = Kind("file", "left out, not a regular file")
OTHER = Kind("file", "left out, no picture and no caption", warns=False)
REPEATS = Kind("folder", "named NUMBER_NAME, as sd-scripts names repeats; they are not applied, each picture counts once")
UNREADABLE_NAME = Kind("file", "with a name that is not UTF-8; it is shown with \\x signs", warns=False)

SYSTEM_FOLDERS = {"@eadir", "__macosx", "$recycle.bin", "#recycle", "system volume information", "lost+found"}
SYSTEM_FOLDERS |= {"thumbs", "thumbnails", "__pycache__"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "folder.jpg.lnk"}
REPEATED = re.compile(r"\d+_.+")


def shown(path: Path, folder: Path) -> str:
    """Return the name of a file in a folder as text that can be printed; bytes that are not UTF-8 become \\x signs."""
    return os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")


@dataclass
class Files:
    """The files of a folder, each list in order of names. `counts` holds what is left out."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    words: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    @classmethod
    def of(cls, folder: Path) -> "Files":
        """List the files of a folder and its sub-folders. Links to folders are followed, but each folder is read once.

        Raises OSError if the folder itself cannot be opened.
        """
        files, seen = cls(folder), {identity(folder)}
        waiting, links = [folder], list[Path]()  # links wait, so that a folder's files bear the name of its real place
        while waiting or links:
            if not waiting:
                link = links.pop(0)
                if identity(link) in seen:
                    files.leave_out(TWICE, link)
                    continue
                if not link.resolve().is_relative_to(folder.resolve()):
                    files.leave_out(OUTWARDS, link)
                seen.add(identity(link))
                waiting = [link]
            inside = files.read(waiting.pop(0))
            for path in inside:
                if path.is_symlink():
                    links.append(path)
                elif identity(path) not in seen:
                    seen.add(identity(path))
                    waiting.append(path)
        for paths in (files.pictures, files.words, files.tables):
            paths.sort(key=lambda path: path.parts)
        return files

    def read(self, folder: Path) -> list[Path]:
        """Sort the files of one folder into the lists, and return its sub-folders that are to be read."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(entry.name for entry in entries)
        except OSError as error:
            if folder == self.folder:
                raise
            self.leave_out(CLOSED._replace(what=f"{CLOSED.what} ({error.strerror or error})"), folder)
            return []
        inside = []
        for path in (folder / name for name in names):
            try:
                kind = path.stat().st_mode
            except OSError as error:
                self.leave_out(BROKEN_LINK if path.is_symlink() else SPECIAL._replace(what=f"left out, {error.strerror}"), path)
                continue
            if stat.S_ISDIR(kind):
                if self.wanted(path):
                    inside.append(path)
            elif stat.S_ISREG(kind):
                self.place(path)
            else:
                self.leave_out(SPECIAL, path)
        return inside

    def wanted(self, folder: Path) -> bool:
        """Return whether a sub-folder is to be read; count it otherwise."""
        if folder.name.casefold() in SYSTEM_FOLDERS:
            self.leave_out(SYSTEM_FOLDER, folder)
        elif folder.name.startswith("."):
            self.leave_out(HIDDEN_FOLDER, folder)
        else:
            if REPEATED.fullmatch(folder.name):
                self.leave_out(REPEATS, folder)
            return True
        return False

    def place(self, path: Path) -> None:
        """Put a file into its list, or count it as left out."""
        name, suffix = path.name, path.suffix.lower()
        if name.startswith("._"):
            self.leave_out(NOTES, path)
        elif name.casefold() in SYSTEM_FILES:
            self.leave_out(SYSTEM, path)
        elif name.startswith("."):
            self.leave_out(HIDDEN, path)
        elif suffix in suffixes():
            self.pictures.append(path)
            if not name.isascii() and os.fsencode(name).decode("utf-8", "ignore") != name:
                self.leave_out(UNREADABLE_NAME, path)
        elif name.lower() in TABLES:
            self.tables.append(path)
        elif suffix in WORDS:
            self.words.append(path)
        elif what := unreadable(suffix):
            self.leave_out(Kind("file", f"left out, {what}"), path)
        else:
            self.leave_out(OTHER, path)

    def leave_out(self, kind: Kind, path: Path) -> None:
        """Count a file or folder under a kind, whether it is left out or read with a remark."""
        self.counts.add(kind, shown(path, self.folder))


def identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others of the machine, through whatever link it is reached."""
    told = folder.stat()
    return told.st_dev, told.st_ino
