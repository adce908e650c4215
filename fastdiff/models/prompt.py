"""What a prompt says besides its words: weights, BREAK, LoRA tags; and the windows in which a text encoder reads it.

Training and sampling read prompts by the same rules. (words:1.3) moves the states of these words away from those of the empty
prompt, or with less than 1 towards them, as ComfyUI does. BREAK begins a new window. A tag like <lora:anime:0.8> is no text and
is left out. Brackets after a backslash, as in saber_\\(fate\\), are brackets. All else is text, also (word) and [word], which
other programs read as weights: names and tags have such brackets too.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fastdiff.checkpoints.text_reading import WINDOW
from fastdiff.runtime import console, text_file

RULES = 1  # of reading prompts; another number wherever a text is read otherwise than before, so that cached states are not
WHOLE = 8  # parts of fewer tokens are not divided between two windows
MOST_WEIGHT = 10.0  # (16:90) is no weight
LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
BREAK = re.compile(r"[\s,]*(?<![^\s,])BREAK(?![^\s,])[\s,]*")
WEIGHT = re.compile(r":\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*$")
WIDE_BRACKETS = re.compile(r"（[^（）]*[：:][^（）]*）")  # as Chinese and Japanese keyboards type them
ESCAPED = re.compile(r"\\([()\[\]])")
UNREAD = {  # kind -> what looks like it
    "square": re.compile(r"(?<!\\)\[[^\[\]]*\]"),
    "and": re.compile(r"\sAND\s"),
    "embedding": re.compile(r"\bembedding:\S"),
    "wildcard": re.compile(r"__[\w/*-]+__|\{[^{}]*\|[^{}]*\}"),
}


@dataclass(frozen=True)
class Part:
    """Words of a prompt that have one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True)
class Prompt:
    """A prompt, read. `kinds` names what it has besides words: keys of `TOLD`."""

    sections: tuple[tuple[Part, ...], ...]  # at least one; each begins a new window
    kinds: frozenset[str] = frozenset()

    @property
    def parts(self) -> list[Part]:
        """The parts of all sections."""
        return [part for section in self.sections for part in section]

    @property
    def plain(self) -> bool:
        """Whether it is nothing but words, in one section."""
        return len(self.parts) == 1 and not self.weighs and not self.kinds & {"cleaned", "lora", "break"}

    @property
    def weighs(self) -> bool:
        """Whether some words have a weight other than 1."""
        return any(part.weight != 1 for part in self.parts)


def parse(text: str) -> Prompt:
    """Read a prompt by the rules of this module. Every text is a prompt: what is no rule of it is words."""
    text, changes = text_file.clean(text)
    kinds = {kind for kind, looks in UNREAD.items() if looks.search(text)} | ({"cleaned"} if changes else set())
    words = " ".join(LORA.sub("", text).split())
    if LORA.search(text):
        kinds.add("lora")
    parts, bare = weighted(words)
    if bare or WIDE_BRACKETS.search(words):
        kinds.add("bare")
    sections: list[list[Part]] = [[]]
    for part in parts:
        first, *others = BREAK.split(part.text)
        sections[-1].append(Part(first, part.weight))
        sections += [[Part(piece, part.weight)] for piece in others]
    if len(sections) > 1:
        kinds.add("break")
    full = [tuple(part for part in section if part.text) for section in sections if any(part.text.strip() for part in section)]
    prompt = Prompt(tuple(full) or ((Part(""),),))
    if prompt.weighs:
        kinds.add("weight")
    return Prompt(prompt.sections, frozenset(kinds))


def weighted(text: str) -> tuple[list[Part], bool]:
    """The parts of a text by weight, and whether it has round brackets that give none. Weights in weights multiply."""
    opened: list[int] = []
    opening: dict[int, float] = {}  # place of a bracket -> the weight of what is in it
    closing: dict[int, int] = {}  # place of the colon before a weight -> that after its bracket
    bare, escaped = False, {match.start() + 1 for match in ESCAPED.finditer(text)}
    for i, symbol in enumerate(text):
        if i in escaped or symbol not in "()":
            continue
        if symbol == "(":
            opened.append(i)
        elif opened:
            start = opened.pop()
            found = WEIGHT.search(text, start + 1, i)
            words = text[start + 1 : found.start()] if found else ""
            if found and re.search(r"[^\W\d_]", words) and abs(float(found[1])) <= MOST_WEIGHT:
                opening[start], closing[found.start()] = float(found[1]), i + 1
            else:
                bare = True
    parts, weights, begin, i = [], [1.0], 0, 0

    def end(at: int) -> None:
        if words := ESCAPED.sub(r"\1", text[begin:at]):
            parts.append(Part(words, weights[-1]))

    while i < len(text):
        if i in opening:
            end(i)
            weights.append(weights[-1] * opening[i])
            begin = i = i + 1
        elif i in closing:
            end(i)
            weights.pop()
            begin = i = closing[i]
        else:
            i += 1
    end(len(text))
    return parts or [Part("")], bare or bool(opened)


# ---- windows


class Tokens(Protocol):
    """A tokenizer: ids of words, and the marks around them."""

    length: int  # tokens that its text encoder reads at once, marks included
    start: int
    end: int
    pad: int

    def ids(self, texts: Sequence[str]) -> list[list[int]]: ...  # without marks, not cut
    def words(self, ids: Sequence[int]) -> str: ...


Weighted = list[tuple[int, float]]  # token ids with their weights


@dataclass(frozen=True)
class Windows:
    """The tokens of a prompt, in windows of a text encoder."""

    windows: tuple[Weighted, ...]  # at least one, each of at most `Tokens.length - 2` tokens
    left_out: tuple[int, ...] = ()  # ids for which there was no more room

    @cached_property
    def tokens(self) -> int:
        """How many tokens the prompt has, those that are left out too."""
        return sum(map(len, self.windows)) + len(self.left_out)


def windows_of(prompts: Sequence[Prompt], tokens: Tokens, max_tokens: int) -> list[Windows]:
    """Split each prompt into windows, in which a text encoder reads it one after the other; the rest is left out.

    A window is full before the next begins, but a weighted part of a few tokens is not divided, both as in ComfyUI.
    `max_tokens` is a multiple of WINDOW: so many windows there are at most, also of a text encoder with shorter ones.
    """
    texts = [part.text for prompt in prompts for part in prompt.parts]
    known = dict(zip(texts, tokens.ids(texts), strict=True)) if texts else {}
    size, most, made = tokens.length - 2, max(1, max_tokens // WINDOW), []
    for prompt in prompts:
        windows = [window for section in prompt.sections for window in section_windows(section, known, size)]
        rest = tuple(i for window in windows[most:] for i, _ in window)
        made.append(Windows(tuple(windows[:most] or [[]]), rest))
    return made


def section_windows(section: Sequence[Part], known: Mapping[str, list[int]], size: int) -> list[Weighted]:
    """The windows of at most `size` tokens of one section; `known` has the token ids of its parts' texts."""
    windows: list[Weighted] = [[]]
    for part in section:
        ids = [(i, part.weight) for i in known[part.text]]
        divides = len(ids) >= WHOLE or len(ids) > size
        while ids:
            room = size - len(windows[-1])
            taken = len(ids) if len(ids) <= room else room if divides else 0
            windows[-1] += ids[:taken]
            ids = ids[taken:]
            if ids:
                windows.append([])
    return windows


# ---- what is told of prompts

TOLD: Mapping[str, str] = {
    "cleaned": "hold U+FFFD, control or invisible characters, which are left out",
    "lora": "name LoRAs, as <lora:anime:0.8>: that is no text and is left out, and no LoRA is loaded by it",
    "weight": "weigh words, as (word:1.3): the weights are obeyed",
    "break": "have BREAK: what follows begins a new window of the text encoder",
    "bare": "have brackets that are read as text, as (word) and (10:30); (word:1.1) weighs a word, by at most 10",
    "square": "have square brackets: [word] and [one:other:0.5] are read as text",
    "and": "have AND: it is read as text",
    "embedding": "name embeddings, as embedding:name: none is loaded, and the name is read as text",
    "wildcard": "have wildcards, as __name__ or {one|other}: they are read as text",
}
WARNED = {"cleaned", "lora", "embedding", "wildcard"}  # what the user wanted does not happen


def tell(lines: Iterable[str], tokens: Tokens, max_tokens: int, source: str, what: str = "prompts") -> None:
    """Say how many of the prompts `lines` are cut, split into windows or have more than words: one line for each kind.

    `source` is the field that they come from, as `as_field` writes it.
    """
    unique = list(dict.fromkeys(lines))
    prompts = [parse(line) for line in unique]
    for kind, text in TOLD.items():
        if found := [line for line, prompt in zip(unique, prompts, strict=True) if kind in prompt.kinds]:
            say = console.warn if kind in WARNED else console.note
            say(f"{source}: {len(found)} of {len(unique)} {what} {text}; the first: {shortened(found[0])}")
    windows = windows_of(prompts, tokens, max_tokens)
    if cut := [w for w in windows if w.left_out]:
        rest = shortened(tokens.words(cut[0].left_out))
        room = f"{max(1, max_tokens // WINDOW)} window{'s' * (max_tokens > WINDOW)} of {tokens.length - 2} tokens"
        console.warn(
            f"{source}: {len(cut)} of {len(unique)} {what} do not fit into {room}, and the rest is left out "
            f"(`max_tokens={max_tokens}`); of the first, which has {cut[0].tokens} tokens: {rest}"
        )
    if long := sum(len(w.windows) > 1 for w in windows):
        console.note(f"{source}: {long} of {len(unique)} {what} are read in several windows of {tokens.length - 2} tokens")


def shortened(text: str, most: int = 80) -> str:
    """A text in quotes, of at most `most` characters."""
    return repr(text if len(text) <= most else text[: most - 3] + "...")
