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
    ESSENTIALS: ClassVar[str] = "accel style base output rank method format precision extract tuned"

    accel: Annotated[str | None, "few-step LoRA as FILE[=WEIGHT], default weight 1; its recipe is kept"] = None
    style: Annotated[list[str], "style LoRA as FILE[=WEIGHT], default weight 0.8; repeatable"] = field(default_factory=list)
    base: Annotated[str | None, "merge into this checkpoint and write a folder, or one file with --output NAME.safetensors"] = (
        field(  # type: ignore[assignment]
            default=None, metadata={"flags": ["-b"]}
        )
    )
    output: Annotated[str | None, "default <accel>-<style>.safetensors; with --base a folder <accel>-<style>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    rank: Annotated[
        str | None, "rank of the written LoRA: a number, or auto; default: the sum of the ranks, with --extract 64"
    ] = None
    energy: Annotated[
        float, "share of the squared singular values that --rank auto keeps in every module", Range(above=0, high=1)
    ] = 0.95
    method: Annotated[Literal["sum", "ties", "dare-ties", "dare-linear"], "how the LoRAs are combined"] = "sum"
    density: Annotated[float, "share of entries that ties and dare keep", Range(above=0, high=1)] = 0.5
    seed: Annotated[int, "seed of the random masks of dare", Range(0, 2**31 - 1)] = 0
    block_weights: Annotated[str | None, "12, 17, 20 or 26 numbers (BASE,IN..,M00,OUT..) that scale every --style"] = None
    format: Annotated[
        Literal["kohya", "diffusers", "peft"],
        "key layout of the written LoRA: kohya loads in all programs; of diffusers' layout ComfyUI skips attention layers",
    ] = "kohya"
    precision: Annotated[Literal["fp16", "bf16", "fp32"], "precision of the written tensors; sums are always fp32"] = "fp16"
    remap: Annotated[str | None, "a pruned checkpoint: move LoRAs of its unpruned parent to the layers that it kept"] = None
    allow_partial: Annotated[bool, "merge the fitting modules of a LoRA that does not fit completely"] = False
    extract: Annotated[bool, "write the LoRA between --base and --tuned"] = False
    tuned: Annotated[str | None, "fine-tuned checkpoint, for --extract, or with --reference for base + (tuned - reference)"] = (
        None
    )
    reference: Annotated[str | None, "checkpoint that --tuned was trained from; the difference of both is added to --base"] = None
    check: Annotated[str | None, "draw with the LoRAs before and after the merge on this base, and compare"] = None
