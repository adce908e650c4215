"""Sheets: pictures in rows and columns with labels, small enough for a screen, and the same in full size where that is larger."""

import math
import re
import unicodedata
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from fastdiff.sampling import engine

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

# The width of a picture on a sheet, and about the width of a whole one. Smaller pictures are enlarged, larger ones are reduced.
LEAST_PX, MOST_PX, SHEET_PX = 128, 320, 1600
FULL_MEGAPIXELS = 170  # a larger full-size sheet is not written: Pillow refuses to open it, and viewers struggle
FULL = "-full"  # the end of the file name of a full-size sheet
INK, PALE = (31, 35, 40), (101, 109, 118)
LINE = 1.3  # the height of a line, in units of the font's size
INSTEAD = {"—": "-", "–": "-", "−": "-", "×": "x", "→": "->", "ß": "ss", "æ": "ae", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L"}


def in_calls(model: str, calls: int) -> str:
    """Return the label of a column: the model, and under it its number of network calls."""
    return f"{model}\n{calls} network call{'s' if calls != 1 else ''}"


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures of one size, row by row, with a label above every column, left of every row and below every picture.

    An empty label leaves its place empty, and without any labels of a kind no room is left for them. Labels of columns may have
    line breaks; what is before the first one is darker than the rest.
    """

    pictures: Sequence["Image.Image"]
    columns: Sequence[str]  # a label for each column, so their number is the width of the sheet in pictures
    rows: Sequence[str] = ()
    captions: Sequence[str] = ()

    @classmethod
    def of_columns(cls, columns: Sequence[tuple[str, Tensor]], rows: Sequence[str] = ()) -> "Sheet":
        """Make a sheet of (label, stack of images (N, 3, H, W) in [-1, 1]), a column per stack, and the labels of the N rows."""
        from PIL import Image

        stacks = [[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in engine.to_bytes(stack)] for _, stack in columns]
        return cls([image for row in zip(*stacks, strict=True) for image in row], [label for label, _ in columns], rows)

    @property
    def tile_px(self) -> int:
        """The width of a picture on the sheet that fits a screen."""
        width = self.pictures[0].width
        if width <= LEAST_PX:
            return width * (LEAST_PX // width)
        room = SHEET_PX - (Layout.ROW_LABEL * font_px(MOST_PX) if any(self.rows) else 0)
        return min(width, MOST_PX, max(LEAST_PX, room // len(self.columns) - Layout.GAP_PX))

    @property
    def is_reduced(self) -> bool:
        """Whether the pictures are smaller on the sheet than they are."""
        return self.tile_px < self.pictures[0].width

    def image(self, *, full: bool = False) -> "Image.Image":
        """Draw the sheet, or with `full` the same sheet with the pictures in their own size."""
        return Layout(self, self.pictures[0].width / self.tile_px if full else 1.0).drawn()

    def paths(self, path: Path) -> list[Path]:
        """Return the files that `save` writes: `path`, and for a reduced sheet the full one beside it, NAME-full."""
        full = self.is_reduced and math.prod(Layout(self, self.pictures[0].width / self.tile_px).size) <= FULL_MEGAPIXELS * 1e6
        return [path, path.with_name(f"{path.stem}{FULL}{path.suffix}")] if full else [path]

    def save(self, path: Path) -> list[Path]:
        """Write the sheet, and where its pictures are reduced also the full one. Returns the written paths, `path` first."""
        paths = self.paths(path)
        for i, file in enumerate(paths):
            self.image(full=i > 0).save(file)
        return paths


class Layout:
    """Where everything on a sheet lies, in pixels. All measures grow by `factor`."""

    GAP_PX, MARGIN_PX = 4, 8
    ROW_LABEL = 11  # the greatest width of a row's label, in units of the font's size
    COLUMN_LINES, CAPTION_LINES = 5, 3  # the greatest number of lines of a label

    def __init__(self, sheet: Sheet, factor: float) -> None:
        self.sheet = sheet
        first, width = sheet.pictures[0], sheet.tile_px * factor
        self.tile = round(width), round(first.height * width / first.width)
        self.font = font_of(round(font_px(sheet.tile_px) * factor))
        self.gap, self.margin = round(self.GAP_PX * factor), round(self.MARGIN_PX * factor)
        self.line = round(LINE * self.font.size)
        in_row = self.fitted(sheet.rows, int(self.ROW_LABEL * self.font.size), self.tile[1] // self.line)
        self.rows, self.columns = in_row, self.fitted(sheet.columns, self.tile[0], self.COLUMN_LINES)
        self.heads = self.fitted([label.partition("\n")[0] for label in sheet.columns], self.tile[0], self.COLUMN_LINES)
        self.captions = self.fitted(sheet.captions, self.tile[0], self.CAPTION_LINES)

    def fitted(self, labels: Sequence[str], width_px: int, most: int) -> list[list[str]]:
        """Break labels into lines. One in letters that the font has not becomes its number."""
        readable = [legible(label) or (f"#{i + 1}" if label.strip() else "") for i, label in enumerate(labels)]
        return [wrapped(label, self.font, width_px, most) for label in readable]

    def height_of(self, labels: list[list[str]]) -> int:
        """Return the height of the longest label, with some room between it and the pictures."""
        lines = max(map(len, labels), default=0)
        return lines * self.line + self.gap if lines else 0

    @cached_property
    def corner(self) -> tuple[int, int]:
        """The upper left corner of the first picture."""
        widths = [math.ceil(self.font.getlength(line)) for lines in self.rows for line in lines]
        left = max(widths) + 2 * self.margin if widths else self.margin
        return left, self.margin + self.height_of(self.columns)

    @property
    def pitch(self) -> tuple[int, int]:
        """The distances from one picture to the next in its row and in its column."""
        captions = self.height_of(self.captions) + self.gap if any(self.captions) else 0
        return self.tile[0] + self.gap, self.tile[1] + self.gap + captions

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of the sheet."""
        columns = len(self.sheet.columns)
        counts = columns, math.ceil(len(self.sheet.pictures) / columns)
        x, y = (start + n * step - self.gap for start, n, step in zip(self.corner, counts, self.pitch, strict=True))
        return x + self.margin, y + self.margin

    def drawn(self) -> "Image.Image":
        """Draw the sheet."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", self.size, "white")
        draw = ImageDraw.Draw(image)
        (left, top), (right, down), (width, height) = self.corner, self.pitch, self.tile
        for i, lines in enumerate(self.columns):
            x, y = left + i * right + width // 2, top - self.gap - len(lines) * self.line
            n = len(self.heads[i])
            self.write(draw, lines[:n], (x, y), "ma", INK)
            self.write(draw, lines[n:], (x, y + n * self.line), "ma", PALE)
        for i, lines in enumerate(self.rows):
            self.write(draw, lines, (self.margin, top + i * down + (height - len(lines) * self.line) // 2), "la", INK)
        for i, picture in enumerate(self.sheet.pictures):
            row, column = divmod(i, len(self.columns))
            x, y = left + column * right, top + row * down
            tile = picture if picture.size == self.tile else picture.resize(self.tile, Image.Resampling.LANCZOS)
            image.paste(tile, (x, y))
            for lines in self.captions[i : i + 1]:
                self.write(draw, lines, (x + width // 2, y + height + self.gap // 2), "ma", INK)
        return image

    def write(
        self, draw: "ImageDraw", lines: Sequence[str], at: tuple[int, int], anchor: str, colour: tuple[int, int, int]
    ) -> None:
        """Write lines of text below each other; the first one lies below `at`."""
        for i, line in enumerate(lines):
            draw.text((at[0], at[1] + i * self.line), line, fill=colour, font=self.font, anchor=anchor)


def font_px(tile_px: int) -> int:
    """Return the size of the labels' font on a sheet with pictures of that width."""
    return max(13, tile_px // 18)


@cache
def font_of(size_px: int) -> "FreeTypeFont":
    """Return Pillow's own font, which needs no file."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


@cache
def has_glyph(letter: str) -> bool:
    """Whether the font has a glyph for a letter; all others look like a code point that is none."""
    font = font_of(13)
    return bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


def legible(text: str) -> str:
    """Return text in the letters that the font has: without accents, and with "..." for what it cannot draw.

    Spaces are made single; line breaks stay. Empty where nothing of the text can be drawn.
    """
    letters = []
    for letter in unicodedata.normalize("NFC", text):
        plain = INSTEAD.get(letter) or "".join(c for c in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(c))
        if letter.isspace() or has_glyph(letter):
            letters.append(letter)
        elif unicodedata.category(letter) not in ("Cc", "Cf", "Mn", "Me"):  # invisible ones, such as joiners of emoji
            letters.append(plain if plain and all(map(has_glyph, plain)) else "…")
    lines = [" ".join(line.split()) for line in "".join(letters).split("\n")]
    joined = "\n".join(re.sub(r"…(\s*…)+", "…", line) for line in lines).strip()
    return joined if joined.strip("… \n") else ""


def wrapped(text: str, font: "FreeTypeFont", width_px: int, most: int) -> list[str]:
    """Break text into at most so many lines of at most that width; words that are wider are broken too.

    Where that is too few, the last line ends with an ellipsis.
    """
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width_px:
                line = f"{line} {word}"
                continue
            lines += [line] if line else []
            line = word
            while len(lines) <= most and len(line) > 1 and font.getlength(line) > width_px:
                fits = bisect_left(range(1, len(line)), True, key=lambda n: font.getlength(line[:n]) > width_px)
                lines, line = [*lines, line[: max(1, fits)]], line[max(1, fits) :]
        lines += [line] if line else []
        if len(lines) > most:
            break
    if len(lines) > most:
        last = lines[max(0, most - 1)]
        while last and font.getlength(f"{last}…") > width_px:
            last = last.rpartition(" ")[0] if " " in last else last[:-1]
        lines = [*lines[: max(0, most - 1)], f"{last.rstrip(' ,.;:')}…"]
    return lines
