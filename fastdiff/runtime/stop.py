"""SIGTERM and Ctrl-C become a flag that every loop asks between two units of work: a step, a network call, a picture.

Training saves a state first; what caching, previews and evaluation have made is on disk already. A second Ctrl-C stops at once.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastdiff.runtime import processes
from fastdiff.runtime.errors import Stopped

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


class StopRequest:
    """What this process was asked to do, and the command that goes on afterwards."""

    GAP_S = 0.5  # torchrun and the terminal both pass a Ctrl-C on: within this time it is one

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Nobody has asked for anything."""
        self.exit_code: int | None = None
        self.asked_s = 0.0
        self.command = ""
        self.watched = self.together = False

    def note(self, number: int, frame: Any) -> None:
        again = self.exit_code == 130 and number == signal.SIGINT
        if again and time.monotonic() - self.asked_s > self.GAP_S:
            raise KeyboardInterrupt
        if not again:
            self.exit_code, self.asked_s = CODES[signal.Signals(number)], time.monotonic()


request = StopRequest()


@contextmanager
def watching(command: str = "") -> Iterator[None]:
    """Signals set the flag in here; `command` goes on with what is stopped. Inside another one it changes nothing."""
    if request.watched or threading.current_thread() is not threading.main_thread():
        yield
        return
    request.forget()
    request.watched, request.command = True, command
    old = {s: signal.signal(s, request.note) for s in CODES}
    try:
        yield
    except KeyboardInterrupt:
        request.exit_code = 130
        raise stopped("interrupted; what is on disk is whole") from None
    finally:
        request.forget()  # what was asked of this work is not asked of the next
        for s, handler in old.items():
            signal.signal(s, handler)


def check() -> None:
    """Raises Stopped where this process was asked to stop; loops call it once a unit of work."""
    if request.together:
        meet()
    elif request.exit_code is not None:
        raise stopped()


def meet() -> None:
    """All processes come here; raises Stopped on each of them where any was asked to stop."""
    if code := processes.highest(request.exit_code or 0):
        request.exit_code = code
        raise stopped()


@contextmanager
def together() -> Iterator[None]:
    """Work that all processes do in step, one network between them: inside, they stop at the same check or not at all."""
    before, request.together = request.together, True
    try:
        yield
    finally:
        request.together = before


def stopped(message: str = "stopped; what is done so far is kept") -> Stopped:
    """The error of a stop, with the command to go on."""
    return Stopped(message, processes.launched(request.command), exit_code=request.exit_code or 75)
