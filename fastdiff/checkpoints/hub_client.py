"""The hub's client with an end to its patience.

Left alone, the client waits without end for some answers, and repeats others five times for up to 60 s each. Here a hub that
says nothing new for `network.patience_s` is given up: the time of all attempts counts together, over all threads. A download that
goes on is never cut, however slow it is.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastdiff.runtime import network

LONGEST_WAIT_S = 10  # that a hub may ask for before its next answer; where it asks for longer, we say so and stop


class Silence(Exception):
    """The hub has said nothing new for the seconds of patience.

    `status` is its last answer, if that was an error. `broken` says how a file ended too early: "stopped" or "closed"; "" where
    none did.
    """

    def __init__(self, status: int | None, broken: str) -> None:
        super().__init__("silence")
        self.status, self.broken = status, broken


class Busy(Exception):
    """The hub refuses more requests for now; `wait_s` is the seconds that it asks for, if it says so."""

    def __init__(self, wait_s: int | None) -> None:
        super().__init__("too many requests")
        self.wait_s = wait_s


class Line:
    """What is going on between us and the hub while somebody is `asking`; other users of the client are left alone."""

    def __init__(self) -> None:
        self.lock, self.own, self.depth = threading.Lock(), threading.local(), 0
        self.reset()

    def reset(self) -> None:
        self.seen: dict[tuple[str, str], int] = {}  # (method, address) -> bytes that have come from there
        self.status: int | None = None  # of the last answer, if that was a fault of the hub
        self.ended: Silence | Busy | None = None
        self.round = time.monotonic()

    def request(self, request: Any) -> None:
        """Before each request: raise where patience is at its end, else give the request the rest of it."""
        if not self.depth:
            return
        if self.ended:
            raise self.ended
        mine, now = vars(self.own), time.monotonic()
        if not mine.get("open") or mine.get("round") != self.round:  # the last request of this thread went well
            mine |= {"since": now, "broken": "", "round": self.round}
        mine["open"] = True
        left = network.patience_s() - (now - mine["since"])
        if left <= 0:
            self.ended = Silence(self.status, mine["broken"])
            raise self.ended
        waits = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(waits.get(kind) or left, left) for kind in ("connect", "read", "write", "pool")
        }

    def response(self, response: Any) -> None:
        """At the head of each answer: raise where the hub wants a long pause; else listen to what follows."""
        if not self.depth:
            return
        if response.status_code == 429:
            wait = retry_after(response.headers)
            if wait is None or wait > LONGEST_WAIT_S:
                self.ended = Busy(wait)
                raise self.ended
        if response.status_code >= 400:
            self.status = response.status_code if response.status_code >= 500 else None
            return
        key = (response.request.method, str(response.request.url).partition("?")[0])
        self.news(key, 0)
        start = response.headers.get("Content-Range", "bytes 0-").partition(" ")[2].partition("-")[0]
        kind = type(response.stream)
        response.stream = heard_stream(kind)(response.stream, self, key, int(start) if start.isdigit() else 0)

    def news(self, key: tuple[str, str], position: int) -> None:
        """Note that an answer has come as far as `position`; what had come before is no news."""
        with self.lock:
            if position > self.seen.get(key, -1):
                self.seen[key] = position
                vars(self.own)["since"] = time.monotonic()
                self.status = None

    def broke(self, error: Exception) -> None:
        """Note how an answer ended before its end."""
        vars(self.own)["broken"] = "stopped" if any("Timeout" in cls.__name__ for cls in type(error).__mro__) else "closed"

    def closed(self) -> None:
        """Note that an answer has come to its end."""
        vars(self.own)["open"] = False


LINE = Line()


def heard_stream(kind: type) -> Callable[..., Any]:
    """A class of streams of the client's own kind that tells `Line` of every piece."""
    base = next(cls for cls in kind.__mro__ if cls.__name__ == "SyncByteStream")

    class Heard(base):  # type: ignore[valid-type, misc]
        def __init__(self, stream: Any, line: Line, key: tuple[str, str], position: int) -> None:
            self.stream, self.line, self.key, self.position = stream, line, key, position

        def __iter__(self) -> Iterator[bytes]:
            try:
                for piece in self.stream:
                    self.position += len(piece)
                    self.line.news(self.key, self.position)
                    yield piece
            except Exception as error:
                self.line.broke(error)
                raise
            self.line.closed()

        def close(self) -> None:
            self.stream.close()

    return Heard


def retry_after(headers: Any) -> int | None:
    """The seconds that a hub asks to wait for; None where it does not say."""
    text = headers.get("Retry-After", "").strip()
    if not text and "r=0" in (limits := headers.get("RateLimit", "")).replace(" ", ""):
        text = limits.partition("t=")[2].split(";")[0].strip()
    return int(text) if text.isdigit() else None


# The hub's storage has a client of its own, which would wait 2 minutes for an answer, six times. So it gives up after 25 s.
STORAGE = {
    "HF_XET_CLIENT_READ_TIMEOUT": "7s",
    "HF_XET_CLIENT_CONNECT_TIMEOUT": "7s",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "500ms",
}


def install() -> None:
    """Make every client that huggingface_hub opens from now on tell LINE; what a user has set up of it is kept."""
    from huggingface_hub.utils import _http, set_client_factory

    if not any(name in os.environ for name in (*STORAGE, *network.TIMEOUTS)):  # a user's own win
        os.environ.update(STORAGE)
    made = _http._GLOBAL_CLIENT_FACTORY
    if vars(made).get("listening"):
        return

    def factory() -> Any:
        client = made()
        hooks = client.event_hooks
        client.event_hooks = {
            "request": [*hooks.get("request", []), LINE.request],
            "response": [*hooks.get("response", []), LINE.response],
        }
        return client

    vars(factory)["listening"] = True
    set_client_factory(factory)


@contextmanager
def quiet_root() -> Iterator[None]:
    """In the block, no error that is logged on the root logger itself is shown; loggers with a name are left alone."""
    root, lesser = logging.getLogger(), lambda record: record.levelno < logging.ERROR
    root.addFilter(lesser)
    try:
        yield
    finally:
        root.removeFilter(lesser)


@contextmanager
def asking() -> Iterator[None]:
    """In the block, the hub's client and urllib give up a server that stays silent; raises `Silence` or `Busy` then.

    It may also end with any error of a library, a timeout among them. Errors that libraries (open_clip) log on the root logger
    are left out, for what is raised says the same.
    """
    install()
    with LINE.lock:
        if not LINE.depth:
            LINE.reset()
        LINE.depth += 1
    try:
        with network.silence_ends(), quiet_root():
            yield
    except Exception as error:
        if LINE.ended and LINE.ended not in network.chain(error):  # a library took it for something else
            raise LINE.ended from error
        raise
    finally:
        with LINE.lock:
            LINE.depth -= 1


def offline() -> bool:
    """Whether downloads are forbidden, by `offline` or by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)
