"""The engine: from noise and prompts to bytes as one pure function of tensors, without waiting for the device in between.

    x_k = c_k . H,   H <- network output for x_k        (c_k: see `linear_walk`); then decode, clamp, uint8

On CUDA the function is captured as one CUDA graph of all steps and the decoder. With `auto` a thread compiles the network call
and the decoder meanwhile (`sampling.compiling`), and a graph that calls the compiled ones then replaces the first. Standard
networks run in their fast form (`models.fast`); any other network runs as it is, in the same loop. On the CPU, OpenVINO can run
the network and the decoder (`sampling.openvino`). A "walk" is one pass over all timesteps, from noise to latents.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.diffusion.guidance import guide_fused, rescale
from fastdiff.models.denoiser import Cond, Denoiser, guidance_embedding
from fastdiff.models.fast.unet import Folded, FoldedUNet
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import quoted
from fastdiff.sampling import openvino
from fastdiff.sampling.compiling import Compile, Forms, Inputs, Parts, at_step, compiled_once, first_rows
from fastdiff.sampling.linear_walk import Table


class Caller:
    """Calls the network at the k-th timestep of a walk, with inputs that were computed once for the walk."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.net = denoiser, denoiser.net
        self.folded = isinstance(denoiser.net, FoldedUNet)

    def inputs(self, t: Tensor, cond: Cond) -> Inputs:
        """Compute the inputs of a walk over timesteps t (n,), or t (n, B), with the conditions `cond`."""
        tensors = {name: v for name, v in vars(cond).items() if v is not None}
        if not self.folded:
            return {**tensors, "t": t}
        w = None
        if self.denoiser.guidance_embedded:
            w = guidance_embedding(cond.guidance - 1, self.net.config.time_cond_proj_dim)
        folded = self.net.fold(t, cond.tokens, pooled=cond.pooled, time_ids=cond.time_ids, guidance=w)
        # Only a ControlNet still needs the conditions: for the UNet they are in the two folded tensors.
        tensors = {**tensors, "t": t} if self.controlled(tensors) else {}
        return {**tensors, **folded._asdict()}

    def controlled(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether a ControlNet takes part: there is one, and `tensors` holds a control picture."""
        return self.denoiser.controlnet is not None and "control" in tensors

    def __call__(self, x: Tensor, k: int, inputs: Inputs) -> Tensor:
        """Return the raw network output (B, C, h, w) for x (B, C, h, w) at the k-th timestep."""
        conditions = {name: v for name, v in inputs.items() if name in Cond.__dataclass_fields__}
        if not self.folded:
            return self.denoiser.answer(x, inputs["t"][k], Cond(**conditions))
        residuals: dict[str, Any] = {}
        if self.controlled(conditions):
            cond, t = Cond(**conditions), inputs["t"][k].expand(len(x))
            residuals = self.denoiser.controlled(x, t, cond, self.denoiser.extra(cond))
        return self.net.step(x, Folded(inputs["kv"], inputs["shift"]), k, residuals)


class Converted(Caller):
    """A Caller that runs the network by OpenVINO. It gets the inputs of one timestep, so one compiled form serves all steps."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser)
        step = Caller(denoiser)  # not a method of this object, which would then live until the garbage collector runs
        self.form = openvino.Compiled(lambda x, **inputs: step(x, 0, inputs), "the network")

    def __call__(self, x: Tensor, k: int, inputs: Inputs) -> Tensor:
        return self.form(x=x, **at_step(inputs, k))


class Walk(NamedTuple):
    """One batch to draw: the solver's table, noise (draws, B, C, h, w), inputs of the network, and guidance w of each step.

    If any step is guided, the inputs hold 2 B rows, prompts first. A guided step calls the network with all of them and
    combines the outputs c and u as u + w (c - u). A step without guidance, where w is None, calls it with the first B. `rescale`
    is phi of `diffusion.guidance.rescale`; 0: guided outputs stay as they are.
    """

    table: Table
    noise: Tensor
    inputs: Inputs
    guidance: tuple[float | None, ...]
    rescale: float = 0.0

    @property
    def rows(self) -> tuple[int, ...]:
        """The different numbers of rows with which the network is called: B, 2 B or both."""
        return tuple(sorted({self.noise.shape[1] * (1 if w is None else 2) for w in self.guidance}))


def latents(call: Callable[[Tensor, int, Inputs], Tensor], walk: Walk, between: Callable[[], None] = lambda: None) -> Tensor:
    """Run a walk and return its latents (B, C, h, w), fp32. `between` runs before every network call."""
    table, noise, inputs, guidance, phi = walk
    shape, draw, k = noise.shape[1:], 0, 0
    prompts_only = first_rows(inputs, shape[0])
    columns = torch.empty(len(table.fresh), noise[0].numel(), device=noise.device)
    for j, fresh in enumerate(table.fresh):
        if fresh:
            columns[j], draw = noise[draw].flatten(), draw + 1
            continue
        between()
        x = (table.rows[k, :j] @ columns[:j]).reshape(shape)
        w = guidance[k]
        if w is None:
            out = call(x, k, prompts_only).float()
        else:
            c, u = call(torch.cat([x, x]), k, inputs).float().chunk(2)
            out = guide_fused(c, u, w)
            if phi:
                out = rescale(out, c, phi)
        columns[j], k = out.reshape(-1), k + 1
    return (table.rows[k] @ columns).reshape(shape)


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to uint8 in 0..255, rounded like diffusers."""
    return (pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def picturing(decode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function from latents (B, C, h, w) to pictures (B, H, W, 3), uint8."""
    return lambda z: to_bytes(decode(z)).permute(0, 2, 3, 1).contiguous()


# ---- captured: the same function as a CUDA graph


class Backend(Protocol):
    """How functions are captured and compiled; tests use one that needs no GPU."""

    def capture(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return a callable that runs the function again and returns the result, which the next run overwrites."""

    def compile(self, function: Callable[..., Tensor], mode: str) -> Callable[..., Tensor]: ...  # mode: of torch.compile

    def aside(self) -> Any:
        """Return a context in which work does not delay the caller's work."""

    def wait(self) -> None:
        """Wait until all work that was started is done."""


class Cuda:
    """CUDA graphs and torch.compile."""

    @staticmethod
    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):  # warm-up: libraries choose kernels and allocate workspaces before the capture
                function()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out = function()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    compile = staticmethod(compiled_once)

    @staticmethod
    def aside() -> Any:
        return torch.cuda.stream(torch.cuda.Stream())

    @staticmethod
    def wait() -> None:
        torch.cuda.synchronize()


class Plain:
    """No CUDA graphs: the function itself runs."""

    @staticmethod
    def capture(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return function

    compile = staticmethod(compiled_once)
    aside = staticmethod(nullcontext)

    @staticmethod
    def wait() -> None: ...


def backend_of(device: torch.device | str, compile: Compile) -> Backend | None:
    """Return the CUDA backend on a GPU, unless `off`. Elsewhere `max` gets the compiler alone (it takes minutes), else None."""
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return None if compile == "off" else Cuda()
    return Plain() if compile == "max" else None


class Captured:
    """A captured walk of named tensors. Inputs that changed since the last call are copied to fixed places.

    Each call overwrites the result of the one before. When the compiled parts are ready, a graph of them replaces the first
    between two calls, in the caller's thread, so a graph is never replaced while it runs. A graph that cannot be captured, for
    lack of memory say, falls back to one of the uncompiled parts, and that to the walk itself without a graph.
    """

    def __init__(self, walk: Walk, parts: Parts, inputs: Inputs, forms: Forms, backend: Backend) -> None:
        self.walk, self.parts, self.forms, self.backend = walk, parts, forms, backend
        self.places, self.given = {k: v.clone() for k, v in inputs.items()}, dict(inputs)
        self.state = ""  # compiled, graph (of the uncompiled parts) or plain (no graph)
        self.replay: Callable[[], Tensor] | None = None

    @property
    def thread(self) -> Any:
        """The thread that compiles or has compiled the parts, if there is one."""
        return self.forms.thread

    def record(self) -> None:
        """Capture the walk on the fixed input places: by the compiled parts if they are ready."""
        self.backend.wait()  # a graph must not go while it runs
        self.replay = None  # it goes first: there may be no memory for two
        if self.forms.ready is not None:
            try:
                self.replay, self.state = self.backend.capture(self.drawing(self.forms.ready)), "compiled"
                return
            except Exception as error:  # most often out of memory
                self.forms.refuse(error, "the compiled networks could not be captured")
        try:
            self.replay, self.state = self.backend.capture(self.drawing(self.parts)), "graph"
        except Exception as error:
            self.replay, self.state = self.drawing(self.parts, stop.check), "plain"
            why = f"{type(error).__name__}: {quoted(error)[:200]}"
            console.warn(f"`compile={self.forms.mode}`: no CUDA graph could be captured, so pictures are drawn without ({why})")

    def drawing(self, parts: Parts, between: Callable[[], None] = lambda: None) -> Callable[[], Tensor]:
        """Return the function that draws what is at the fixed places by these parts."""
        walk, places = self.walk, self.places  # not `self`, which keeps the function
        return lambda: drawn(walk, parts, places, between)

    def __call__(self, inputs: Inputs) -> Tensor:
        for name, tensor in inputs.items():
            if tensor is not self.given[name]:
                self.places[name].copy_(tensor, non_blocking=True)
                self.given[name] = tensor
        if self.state != "plain":  # otherwise a compiled form would not be captured either
            noise, others = self.places["noise"][0], {k: v for k, v in self.places.items() if k != "noise"}
            self.forms.count(noise, self.walk.rows, others)
        if self.replay is None or (self.state == "graph" and self.forms.ready is not None):
            self.record()
        assert self.replay is not None
        return self.replay()


def drawn(walk: Walk, parts: Parts, tensors: Inputs, between: Callable[[], None]) -> Tensor:
    """Draw a walk whose noise and inputs are `tensors`. Returns uint8 pictures (B, H, W, 3)."""
    inputs = {name: v for name, v in tensors.items() if name != "noise"}
    return parts.picture(latents(parts.call, walk._replace(noise=tensors["noise"], inputs=inputs), between))


class Engine:
    """Runs walks of one network and decoder. It keeps the captured functions of the last KEPT shapes: each holds GPU memory.

    What it keeps must not refer to it or to its sampler: the memory of a sampler that is no longer used is free at once then.
    """

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
        if compile == "openvino":  # compiled per call, not per walk: a captured walk would hold the network once per step
            openvino.check(device)
            form = openvino.Compiled(decode, "the decoder")
            self.call, self.decode = Converted(denoiser), lambda z: form(latents=z)
        self.backend = backend or backend_of(device, compile)
        self.captured: dict[Any, Captured] = {}
        self.forms: dict[Any, Forms] = {}

    @torch.no_grad()
    def inputs(self, table: Table, cond: Cond) -> Inputs:
        """Compute the network inputs of a walk, once for all its steps."""
        return self.call.inputs(table.t, cond)

    @torch.no_grad()
    def latents(self, walk: Walk) -> Tensor:
        """Run a walk uncaptured and return latents (B, C, h, w), fp32. Raises Stopped after a stop signal."""
        return latents(self.call, walk, stop.check)

    @torch.no_grad()
    def bytes(self, walk: Walk) -> Tensor:
        """Draw pictures (B, H, W, 3), uint8, on the device. The next call may overwrite them."""
        tensors, parts = {"noise": walk.noise, **walk.inputs}, Parts(self.call, picturing(self.decode))
        backend = self.backend
        if backend is None:
            return drawn(walk, parts, tensors, stop.check)
        stop.check()  # a captured walk runs no Python
        key = (id(walk.table), walk.guidance, walk.rescale, tuple((k, tuple(v.shape)) for k, v in tensors.items()))
        if key not in self.captured:
            backend.wait()  # a graph must not go while it runs
            one_step = [(k, tuple(v.shape)) for k, v in at_step(walk.inputs, 0).items()]
            shape = (tuple(walk.noise.shape[1:]), walk.rows, *one_step)
            forms = kept(self.forms, shape, lambda: Forms(parts, self.compile, backend), self.KEPT)
            kept(self.captured, key, lambda: Captured(walk, parts, tensors, forms, backend), self.KEPT)
        return self.captured[key](tensors)


def kept(table: dict[Any, Any], key: Any, make: Callable[[], Any], most: int) -> Any:
    """Return the entry of `key`, made if it is new. The oldest entries go, so that at most `most` stay."""
    if key not in table:
        while len(table) >= most:
            table.pop(next(iter(table)))
        table[key] = make()
    return table[key]


class Copy:
    """A copy of a tensor from the device to the CPU, made in the background; `wait` returns it."""

    def __init__(self, source: Tensor) -> None:
        self.event = None
        if source.is_cuda:
            self.host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self.host.copy_(source, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = source.cpu().clone()  # cloned: the engine may overwrite the source

    def wait(self) -> Tensor:
        """Wait until the copy is complete and return it."""
        if self.event is not None:
            self.event.synchronize()
        return self.host


def on_cuda(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"
