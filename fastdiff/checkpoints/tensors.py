"""Tensor files, safely: what a file is by its first bytes, a checked header, tensors read one by one and written so.

Nothing that a file says is run. A pickle is opened only when allowed, by torch's unpickler that builds tensors alone.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastdiff.runtime.errors import DoesNotFit, GateFailed, InputRefused, UsageError, as_field, quoted

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLE = rb"PK\x03\x04|\x80[\x02-\x05][^\0]"
OTHER_FILES = (  # how they begin, what they are, what to do
    (PICKLE, "a pickle (.ckpt, .pt, .bin), which can run code", "convert it to safetensors; `allow_pickle` reads tensors alone"),
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights", "run: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, not the weights", "download the file again"),
    (rb"GGUF", "a GGUF file", "give the safetensors file that it was made from"),
    (rb"", "not a safetensors file, or corrupt, empty or cut short", "download or copy the file again"),
)  # fmt: skip
AHEAD = 4  # tensors made before the first of them is on its way to the disk
STRANGE_NAME = re.compile(r"[/\\\x00-\x1f]|^\.|\.\.")


class Layout(NamedTuple):
    """One tensor of a file: torch dtype, shape, and where its bytes are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name. Indexing reads that tensor's bytes and no others."""

    def __init__(self, path: Path, layouts: dict[str, Layout], metadata: dict[str, str], loaded: dict[str, Tensor] | None = None):
        self.path, self.layouts, self.metadata, self.loaded = path, layouts, metadata, loaded
        self.lock = threading.Lock()  # one place in the file at a time

    def __getitem__(self, name: str) -> Tensor:
        if self.loaded is not None:
            return self.loaded[name]
        dtype, shape, start, end = self.layouts[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        buffer = torch.empty(end - start, dtype=torch.uint8)
        with self.lock:
            self.handle.seek(start)
            if self.handle.readinto(memoryview(buffer.numpy())) != len(buffer):
                raise InputRefused(f"{self.path}: cut short while it was read ({name})")
        return buffer.view(dtype).reshape(shape)

    @cached_property
    def handle(self) -> Any:
        """Open until the object goes; opening it for each tensor would cost as much as reading."""
        return self.path.open("rb")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.layouts

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.layouts.items()}


def open_file(path: str | Path, *, allow_pickle: bool = False) -> TensorFile:
    """A .safetensors file, or a pickle where that is allowed; InputRefused says what anything else is."""
    path = Path(path).expanduser()
    if not path.exists():
        raise UsageError(f"{path}: no such file")
    if path.is_dir():
        raise InputRefused(f"{path}: a folder, not a file of tensors", f"name the file: {path}/<name>.safetensors")
    try:
        with path.open("rb") as file:
            head = file.read(64)
        return open_pickle(path, head) if allow_pickle and re.match(PICKLE, head) else open_safetensors(path, head)
    except OSError as error:
        raise InputRefused(f"{path}: cannot be read ({error.strerror or error})") from error


def open_safetensors(path: Path, head: bytes) -> TensorFile:
    """The library checks the header; we refuse besides what it lets pass: a name twice, a name that is a path."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            count = len(file.keys())
    except (SafetensorError, ValueError) as error:
        _, kind, hint = next(row for row in OTHER_FILES if re.match(row[0], head))
        raise InputRefused(f"{path}: {kind}", hint) from error
    size = int.from_bytes(head[:8], "little")
    with path.open("rb") as file:
        file.seek(8)
        pairs = json.loads(file.read(size), object_pairs_hook=lambda found: found)
    metadata: dict[str, str] = {}
    layouts: dict[str, Layout] = {}
    for name, entry in pairs:
        if name == "__metadata__":
            metadata = dict(entry)
            continue
        if name in layouts:
            raise InputRefused(f"{path}: the tensor {name!r} is in it twice")
        if STRANGE_NAME.search(name):
            raise InputRefused(f"{path}: the tensor name {name[:80]!r} looks like a path")
        told = dict(entry)
        if told["dtype"] not in DTYPES:
            raise InputRefused(f"{path}: {name} is stored as {told['dtype']}, which is not supported")
        start, end = told["data_offsets"]
        layouts[name] = Layout(DTYPES[told["dtype"]], tuple(told["shape"]), 8 + size + start, 8 + size + end)
    assert len(layouts) == count, "the library counts tensors otherwise"
    return TensorFile(path, layouts, metadata)


def unsafe_globals(path: Path) -> list[str]:
    """What a pickle would import beyond tensors; found without running it."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, OSError):  # no whole zip archive: only the guarded unpickler itself can tell
        return []


def open_pickle(path: Path, head: bytes) -> TensorFile:
    """Tensors of a torch.save file, built by the unpickler that can build nothing else."""
    import pickle

    told = unsafe_globals(path)
    hint = "it was not opened; convert it to safetensors where you trust it"
    if told:
        raise InputRefused(f"{path}: a pickle that wants to run {', '.join(told[:3])}", hint)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)|[Tt]rying to load unsupported GLOBAL (\S+)", str(error))
        raise InputRefused(f"{path}: a pickle that holds more than tensors" + (f" ({name[1]})" if name else ""), hint) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise InputRefused(
            f"{path}: a corrupt pickle ({quoted(error).splitlines()[0][:100]})", "download the file again"
        ) from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    tensors = {str(k): v.detach() for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputRefused(f"{path}: a pickle without tensors")
    layouts = {k: Layout(v.dtype, tuple(v.shape), 0, v.nbytes) for k, v in tensors.items()}
    return TensorFile(path, layouts, {}, tensors)


@dataclass
class Entry:
    """One tensor to write; `read` is called when its turn has come, and its result freed after."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Tensors at hand as entries."""
    return [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def raw(tensor: Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def write(path: str | Path, wanted: Iterable[Entry], metadata: Mapping[str, str]) -> dict[str, bytes]:
    """A safetensors file, staged beside `path`, synced and renamed; a handful of tensors are in memory.

    Returns a digest of each tensor's bytes, for `verify`.

    The same bytes for the same content: metadata is sorted (the library's order differs from process to process), tensors
    lie by size of their dtype and name, as the library lays them. DoesNotFit where the disk is too full.
    """
    path = Path(path)
    rows = sorted(wanted, key=lambda row: (-row.dtype.itemsize, row.name))
    told: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for row in rows:
        assert row.name not in told, f"{row.name} twice"
        told[row.name] = {"dtype": CODES[row.dtype], "shape": list(row.shape), "data_offsets": [offset, offset + row.nbytes]}
        offset += row.nbytes
    text = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < offset + len(text):
        raise DoesNotFit(f"{as_field('output', path)}: needs {offset / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free there")
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            digests = stream(file, rows)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    return digests


def stream(file: BinaryIO, rows: Iterable[Entry]) -> dict[str, bytes]:
    """Make a tensor while the one before it is written and hashed: the three take about as long as each other."""
    waiting: deque[tuple[str, Future[Any], Future[bytes]]] = deque()
    digests: dict[str, bytes] = {}
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
        for row in rows:
            tensor = row.read().detach().to("cpu", row.dtype).contiguous()
            assert tuple(tensor.shape) == row.shape, f"{row.name}: {tuple(tensor.shape)}, announced as {row.shape}"
            data = raw(tensor)
            waiting.append((row.name, writer.submit(file.write, data), hasher.submit(digest, data)))
            while len(waiting) > AHEAD:
                finish(waiting, digests)
        while waiting:
            finish(waiting, digests)
    return digests


def finish(waiting: deque[tuple[str, "Future[Any]", "Future[bytes]"]], digests: dict[str, bytes]) -> None:
    name, written, hashed = waiting.popleft()
    written.result()  # raises what the disk raised
    digests[name] = hashed.result()


def digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def verify(path: Path, digests: Mapping[str, bytes]) -> None:
    """Read a written file back and compare every tensor; GateFailed names the first that differs."""
    file = open_file(path)
    same = lambda name: name in file and digest(raw(file[name])) == digests[name]
    with ThreadPoolExecutor(2) as pool:
        wrong = [name for name, good in zip(digests, pool.map(same, digests), strict=True) if not good]
    if wrong:
        raise GateFailed(f"{path}: {wrong[0]} does not read back as it was written; the disk may be failing")
    if len(file) != len(digests):
        raise GateFailed(f"{path}: {len(file)} tensors read back, {len(digests)} were written")
