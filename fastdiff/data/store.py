"""Tensors on disk by key, many per safetensors file. Files are memory-mapped, so a data set may be larger than memory."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.denoiser import of_one_length
from fastdiff.runtime import console
from fastdiff.runtime.errors import DoesNotFit


class Store:
    """A folder of safetensors files with tensors named `KEY.PART`. The headers of the files tell which keys there are.

    Each process writes its own files, and each file is written completely or not at all. So several processes can fill one
    store, and a killed one continues after its last file. `notes` are small JSON values by key, kept in the files' headers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.places, self.notes = folder, {}, {}
        self.files: dict[Path, Any] = {}
        self.scan()

    places: dict[str, Any]  # key -> the open file that holds it
    notes: dict[str, Any]

    def scan(self) -> None:
        """Open the files that other processes have written since the last scan."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self.files:
                self.open(path)

    def open(self, path: Path) -> None:
        """Map a file. A damaged file is deleted with a warning, so that its contents are made again."""
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt").__enter__()
            notes = json.loads((file.metadata() or {}).get("notes", "{}"))
        except FileNotFoundError:  # another process has removed it
            return
        except (SafetensorError, ValueError, OSError):
            console.warn(f"{path}: the file is damaged; its contents are made again")
            path.unlink(missing_ok=True)
            return
        self.files[path] = file
        self.places |= {name.split(".")[0]: file for name in file.keys()}  # noqa: SIM118  (it has no __iter__)
        self.notes |= notes

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def put(self, rows: dict[str, dict[str, Tensor]], notes: dict[str, Any] | None = None) -> None:
        """Write {key: {part: tensor}} as one file, with notes by key. Raises DoesNotFit if the disk is full."""
        from safetensors.torch import save_file

        if not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(' '.join(rows).encode()).hexdigest()[:32]}.safetensors"
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        flat = {f"{key}.{part}": tensor.contiguous() for key, parts in rows.items() for part, tensor in parts.items()}
        try:
            save_file(flat, staged, {"notes": json.dumps(notes or {})})
            staged.replace(path)
        except Exception as error:  # safetensors raises its own error for a full disk
            staged.unlink(missing_ok=True)
            if "No space left" in str(error) or "StorageFull" in str(error):
                raise DoesNotFit(f"{self.folder}: the disk is full", "set FASTDIFF_CACHE to another folder") from error
            raise
        self.open(path)

    def get(self, key: str, part: str) -> Tensor:
        """Return a stored tensor, in its stored dtype."""
        return self.places[key].get_tensor(f"{key}.{part}")

    def shape(self, key: str, part: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor without reading it."""
        return tuple(self.places[key].get_slice(f"{key}.{part}").get_shape())


class Stored:
    """The tensors of N keys as rows of one tensor (N, ...), read from disk when indexed, as fp32.

    Text states (L, D) of prompts of different lengths are brought to one length by the rows that are read together.
    """

    def __init__(self, store: Store, part: str, keys: list[str]) -> None:
        self.store, self.part, self.keys = store, part, keys

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self), *self.store.shape(self.keys[0], self.part))

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """Read the rows (N', ...) of indices (N',) or a slice."""
        keys: Iterable[str] = self.keys[index] if isinstance(index, slice) else (self.keys[i] for i in index.tolist())
        return stacked([self.store.get(key, self.part).float() for key in keys])

    def rows(self, part: slice) -> "Stored":
        """Return a part of the rows without reading them."""
        return Stored(self.store, self.part, self.keys[part])


class Rows:
    """Tensors of different lengths (L, D) as rows of one tensor (N, L, D), like `Stored`, but in memory."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.tensors = rows

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """The rows (N', L, D) of indices (N',) or a slice, of one length."""
        return stacked(self.tensors[index] if isinstance(index, slice) else [self.tensors[i] for i in index.tolist()])


def stacked(rows: list[Tensor]) -> Tensor:
    """Tensors as rows of one; of text states (L, D), which may differ in length, all are brought to one."""
    return torch.stack(rows if len({row.shape for row in rows}) < 2 else of_one_length(rows))


class Share:
    """Divides the work on a cache folder among processes. All processes must make one and call the same methods in turn.

    Machines that share the folder's file system share one cache; otherwise each machine fills its own.
    """

    def __init__(self, folder: Path) -> None:
        from accelerate import PartialState

        self.state = PartialState()
        self.rank, self.processes = self.state.process_index, self.state.num_processes
        if self.processes == 1:
            return
        mark = folder / f".shared-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}"
        if self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.wait()
        if not self.all(mark.exists()):
            self.rank, self.processes = self.state.local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        if self.state.is_main_process:
            mark.unlink(missing_ok=True)

    def mine(self, number: int) -> bool:
        """Return whether this process handles the item of this number. The number must not depend on what is missing by now."""
        return number % self.processes == self.rank

    def wait(self) -> None:
        """Wait for all processes."""
        self.state.wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """Return the items of all processes in one list."""
        from accelerate.utils import gather_object

        return gather_object(items) if self.state.num_processes > 1 else items

    def all(self, mine: bool) -> bool:
        """Return whether the value is true on all processes."""
        return all(self.gather([mine]))
