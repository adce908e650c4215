"""Why a download failed, in words: every library wraps the same few causes in errors of its own."""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from fastdiff.runtime.disk import FULL
from fastdiff.runtime.errors import DoesNotFit, UsageError, quoted

# The seconds of silence after which a server is given up. Libraries then wait up to 8 s more between two of their attempts.
PATIENCE_S = 15.0
PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
TIMEOUTS = ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT")  # of the hub's client; a user who sets them is obeyed
NO_NAME = re.compile(
    r"name or service not known|name resolution|nodename nor servname|getaddrinfo failed|no address associated", re.IGNORECASE
)
CUT = re.compile(r"without sending complete|consistency check failed|incompleteread|incomplete read|peer closed", re.IGNORECASE)


def patience_s() -> float:
    """The seconds of silence after which a server is given up: PATIENCE_S, or the longer of the user's own timeouts."""
    return max(float(value) if (value := os.environ.get(name, "")).isdigit() else PATIENCE_S for name in TIMEOUTS) or PATIENCE_S


def offline() -> bool:
    """Whether the environment forbids downloads, by the rule of the hub's client."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in {"1", "ON", "TRUE", "YES"}


@contextmanager
def silence_ends() -> Iterator[None]:
    """In the block, sockets of libraries that set no timeout (urllib, as torch.hub uses it) give up a silent server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(before or patience_s())
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def chain(error: BaseException) -> list[BaseException]:
    """The error, and all that it was raised from, the outermost first."""
    errors: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is not None and current not in errors:
            errors.append(current)
            reason = vars(current).get("reason")  # urllib's URLError keeps the cause there
            waiting += [current.__cause__, current.__context__, reason if isinstance(reason, BaseException) else None]
    return errors


def one_line(error: BaseException) -> str:
    """The first line of a library's message, fit for ours."""
    return (quoted(error).strip() or type(error).__name__).splitlines()[0].strip()[:200]


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for; None where no server answered."""
    for each in chain(error):
        code = vars(each).get("code") or getattr(vars(each).get("response"), "status_code", None)  # of any HTTP client
        if isinstance(code, int) and 300 <= code < 600:
            return code
    return None


def proxy() -> str:
    """The first variable that names a proxy; "" where none is set."""
    return next((name for name in PROXIES if os.environ.get(name)), "")


def cause(error: BaseException, host: str) -> tuple[str, str] | None:
    """What keeps a server from being reached or heard, and what to do; None for an error of another kind.

    `host` is the name of the server, for messages.
    """
    errors = chain(error)
    names, texts = {cls.__name__ for each in errors for cls in type(each).__mro__}, " ".join(map(str, errors))
    over = f"{proxy()} names the proxy" if proxy() else "behind a proxy, name it in HTTPS_PROXY"
    if "ProxyError" in names:
        return f"the proxy in {proxy() or 'HTTPS_PROXY'} lets nothing through to {host}", "correct or unset that variable"
    if any(isinstance(each, ssl.SSLError) for each in errors) or "CERTIFICATE_VERIFY_FAILED" in texts:
        return f"the certificate of {host} is not trusted", "a firewall may stand between: name its certificate in SSL_CERT_FILE"
    if any(isinstance(each, socket.gaierror) for each in errors) or NO_NAME.search(texts):
        return f"the address of {host} cannot be looked up: no network?", f"connect this machine; {over}"
    if any(isinstance(each, ConnectionRefusedError) for each in errors) or "refused" in texts.lower():
        where = f"the proxy in {proxy()}, or {host}," if proxy() else host
        return f"{where} refuses connections", f"check the network and the address; {over}"
    if names & {"TimeoutException", "Timeout", "TimeoutError"} or "timed out" in texts:
        return f"{host} did not answer in {patience_s():.0f} s", f"try again later; {over}"
    if names & {"IncompleteRead", "ContentTooShortError"} or CUT.search(texts):
        return f"{host} ended the connection in the middle of a file", "run the command again"
    if "error sending request" in texts:  # of the hub's storage, whose client says no more
        return f"the storage of {host} cannot be reached, or does not answer", f"try again later; {over}"
    if names & {"ConnectError", "ConnectionError", "NetworkError", "RemoteProtocolError", "URLError", "ReadError"}:
        return f"{host} cannot be reached ({one_line(errors[-1])})", f"connect this machine; {over}"
    return None


def full_disk(error: BaseException, folder: Path, other: str) -> UsageError | None:
    """The clear error where `folder` has no room left or cannot be written to; None for any other.

    `other` says how another folder is chosen.
    """
    for each in chain(error):
        if isinstance(each, OSError) and each.errno in FULL:
            return DoesNotFit(f"{folder}: the disk is full", f"free some space, or {other}")
        if isinstance(each, OSError) and each.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return UsageError(f"{each.filename or folder}: cannot be written ({each.strerror})", other)
    return None


def host_of(url: str) -> str:
    """The host and port of an address, without a user's name and password."""
    return urlsplit(url).netloc.rpartition("@")[2] or url
