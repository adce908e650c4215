"""The options of `merge-lora`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range

EXAMPLES = """fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors
fastdiff merge-lora --accel lcm.safetensors --style a.safetensors=0.6 --style b.safetensors=0.4 --rank 64 -o fast.safetensors
fastdiff merge-lora --accel lcm.safetensors --style anime.safetensors --base model.safetensors -o fast-model.safetensors
fastdiff merge-lora --extract --base sdxl --tuned lightning.safetensors --rank 64 -o lightning-lora.safetensors
fastdiff merge-lora --base custom.safetensors --tuned fast-folder --reference sdxl -o custom-fast.safetensors"""


@dataclass
class Config(BaseConfig):
    PANEL: ClassVar[str] = "Merge"
    ESSENTIALS: ClassVar[tuple[str, ...]] = (
        "accel",
        "style",
        "base",
        "output",
        "rank",
        "method",
        "format",
        "precision",
        "extract",
        "tuned",
    )

    accel: Annotated[str | None, "the few-step LoRA, FILE[=WEIGHT], weight 1 unless given; its recipe is kept"] = None
    style: Annotated[list[str], "FILE[=WEIGHT], weight 0.8 unless given; repeat for more"] = field(default_factory=list)
    base: Annotated[str | None, "bake into this checkpoint: a folder, or with --output NAME.safetensors one file"] = field(  # type: ignore[assignment]
        default=None, metadata={"flags": ["-b"]}
    )
    output: Annotated[str | None, "default <accel>-<style>.safetensors; with --base a folder <accel>-<style>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    rank: Annotated[str | None, "of the written LoRA: a number (the best approximation) or auto; default: exact"] = None
    energy: Annotated[float, "share of sum sigma^2 that --rank auto keeps in every module", Range(above=0, high=1)] = 0.95
    method: Annotated[Literal["sum", "ties", "dare-ties", "dare-linear"], "how the updates are joined"] = "sum"
    density: Annotated[float, "share of entries that ties and dare keep", Range(above=0, high=1)] = 0.5
    seed: Annotated[int, "of dare's masks", Range(0, 2**31 - 1)] = 0
    block_weights: Annotated[str | None, "12, 17, 20 or 26 numbers (BASE,IN..,M00,OUT..) that scale every --style"] = None
    format: Annotated[Literal["kohya", "diffusers", "peft"], "layout of the written LoRA; kohya loads everywhere"] = "kohya"
    precision: Annotated[Literal["fp16", "bf16", "fp32"], "of the written tensors; the sum itself is always fp32"] = "fp16"
    remap: Annotated[str | None, "a pruned checkpoint: the LoRAs are of its parent, and move to the layers that it kept"] = None
    allow_partial: Annotated[bool, "merge what fits of a LoRA that does not fit whole"] = False
    extract: Annotated[bool, "write the LoRA between --base and --tuned"] = False
    tuned: Annotated[str | None, "a checkpoint: with --extract its LoRA; with --reference, base + (tuned - reference)"] = None
    reference: Annotated[str | None, "what --tuned was trained from; its difference is added to --base"] = None
    check: Annotated[str | None, "sample before and after on this base, and compare"] = None
