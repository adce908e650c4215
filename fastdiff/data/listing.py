"""The samples of a source as one pass found them, kept in the cache: usable ones, refused ones, and what was changed."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from fastdiff.runtime import console
from fastdiff.runtime.counts import Counts
from fastdiff.runtime.disk import write_atomic

NAMED = 5  # refused samples with a warning of their own


@dataclass
class Listing:
    """The samples of a source.

    `rows` holds (name, hash of the picture's bytes, caption) of each usable sample, `refused` (name, reason) of all others.
    `counts` holds what was guessed or changed in the usable ones.
    """

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)

    def refuse(self, name: str, why: str) -> None:
        """Add a refused sample; the first few are named in warnings."""
        self.refused.append((name, why))
        if len(self.refused) <= NAMED:
            console.warn(f"{name}: {why}; skipped")

    def write(self, path: Path) -> None:
        """Write the listing as JSON."""
        write_atomic(path, json.dumps({"rows": self.rows, "refused": self.refused, "counts": self.counts.to_json()}))

    @classmethod
    def read(cls, path: Path) -> "Listing | None":
        """Read a listing, or return None if the file is missing or damaged."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            rows, refused = ([tuple(row) for row in content[name]] for name in ("rows", "refused"))
            return cls(rows, refused, Counts.from_json(content["counts"]))
        except (OSError, ValueError, TypeError, KeyError):
            return None
