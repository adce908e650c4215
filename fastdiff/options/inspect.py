"""The options of `inspect`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

EXAMPLES = """fastdiff inspect model.safetensors
fastdiff inspect style.safetensors --base sdxl --json"""


@dataclass
class Config:
    ESSENTIALS: ClassVar[str] = "file base"
    file: Annotated[str, "a .safetensors file, a pickle, a diffusers folder or a hub id"] = field(metadata={"argument": True})
    base: Annotated[str | None, "count how many modules of a LoRA fit this checkpoint"] = field(
        default=None, metadata={"flags": ["-b"]}
    )
