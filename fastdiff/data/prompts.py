"""Prompts from a file, or the shipped ones of a family."""

import random
import re
from functools import cache
from pathlib import Path

from fastdiff.checkpoints.family import Family
from fastdiff.data import emoji, held_out
from fastdiff.runtime import console, text_file
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import UsageError, as_field

PROMPTS = ASSETS / "prompts.txt"
COUNT = 8640  # prompts for `emoji`, some of them equal
COLOURS = list(emoji.BACKGROUNDS)
ON_BACKGROUND = emoji.CAPTION_WEIGHTS[0] + emoji.CAPTION_WEIGHTS[2]  # share of the captions that name a background


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a text file, one per line; blank lines and lines that start with # are skipped.

    Raises UsageError if the file does not exist, is no text in an encoding that can be recognised, or has no prompts.
    """
    path = path.expanduser()
    if not path.exists():
        raise UsageError(f"{as_field('prompts', path)}: no such file")
    if path.is_dir():
        raise UsageError(f"{as_field('prompts', path)}: is a folder", "give a text file of prompts, one per line")
    try:
        with path.open("rb") as file:
            data = file.read()
    except OSError as error:
        raise UsageError(f"{as_field('prompts', path)}: cannot be read ({error.strerror or error})") from error
    prompts = prompts_in(data, str(path))
    if not prompts:
        raise UsageError(f"{as_field('prompts', path)}: the file has no prompts (one per line)")
    return prompts


def prompts_in(data: bytes, name: str) -> list[str]:
    """Return the prompts of a text's bytes, one per line; blank lines and lines that start with # are skipped.

    What was guessed or changed is told, with the name of the file. Raises UsageError if it is no text.
    """
    try:
        text, kinds = text_file.decode(data)
    except text_file.NotText as error:
        raise UsageError(f"{as_field('prompts', name)}: {error}", "save the file as UTF-8") from error
    lines = [text_file.clean(line) for line in re.split("[\n\v\f\x85\u2028\u2029]", text)]
    text_file.tell(as_field("prompts", name), [*kinds, *(kind for _, changed in lines for kind in changed)])
    prompts = [line for line, _ in lines if line and not line.startswith("#")]
    if prompts and all(line.startswith("{") and line.endswith("}") and '"' in line for line in prompts):
        raise UsageError(f"{as_field('prompts', name)}: its lines are JSON, not prompts", "give the prompts alone, one per line")
    if doubtful := [line for line, _ in lines if re.match("#[^# ]", line)]:
        how = "begin with # and are left out as comments; a prompt must begin with another character"
        console.warn(f"{as_field('prompts', name)}: {len(doubtful)} of its lines, as {doubtful[0]!r}, {how}")
    return prompts


def default_prompts(family: Family) -> list[str]:
    """Return the shipped prompts; for a family with an embedded data set, `emoji_prompts`."""
    return read_prompts(PROMPTS) if family.data is None else list(emoji_prompts())


def training_prompts(family: Family, prompts: str | None) -> list[str]:
    """Return the prompts of a run: of a file, or the shipped ones of the family.

    Warns of prompts that name what is held out to judge students of the embedded checkpoint. Raises UsageError as `read_prompts`.
    """
    if prompts is None:
        return default_prompts(family)
    lines = read_prompts(Path(prompts))
    held_out.warn_of(family, lines, as_field("prompts", prompts))
    return lines


@cache
def emoji_prompts() -> tuple[str, ...]:
    """Return COUNT prompts for the teacher of the embedded checkpoint; they name nothing that is held out.

    A third names a picture ("red apple on blue"), a third a group ("fruit"), and a third puts words of two captions together
    ("hat fruit on pink"). No picture of such a compound exists, but the teacher draws it too. So a student sees how the teacher
    treats many more prompts (measured: examples/emoji/README.md).
    """
    draw = random.Random(0)
    return tuple(draw.choice((name_prompt, group_prompt, compound_prompt))(draw) for _ in range(COUNT))


@cache
def trained_places() -> list[tuple[int, int]]:
    """Return the picture number and background of each image that students may see."""
    return list(zip(*(column.tolist() for column in held_out.images(held_out.TRAINED)), strict=True))


@cache
def trained_groups() -> list[tuple[str, int]]:
    """Return every group with each background that students may see it on."""
    return sorted({(emoji.pictures()[picture].group, background) for picture, background in trained_places()})


def name_prompt(draw: random.Random) -> str:
    """The name of a picture, seven times in ten on a background."""
    picture, background = draw.choice(trained_places())
    return emoji.caption(picture, background if draw.random() < ON_BACKGROUND else None)


def group_prompt(draw: random.Random) -> str:
    """The name of a group, seven times in ten on a background; each pair of both is as frequent as the others."""
    group, background = draw.choice(trained_groups())
    return f"{group} on {COLOURS[background]}" if draw.random() < ON_BACKGROUND else group


def compound_prompt(draw: random.Random) -> str:
    """Up to four words from the names or groups of two pictures, mixed, and a background that both are trained on."""
    while True:
        pair = [emoji.pictures()[draw.choice(trained_places())[0]] for _ in range(2)]
        first, second = ((p.group if draw.random() < 0.5 else p.name).split() for p in pair)
        words = [word for part in (first, second) for word in draw.sample(part, draw.randint(1, len(part)))]
        draw.shuffle(words)
        mixed = list(dict.fromkeys(words))[:4]
        background = draw.randrange(len(COLOURS))
        line = f"{' '.join(mixed)} on {COLOURS[background]}"
        of_both = set(mixed) - set(first) and set(mixed) - set(second)
        trained = all((picture.name, background) not in held_out.subjects() for picture in pair)
        if of_both and trained and held_out.may_train(line, background):
            return line
