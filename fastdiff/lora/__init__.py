"""Read LoRA files of every layout, merge them exactly, write them, and train them as adapters of a network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff.lora.adapters import attach as attach
    from fastdiff.lora.adapters import save_adapter as save_adapter
    from fastdiff.lora.file import Lora as Lora
    from fastdiff.lora.file import from_peft as from_peft
    from fastdiff.lora.file import layers_told as layers_told
    from fastdiff.lora.file import load as load
    from fastdiff.lora.file import outline as outline
    from fastdiff.lora.file import parse as parse
    from fastdiff.lora.file import parse_spec as parse_spec
    from fastdiff.lora.file import summary as summary
    from fastdiff.lora.merging import bake as bake
    from fastdiff.lora.merging import merge as merge
    from fastdiff.lora.places import called as called
    from fastdiff.lora.places import files_of as files_of
    from fastdiff.lora.places import located as located
    from fastdiff.lora.writing import header as header
    from fastdiff.lora.writing import save as save

# Public name -> module. No module here may have one of these names: importing it would replace the function.
PUBLIC = {
    **dict.fromkeys(
        ("Lora", "from_peft", "layers_told", "load", "outline", "parse", "parse_spec", "summary"),
        "fastdiff.lora.file",
    ),
    **dict.fromkeys(("called", "files_of", "located"), "fastdiff.lora.places"),
    **dict.fromkeys(("header", "save"), "fastdiff.lora.writing"),
    **dict.fromkeys(("merge", "bake"), "fastdiff.lora.merging"),
    **dict.fromkeys(("attach", "save_adapter"), "fastdiff.lora.adapters"),
}


# Python calls this for a name that the module does not have yet. The modules import torch, so they load on first use.
def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'fastdiff.lora' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(PUBLIC[name]), name)  # a name of PUBLIC
    return value
