"""SIGTERM and Ctrl-C set a flag, which every loop checks between units of work: a step, a network call or a picture.

Training saves a state before it stops; results of caching, previews and evaluation are on disk already. A second Ctrl-C stops
at once.
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
    """Whether this process was asked to stop, and the command that continues the work later."""

    GAP_S = 0.5  # torchrun and the terminal both send the signal of one Ctrl-C: within this time it counts once

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Clear the request: nothing was asked, no signal is watched."""
        self.exit_code: int | None = None
        self.asked_s = 0.0
        self.command = ""
        self.watched = self.together = False

    def note(self, number: int, frame: Any) -> None:
        """The signal handler: set the exit code. Raises KeyboardInterrupt on a second Ctrl-C."""
        again = self.exit_code == 130 and number == signal.SIGINT
        if again and time.monotonic() - self.asked_s > self.GAP_S:
            raise KeyboardInterrupt
        if not again:
            self.exit_code, self.asked_s = CODES[signal.Signals(number)], time.monotonic()


request = StopRequest()


@contextmanager
def watching(command: str = "") -> Iterator[None]:
    """Inside the block SIGTERM and Ctrl-C set the flag; `command` continues stopped work. A nested block changes nothing."""
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
        request.forget()  # the request was for this work, not for the next
        for s, handler in old.items():
            signal.signal(s, handler)


def check() -> None:
    """Raise Stopped if this process was asked to stop. Loops call it once per unit of work."""
    if request.together:
        meet()
    elif request.exit_code is not None:
        raise stopped()


def meet() -> None:
    """Raise Stopped on all processes if any of them was asked to stop. Every process must call it."""
    if code := processes.highest(request.exit_code or 0):
        request.exit_code = code
        raise stopped()


@contextmanager
def together() -> Iterator[None]:
    """For work in which the processes wait for each other: inside, all stop at the same `check` or none does."""
    before, request.together = request.together, True
    try:
        yield
    finally:
        request.together = before


def stopped(message: str = "stopped; what is done so far is kept") -> Stopped:
    """The error to raise after a stop request, with the command that continues the work."""
    return Stopped(message, processes.launched(request.command), exit_code=request.exit_code or 75)
