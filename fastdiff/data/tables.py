"""Tables of captions: metadata.jsonl and metadata.csv, a row for each picture with its file_name."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from fastdiff.data.images import CAPTIONS, Caption
from fastdiff.runtime import text_file
from fastdiff.runtime.counts import Counts, Kind
from fastdiff.runtime.errors import InputRefused, UsageError, as_field
from fastdiff.runtime.picture_file import suffixes

NAME = "file_name"
DELIMITERS = ",;\t"

NOT_CLOSED = "a quote is opened and not closed"
WORDED = {"unexpected end of data": NOT_CLOSED}  # what csv says -> what it means

OUTSIDE = Kind("table row", "names a file outside of the folder, not used")
BACKSLASHES = Kind("table row", "backslashes in its file name, taken for folders", warns=False)
AGAIN = Kind("table row", "a second row of the same file; the last one is used")
LONGER = Kind("table row", "more fields than the header; the rest was taken for the end of the caption (put it in quotes)")


def read(path: Path, column: str | None, counts: Counts, columns: set[str]) -> dict[str, Caption]:
    """Read the captions of a table by the name of the picture, relative to the table's folder, with / between folders.

    `column` is the column or key of the caption (default: the first of CAPTIONS). The table's columns or keys are added to
    `columns`. Raises InputRefused with the number of an
    invalid line, and UsageError if a column is missing.
    """
    try:
        text, kinds = text_file.read(path)
    except text_file.NotText as error:
        raise InputRefused(f"{path}: {error}", "save it as UTF-8") from error
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error
    text_file.tell(str(path), kinds)
    captions: dict[str, Caption] = {}
    rows = of_csv if path.suffix.lower() == ".csv" else of_jsonl
    for number, row in rows(path, text, column, counts):
        place = f"{path.name} line {number}"
        columns.update(row)
        name = within(path.parent, str(row[NAME]), place, counts)
        if name is None:
            continue
        if name in captions:
            counts.add(AGAIN, place)
        captions[name] = Caption.of_row(row, column)
    return captions


def within(folder: Path, name: str, place: str, counts: Counts) -> str | None:
    """Return a file name of a table relative to its folder, with / between folders; None if the file is elsewhere."""
    if "\\" in name and not (folder / name).exists():
        counts.add(BACKSLASHES, place)
        name = PureWindowsPath(name).as_posix()
    if PureWindowsPath(name).drive and not (folder / name).exists():
        counts.add(OUTSIDE, place)
        return None
    root = folder.absolute()
    parts: list[str] = []
    for part in (root / name).parts:
        if part == "..":
            del parts[-1:]
        else:
            parts.append(part)
    try:
        return Path(*parts).relative_to(root).as_posix()
    except ValueError:
        pass
    try:  # an absolute path that reaches the folder by a link
        return Path(*parts).resolve().relative_to(folder.resolve()).as_posix()
    except (ValueError, OSError):
        counts.add(OUTSIDE, place)
        return None


def of_jsonl(path: Path, text: str, column: str | None, counts: Counts) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and object of each line of metadata.jsonl."""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines, which also parts at characters within texts
        if not line.strip("\ufeff \t"):
            continue
        try:
            row = json.loads(line.strip("\ufeff"))
            if not isinstance(row[NAME], str) or not row[NAME]:
                raise TypeError(NAME)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            hint = f'each line is {{"{NAME}": ..., "{column or CAPTIONS[0]}": ...}}'
            raise InputRefused(f"{path}: line {number} is not a JSON object with a {NAME}", hint) from error
        yield number, row


def of_csv(path: Path, text: str, column: str | None, counts: Counts) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and row of each line of metadata.csv, whose fields are parted by commas, semicolons or tabs."""
    first, _, rest = text.partition("\n")
    skipped = first.lower().startswith("sep=")  # Excel's own line
    if skipped:
        first = rest.partition("\n")[0]
        text = rest
    delimiter = max(DELIMITERS, key=first.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    number = 1 + skipped
    try:
        header = in_our_case([name.strip() for name in next(lines, [])], column)
        place, files = check(path, header, column), header.index(NAME)
        while True:
            number = lines.line_num + skipped + 1  # where the row begins
            fields = next(lines, None)
            if fields is None:
                return
            if any(holds_a_row(field, delimiter, files) for field in fields):
                raise csv.Error(NOT_CLOSED)
            if not any(field.strip() for field in fields):
                continue
            if len(fields) > len(header):
                if place != len(header) - 1:
                    what = f"line {number} has {len(fields)} fields, and the header {len(header)}"
                    raise InputRefused(f"{path}: {what}", "put captions in quotes")
                counts.add(LONGER, f"{path.name} line {number}")
                joined = (delimiter + " " * (delimiter != "\t")).join(fields[place:])
                fields = [*fields[:place], joined]
            row = dict(zip(header, fields, strict=False))
            if not row.get(NAME):
                raise InputRefused(f"{path}: line {number} has no {NAME}")
            yield number, row
    except csv.Error as error:
        what = WORDED.get(str(error), str(error))
        what = "there is text behind a closing quote" if "expected after" in what else what
        hint = "a caption that holds a quote is put in quotes, and the quote in it is doubled"
        raise InputRefused(f"{path}: line {number}: {what}", hint) from error


def holds_a_row(field: str, delimiter: str, place: int) -> bool:
    """Return whether a later line of a field of several lines has a picture's name in the `place` of one: rows were swallowed."""
    if "\n" not in field:
        return False
    rows = (line.split(delimiter) for line in field.split("\n")[1:])
    return any(len(row) > max(place, 1) and row[place].strip(' "').lower().endswith(suffixes()) for row in rows)


def in_our_case(header: list[str], column: str | None) -> list[str]:
    """Return a header in which the names that we look for are in our case: File_Name becomes file_name."""
    for wanted in (NAME, *([column] if column else CAPTIONS)):
        others = [i for i, name in enumerate(header) if name.casefold() == wanted.casefold()]
        if wanted not in header and len(others) == 1:
            header[others[0]] = wanted
    return header


def check(path: Path, header: list[str], column: str | None) -> int:
    """Return the place of the caption in a CSV header. Raises UsageError if a column is missing."""
    if NAME not in header:
        hint = f"its first line must be like {NAME},{column or CAPTIONS[0]}"
        raise InputRefused(f"{path}: the first line names no column {NAME}; it has {', '.join(header) or 'nothing'}", hint)
    wanted = [column] if column else [key for key in CAPTIONS if key in header]
    if not wanted or wanted[0] not in header:
        missing = as_field("caption_column", column) if column else f"column {', '.join(CAPTIONS)}"
        hint = "name the column of the captions with `caption_column`"
        raise UsageError(f"{path}: the first line has no {missing}; it has {', '.join(header)}", hint)
    return header.index(wanted[0])
