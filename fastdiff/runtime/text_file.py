"""Text that people wrote, in whatever encoding their editor chose: captions, prompts, tables and configs.

UTF-8, UTF-16 and UTF-32 are recognised for certain. Windows-1252, which old Windows programs write in Western Europe and
America, is recognised where every line reads as a Western language. Other encodings cannot be told apart safely: refused.

What no rule can find: a text of one or two letters in another encoding whose bytes are words in UTF-8 or Windows-1252 (夜 in
Shift-JIS is –é), UTF-16 without a mark whose bytes all read as ASCII and that has no kana, and one letter in UTF-7.
"""

import codecs
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastdiff.runtime import console
from fastdiff.runtime.counts import Kind

WESTERN = Kind("text", "not UTF-8, read as Windows-1252 (save it as UTF-8 to be sure)")
WIDE = Kind("text", "UTF-16 or UTF-32, read so", warns=False)
CONTROLS = Kind("text", "control characters were left out")
INVISIBLE = Kind("text", "invisible characters (byte-order marks, zero-width spaces) were left out", warns=False)
LOST = Kind("text", "holds U+FFFD, the sign that an earlier program lost a character; the sign was left out")

MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
CONTROL = re.compile(r"[\0-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")  # without white space
ZERO_WIDTH = re.compile(r"[\ufeff\u200b\u2060\u00ad\u200e\u200f\u202a-\u202e]")  # not the joiners, which emoji and scripts need
MOST_CONTROLS = 0.1  # a file with a larger share of control characters is no text


# Encodings that write everything in the bytes of ASCII, so that a text in them passes for UTF-8.
JAPANESE = re.compile(rb"\x1b(?:\$[@AB]|\$\([CD]|\$\)[A-H]|\([BIJ])")  # what switches the alphabet in ISO-2022
CHINESE = re.compile(rb"~\{(?:[\x21-\x77][\x21-\x7e])+~\}")  # HZ
SEVEN_BITS = re.compile(r"(?<![\w+/])\+([A-Za-z0-9+/]{5,})(?![\w+/=])-?")  # UTF-7: base64 behind a plus
ASIAN = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]")
KANA = re.compile(r"[\u3041-\u30fa]")


class NotText(ValueError):
    """Bytes are no text in an encoding that can be recognised; the message says why."""


def decode(data: bytes) -> tuple[str, list[Kind]]:
    """Decode the bytes of a text file. Returns the text, with \\n as line ends, and what was guessed. Raises NotText."""
    text, kinds = characters(data)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if ended := text.rstrip("\0\x1a"):  # DOS editors end a file so
        text = ended
    if len(CONTROL.findall(text)) > MOST_CONTROLS * len(text):
        raise NotText("holds control characters, as no text does")
    return text, kinds


def characters(data: bytes) -> tuple[str, list[Kind]]:
    """Decode bytes by their mark, as UTF-8, as UTF-16 without a mark, or as Windows-1252, whichever fits first."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            try:
                text = data[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                continue
            return text, [] if encoding == "utf-8" else [WIDE]
    if 2 * data.count(0) >= len(data) - 1 and (wide := unmarked(data)):
        return wide, [WIDE]
    if encoding := disguised(data):
        raise NotText(f"is in {encoding}, which is not read")
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is not UTF-8"
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError as error:
        raise NotText(f"{place}, nor Windows-1252") from error
    if CONTROL.search(text) or not all(map(reads_western, text.splitlines())):
        raise NotText(f"{place}, and the text does not read as Windows-1252")
    return text, [WESTERN]


def unmarked(data: bytes) -> str:
    """Decode UTF-16 without a mark if it is certain: each second byte is 0, the others are not. Otherwise return ""."""
    for encoding, high, low in (("utf-16-le", data[1::2], data[::2]), ("utf-16-be", data[::2], data[1::2])):
        if len(data) % 2 == 0 and len(data) >= 4 and not low.count(0) and high.count(0) == len(high):
            text = data.decode(encoding)
            return "" if CONTROL.search(text) else text
    return ""


def disguised(data: bytes) -> str:
    """Return the name of another encoding whose text would pass for UTF-8, or ""."""
    if JAPANESE.search(data):
        return "ISO-2022 (of old Japanese or Korean mail)"
    if CHINESE.search(data):
        return "HZ (of old Chinese mail)"
    if data.isascii() and any(seven_bits(run) for run in SEVEN_BITS.findall(data.decode("ascii"))):
        return "UTF-7"
    return "UTF-16 without a mark" if asian_pairs(data) else ""


def seven_bits(run: str) -> bool:
    """Return whether base64 behind a plus sign is a text in UTF-7 and no word: its letters mix, and give letters of Asia only."""
    if len(re.findall("[a-z][A-Z]|[A-Za-z][0-9]", run)) < 2:
        return False
    try:
        text = f"+{run}-".encode("ascii").decode("utf-7")
    except UnicodeDecodeError:
        return False
    return bool(text) and all(map(ASIAN.match, text))


def asian_pairs(data: bytes) -> bool:
    """Return whether bytes are UTF-16 of an Asian language: each pair is a letter of it or a sign of ASCII, and one is kana.

    Without zero bytes, signs within the bytes must show that they are no words of ASCII: `猫の絵` is `+sn0u}`.
    """
    if len(data) % 2 or len(data) < 4:
        return False
    inner = data.rstrip(b"\0\x1a")
    zeros = 0 in inner
    if not zeros and (not data.isascii() or not re.search(rb"[+{}|~^`<>\\\[\]]", data) or re.search(rb"\s", data)):
        return False
    for encoding, high in (("utf-16-le", data[1::2]), ("utf-16-be", data[::2])):
        if zeros and high.count(0) != data.count(0):
            continue
        with suppress(UnicodeDecodeError):
            text = data.decode(encoding)
            if KANA.search(text) if not zeros else ASIAN.search(text):
                return all(c.isspace() or (c.isascii() and c.isprintable()) or ASIAN.match(c) for c in text)
    return False


# ---- Windows-1252

# Letters beyond ASCII that one language uses together. Each also exists in another encoding with another meaning, so that a
# line which mixes letters of no language (as Czech or Turkish read in the wrong encoding do) is refused.
LANGUAGES = (
    "àâæçéèêëîïôœùûüÿ",  # French
    "äöüßéà",  # German
    "áéíóúüñºª",  # Spanish, Irish
    "áâãàçéêíóôõúü",  # Portuguese
    "àèéìíîòóùú",  # Italian
    "àçéèíïóòúü",  # Catalan
    "åäöéàü",  # Swedish, Finnish
    "æøåéèêòôóü",  # Danish, Norwegian
    "áèéêëíïóöúüç",  # Dutch
)
HIGH = "àâäãåæçéèêëîïíìôœöòóõøùúûüÿñßá"
ALL = HIGH + HIGH.upper() + "Ÿ"
ALONE = "àáâäåæèéêíìîóòôöøúùûüÀÁÂÄÅÆÈÉÊÍÌÎÓÒÔÖØÚÙÛÜ"  # words of one letter
MARKED = f"A-Za-z{ALL}"
OPENING, CLOSING, JOINING = "“‘„‚«‹¿¡", "”»›", "’–—…­·×´\xa0"
SINGLE = "•©®™°½¼¾€£§µ±²³ºª"
IMPLAUSIBLE = re.compile(
    rf"[{MARKED}][{OPENING.replace('‘', '')}][{MARKED}]"  # an opening mark within a word
    rf"|[{CLOSING}][{MARKED}]"  # a word right behind a closing mark
    rf"|[{ALL}][{SINGLE}]|[{SINGLE}][{ALL}]|[A-Za-z][{SINGLE}][A-Za-z]|[{SINGLE}]{{2}}"  # signs within words
    rf"|[“„‚‹¿¡][^{MARKED}\d{OPENING}’–…('\"#.*-]|[«‘][^{MARKED}\d\s{OPENING}’–…('\"#.*-]"
    rf"|[{ALL}{JOINING}][{{@\\^~`]"  # the second byte of a letter in Shift-JIS or GBK
    rf"|[{OPENING}][{ALL}][–—]|•[–—]|[\xad·´]{{2}}"
    rf"|[{ALL}]{{3}}"  # three in a row: no Western word has them
    rf"|[a-z{HIGH}][{HIGH.upper().replace('SS', '')}]|[{HIGH.upper().replace('SS', '')}][a-z{HIGH}]+[A-Z]"  # mIxed case
)
KNOWN = {*ALL, *OPENING, *CLOSING, *JOINING, *SINGLE}


def reads_western(line: str) -> bool:
    """Return whether a line that was read as Windows-1252 reads as one of LANGUAGES."""
    beyond = {c for c in line if ord(c) > 126}
    if not beyond:
        return True
    if not beyond <= KNOWN or IMPLAUSIBLE.search(line) or line.count("‹") != line.count("›"):
        return False
    letters = {c.lower() for c in beyond if c in ALL}
    if letters and not any(letters <= {*language} for language in LANGUAGES):
        return False
    words = re.findall(rf"[{MARKED}]+", line)
    return all(word in ALONE or re.search("[A-Za-z]", word) for word in words)


# ---- what a caption or prompt may hold


def clean(text: str) -> tuple[str, list[Kind]]:
    """Return a caption or prompt on one line, without what is no character, and the kinds of what was left out.

    White space of any kind, such as a no-break space, becomes one space. U+FFFD, control and zero-width characters go.
    """
    kinds = []
    for kind, pattern in ((LOST, re.compile("\ufffd")), (CONTROLS, CONTROL), (INVISIBLE, ZERO_WIDTH)):
        if pattern.search(text):
            kinds.append(kind)
            text = pattern.sub("", text)
    return " ".join(text.split()), kinds


def read(path: Path) -> tuple[str, list[Kind]]:
    """Decode a text file as `decode` does. Raises NotText, or OSError if the file cannot be read."""
    with path.open("rb") as file:
        return decode(file.read())


def tell(name: str, kinds: Iterable[Kind]) -> None:
    """Print what was guessed or changed in one text, each kind once."""
    for kind in dict.fromkeys(kinds):
        (console.warn if kind.warns else console.note)(f"{name}: {kind.what}")
