"""Prompts from a file, or the shipped ones of a family."""

import random
from functools import cache
from pathlib import Path

from fastdiff.checkpoints.family import Family
from fastdiff.data import emoji
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import UsageError, as_field

PROMPTS = ASSETS / "prompts.txt"
COLOURS = list(emoji.BACKGROUNDS)
ON_BACKGROUND = 0.7  # share of the captions that name a background, as the teacher was trained


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a file, one per line; blank lines and lines that start with # are skipped.

    Raises UsageError if the file does not exist or has no prompts.
    """
    if not path.exists():
        raise UsageError(f"{as_field('prompts', path)}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{as_field('prompts', path)}: the file has no prompts (one per line)")
    return prompts


def default_prompts(family: Family) -> list[str]:
    """Return the shipped prompts; for a family with an embedded data set, `emoji_prompts`."""
    return read_prompts(PROMPTS) if family.data is None else emoji_prompts()


def emoji_prompts(n: int = 8640, seed: int = 0) -> list[str]:
    """Return `n` prompts for the teacher of the embedded checkpoint; none is among the captions that are kept from training.

    A third names a picture ("red apple on blue"), a third a group ("fruit"), and a third puts words of two captions together
    ("hat fruit on pink"). Nobody drew pictures of these compounds, but the teacher answers them too. A student that learned the
    answers draws more of what it was never trained on.
    """
    rng, kept, lines = random.Random(seed), emoji.kept_captions(), list[str]()
    while len(lines) < n:
        kind = rng.random()
        line = (named if kind < 0.33 else grouped if kind < 0.66 else compound)(rng)
        if line not in kept:
            lines.append(line)
    return lines


@cache
def trained() -> tuple[list[int], list[int], list[tuple[str, int]]]:
    """Return what students may see: picture numbers and backgrounds of all images, and all (group, background)."""
    picture, background = (column.tolist() for column in emoji.trained_items())
    places = {(emoji.pictures()[p].group, b) for p, b in zip(picture, background, strict=True)}
    return picture, background, sorted(places)


def named(rng: random.Random) -> str:
    """A caption with the name of a picture, seven times in ten on a background."""
    picture, background, _ = trained()
    k = rng.randrange(len(picture))
    return emoji.caption(picture[k], background[k] if rng.random() < ON_BACKGROUND else None)


def grouped(rng: random.Random) -> str:
    """A caption with the name of a group, seven times in ten on a background; each pair of both is as frequent as the others."""
    name, background = rng.choice(trained()[2])
    return f"{name} on {COLOURS[background]}" if rng.random() < ON_BACKGROUND else name


def compound(rng: random.Random) -> str:
    """Up to four words of two names or groups, in any order, on a background that neither picture is kept on."""
    pair = [rng.choice(trained()[0]) for _ in range(2)]
    parts = [emoji.caption(picture, None, coarse=rng.random() >= 0.5).split() for picture in pair]
    free = [b for b in range(len(COLOURS)) if all(emoji.part()[picture, b] == emoji.TRAINED for picture in pair)]
    if not free:
        return compound(rng)
    words = [word for own in parts for word in rng.sample(own, rng.randint(1, len(own)))]
    rng.shuffle(words)
    return f"{' '.join(words[:4])} on {COLOURS[rng.choice(free)]}"
