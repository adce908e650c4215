"""Compile the network call and the decoder once for a shape of batch, by torch.compile, beside the caller's work.

One compiled network call serves every step of every walk of that shape, so the work does not grow with the number of steps.
"""

import ctypes
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.runtime import console
from fastdiff.runtime.errors import quoted

Compile = Literal["auto", "off", "max", "openvino"]
Inputs = dict[str, Tensor]  # inputs of the network besides x, by name
MODES = {"auto": "default", "max": "max-autotune-no-cudagraphs"}  # modes of torch.compile; we capture CUDA graphs ourselves
WORTH_COMPILING = 8  # calls of one shape before compiling starts: a single picture is done sooner without
PER_STEP = {"t", "shift"}  # inputs whose first dimension counts the timesteps


class Parts(NamedTuple):
    """The two functions that draw a walk."""

    call: Callable[[Tensor, int, Inputs], Tensor]  # x (B, C, h, w), k, inputs of all timesteps -> the k-th network output
    picture: Callable[[Tensor], Tensor]  # latents (B, C, h, w) -> uint8 pictures (B, H, W, 3)


def first_rows(inputs: Inputs, n: int) -> Inputs:
    """Return the inputs of the first n rows of the batch, as views; what all rows share stays as it is."""
    batch = lambda name, v: 1 if name in PER_STEP else 0
    return {
        name: v.narrow(batch(name, v), 0, n) if v.ndim > batch(name, v) and v.shape[batch(name, v)] > n else v
        for name, v in inputs.items()
    }


def at_step(inputs: Inputs, k: int) -> Inputs:
    """Return the inputs of the k-th timestep alone: views of the same shape for every k."""
    return {name: v[k : k + 1] if name in PER_STEP else v for name, v in inputs.items()}


class Compiler(Protocol):
    """What `Forms` needs of an engine's backend."""

    def compile(self, function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
        """Return the function compiled in a mode of torch.compile; the work may wait until its first call."""

    def aside(self) -> Any:
        """Return a context in which work does not delay the caller's work."""


def compiled_once(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
    """Compile a function by torch.compile for the first tensors that it gets; it refuses tensors of another kind.

    torch.compile would compile again for them, for minutes and in whichever thread calls. And it counts the compiled forms of
    a function by its code object, at most 8; each copy of the code has its own count, and its forms go when it goes.
    """
    done = False

    def inductor(graph: Any, inputs: Any) -> Any:
        nonlocal done
        if done:
            raise RuntimeError("the inputs are not those that it was compiled for")
        done = True
        return torch._inductor.compile(graph, inputs, options=torch._inductor.list_mode_options(mode))

    def own(*args: Tensor, **inputs: Tensor) -> Tensor:
        return function(*args, **inputs)

    copy = FunctionType(own.__code__.replace(), own.__globals__, own.__name__, None, own.__closure__)
    return torch.compile(copy, backend=inductor, fullgraph=True, dynamic=False)


class Forms:
    """The compiled parts for one shape of batch. `ready` holds them once they are compiled and have run.

    With `max` they are compiled before the first picture. With `auto` a thread compiles them after WORTH_COMPILING calls. If
    that fails, for lack of a compiler or of memory, a warning says so and `ready` stays None.
    """

    def __init__(self, parts: Parts, mode: Compile, backend: Compiler) -> None:
        self.parts, self.mode, self.backend = parts, mode, backend
        self.calls = 0
        self.ready: Parts | None = None
        self.thread: threading.Thread | None = None

    def count(self, latents: Tensor, rows: Sequence[int], inputs: Inputs) -> None:
        """Count a call for latents (B, C, h, w) whose network calls have these numbers of rows; compile when it is time."""
        self.calls += 1
        if self.mode == "max" and self.calls == 1:
            console.info("compiling: takes minutes, once for each size of picture")
            self.prepare(latents, rows, inputs)
        if self.mode == "auto" and self.calls == WORTH_COMPILING:
            self.thread = ending_with_process(lambda: self.prepare(latents, rows, inputs))

    def prepare(self, latents: Tensor, rows: Sequence[int], inputs: Inputs) -> None:
        """Compile both parts and run each once on tensors of these shapes, since kernels are built at the first call.

        The network call is compiled once for each number of rows.
        """
        call, picture = self.parts
        try:
            steps = {n: self.backend.compile(lambda x, **inputs: call(x, 0, inputs), MODES[self.mode]) for n in rows}
            decode = self.backend.compile(picture, MODES[self.mode])
            with torch.no_grad(), self.backend.aside():
                copies = {name: v.clone() for name, v in inputs.items()}
                for n, step in steps.items():
                    step(torch.zeros(n, *latents.shape[1:], device=latents.device), **at_step(first_rows(copies, n), 0))
                decode(torch.zeros(latents.shape, device=latents.device))  # zeros leave the random numbers alone
            self.ready = Parts(lambda x, k, inputs: steps[len(x)](x, **at_step(inputs, k)), decode)
        except Exception as error:
            self.refuse(error, "compiling failed")

    def refuse(self, error: Exception, what: str) -> None:
        """Warn that the uncompiled parts draw, and keep to them."""
        self.ready = None
        if threading.main_thread().is_alive():  # otherwise the process is ending, and so is the compiler
            why = f"{type(error).__name__}: {quoted(error)[:200]}"
            console.warn(f"`compile={self.mode}`: {what}, so pictures are drawn by the uncompiled networks ({why})")


# ---- a thread that ends with the process


class Ending(SystemExit):
    """Raised in a thread because its process ends. Handlers of Exception let it pass."""


def ending_with_process(work: Callable[[], None]) -> threading.Thread:
    """Run `work` in a thread that is stopped, and waited for, when the main thread has ended.

    A daemon thread will not do: Python ends it in the middle of the compiler's C++ code, which aborts the process (exit code
    134). Nor will a common thread: the process would wait for minutes. So a second thread waits for the main thread's end and
    then raises `Ending` in the first one.
    """

    def run() -> None:
        with suppress(Ending):
            work()

    def guard() -> None:
        main, hook = threading.main_thread(), sys.unraisablehook
        while thread.is_alive() and main.is_alive():
            main.join(POLL_S)
        if thread.is_alive():
            sys.unraisablehook = lambda about: None if about.exc_type is Ending else hook(about)
        while thread.is_alive():
            # Repeated, since Python drops an exception that is raised in a destructor.
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(Ending))
            thread.join(POLL_S)
            end_workers()

    thread = threading.Thread(target=run, name="fastdiff-compile")
    thread.start()
    threading.Thread(target=guard, name="fastdiff-compile-end").start()
    return thread


POLL_S = 0.1


def end_workers() -> None:
    """End the compiler's own processes. A thread that waits for one of them cannot be stopped otherwise."""
    loaded = sys.modules.get("torch._inductor.async_compile")
    with suppress(Exception):  # it may be half imported, or start more of them just now
        if loaded is not None:
            loaded.shutdown_compile_workers()
