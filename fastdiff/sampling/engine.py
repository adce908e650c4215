"""From noise and prompts to bytes as one pure function of tensors, with nothing read back from the device inside.

    x_k = c_k . H,   H <- answer of the network to x_k        (`coefficients`); then decode, clamp, uint8

On CUDA the function is captured: one graph for all steps and the decoder, ready after a few runs of it. With `auto` it is
compiled meanwhile, and the graph of the compiled form takes the place of the first. Networks of stock layers run as
`models.folded` and `models.decoder` have them; any other runs as it is, in the same walk. On the CPU network and decoder may
be handed to another library, each as one function of a call (`intel`).
"""

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.models.denoiser import Cond, Denoiser, guidance_embedding
from fastdiff.models.fast.unet import Folded, FoldedUNet
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import quoted
from fastdiff.sampling import openvino
from fastdiff.sampling.solver_table import Table

Compile = Literal["auto", "off", "max", "openvino"]
Inputs = dict[str, Tensor]  # what a call of the network takes besides x, by name
MODES = {"auto": "default", "max": "max-autotune-no-cudagraphs"}  # of torch.compile; the graph is ours
WORTH_COMPILING = 8  # calls of one shape: who draws a single picture does not wait for a compiler


class Caller:
    """The network's raw answer at the k-th timestep, from inputs that are made once a walk."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.net = denoiser, denoiser.net
        self.folded = isinstance(denoiser.net, FoldedUNet)

    def inputs(self, t: Tensor, cond: Cond) -> Inputs:
        tensors = {name: v for name, v in vars(cond).items() if v is not None}
        if not self.folded:
            return {**tensors, "t": t}
        w = None
        if self.denoiser.guidance_embedded:
            w = guidance_embedding(cond.guidance - 1, self.net.config.time_cond_proj_dim)
        folded = self.net.fold(t, cond.tokens, pooled=cond.pooled, time_ids=cond.time_ids, guidance=w)
        tensors = {**tensors, "t": t} if self.controlled(tensors) else {}  # else all that they say is in the two folded tensors
        return {**tensors, **folded._asdict()}

    def controlled(self, tensors: Mapping[str, Tensor]) -> bool:
        return self.denoiser.controlnet is not None and "control" in tensors

    def __call__(self, x: Tensor, k: int, inputs: Inputs) -> Tensor:
        conditions = {name: v for name, v in inputs.items() if name in Cond.__dataclass_fields__}
        if not self.folded:
            return self.denoiser.answer(x, inputs["t"][k], Cond(**conditions))
        residuals: dict[str, Any] = {}
        if self.controlled(conditions):
            cond, t = Cond(**conditions), inputs["t"][k].expand(len(x))
            residuals = self.denoiser.controlled(x, t, cond, self.denoiser.extra(cond))
        return self.net.step(x, Folded(inputs["kv"], inputs["shift"]), k, residuals)


class Converted(Caller):
    """The network by OpenVINO: it sees one timestep's rows, so that one form of it does for every step of every walk."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        step = super().__call__
        self.form = openvino.Compiled(lambda x, **inputs: step(x, 0, inputs), "the network")

    def __call__(self, x: Tensor, k: int, inputs: Inputs) -> Tensor:
        return self.form(x=x, **{name: v[k : k + 1] if name in {"t", "shift"} else v for name, v in inputs.items()})


class Walk(NamedTuple):
    """One batch: the sampler's numbers, noise (draws, B, C, h, w), what the network is told, and the guidance.

    With guidance the inputs hold 2 B rows, prompts first, and u + w (c - u) counts.
    """

    table: Table
    noise: Tensor
    inputs: Inputs
    guidance: float | None


def latents(call: Callable[[Tensor, int, Inputs], Tensor], walk: Walk, between: Callable[[], None] = lambda: None) -> Tensor:
    """Latents (B, C, h, w), fp32; `between` is done before every call."""
    table, noise, inputs, w = walk
    shape, draw, k = noise.shape[1:], 0, 0
    columns = torch.empty(len(table.fresh), noise[0].numel(), device=noise.device)
    for j, fresh in enumerate(table.fresh):
        if fresh:
            columns[j], draw = noise[draw].flatten(), draw + 1
            continue
        between()
        x = (table.rows[k, :j] @ columns[:j]).reshape(shape)
        if w is None:
            out = call(x, k, inputs).float()
        else:
            c, u = call(torch.cat([x, x]), k, inputs).float().chunk(2)
            out = torch.lerp(u, c, w)
        columns[j], k = out.reshape(-1), k + 1
    return (table.rows[k] @ columns).reshape(shape)


def to_bytes(pixels: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, uint8, rounded as diffusers rounds."""
    return (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- captured: the same function without the host


class Backend(Protocol):
    """What captures and compiles; tests have one without a GPU."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """What runs the function again, and where its answer then is."""

    def compile(self, function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]: ...

    def aside(self) -> Any:
        """A context in which work does not hold up the caller's."""


class Cuda:
    """CUDA graphs and torch.compile."""

    @staticmethod
    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):  # libraries pick their kernels and take their workspaces outside the graph
                function()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = function()
        return graph.replay, out

    @staticmethod
    def compile(function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]:
        return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)

    @staticmethod
    def aside() -> Any:
        return torch.cuda.stream(torch.cuda.Stream())


class Plain:
    """Without graphs: what is compiled runs as it is."""

    @staticmethod
    def capture(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        out = function().clone()
        return lambda: out.copy_(function()), out

    compile = Cuda.compile
    aside = staticmethod(nullcontext)


def backend_of(device: torch.device | str, compile: Compile) -> Backend | None:
    """CUDA's where there is a GPU; elsewhere the compiler alone, and only where it is asked for: it takes minutes."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return None if compile == "off" else Cuda()
    return Plain() if compile == "max" else None


class Captured:
    """A pure function of named tensors, which stay at fixed places: copied in where they are other ones than last time.

    Its answer is overwritten by the next call. A thread compiles (`auto`); the swap happens in the caller's thread, between
    two calls, so that a graph is never replaced while it runs.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: Inputs, compile: Compile, backend: Backend) -> None:
        self.function, self.backend, self.mode = function, backend, compile
        self.places, self.given = {k: v.clone() for k, v in inputs.items()}, dict(inputs)
        self.calls, self.state = 0, "graph"
        self.thread: threading.Thread | None = None
        self.ready: Callable[..., Tensor] | None = None
        if compile == "max":
            function, self.state = self.backend.compile(function, MODES["max"]), "compiled"
        self.record(function)

    def record(self, function: Callable[..., Tensor]) -> None:
        self.replay, self.out = self.backend.capture(lambda: function(**self.places))

    def __call__(self, inputs: Inputs) -> Tensor:
        if self.ready is not None:
            function, self.ready = self.ready, None
            self.record(function)
            self.state = "compiled"
        for name, tensor in inputs.items():
            if tensor is not self.given[name]:
                self.places[name].copy_(tensor, non_blocking=True)
                self.given[name] = tensor
        self.calls += 1
        if self.mode == "auto" and self.calls == WORTH_COMPILING:
            self.thread = threading.Thread(target=self.prepare, daemon=True)
            self.thread.start()
        self.replay()
        return self.out

    def prepare(self) -> None:
        """Compile, and run once on copies: the kernels are built at the first call."""
        try:
            function = self.backend.compile(self.function, MODES["auto"])
            with torch.no_grad(), self.backend.aside():
                function(**{k: v.clone() for k, v in self.places.items()})
            self.ready = function
        except Exception as error:  # a compiler that is not there or fails: the graph goes on as it is
            why = f"{type(error).__name__}: {quoted(error)[:200]}"
            console.warn(f"`compile=auto`: not compiled, the graph goes on ({why})")


class Engine:
    """Walks of one network and decoder. Captured functions are kept by shape: the last few of them, since each has its memory."""

    KEPT = 4

    def __init__(
        self,
        denoiser: Denoiser,
        decode: Callable[[Tensor], Tensor],
        device: torch.device | str,
        *,
        compile: Compile = "off",
        backend: Backend | None = None,
    ) -> None:
        self.call, self.decode, self.device, self.compile = Caller(denoiser), decode, torch.device(device), compile
        if compile == "openvino":  # no backend: a captured walk has a network for each of its steps, this one for all
            openvino.check(device)
            form = openvino.Compiled(decode, "the decoder")
            self.call, self.decode = Converted(denoiser), lambda z: form(latents=z)
        self.backend = backend or backend_of(device, compile)
        self.captured: dict[Any, Captured] = {}

    @torch.no_grad()
    def inputs(self, table: Table, cond: Cond) -> Inputs:
        return self.call.inputs(table.t, cond)

    @torch.no_grad()
    def latents(self, walk: Walk) -> Tensor:
        return latents(self.call, walk, stop.check)

    @torch.no_grad()
    def bytes(self, walk: Walk) -> Tensor:
        """Pictures (B, H, W, 3), uint8, on the device; the next call may overwrite them."""

        between = stop.check if self.backend is None else lambda: None  # a captured walk has no host in it

        def draw(noise: Tensor, **inputs: Tensor) -> Tensor:
            pixels = self.decode(latents(self.call, walk._replace(noise=noise, inputs=inputs), between))
            return to_bytes(pixels).permute(0, 2, 3, 1).contiguous()

        tensors = {"noise": walk.noise, **walk.inputs}
        if self.backend is None:
            return draw(**tensors)
        stop.check()
        key = (id(walk.table), walk.guidance, tuple((k, tuple(v.shape)) for k, v in tensors.items()))
        if key not in self.captured:
            while len(self.captured) >= self.KEPT:
                self.captured.pop(next(iter(self.captured)))
            self.captured[key] = Captured(draw, tensors, self.compile, self.backend)
        return self.captured[key](tensors)


class Copy:
    """A tensor on its way from the device; `wait` returns it."""

    def __init__(self, source: Tensor) -> None:
        self.event = None
        if source.is_cuda:
            self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self.host.copy_(source, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = source.cpu().clone()  # the engine may write there again

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.host


def on_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"
