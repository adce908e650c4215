"""Keep access tokens out of everything that is printed or written: messages, tracebacks, JSON, cards and run folders."""

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

HIDDEN = "***"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
SHORTEST = 6  # a shorter value of such a variable is no token; hiding it would spoil words that only contain it
SHAPES = (  # what a token looks like, and where else one stands
    (re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"(?<=://)[^/\s@'\"\\]+@"), f"{HIDDEN}@"),  # user:password@ of an address
    (re.compile(r"\b(bearer)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"([?&](?:access_)?token=)[^&\s'\"\\]+", re.IGNORECASE), rf"\1{HIDDEN}"),
)


def hidden(text: str) -> str:
    """The text with every access token in it as ***: those that are set on this machine, and whatever looks like one."""
    for token in known():
        text = text.replace(token, HIDDEN)
    for shape, instead in SHAPES:
        text = shape.sub(instead, text)
    return text


def hidden_in(value: Any) -> Any:
    """The value, a dictionary, list or tuple perhaps, with every text in it as of `hidden`; keys are left as they are."""
    if isinstance(value, str):
        return hidden(value)
    if isinstance(value, dict):
        return {key: hidden_in(each) for key, each in value.items()}
    return [hidden_in(each) for each in value] if isinstance(value, (list, tuple)) else value


def known() -> list[str]:
    """The tokens of this machine, the longest first: in variables, and in the files that `hf auth login` writes."""
    values = [os.environ.get(name, "").strip() for name in VARIABLES]
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")).expanduser()
    login = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    for path in (login, login.with_name("stored_tokens")):
        try:
            values += in_file(path, path.stat().st_mtime_ns)
        except OSError:  # not logged in
            continue
    return sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True)


@lru_cache(maxsize=8)
def in_file(path: Path, changed: int) -> list[str]:
    """The tokens in a file of a login: one alone, or lines `hf_token = TOKEN`. `changed` is when it was written."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line.rpartition("=")[2].strip() for line in lines if not line.startswith("[")]
