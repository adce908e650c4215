"""A folder of images. The caption of `a.png` is in `a.txt`, in `a.json`, or in a `metadata.jsonl` for all images."""

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastdiff.data.images import CAPTIONS, SUFFIXES, Framing, Refused, Sample, caption_in, caption_of_json, decode, hash_of
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

MISSING = "without a caption"


class Folder:
    """The images of a folder and its sub-folders, in order of their names.

    Raises UsageError if there are no images or no captions, and InputRefused if metadata.jsonl is invalid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.spec = folder, str(folder)
        self.images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.images:
            raise UsageError(f"{as_field('data', folder)}: no images in it ({', '.join(SUFFIXES)})")
        self.table = table(folder)
        self.captions = {path: self.caption(path) for path in self.images}
        missing = [p for p in self.images if self.captions[p] is None]
        if len(missing) == len(self.images):
            all_of = f"{len(missing)} of {len(missing)} images have no caption"
            raise UsageError(
                f"{as_field('data', folder)}: {all_of}, the first is {missing[0].name}",
                f"put it into {missing[0].stem}.txt beside the image, into {missing[0].stem}.json as "
                '{"text": ...}, or into a metadata.jsonl of {"file_name": ..., "text": ...} lines',
            )

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.images)

    def caption(self, path: Path) -> str | None:
        """Return the caption of an image, or None if it has none."""
        if path in self.table:
            return self.table[path]
        if (side := path.with_suffix(".txt")).exists():
            return side.read_text(encoding="utf-8", errors="replace").strip() or None
        if (side := path.with_suffix(".json")).exists():
            return caption_of_json(side.read_text(encoding="utf-8", errors="replace"))
        return None

    def identity(self) -> str:
        """Return a hash that changes whenever a file or a caption does."""
        stats = [(str(p.relative_to(self.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in self.images]
        return hash_of(str(self.folder.resolve()), stats, [self.captions[p] for p in self.images])

    def samples(self) -> Iterator[Sample]:
        """Yield all images, then the rows of metadata.jsonl without an image, each as a sample with a problem."""
        for path in self.images:
            name, caption = str(path.relative_to(self.folder)), self.captions[path]
            yield Sample(name, caption, path.read_bytes, "" if caption else MISSING)
        for path in set(self.table) - set(self.images):
            yield Sample(str(path.relative_to(self.folder)), problem="in metadata.jsonl but not in the folder")


def table(folder: Path) -> dict[Path, str | None]:
    """Read the captions of metadata.jsonl by path. Raises InputRefused with the number of an invalid line."""
    path = folder / "metadata.jsonl"
    captions: dict[Path, str | None] = {}
    if not path.exists():
        return captions
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name = row["file_name"]
        except (ValueError, TypeError, KeyError) as error:
            hint = f'each line is {{"file_name": ..., "{CAPTIONS[0]}": ...}}'
            raise InputRefused(f"{path}: line {number} is not a JSON object with a file_name", hint) from error
        captions[folder / name] = caption_in(row)
    return captions


def square(path: Path, side_px: int) -> tuple[Tensor, list[int]]:
    """Read a picture, resize its short side to S = `side_px` and crop the centre.

    Returns pixels (3, S, S) in [-1, 1] and SDXL's six sizes (see `Framing.cut`). Raises InputRefused if it is not readable.
    """
    try:
        ((pixels, size),) = Framing(side_px).cut(decode(path.read_bytes()), "")
    except Refused as error:
        raise InputRefused(f"{path}: {error}") from error
    return pixels / 127.5 - 1, size
