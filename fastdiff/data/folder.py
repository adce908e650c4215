"""A folder of pictures and captions.

The caption of `a.png` is taken from the first of these that has one: the row of `a.png` in metadata.jsonl, then in metadata.csv
(of the picture's folder, else of the folders above it), `a.png.txt` or `a.txt`, `a.png.caption` or `a.caption`, `a.png.json` or
`a.json`. Where they disagree, the run says so.
"""

import json
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fastdiff.data import tables
from fastdiff.data.images import BAD_JSON, CAPTIONS, Caption, Framing, Sample, hash_of
from fastdiff.data.walk import TABLES, WORDS, Files, shown
from fastdiff.runtime import text_file
from fastdiff.runtime.counts import Counts, Kind
from fastdiff.runtime.errors import InputRefused, UsageError, as_field
from fastdiff.runtime.picture_file import ENLARGED, Refused, decode, suffixes, unreadable

MISSING = "without a caption"
NO_TEXT = Kind("caption", "no text, left out; another caption of the picture is used")
DISAGREE = Kind("picture", "captions that disagree; the first of " + ", ".join((*TABLES, *WORDS)) + " is used")
EMPTY = Kind("caption", "empty")
SHARED = Kind("caption", "shared by pictures of the same name")
ALONE = Kind("caption", "without a picture that is read")
ALONE_JSON = Kind("file", ".json without a picture of its name, not used (a table of captions is named metadata.jsonl)")
NO_COLUMN = Kind("caption", "of a text file, which has no columns (`caption_column`)")


class Folder:
    """The images of a folder and its sub-folders, in order of their names.

    `caption_column` is the key of the caption in JSON and tables (default: the first of CAPTIONS). `counts` holds what is left
    out, guessed or changed. Raises UsageError if there are no images or no captions, and InputRefused if a table is invalid.
    """

    def __init__(self, folder: Path, caption_column: str | None = None) -> None:
        self.folder, self.spec, self.column = folder, str(folder), caption_column
        try:
            self.files = Files.of(folder)
        except OSError as error:
            raise UsageError(f"{as_field('data', folder)}: cannot be opened ({error.strerror or error})") from error
        self.images, self.counts = self.files.pictures, self.files.counts
        if not self.images:
            raise UsageError(f"{as_field('data', folder)}: no images in it ({', '.join(suffixes())})", self.left_out())
        self.tables = self.read_tables()
        self.beside = words_by_picture(self.files.words)
        self.problems: dict[Path, str] = {}
        self.used: dict[Path, Path] = {}  # caption file -> the first picture that it describes
        self.read: dict[Path, Caption] = {}
        self.captions = {path: self.caption(path) for path in self.images}
        for path in self.files.words:
            if path not in self.used:
                self.counts.add(ALONE_JSON if path.suffix.lower() == ".json" else ALONE, shown(path, folder))
        self.check_column()
        missing = [p for p in self.images if self.captions[p] is None and p not in self.problems]
        if len(missing) == len(self.images):
            all_of = f"{len(missing)} of {len(missing)} images have no caption"
            raise UsageError(
                f"{as_field('data', folder)}: {all_of}, the first is {shown(missing[0], missing[0].parent)}",
                f"put it into {missing[0].stem}.txt beside the image, into {missing[0].stem}.json as "
                f'{{"{caption_column or CAPTIONS[0]}": ...}}, or into a metadata.jsonl of {{"file_name": ..., '
                f'"{caption_column or CAPTIONS[0]}": ...}} lines',
            )

    def check_column(self) -> None:
        """Raise UsageError if no table and no .json file has the column of captions, naming the columns that there are."""
        jsons = [path for path in self.read if path.suffix.lower() == ".json"]
        if (
            not self.column
            or self.column in self.columns
            or any(self.read[path].text or self.read[path].problem for path in jsons)
        ):
            return
        columns = dict.fromkeys(sorted(self.columns))
        for path in jsons[:100]:
            with suppress(OSError, ValueError, RecursionError):
                row = json.loads(text_file.read(path)[0])
                columns |= dict.fromkeys(row if isinstance(row, dict) else [])
        hint = f"they have {', '.join(columns)}" if columns else "text files have no columns: leave `caption_column` out"
        where = "no table or .json file of captions has it" if columns else "there is no table or .json file of captions"
        raise UsageError(f"{as_field('data', self.folder)}: {as_field('caption_column', self.column)}: {where}", hint)

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.images)

    def left_out(self) -> str:
        """Say what was left out where nothing else was found."""
        return "; ".join(f"{n} {kind.noun}{'' if n == 1 else 's'}: {kind.what}" for kind, (n, _) in self.counts.rows.items())

    def read_tables(self) -> dict[str, list[Caption]]:
        """Read all tables: the captions of each picture by its name in the folder, the one that wins first."""
        captions: dict[str, list[Caption]] = {}
        self.rows: dict[str, str] = {}  # picture -> the table that names it
        self.columns: set[str] = set()  # of all tables
        for path in sorted(self.files.tables, key=lambda p: (-len(p.parts), p.parent.parts, TABLES.index(p.name.lower()))):
            place = path.parent.relative_to(self.folder)
            for name, caption in tables.read(path, self.column, self.counts, self.columns).items():
                key = normal((place / name).as_posix())
                captions.setdefault(key, []).append(caption)
                self.rows.setdefault(key, path.name)
        return captions

    def caption(self, path: Path) -> str | None:
        """Return the caption of an image, or None if it has none. What was guessed or changed is counted."""
        name = shown(path, self.folder)
        row = normal(path.relative_to(self.folder).as_posix())
        candidates = [(row, caption) for caption in self.tables.get(row, [])]
        self.rows.pop(row, None)
        for suffix in WORDS:
            for side in self.beside.get((path.parent, normal(path.name), suffix), []) + self.beside.get(
                (path.parent, normal(path.stem), suffix), []
            ):
                candidates.append((shown(side, self.folder), self.of_file(side, path)))
        caption = chosen([caption for _, caption in candidates])
        if caption.text:
            place = next(place for place, one in candidates if one.text)
            for kind in caption.kinds:
                self.counts.add(kind, name if kind in (DISAGREE, NO_TEXT) else place)
            if self.column and place.lower().endswith((".txt", ".caption")):
                self.counts.add(NO_COLUMN, place)
            return caption.text
        if caption.problem:
            self.problems[path] = caption.problem
        elif candidates:
            place, caption = candidates[0]
            self.counts.add([*([] if BAD_JSON in caption.kinds else [EMPTY]), *caption.kinds], place)
        return None

    def of_file(self, side: Path, picture: Path) -> Caption:
        """Read the caption file of a picture."""
        if side in self.used:
            self.counts.add(SHARED, shown(side, self.folder))
            return self.read[side]
        self.used[side] = picture
        try:
            with side.open("rb") as file:
                data = file.read()
        except OSError as error:
            caption = Caption(problem=f"a caption that cannot be read ({error.strerror or error})")
        else:
            caption = Caption.of_json(data, self.column) if side.suffix.lower() == ".json" else Caption.of_bytes(data)
        self.read[side] = caption
        return caption

    def identity(self) -> str:
        """Return a hash that changes whenever a file or a caption does."""
        stats = [(str(p.relative_to(self.folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in self.images]
        captions = [self.captions[p] for p in self.images]
        rows = sorted(self.rows.items())  # of pictures that are not there
        return hash_of(str(self.folder.resolve()), stats, captions, list(self.problems.values()), rows)

    def samples(self) -> Iterator[Sample]:
        """Yield all images, then the rows of tables without an image, each as a sample with a problem."""
        for path in self.images:
            name, caption = shown(path, self.folder), self.captions[path]
            yield Sample(name, caption, path.read_bytes, "" if caption else self.problems.get(path, MISSING))
        for name, table in sorted(self.rows.items()):
            yield Sample(name, problem=f"in {table} but {self.why_missing(name)}")

    def why_missing(self, name: str) -> str:
        """Say why a picture that a table names is not among the images."""
        if not (self.folder / name).is_file():
            return "not in the folder"
        why = unreadable(Path(name).suffix)
        return f"left out of the pictures of the folder ({why or 'its name is that of a hidden file, a system, or no picture'})"


def chosen(captions: list[Caption]) -> Caption:
    """Choose among the captions of one picture, the one that wins first. What is told of the others is among its kinds."""
    found = [caption for caption in captions if caption.text]
    if not found:
        return next((caption for caption in captions if caption.problem), captions[0] if captions else Caption())
    kinds = [DISAGREE] if len({caption.text for caption in found}) > 1 else []
    kinds += [NO_TEXT] if any(caption.problem for caption in captions) else []
    return Caption(found[0].text, (*found[0].kinds, *kinds))


def normal(name: str) -> str:
    """Return a name with composed letters: macOS writes é as e and an accent, and tables of other systems as one letter."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def words_by_picture(files: list[Path]) -> dict[tuple[Path, str, str], list[Path]]:
    """Return caption files by folder, the name that they describe, and suffix in small letters. `files` are in order."""
    found: dict[tuple[Path, str, str], list[Path]] = {}
    for path in files:
        found.setdefault((path.parent, normal(path.stem), path.suffix.lower()), []).append(path)
    return found


def pictures_of(folder: Path, name: str) -> list[Path]:
    """Return the pictures in a folder that the option `name` gave, in order of their names, and tell what is left out."""
    files = Files.of(folder)
    files.counts.tell(as_field(name, folder))
    return files.pictures


def square(path: Path, side_px: int, counts: Counts | None = None) -> tuple[Tensor, list[int]]:
    """Read a picture, resize its short side to S = `side_px` and crop the centre.

    Returns pixels (3, S, S) in [-1, 1] and SDXL's six sizes (see `Framing.cut`). What was changed to make it a picture in RGB of
    this size is counted, or told without `counts`. Raises InputRefused if it is not readable.
    """
    try:
        image, kinds = decode(path.read_bytes())
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    except Refused as error:
        raise InputRefused(f"{path}: {error}") from error
    kinds = [*kinds, *([ENLARGED] if min(image.size) < side_px else [])]
    if counts is None:
        text_file.tell(str(path), kinds)
    else:
        counts.add(kinds, path.name)
    ((pixels, size),) = Framing(side_px).cut(image, "")
    return pixels / 127.5 - 1, size
