"""Counts by kind of what a run leaves out, guesses or changes, so that one line tells of all files of a kind."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastdiff.runtime import console


class Kind(NamedTuple):
    """One kind of event, told as "12 pictures: WHAT; the first: NAME". The plural of `noun` ends in s."""

    noun: str
    what: str
    warns: bool = True  # a warning, because something may be lost; otherwise a plain line


@dataclass
class Counts:
    """How often each kind occurred, and the name of its first file."""

    rows: dict[Kind, tuple[int, str]] = field(default_factory=dict)

    def add(self, kinds: Kind | Iterable[Kind], name: str) -> None:
        """Count one file under a kind or several kinds."""
        for kind in [kinds] if isinstance(kinds, Kind) else kinds:
            count, first = self.rows.get(kind, (0, name))
            self.rows[kind] = (count + 1, first)

    def count(self, words: str) -> int:
        """Return how many files have a kind whose text contains these words."""
        return sum(n for kind, (n, _) in self.rows.items() if words in f"{kind.noun}: {kind.what}")

    def tell(self, prefix: str) -> None:
        """Print one line for each kind, after the prefix."""
        for kind, (count, first) in self.rows.items():
            line = f"{prefix}: {count} {kind.noun}{'' if count == 1 else 's'}: {kind.what}; the first: {first}"
            (console.warn if kind.warns else console.info)(line)

    def to_json(self) -> list[list[Any]]:
        """Return the rows as JSON values."""
        return [[*kind, *row] for kind, row in self.rows.items()]

    @classmethod
    def from_json(cls, rows: list[list[Any]]) -> "Counts":
        """Return the counts that `to_json` wrote."""
        return cls({Kind(noun, what, warns): (count, first) for noun, what, warns, count, first in rows})
