"""Write training prompts for the embedded checkpoint, one a line: its captions, and compounds of their words.

    python examples/emoji/prompts.py 8640 > prompts.txt
    fastdiff dmd --prompts prompts.txt --pairs 8640

A third name a picture ("red apple on blue"), a third a group ("fruit"), and a third put words of two captions together
("hat fruit on pink"). Nobody drew pictures of compounds, but the teacher answers them too. A student that learned these answers
draws more of what it was never trained on. No prompt that students are judged by is in the list, and a compound is on a background
that neither of its two pictures is kept on.
"""

import argparse
import random

from fastdiff.data import emoji

COLOURS = list(emoji.BACKGROUNDS)
PICTURE, BACKGROUND = (column.tolist() for column in emoji.trained_items())
GROUPS = sorted({(emoji.pictures()[p].group, b) for p, b in zip(PICTURE, BACKGROUND, strict=True)})
ON_BACKGROUND = 0.7  # share of the captions that name one


def named(rng: random.Random) -> str:
    """The name of a picture."""
    k = rng.randrange(len(PICTURE))
    return emoji.caption(PICTURE[k], BACKGROUND[k] if rng.random() < ON_BACKGROUND else None)


def group(rng: random.Random) -> str:
    """The name of a group, each group and background as often as the others."""
    name, background = rng.choice(GROUPS)
    return f"{name} on {COLOURS[background]}" if rng.random() < ON_BACKGROUND else name


def compound(rng: random.Random) -> str:
    """Up to four words of two names or groups, in any order."""
    pair = [rng.choice(PICTURE) for _ in range(2)]
    parts = [emoji.caption(picture, None, coarse=rng.random() >= 0.5).split() for picture in pair]
    free = [b for b in range(len(COLOURS)) if all(emoji.part()[picture, b] == emoji.TRAINED for picture in pair)]
    if not free:
        return compound(rng)
    words = [word for own in parts for word in rng.sample(own, rng.randint(1, len(own)))]
    rng.shuffle(words)
    return f"{' '.join(words[:4])} on {COLOURS[rng.choice(free)]}"


def prompts(n: int, seed: int = 0) -> list[str]:
    """Return `n` prompts, none of them among the captions that are kept from training."""
    rng, kept, lines = random.Random(seed), emoji.kept_captions(), list[str]()
    while len(lines) < n:
        kind = rng.random()
        line = (named if kind < 0.33 else group if kind < 0.66 else compound)(rng)
        if line not in kept:
            lines.append(line)
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="number of prompts")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("\n".join(prompts(arguments.n, arguments.seed)))
