"""Read and write tensor files safely: detect the format by the first bytes, check the header, handle one tensor at a time.

No code from a file is ever run. A pickle is opened only where that is allowed, by torch's unpickler for tensors alone.
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
from functools import cached_property, partial
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from fastdiff.checkpoints import pickles
from fastdiff.checkpoints.pickles import PICKLE
from fastdiff.runtime import secrets
from fastdiff.runtime.errors import DoesNotFit, GateFailed, InputRefused, UsageError, as_field

# What the option `precision` of commands that write files means; None: as the inputs are stored.
WRITTEN: dict[str, torch.dtype | None] = {
    "stored": None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
}  # fmt: skip
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
OTHER_FILES = (  # first bytes, what such a file is, what to do
    (PICKLE, "a pickle (.ckpt, .pt, .bin), which can run code", "convert it to safetensors; `allow_pickle` reads tensors alone"),
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights", "run: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a web page, not the weights", "download the file again"),
    (rb"GGUF", "a GGUF file", "give the safetensors file that it was made from"),
    (rb"", "not a safetensors file, or corrupt, empty or cut short", "download or copy the file again"),
)  # fmt: skip
MOST_TENSORS = 100_000  # of a file: SDXL has 2,600, and a LoRA of all its layers 8,000
AHEAD = 4  # tensors that may wait in memory to be written
STRANGE_NAME = re.compile(r"[/\\\x00-\x1f]|^\.|\.\.")


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    """The smallest of fp16, bf16 and fp32 that holds the values of all these floating dtypes; None where there are none.

    bf16 beside fp16 needs fp32: neither holds the other's values. 8-bit numbers fit in fp16; of fp64 the digits of fp32 are used.
    """
    needed = {torch.float16 if dtype.itemsize == 1 else dtype for dtype in dtypes if dtype.is_floating_point}
    return next(iter(needed)) if len(needed) == 1 and torch.float64 not in needed else torch.float32 if needed else None


class Layout(NamedTuple):
    """Dtype and shape of one tensor of a file, and the range of bytes that it takes there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a file by name. Indexing reads the bytes of that tensor alone; InputRefused where the file is cut short."""

    def __init__(
        self, path: Path, layouts: dict[str, Layout], metadata: dict[str, str], loaded: dict[str, Tensor] | None = None
    ) -> None:
        self.path, self.layouts, self.metadata, self.loaded = path, layouts, metadata, loaded
        self.lock = threading.Lock()  # threads share one position in the file

    def __getitem__(self, name: str) -> Tensor:
        if self.loaded is not None:
            return self.loaded[name]
        dtype, shape, start, end = self.layouts[name]
        if start == end:
            return torch.empty(shape, dtype=dtype)
        buffer = torch.empty(end - start, dtype=torch.uint8)
        with self.lock:
            self.handle.seek(start)
            if self.handle.readinto(buffer.numpy().data) != len(buffer):
                raise InputRefused(f"{self.path}: cut short while it was read ({name})")
        return buffer.view(dtype).reshape(shape)

    @cached_property
    def handle(self) -> BufferedReader:
        """The open file, kept until this object is deleted: opening it for each tensor would take as long as reading."""
        return self.path.open("rb")

    def __iter__(self) -> Iterator[str]:
        return iter(self.layouts)

    def __contains__(self, name: object) -> bool:  # the method of Mapping would read the tensor
        return name in self.layouts

    def __len__(self) -> int:
        return len(self.layouts)

    @property
    def stored_dtypes(self) -> list[str]:
        """The codes of the dtypes that the file itself holds, in order."""
        return sorted({CODES.get(layout.dtype, str(layout.dtype)) for layout in self.layouts.values()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: layout.shape for name, layout in self.layouts.items()}


class PickleOutline(TensorFile):
    """A pickle of which names, shapes and dtypes are known. The numbers of all its tensors are read when some are asked for."""

    def __init__(self, path: Path, layouts: dict[str, Layout], loaded: dict[str, Tensor], head: bytes) -> None:
        super().__init__(path, layouts, {}, loaded)
        self.head, self.read = head, False

    def __getitem__(self, name: str) -> Tensor:
        if not self.read:
            self.loaded, self.read = pickles.load(self.path, self.head), True
        return super().__getitem__(name)


def outlined(file: TensorFile) -> TensorFile:
    """The file with all its tensors on the meta device: they have shapes and no numbers, and none is read."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape, *_) in file.layouts.items()}
    return TensorFile(file.path, file.layouts, file.metadata, empty)


def open_file(path: str | Path, *, allow_pickle: bool = False) -> TensorFile:
    """Open a .safetensors file, or with `allow_pickle` a pickle of tensors too. No tensor of a .safetensors file is read yet.

    UsageError where there is no file; InputRefused, naming what the file is, where it is of another kind, corrupt or unsafe.
    """
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
    """Open a safetensors file whose first bytes are `head`; InputRefused where it is corrupt or strange.

    The library checks the header. Names that occur twice or look like a path pass there, so they are refused here.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            count = len(file.keys())
    except (SafetensorError, ValueError) as error:
        _, kind, hint = next(row for row in OTHER_FILES if re.match(row[0], head))
        raise InputRefused(f"{path}: {kind}", hint) from error
    if count > MOST_TENSORS:
        raise InputRefused(f"{path}: holds {count} tensors, more than any model that is supported ({MOST_TENSORS})")
    size = int.from_bytes(head[:8], "little")
    with path.open("rb") as file:
        file.seek(8)
        pairs = json.loads(file.read(size), object_pairs_hook=lambda pairs: pairs)  # keeps names that occur twice
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
        fields = dict(entry)
        if fields["dtype"] not in DTYPES:
            raise InputRefused(f"{path}: {name} is stored as {fields['dtype']}, which is not supported")
        start, end = fields["data_offsets"]
        layouts[name] = Layout(DTYPES[fields["dtype"]], tuple(fields["shape"]), 8 + size + start, 8 + size + end)
    assert len(layouts) == count, "the library counts another number of tensors"
    return TensorFile(path, layouts, metadata)


def open_pickle(path: Path, head: bytes, *, values: bool = True) -> TensorFile:
    """Open a torch.save file, of which nothing is run; see `pickles.load`.

    Without `values`, only names, shapes and dtypes are read, and numbers where they are asked for.
    """
    loaded = pickles.load(path, head, values=values)
    if len(loaded) > MOST_TENSORS:
        raise InputRefused(f"{path}: holds {len(loaded)} tensors, more than any model that is supported ({MOST_TENSORS})")
    layouts = {k: Layout(v.dtype, tuple(v.shape), 0, v.nbytes) for k, v in loaded.items()}
    return TensorFile(path, layouts, {}, loaded) if values else PickleOutline(path, layouts, loaded, head)


@dataclass
class Entry:
    """One tensor to write. `read` makes it just before it is written, and it is freed afterwards."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def entries(tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Entries that write tensors which are already in memory."""
    return [Entry(name, t.dtype, tuple(t.shape), partial(tensors.__getitem__, name)) for name, t in tensors.items()]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write(path: str | Path, wanted: Iterable[Entry], metadata: Mapping[str, str]) -> dict[str, bytes]:
    """Write a safetensors file and return the sha256 of each tensor's bytes by name, for `verify`.

    The file is written under another name in the same folder, synced and then renamed; only a handful of tensors are in memory
    at a time. DoesNotFit where the disk has too little space.
    """
    path = Path(path)
    # Equal content gives equal bytes: tensors lie by dtype size and name, as the library lays them, and metadata is sorted,
    # since the library's own order changes from process to process.
    rows = sorted(wanted, key=lambda row: (-row.dtype.itemsize, row.name))
    head: dict[str, Any] = {"__metadata__": secrets.hidden_in(dict(sorted(metadata.items())))} if metadata else {}
    offset = 0
    for row in rows:
        assert row.name not in head, f"{row.name} twice"
        head[row.name] = {"dtype": CODES[row.dtype], "shape": list(row.shape), "data_offsets": [offset, offset + row.nbytes]}
        offset += row.nbytes
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
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
    """Write the tensors to the end of `file` and return the sha256 of each by name.

    A tensor is made while the one before it is written and hashed, since the three take about the same time.
    """
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
    """Wait for the oldest waiting tensor and note its digest; raises OSError where it could not be written."""
    name, written, hashed = waiting.popleft()
    written.result()
    digests[name] = hashed.result()


def digest(data: memoryview) -> bytes:
    return hashlib.sha256(data).digest()


def verify(path: Path, digests: Mapping[str, bytes]) -> None:
    """Read a written file back and compare it with the digests from `write`; GateFailed names the first tensor that differs."""
    file = open_file(path)
    same = lambda name: name in file and digest(raw(file[name])) == digests[name]
    with ThreadPoolExecutor(2) as pool:
        wrong = [name for name, good in zip(digests, pool.map(same, digests), strict=True) if not good]
    if wrong:
        raise GateFailed(f"{path}: {wrong[0]} does not read back as it was written; the disk may be failing")
    if len(file) != len(digests):
        raise GateFailed(f"{path}: {len(file)} tensors read back, {len(digests)} were written")
