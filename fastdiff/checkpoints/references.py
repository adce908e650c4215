"""References to the hub: owner/name, with @revision and /path behind it, or the address of a page or a file there."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.runtime.network import host_of
from fastdiff.runtime.secrets import hidden

FILES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}  # suffixes of weights
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co", "www.hf.co"}
NAME = re.compile(r"(?![.-])[\w.-]{1,96}(?<![.-])", re.ASCII)  # of an owner or a repository
REVISION = r"refs/pr/\d+|[^/@\s]+"
SHORT = re.compile(rf"([^/@]+/[^/@]+)(?:@({REVISION}))?(?:/([^@]+))?")
AT_THE_END = re.compile(rf"([^/@]+/[^/@]+)/([^@]+)@({REVISION})")
PAGE = re.compile(rf"([^/]+/[^/]+)/(?:tree|blob|resolve|raw)/({REVISION})(?:/(.+))?")
FORMS = "owner/name, owner/name@revision, owner/name/FILE, or the address of its page"


@dataclass(frozen=True)
class Reference:
    """A repository of the hub, or a file or folder in it."""

    hub_id: str  # owner/name
    revision: str | None = None  # a branch, tag or commit; None = the main branch
    path: str = ""  # of a file or folder inside; "" = all of it
    kind: str = "model"  # or "dataset"

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{self.hub_id}{at}" + (f"/{self.path}" if self.path else "")

    @property
    def page(self) -> str:
        """The address of its page."""
        return f"{endpoint()}/{'' if self.kind == 'model' else f'{self.kind}s/'}{self.hub_id}"

    @property
    def names_file(self) -> bool:
        """Whether it names a file of weights."""
        return bool(self.path) and Path(self.path).suffix.lower() in FILES


def local(ref: str | Path) -> Path | None:
    """The path that `ref` is, if there is such a file or folder on this machine; it always wins over the hub."""
    path = Path(ref).expanduser()
    try:
        return path if path.exists() else None
    except OSError:  # longer than any path, or a form that the system does not know
        return None


def parse(ref: str, option: str) -> Reference | None:
    """The reference that `ref` is, the value of the option `option`; None where it has no such form, and is a path or an alias.

    UsageError for an address that is no model of the hub, and for one that carries a name or a token.
    """
    ref = ref.strip()
    if match := re.match(r"(https?|hf)://", ref, re.IGNORECASE):
        if match[1].lower() == "hf":
            return refuse_strange(short(ref[match.end() :].removeprefix("models/").strip("/")), ref, option)
        return address(ref, option)
    if ref.split("/")[0].lower() in HOSTS:
        return address(f"https://{ref}", option)
    if "://" in ref:
        raise elsewhere(ref, option)
    if like_path(ref):
        return None
    return short(ref.strip("/"))


def called(ref: str, option: str = "base") -> str:
    """A short name for what `ref` names, to name results by: its file or folder without suffix, or its repository."""
    where = None if local(ref) else parse(ref, option)
    if where is None or where.names_file:
        return Path(where.path if where else ref).stem or ref
    return Path(where.path or where.hub_id).name


def like_path(ref: str) -> bool:
    """Whether a reference to something that is not there can only mean a path: of a file in a folder, or in one that exists."""
    if ref.startswith((".", "/", "~")) or "\\" in ref:
        return True
    first, *rest = ref.split("/")
    file = Path(ref).suffix.lower() in FILES
    return (file and len(rest) < 2) or (len(rest) > 1 and Path(first).is_dir())


def short(text: str) -> Reference | None:
    """The reference in owner/name[@revision][/path] or owner/name/path@revision; None for any other text."""
    if match := SHORT.fullmatch(text):
        hub_id, revision, path = match.groups()
    elif match := AT_THE_END.fullmatch(text):
        hub_id, path, revision = match.groups()
    else:
        return None
    return checked(hub_id, revision, path)


def checked(hub_id: str, revision: str | None, path: str | None) -> Reference | None:
    """The reference, if its names are ones that the hub has; else None."""
    names = hub_id.split("/")
    if not all(NAME.fullmatch(name) and ".." not in name and "--" not in name for name in names):
        return None
    inside = (path or "").strip("/")
    if any(part in {"", ".", ".."} for part in inside.split("/")) and inside:
        return None
    return Reference(hub_id, unquote(revision) if revision else None, inside)


def address(url: str, option: str) -> Reference:
    """The reference in the address of a page or file; UsageError where it is none of a model on the hub."""
    parts = urlsplit(url)
    ours = HOSTS | {host_of(os.environ.get("HF_ENDPOINT", "")).lower(), host_of(endpoint()).lower()}
    if "@" in parts.netloc or (parts.netloc.lower() in ours and hidden(url) != url):
        hint = "give the address without it, and set HF_TOKEN: what is typed stays in the shell's history and in run folders"
        raise UsageError(f"{as_field(option, hidden(url))}: the address carries a name or an access token", hint)
    if parts.netloc.lower() not in ours:
        raise elsewhere(url, option)
    text = unquote(parts.path).strip("/")
    prefix = urlsplit(endpoint()).path.strip("/")  # of a mirror that does not lie at the top of its host
    text = text.removeprefix(f"{prefix}/") if prefix else text
    kind = text.split("/")[0]
    if kind in {"datasets", "spaces", "collections", "papers", "docs", "blog"}:
        raise UsageError(f"{as_field(option, url)}: an address of {kind} on the hub, not of a model", f"give {FORMS}")
    match = PAGE.fullmatch(text)
    found = checked(*match.groups()) if match else short(text.removesuffix(".git"))
    return refuse_strange(found, url, option)


def refuse_strange(found: Reference | None, ref: str, option: str) -> Reference:
    if found is None:
        raise UsageError(f"{as_field(option, hidden(ref))}: names no model of the hub", f"give {FORMS}")
    return found


def endpoint() -> str:
    """The address of the hub that the client asks."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def elsewhere(url: str, option: str) -> UsageError:
    """The error for an address of another site."""
    return UsageError(
        f"{as_field(option, hidden(url))}: an address of {host_of(url)}, from where nothing is downloaded",
        "download the file and give its path",
    )
