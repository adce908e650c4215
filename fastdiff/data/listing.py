"""The samples of a source as one pass found them, kept in the cache: usable ones, refused ones, and what was changed."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdiff.runtime import console
from fastdiff.runtime.counts import Counts
from fastdiff.runtime.disk import write_atomic

NAMED = 5  # refused samples with a warning of their own


@dataclass
class Listing:
    """The samples of a source.

    `rows` holds (name, hash of the picture's bytes, caption) of each usable sample, `refused` (name, reason) of all others.
    `counts` holds what was guessed or changed in the usable ones. `cut` says that the source has more samples than were asked
    for, `passing` that a sample was refused for what may be gone in the next run, such as a read error.
    """

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    cut: bool = False
    passing: bool = False

    def refuse(self, name: str, why: str) -> None:
        """Add a refused sample; the first few are named in warnings."""
        self.refused.append((name, why))
        if len(self.refused) <= NAMED:
            console.warn(f"{name}: {why}; skipped")

    def write(self, path: Path) -> None:
        """Write the listing as JSON."""
        content = {"rows": self.rows, "refused": self.refused, "counts": self.counts.to_json()}
        write_atomic(path, json.dumps(content | {"cut": self.cut, "passing": self.passing}))

    @classmethod
    def read(cls, path: Path) -> "Listing | None":
        """Read a listing. None if the file is missing or damaged, or if samples that it refuses may be readable now."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, refused = (table(content[name], width) for name, width in (("rows", 3), ("refused", 2)))
            made = cls(rows, refused, Counts.from_json(content["counts"]), bool(content.get("cut")), bool(content.get("passing")))
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return None if made.passing else made


def table(rows: Any, width: int) -> list[tuple[Any, ...]]:
    """Return rows of JSON as tuples. Raises ValueError if one is not of `width` texts."""
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and len(row) == width and all(isinstance(part, str) for part in row) for row in rows
    ):
        raise ValueError(f"rows that are not {width} texts")
    return [tuple(row) for row in rows]
