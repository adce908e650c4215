"""What no student of the embedded checkpoint may be trained on, so that it can be judged by what it never saw.

Three tenths of the images are held out: three whole groups, and every other group on two backgrounds. All that gives training
items asks this file: the pictures, the shipped prompts, the teacher's samples, and the warning about a user's own captions and
prompts. A user's own pictures are not looked at. A "subject" is the name or the group of a picture: "red apple" or "fruit".
"""

import re
from collections.abc import Iterable
from functools import cache
from itertools import product

import torch
from torch import Tensor

from fastdiff.checkpoints.family import Family
from fastdiff.data import emoji
from fastdiff.data.emoji import BACKGROUNDS
from fastdiff.runtime import console

TRAINED, JUDGED, SEARCHED = 0, 1, 2  # parts: for training, for judging, and for the search of the best undistilled sampler
GROUPS = {"bug": JUDGED, "ball": JUDGED, "drink": SEARCHED}  # held out on every background


@cache
def part() -> Tensor:
    """Return the part of every image: TRAINED, JUDGED or SEARCHED, (pictures, backgrounds)."""
    groups, k = sorted({p.group for p in emoji.pictures()}), len(BACKGROUNDS)
    rows = []
    for picture in emoji.pictures():
        i, row = groups.index(picture.group), [GROUPS.get(picture.group, TRAINED)] * k
        if picture.group not in GROUPS:
            row[(2 * i + 1) % k], row[(2 * i + 5) % k] = JUDGED, SEARCHED
        rows.append(row)
    return torch.tensor(rows)


def images(which: int) -> tuple[Tensor, Tensor]:
    """Return the images of a part, such as TRAINED: picture numbers (N,) and backgrounds (N,)."""
    picture, background = (part() == which).nonzero(as_tuple=True)
    return picture, background


@cache
def captions() -> dict[str, int]:
    """Return {caption: JUDGED or SEARCHED} of all captions that no trained image has."""
    part_of: dict[str, int] = {}
    trained = set[str]()
    for p, b in product(range(len(emoji.pictures())), range(len(BACKGROUNDS))):
        which = int(part()[p, b])
        for line in emoji.captions_of(p, b):
            if which == TRAINED:
                trained.add(line)
            else:
                part_of.setdefault(line, which)
    return {line: which for line, which in part_of.items() if line not in trained}


@cache
def subjects() -> frozenset[tuple[str, int]]:
    """Return all (subject, background) that are held out: a name on it, or a group of which all pictures are held out on it."""
    held: dict[tuple[str, int], bool] = {}
    for (p, picture), b in product(enumerate(emoji.pictures()), range(len(BACKGROUNDS))):
        held[picture.name, b] = bool(part()[p, b] != TRAINED)
    for picture, b in product(emoji.pictures(), range(len(BACKGROUNDS))):
        held[picture.group, b] = held.get((picture.group, b), True) and held[picture.name, b]
    return frozenset(key for key, is_held in held.items() if is_held)


PLURALS = ((r"ies$", "y"), (r"(ss|sh|ch|x)es$", r"\1"), (r"(?<!s)s$", ""))  # only the first that fits is applied


def words(text: str) -> frozenset[str]:
    """Return the words of a text, lower case and singular: "Ants, wine-glasses, cherries" has ant, wine, glass and cherry."""
    return frozenset(map(singular, re.findall(r"[a-z]+", text.lower())))


def singular(word: str) -> str:
    """Return a word without the ending of an English plural."""
    return next((new for ending, to in PLURALS if (new := re.sub(ending, to, word)) != word), word)


@cache
def words_on(background: int) -> frozenset[frozenset[str]]:
    """Return the words of each subject that is held out on a background."""
    return frozenset(words(subject) for subject, b in subjects() if b == background)


def may_train(line: str, background: int) -> bool:
    """Whether a student may be trained on a sample of a prompt that shows this background.

    A prompt that is no caption must not have all words of a subject that is held out on that background.
    """
    subject, _ = emoji.subject_and_background(line)
    if subject in emoji.known_names():
        return (subject, background) not in subjects()
    return not any(words(subject) >= held for held in words_on(background))


def names_held_out(line: str) -> bool:
    """Whether a prompt names what is held out: on the background that it names, or on all backgrounds if it names none."""
    _, background = emoji.subject_and_background(line)
    return not any(may_train(line, b) for b in (range(len(BACKGROUNDS)) if background is None else [background]))


def warn_of(family: Family, lines: Iterable[str], source: str) -> None:
    """Warn of a user's captions or prompts that name what is held out to judge students of the embedded checkpoint."""
    held = set(filter(names_held_out, lines)) if family.judge_ships else set()
    if held:
        console.warn(
            f"{source}: {len(held)} of its lines, as {min(held)!r}, name what no student should be trained on; the figures of "
            "unseen prompts will flatter this one"
        )
