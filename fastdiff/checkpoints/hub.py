"""The hub: what a repository holds, and its files on this machine. Every error is the clear one of `hub_errors`.

What is on this machine already is used without asking the hub.
"""

import glob
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import hub_errors
from fastdiff.checkpoints.hub_client import asking, offline
from fastdiff.checkpoints.references import FILES, Reference
from fastdiff.runtime import disk
from fastdiff.runtime.console import info, note
from fastdiff.runtime.errors import InputRefused, UsageError

MANY = 2**20  # bytes of a download that is told; configs are less
COMMIT = re.compile(r"[0-9a-f]{40}")
SPARE = 2**28  # bytes that stay free on the disk


@dataclass(frozen=True)
class Repository:
    """The files of a repository at a revision."""

    where: Reference
    given: str  # the option with its value, as messages write it
    sizes: Mapping[str, int | None] = field(hash=False)  # file -> bytes, None where the hub does not tell
    folder: Path | None = None  # on this machine, where its files are known from there and not from the hub
    unasked: hub_errors.Unreachable | None = None  # why the hub did not list its files, where they are those of `folder`

    @property
    def no_other(self) -> str:
        """What is known of other files of a kind that is used: the hub knows of all, this machine of its own alone."""
        return "this machine has no other" if self.folder else "it has no other"

    def lacking(self, what: str, error: UsageError) -> UsageError:
        """The error for something that is not among the files: `error` where the hub listed them, else why it did not."""
        return hub_errors.partial(self.unasked, self.given, self.where, what) if self.unasked else error

    def inside(self) -> dict[str, str]:
        """The files below the path of the reference: name from there -> name in the repository."""
        start = f"{self.where.path}/" if self.where.path else ""
        return {name.removeprefix(start): name for name in self.sizes if name.startswith(start)}

    def top(self, *, allow_pickle: bool = False) -> list[str]:
        """The files of weights at the top, or in the folder of the reference: safetensors, where there are any."""
        names = [name for name in self.inside() if "/" not in name and Path(name).suffix.lower() in FILES]
        safe = sorted(name for name in names if name.endswith(".safetensors"))
        return safe or (sorted(names) if allow_pickle else [])

    def only_file(self, *, allow_pickle: bool = False) -> str:
        """The one file of weights there. UsageError where there are several, which it lists, InputRefused where there is none.

        Where the hub could not be asked, and this machine has none, the error says why.
        """
        names = self.top(allow_pickle=allow_pickle)
        if len(names) == 1:
            only = "the only file of weights on this machine" if self.folder else "its only file of weights"
            info(f"{self.where}: {names[0]} is used, {only}")
            return names[0]
        if names:
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            at = f"{self.where}/" if not (self.where.revision and self.where.path) else f"{self.where.hub_id}/{self.where.path}/"
            raise UsageError(
                f"{self.given}: {self.where} has {len(names)} files of weights: {listed}", f"name one: {at}{names[0]}"
            )
        if pickled := self.top(allow_pickle=True):
            hint = "`allow_pickle=True` reads their tensors; nothing in them is run"
            alone = InputRefused(f"{self.given}: {self.where} has pickled weights alone ({', '.join(pickled[:3])})", hint)
            raise self.lacking("no safetensors weights", alone)
        nothing = f"{self.given}: {self.where} has no model_index.json and no file of weights"
        raise self.lacking("no file of weights", InputRefused(nothing, "give another repository"))


def cached(where: Reference) -> Path | None:
    """The folder of a repository in the hub's cache on this machine, at that revision; it need not be complete."""
    home = hub_errors.cache_folder() / f"{where.kind}s--{where.hub_id.replace('/', '--')}"
    revision = where.revision or "main"
    try:
        commit = revision if COMMIT.fullmatch(revision) else (home / "refs" / revision).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = home / "snapshots" / commit
    return folder if commit and folder.is_dir() else None


def kept(where: Reference, given: str) -> Repository | None:
    """What of a repository is on this machine, or None."""
    if (folder := cached(where)) is None:
        return None
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    return Repository(where, given, sizes, folder) if sizes else None


def ask(where: Reference, given: str) -> Repository:
    """The files of a repository as the hub lists them; offline, or where the hub cannot be asked, those on this machine."""
    try:
        if offline():
            raise hub_errors.offline(given, str(where))
        with asking():
            from huggingface_hub import HfApi

            found: Any = HfApi().repo_info(where.hub_id, repo_type=where.kind, revision=where.revision, files_metadata=True)
    except Exception as error:  # the client raises a dozen kinds; `explain` knows them
        clear = hub_errors.explain(error, given, where)
        if isinstance(clear, hub_errors.Unreachable) and (here := kept(where, given)):
            note(f"{given}: {hub_errors.reason(clear, given)}; what is on this machine is used")
            return replace(here, unasked=clear)
        raise clear from error
    return Repository(where, given, {file.rfilename: file.size for file in found.siblings or []})


def holds(where: Reference, given: str, name: str) -> bool:
    """Whether a repository, or the folder of the reference, holds a file; errors as of `ask`, unless it is on this machine."""
    here = kept(where, given)
    return bool(here and name in here.inside()) or name in ask(where, given).inside()


def fetch(repository: Repository, names: Iterable[str]) -> Path:
    """Download files of a repository, and return the folder that has them all; what is on this machine is not asked for.

    Tells the size, and DoesNotFit where the disk has no room. UsageError where a file is not there or cannot be had.
    """
    where, given, wanted = repository.where, repository.given, list(dict.fromkeys(names))
    if repository.folder and all((repository.folder / name).exists() for name in wanted):
        return told(repository.folder, where)
    if offline():
        raise hub_errors.offline(given, str(where))
    if gone := [name for name in wanted if name not in repository.sizes]:
        message = f"{given}: {where.hub_id}{f' at {where.revision}' if where.revision else ''} has no file {gone[0]}"
        hint = f"its files: {some(repository.sizes)}" + hub_errors.near(gone[0], repository.sizes)
        raise repository.lacking(f"no {gone[0]}", UsageError(message, hint))
    here = cached(where)
    rest = [name for name in wanted if here is None or not (here / name).exists()]
    size = sum(repository.sizes[name] or 0 for name in rest)
    cache = hub_errors.cache_folder()
    if size > MANY:
        disk.require(cache, size + SPARE, f"the files of {where.hub_id}", f"free some space, or {hub_errors.OTHER_DISK}")
        info(f"{where.hub_id}: downloading {disk.format_size(size)} ({len(rest)} files) to {cache}")
    try:
        with asking():
            from huggingface_hub import snapshot_download

            patterns = [glob.escape(name) for name in wanted]
            folder = Path(snapshot_download(where.hub_id, revision=where.revision, allow_patterns=patterns))
    except Exception as error:  # the client raises a dozen kinds; `explain` knows them
        raise hub_errors.explain(error, given, where) from error
    if gone := [name for name in wanted if not (folder / name).exists()]:
        raise UsageError(
            f"{given}: {gone[0]} of {where.hub_id} could not be downloaded", "run the command again with network access"
        )
    return told(folder, where)


def some(names: Iterable[str]) -> str:
    """The first names of weights, for a message."""
    listed = [name for name in names if Path(name).suffix.lower() in FILES] or list(names)
    return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def told(folder: Path, where: Reference) -> Path:
    """The folder; says once at which commit the repository is: owner/name@commit repeats the run."""
    if COMMIT.fullmatch(folder.name) and where.revision != folder.name:
        note(f"{where.hub_id} is used at commit {folder.name}")
    return folder


def file(where: Reference, given: str) -> Path:
    """The file that a reference names; downloads it where it is not on this machine."""
    here = cached(where)
    if here and (here / where.path).is_file():
        return told(here, where) / where.path
    return fetch(ask(where, given), [where.path]) / where.path


def one_file(where: Reference, given: str, *, allow_pickle: bool = False) -> Path:
    """The only file of weights of a repository or a folder of it; errors as of `Repository.only_file`."""
    repository = ask(where, given)
    name = repository.inside()[repository.only_file(allow_pickle=allow_pickle)]
    return fetch(repository, [name]) / name


def first_with(wheres: Sequence[Reference], how: Callable[[Reference], Path]) -> tuple[Reference, Path]:
    """The first repository of several from which something can be had, and the path of that.

    Where none will do, the error of the first that is there counts. A hub that cannot be asked for one is asked for no other.
    """
    failed: list[UsageError] = []
    for where in wheres:
        try:
            return where, how(where)
        except UsageError as error:
            failed.append(error)
            if isinstance(error, hub_errors.Unreachable):
                break
    best = next((error for error in failed if not isinstance(error, hub_errors.NotThere)), failed[0])
    if len(wheres) > 1:
        best.args = (f"{best} (it stands for {', '.join(map(str, wheres))})",)
    raise best
