"""Read the tensors of a pickle (.ckpt, .pt, .bin) without running anything of it.

torch's guarded unpickler makes the tensors. It refuses every other name, so the names of known leftovers of training (callbacks
of Lightning, numpy's numbers, paths, configs) stand here for objects of our own that do nothing: the real ones are not imported.
"""

import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # the names of Python 2, as every unpickler translates them
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.runtime.errors import InputRefused, quoted

PICKLE = rb"PK\x03\x04|\x80[\x02-\x05][^\0]"  # the first bytes of a file of torch.save, new or old
LEFTOVERS = re.compile(  # names of what training leaves in a file beside the weights
    r"(pytorch_lightning|lightning|lightning_fabric|lightning_utilities|torchmetrics|omegaconf|ldm|sgm)\.[\w.]+"
    r"|numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+|complex\d+|dtypes\.\w+|_?core\.multiarray\.(scalar|_reconstruct))"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path"
    r"|collections\.(defaultdict|deque)|argparse\.Namespace|types\.SimpleNamespace|typing\.\w+|copyreg\._reconstructor"
    r"|builtins\.(object|bool|int|float|str|bytes|tuple|list|dict|frozenset|slice|range)"
)
DICTS = re.compile(r"collections\.defaultdict|.*\.AttributeDict")  # those that are filled item by item, as dictionaries
LISTS = re.compile(r"collections\.deque")  # and as lists
TENSORS = re.compile(  # names that the guarded unpickler itself knows how to make
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)"
    r"|torch\.(\w*Storage|\w*Tensor|Size|device|float\w+|bfloat16|u?int\d+|bool|complex\d+|half|double|long|short|per_\w+)"
    r"|torch\.(storage\.\w+|_utils\._rebuild_\w+|nn\.parameter\.Parameter|serialization\._get_layout"
    r"|_tensor\._rebuild_from_type_v2)"
)
MOST_CODES = 5_000_000  # of a pickle: SDXL's takes 0.3 million, with what its optimizer keeps a million
HINT = "it was not opened; convert it to safetensors where you trust it"


class Inert:
    """Stands for any leftover of training: takes whatever it is made of and filled with, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class InertList(list):  # type: ignore[type-arg]
    """Stands for a leftover that is filled item by item, as a deque is."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "InertList":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...


class InertDict:
    """Stands for a kind of dictionary: making one gives a plain, empty one, because the unpickler fills no others."""

    def __new__(cls, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # type: ignore[misc]
        return {}


def stand_in(name: str) -> type:
    """The class that stands for the leftover of that full name."""
    return InertDict if DICTS.fullmatch(name) else InertList if LISTS.fullmatch(name) else Inert


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """InputRefused for an archive that holds more than the file has bytes.

    torch.save packs nothing, so an honest archive is as large as its content. A packed one of some KB may hold gigabytes of
    pickle, which would be read for hours; and torch, which maps a file into memory, would take its packed bytes for weights.
    """
    rows = archive.infolist()
    packed = any(row.compress_type != zipfile.ZIP_STORED or row.file_size != row.compress_size for row in rows)
    if packed or sum(row.file_size for row in rows) > path.stat().st_size:
        raise InputRefused(f"{path}: a packed pickle, which torch.save does not write", HINT)


def imported(path: Path) -> set[str]:
    """The full names of everything that a file of torch.save would import. They are read off it without running anything.

    Empty where it cannot be taken apart; the guarded unpickler then refuses what it does not know. InputRefused where it is so
    long that taking it apart would not end.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                check_archive(path, archive)
                inner = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
                with archive.open(inner) as file:
                    return set(names_in(file, path))
        with path.open("rb") as file:  # the old format: four pickles in a row, and then the bytes of the tensors
            return {name for _ in range(4) for name in names_in(file, path)}
    except InputRefused:
        raise
    except (ValueError, RuntimeError, OSError, EOFError, StopIteration, KeyError, IndexError, zipfile.BadZipFile):
        return set()


def names_in(file: Any, path: Path) -> Iterator[str]:
    """Yield the full names that the next pickle of an open file, or of an archive's entry, imports; `path` is for messages."""
    texts: list[str] = []  # of the newer kind of import, which takes its name from the two texts before it
    for count, (code, value, _) in enumerate(pickletools.genops(file)):
        if count > MOST_CODES:
            raise InputRefused(f"{path}: a pickle of more than {MOST_CODES} instructions", HINT)
        if code.name in {"GLOBAL", "INST"}:
            module, name = str(value).split(" ", 1)
        elif code.name == "STACK_GLOBAL":
            module, name = (texts + ["?", "?"])[-2:] if len(texts) < 2 else texts[-2:]
        else:
            texts += [value] if isinstance(value, str) else []
            continue
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        yield f"{module}.{name}"


def leftovers(path: Path) -> list[str]:
    """The names of harmless leftovers of training that a pickle holds."""
    return sorted(name for name in imported(path) if LEFTOVERS.fullmatch(name))


def unsafe_globals(path: Path) -> list[str]:
    """The names of functions and classes that a pickle would import and that are neither tensors nor known leftovers."""
    return sorted(name for name in imported(path) if not LEFTOVERS.fullmatch(name) and not TENSORS.fullmatch(name))


def load(path: Path, head: bytes, *, values: bool = True) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, whose first bytes are `head`; those of its `state_dict`, if it has one.

    Without `values` they are on the meta device: names, shapes and dtypes alone. InputRefused where the file is corrupt, holds
    tensors that are none (sparse ones, or some without numbers), or would import anything beyond tensors and known leftovers of
    training.
    """
    if unsafe := unsafe_globals(path):
        raise InputRefused(f"{path}: a pickle that wants to run {', '.join(unsafe[:3])}", HINT)
    known = [(stand_in(name), name) for name in leftovers(path)]
    how: dict[str, Any] = dict(map_location="cpu" if values else "meta", weights_only=True)
    named_so = path.suffix == ".safetensors"  # torch.load goes by the name, but not where it is given an open file
    try:
        with torch.serialization.safe_globals(known), path.open("rb") as file:  # type: ignore[arg-type]
            content = torch.load(file if named_so else path, mmap=head.startswith(b"PK") and values and not named_so, **how)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        raise InputRefused(f"{path}: a pickle that holds more than tensors" + (f" ({name[1]})" if name else ""), HINT) from error
    except Exception as error:  # the unpickler runs into any kind of error in a file that is cut short, or made to mislead it
        reason = (quoted(error) or type(error).__name__).splitlines()[0][:100]
        raise InputRefused(f"{path}: a corrupt pickle ({reason})", "download the file again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {str(k): v.detach() for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise InputRefused(f"{path}: a pickle without tensors")
    check_tensors(path, tensors, values=values)
    return tensors


def check_tensors(path: Path, tensors: Mapping[str, Tensor], *, values: bool) -> None:
    """InputRefused where a tensor of a pickle is no plain block of numbers that the file holds."""
    size = path.stat().st_size
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise InputRefused(f"{path}: {name} is a sparse or quantised tensor, which is not supported")
        if tensor.is_meta and values:
            raise InputRefused(f"{path}: {name} has no numbers (it was saved from the meta device)")
        if tensor.nbytes > size:  # strides of 0 make trillions of numbers of one, which would be written out on first use
            raise InputRefused(f"{path}: {name} claims {tensor.nbytes} bytes, and the whole file has {size}")
