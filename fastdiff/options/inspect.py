"""The options of `inspect`."""

from dataclasses import MISSING, dataclass, field
from typing import Annotated, ClassVar

EXAMPLES = """fastdiff inspect model.safetensors
fastdiff inspect style.safetensors --base sdxl --json"""


@dataclass
class Config:
    ESSENTIALS: ClassVar[tuple[str, ...]] = (
        "file",
        "base",
    )
    file: Annotated[str, "a .safetensors file, a pickle or a diffusers folder"] = field(
        default=MISSING, metadata={"argument": True}
    )  # type: ignore[arg-type]
    base: Annotated[str | None, "how much of a LoRA would land on this checkpoint"] = field(
        default=None, metadata={"flags": ["-b"]}
    )
