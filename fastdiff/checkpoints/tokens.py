"""The tokenizers of a checkpoint, and CLIP's vocabulary, which all families share and which ships with fastdiff."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.runtime.disk import ASSETS


def tokenizers(folder: Path, index: Mapping[str, Any]) -> list[Any]:
    """The tokenizers that model_index.json, `index`, names: the folder's own, or else CLIP's with the folder's settings."""
    from transformers import CLIPTokenizer

    made = []
    for part in names(index):
        home = folder / part
        if (home / "vocab.json").exists() or (home / "tokenizer.json").exists():
            made.append(CLIPTokenizer.from_pretrained(home, local_files_only=True))
        else:
            vocab, merges = clip_vocabulary()
            settings = json.loads((home / "tokenizer_config.json").read_text())
            settings.pop("tokenizer_class", None)
            # transformers annotates `merges` as strings and takes pairs too, as its tokenizer files have them.
            made.append(CLIPTokenizer(vocab=vocab, merges=merges, **settings))  # type: ignore[arg-type]
    return made


def names(index: Mapping[str, Any]) -> list[str]:
    """The names of the tokenizers: tokenizer, and for SDXL tokenizer_2 too."""
    return [part for part, row in index.items() if part.startswith("tokenizer") and row[1]]


def missing(folder: Path, index: Mapping[str, Any]) -> list[Path]:
    """The folders of tokenizers that have no file to make one of."""
    files = ("vocab.json", "tokenizer.json", "tokenizer_config.json")
    return [folder / part for part in names(index) if not any((folder / part / file).exists() for file in files)]


def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary (49,408 entries) and merges, out of the merges alone: their order is the numbering.

    Bytes in the order of the original code (printable ones first), the same at the end of a word, merges, the two marks.
    """
    import gzip

    text = gzip.decompress((ASSETS / "clip" / "merges.txt.gz").read_bytes()).decode()
    merges = [(a, b) for a, b in (line.split(" ") for line in text.splitlines())]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    words = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    return {word: i for i, word in enumerate(words)}, merges
