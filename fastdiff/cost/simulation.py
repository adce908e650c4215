"""A CUDA card that is not there: real code runs on it with right shapes, dtypes and devices, without numbers or memory.

    with Card() as card:
        ...                                     # device="cuda" works, whether this machine has a card or not
    card.peak_bytes, card.syncs

A tensor on "cuda" is a `Simulated`: it knows its shape and shares a counted `Block` with its views. Tensors on the CPU are real
and computed. An operation that mixes the two raises, as on a card. Autocast is torch's own, with CUDA's lists. Attention takes
the kernel that a card would take, and the backward pass runs in `cost.backward`. Values that are read back are constants or small
random numbers; each read is counted as a synchronisation of the host with the card.

Counted are tensors alone, in the 512 bytes that CUDA's allocator rounds to. Not counted: CUDA's context, the workspaces of cuBLAS
and cuDNN, and what the allocator loses between blocks of different sizes.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.cost.backward import Engine

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROUNDED = 512  # bytes that CUDA's allocator rounds to
FLASH_HEADS = 256  # widest attention head that the flash kernel takes
PACKAGE = str(Path(__file__).parents[1])
READ_BACK = 0.5  # what reading a floating-point number gives
Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # shape, strides, dtype


class Block:
    """Memory of the card, counted from its making to its end. A tensor and its views share one."""

    __slots__ = ("bytes", "card", "storage")

    def __init__(self, card: "Card", size: int) -> None:
        self.card, self.bytes = card, -(-size // ROUNDED) * ROUNDED
        self.storage: torch.UntypedStorage | None = None  # made for libraries that tell tensors apart by their address
        card.take(self.bytes)

    def __del__(self) -> None:
        self.card.live_bytes -= self.bytes


class Simulated(Tensor):
    """A tensor on the simulated card."""

    block: Block
    spec: Spec

    @staticmethod
    def __new__(cls, spec: Spec, block: Block) -> "Simulated":
        shape, strides, dtype = spec
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, strides=strides, dtype=dtype, device=CUDA)  # type: ignore[attr-defined]
        tensor.spec, tensor.block = spec, block
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    # torch annotates this as an instance method
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        tensor = next(value for value in leaves(args) if isinstance(value, Simulated))
        return tensor.block.card.perform(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        if self.block.storage is None:
            self.block.storage = torch.UntypedStorage(1)
        return self.block.storage

    def storage(self) -> Any:
        return torch.TypedStorage(wrap_storage=self.untyped_storage(), dtype=self.dtype, _internal=True)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.untyped_storage().data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch.no_grad():
            return memo.setdefault(id(self), alike(self, self.detach().clone()))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Simulated({tuple(self.shape)}, {self.dtype})"


def assigned(tensor: Tensor, value: Tensor) -> None:
    """Set `tensor.data`, also from the CPU to the card and back."""
    if not isinstance(tensor, Simulated) and not isinstance(value, Simulated):
        DATA.__set__(tensor, value)
        return
    with torch.no_grad():
        torch.utils.swap_tensors(tensor, alike(tensor, value.detach().view(value.shape)))


DATA: Any = vars(torch._C.TensorBase)["data"]  # torch's own way to set it


def alike(tensor: Tensor, value: Tensor) -> Tensor:
    """Return `value` as a parameter if `tensor` is one, with its `requires_grad`."""
    return (
        nn.Parameter(value, tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else value.requires_grad_(tensor.requires_grad)
    )


def leaves(value: Any) -> Iterator[Any]:
    """Iterate over the values in nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves(tuple(value.values()))
    else:
        yield value


class Card(TorchDispatchMode):
    """The simulated card. Inside the `with`, torch believes that a CUDA device with `memory_gib` is there."""

    def __init__(self, memory_gib: float = 24, *, capability: tuple[int, int] = (8, 9)) -> None:
        super().__init__()
        self.memory_bytes, self.capability = int(memory_gib * 2**30), capability
        self.live_bytes = self.peak_bytes = 0
        self.syncs: Counter[str] = Counter()  # {file:line of ours: how often the host waited for the card there}
        self.kernels: Counter[str] = Counter()  # {attention kernel: calls}
        self.watched = False  # whether to note where the peak was
        self.peak_place: list[str] = []
        # {operation and the specs of its arguments: specs of its results, and the argument whose memory each one is in}
        self.known: dict[Any, Any] = {}

    # ---- bytes

    def take(self, size: int) -> None:
        """Count a new block."""
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            if self.watched:
                self.peak_place = callers()

    def reset_peak(self) -> None:
        """Start measuring a new peak."""
        self.peak_bytes, self.peak_place = self.live_bytes, []

    def sync(self) -> None:
        """Count a wait of the host for the card, at the innermost line of ours."""
        self.syncs[next(iter(callers()), "elsewhere")] += 1

    def made(self, spec: Spec) -> Simulated:
        """Return a new tensor in a block of its own."""
        return Simulated(spec, Block(self, extent(spec) * spec[2].itemsize))

    # ---- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Simulated):  # most operations: no need to look at all arguments
            return self.perform(func, args, kwargs)
        device = kwargs.get("device")
        if (device is not None and device.type == "cuda") or any(
            isinstance(value, Simulated) for value in leaves((args, kwargs))
        ):
            return self.perform(func, args, kwargs)
        if func._overloadpacket is aten._to_copy and args[0].is_meta and device is not None and device.type == "cpu":
            kwargs["device"] = torch.device("meta")  # a network without weights, which moves to the CPU
        kwargs.pop("pin_memory", None)  # only a driver can pin memory
        return func(*args, **kwargs)

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Do one operation on the card: look up or find out what it returns, and count the new blocks."""
        packet = func._overloadpacket
        if (read := READS.get(packet)) and (result := read(self, packet, args, kwargs)) is not NotImplemented:
            return result
        kwargs.pop("generator", None)
        if (device := kwargs.get("device")) is not None and device.type == "cpu":  # a CPU tensor like one on the card
            kwargs.pop("pin_memory", None)
            metas = iter([empty(value.spec) for value in leaves(args) if isinstance(value, Simulated)])
            return func(*swapped(args, metas), **kwargs)
        tensors: list[Tensor] = []
        key = (func, described(args, tensors), described(tuple(kwargs.items()), tensors))
        results = self.known.get(key)
        if results is None:
            results = self.known[key] = self.found_out(func, args, kwargs, tensors)
        single, rows = results
        out = [tensors[row] if isinstance(row, int) else self.result(row, tensors) for row in rows]
        return out[0] if single is None else single(out)

    def result(self, row: Any, tensors: list[Tensor]) -> Any:
        """Make one result: a new tensor, a view of an argument, or a plain value."""
        if not isinstance(row, Row):
            return row[0]
        if row.source is None:
            return self.made(row.spec)
        return Simulated(row.spec, tensors[row.source].block)  # type: ignore[attr-defined]

    def found_out(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run an operation on the meta device: (how several results are packed, one row for each)."""
        mixed = [t for t in tensors if not isinstance(t, Simulated) and t.dim() > 0]
        if mixed and func._overloadpacket not in INDEXED:
            shapes = ", ".join(str(tuple(t.shape)) for t in mixed)
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} of cuda:0 and a cpu tensor of {shapes}")
        metas = [empty(spec_of(t)) for t in tensors]
        waiting = iter(metas)
        placed = lambda value: swapped(value, waiting)
        meta_args, meta_kwargs = placed(args), placed(tuple(kwargs.values()))
        how = dict(zip(kwargs, meta_kwargs, strict=True))
        if "device" in how:
            how["device"] = torch.device("meta")
        with torch.no_grad():
            out = func(*meta_args, **how)
        several = isinstance(out, tuple | list)
        storages = {meta.untyped_storage()._cdata: i for i, meta in enumerate(metas)}

        def row(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return (value,)
            same = next((i for i, meta in enumerate(metas) if meta is value), None)
            if same is not None:
                return same
            return Row(spec_of(value), storages.get(value.untyped_storage()._cdata))

        return (type(out) if several else None), [row(value) for value in (out if several else (out,))]

    def scalar(self, packet: Any, args: Any, kwargs: Any) -> Any:
        """Answer `.item()` and `bool()`."""
        if not any(isinstance(value, Simulated) for value in args):
            return NotImplemented
        self.sync()
        if packet is not aten._local_scalar_dense or args[0].dtype == torch.bool:
            return True
        return READ_BACK if args[0].dtype.is_floating_point else 1

    def copied(self, packet: Any, args: Any, kwargs: Any) -> Any:
        """Copy a tensor between CPU and card, as a new one."""
        source, device = args[0], kwargs.get("device")
        dtype = kwargs.get("dtype") or source.dtype
        if isinstance(source, Simulated):
            if device is not None and device.type == "meta":
                return torch.empty_strided(*source.spec[:2], dtype=dtype, device=device)
            if device is None or device.type != "cpu":
                return NotImplemented
            self.sync()
            return made_up(source, dtype)
        strides = torch.empty_like(empty(spec_of(source))).stride()  # dense, in the order of the source's
        return self.made((tuple(source.shape), strides, dtype))

    def written(self, packet: Any, args: Any, kwargs: Any) -> Any:
        """Copy a tensor between CPU and card, into an existing one."""
        target, source = args[:2]
        if isinstance(target, Simulated) and isinstance(source, Simulated):
            return NotImplemented
        torch.broadcast_shapes(target.shape, source.shape)
        if isinstance(source, Simulated):
            if not (args[2] if len(args) > 2 else kwargs.get("non_blocking")):
                self.sync()
            if not target.is_meta:
                target.copy_(made_up(source, target.dtype).expand_as(target))
        return target

    # ---- torch's view of the card

    def __enter__(self) -> "Card":
        self.stack = ExitStack()
        self.stack.enter_context(self.pretended())
        self.stack.enter_context(Engine().watching())
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.stack.close()

    @contextmanager
    def pretended(self) -> Iterator[None]:
        """Let torch's questions about CUDA be answered by this card."""
        torch._C._ensureCUDADeviceGuardSet()
        answers: list[tuple[Any, str, Any]] = [
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "is_initialized", lambda: False),
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "set_device", lambda *_: None),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: self.capability >= (8, 0)),
            (torch.cuda, "get_device_name", lambda *_: "simulated CUDA"),
            (torch.cuda, "get_device_capability", lambda *_: self.capability),
            (torch.cuda, "current_stream", lambda *_: Event()),
            (torch.cuda, "synchronize", lambda *_: self.sync()),
            (torch.cuda, "empty_cache", lambda: None),
            (torch.cuda, "get_rng_state_all", lambda: [torch.zeros(16, dtype=torch.uint8)]),
            (torch.cuda, "set_rng_state_all", lambda *_: None),
            (torch.cuda, "manual_seed", lambda *_: None),
            (torch.cuda, "manual_seed_all", lambda *_: None),
            (torch.cuda, "mem_get_info", lambda *_: (self.memory_bytes - self.live_bytes, self.memory_bytes)),
            (torch.cuda, "memory_allocated", lambda *_: self.live_bytes),
            (torch.cuda, "max_memory_allocated", lambda *_: self.peak_bytes),
            (torch.cuda, "max_memory_reserved", lambda *_: self.peak_bytes),
            (torch.cuda, "reset_peak_memory_stats", lambda *_: self.reset_peak()),
            (torch.cuda, "Event", Event),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.Tensor, "pin_memory", pinned),
            (F, "scaled_dot_product_attention", self.attention(F.scaled_dot_product_attention)),
            (torch.Tensor, "data", property(DATA.__get__, assigned)),
            (torch, "tensor", copying(torch.tensor)),
            (torch, "as_tensor", copying(torch.as_tensor)),
        ]
        before = torch.__future__.get_swap_module_params_on_conversion()
        with ExitStack() as stack:
            for owner, name, answer in answers:
                stack.enter_context(patch.object(owner, name, answer, create=True))
            # A parameter keeps its identity when its network moves, as on a real card.
            torch.__future__.set_swap_module_params_on_conversion(True)
            # What depends on values, such as the places of a mask, gets the largest size that it can have.
            stack.enter_context(patch.object(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True))
            try:
                yield
            finally:
                torch.__future__.set_swap_module_params_on_conversion(before)

    def attention(self, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return an attention with the kernel of an Ampere or later card: flash in half precision, else memory-efficient."""

        def attend(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
        ) -> Tensor:  # fmt: skip
            if not isinstance(query, Simulated):
                return real(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
            if torch.is_autocast_enabled("cuda"):
                query, key, value = (x.to(torch.get_autocast_dtype("cuda")) for x in (query, key, value))
            if not query.dtype == key.dtype == value.dtype:
                raise RuntimeError(f"attention of {query.dtype}, {key.dtype} and {value.dtype}")
            width = query.shape[-1]
            if attn_mask is None and query.dtype.itemsize == 2 and width <= FLASH_HEADS:
                self.kernels["flash"] += 1
                if pad := -width % 8:
                    query, key, value = (F.pad(x, (0, pad)) for x in (query, key, value))
                how = dict(scale=scale or 1 / math.sqrt(width))
                out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, False, **how)[0]
                return out[..., :width] if pad else out
            self.kernels["efficient"] += 1
            grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
            if attn_mask is not None:
                attn_mask = attn_mask.expand(*query.shape[:2], query.shape[-2], key.shape[-2])
            efficient = aten._scaled_dot_product_efficient_attention
            return efficient(query, key, value, attn_mask, grad, 0.0, is_causal, scale=scale)[0]

        return attend


READS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: Card.scalar,
    aten.is_nonzero: Card.scalar,
    aten.equal: Card.scalar,
    aten._to_copy: Card.copied,
    aten.copy_: Card.written,
}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # these take indices from the CPU


class Row:
    """One result of an operation: its spec, and the number of the tensor argument whose memory it is a view of."""

    __slots__ = ("source", "spec")

    def __init__(self, spec: Spec, source: int | None) -> None:
        self.spec, self.source = spec, source


def spec_of(tensor: Tensor) -> Spec:
    """Return the spec of any tensor."""
    return tensor.spec if isinstance(tensor, Simulated) else (tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def described(value: Any, tensors: list[Tensor]) -> Any:
    """Return arguments as a key, with a spec in place of each tensor; the tensors are appended to `tensors`."""
    if isinstance(value, Simulated):
        tensors.append(value)
        return value.spec
    if isinstance(value, tuple | list):
        return tuple([described(part, tensors) for part in value])
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("cpu", *spec_of(value))
    return (type(value), value) if isinstance(value, int | float) else value  # 1, 1.0 and True are equal as keys


def swapped(value: Any, metas: Iterator[Tensor]) -> Any:
    """Return arguments with the next of `metas` in place of each tensor."""
    if isinstance(value, Tensor):
        return next(metas)
    return type(value)(swapped(part, metas) for part in value) if isinstance(value, tuple | list) else value


def extent(spec: Spec) -> int:
    """Return how many elements lie between the first and the last one of a tensor, both included."""
    shape, strides, _ = spec
    return 0 if 0 in shape else 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def empty(spec: Spec) -> Tensor:
    """Return a meta tensor of a spec."""
    return torch.empty_strided(*spec[:2], dtype=spec[2], device="meta")


def copying(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `torch.tensor` or `torch.as_tensor` so that its copy to the card is an operation that the card sees."""

    def made(value: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return make(value, *args, **kwargs) if device is None else make(value, *args, device=device, **kwargs)
        if isinstance(value, Tensor):
            return value.to(device, **kwargs)
        return make(value, *args, device="cpu", **kwargs).to(device)

    return made


def pinned(tensor: Tensor, *_: Any) -> Tensor:
    """Stand in for Tensor.pin_memory: like the driver's, it refuses a tensor in which one value stands for many."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


class Event:
    """Stand-in for torch.cuda.Event and torch.cuda.Stream: there is nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...


def made_up(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a CPU tensor in place of one that is read back from the card; always the same one for a shape."""
    if dtype.is_floating_point:
        return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())).mul_(0.1).to(dtype)
    return torch.ones(tensor.shape, dtype=dtype) if dtype == torch.bool else torch.zeros(tensor.shape, dtype=dtype)


def callers(depth: int = 8) -> list[str]:
    """Return the places in this package that are being called, innermost first, as file:line."""
    places: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame and len(places) < depth:
        path = frame.f_code.co_filename
        if path.startswith(PACKAGE) and "/cost/simulation" not in path and "/cost/backward" not in path:
            places.append(f"{path.removeprefix(PACKAGE)[1:]}:{frame.f_lineno}")
        frame = frame.f_back
    return places
