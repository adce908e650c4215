"""The tokenizers of a checkpoint, and CLIP's vocabulary, which all families share and which ships with fastdiff."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.checkpoints import configs
from fastdiff.checkpoints.supported import class_of
from fastdiff.runtime.disk import ASSETS
from fastdiff.runtime.errors import InputRefused


def tokenizers(folder: Path, index: Mapping[str, Any]) -> list[Any]:
    """The tokenizers that model_index.json, `index`, names: the folder's own, or else CLIP's with the folder's settings.

    InputRefused where the files of one are damaged.
    """
    from transformers import CLIPTokenizer

    made = []
    for part in names(index):
        home = folder / part
        settings = settings_of(home)
        with configs.building(home, "tokenizer"):
            if (home / "vocab.json").exists() or (home / "tokenizer.json").exists():
                made.append(CLIPTokenizer.from_pretrained(home, local_files_only=True))
            else:
                vocab, merges = clip_vocabulary()
                settings.pop("tokenizer_class", None)
                # transformers annotates `merges` as strings and takes pairs too, as its tokenizer files have them.
                made.append(CLIPTokenizer(vocab=vocab, merges=merges, **settings))  # type: ignore[arg-type]
    return made


def settings_of(home: Path) -> dict[str, Any]:
    """The content of a tokenizer's tokenizer_config.json; InputRefused where it is damaged, or says no length of a prompt."""
    path = home / "tokenizer_config.json"
    if not path.is_file():
        raise InputRefused(f"{path}: missing", configs.AGAIN)
    settings = configs.read(path)
    configs.check(settings, {"model_max_length": configs.WHOLE}, path, ("model_max_length",))
    encoder = home.with_name(home.name.replace("tokenizer", "text_encoder")) / "config.json"
    length, places = settings["model_max_length"], configs.read(encoder).get("max_position_embeddings")
    if isinstance(places, int) and length > places:
        raise InputRefused(f"{path}: model_max_length is {length}, and the text encoder takes {places} tokens", configs.AGAIN)
    return settings


def check(folder: Path, index: Mapping[str, Any]) -> None:
    """InputRefused where a tokenizer that model_index.json names has no files, or damaged ones. No tokenizer is made."""
    if gone := missing(folder, index):
        raise InputRefused(f"{gone[0]}: no tokenizer there")
    for part in names(index):
        settings_of(folder / part)
        for file in ("vocab.json", "tokenizer.json"):
            if (path := folder / part / file).is_file() and not configs.read(path):
                raise InputRefused(f"{path}: empty", configs.AGAIN)


def names(index: Mapping[str, Any]) -> list[str]:
    """The names of the tokenizers: tokenizer, and for SDXL tokenizer_2 too."""
    return [part for part in index if part.startswith("tokenizer") and class_of(index, part)]


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
