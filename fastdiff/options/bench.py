"""The options of `bench`."""

from dataclasses import MISSING, dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range

EXAMPLES = """fastdiff bench sample
fastdiff bench sample --base sd15 --random-weights --device cuda --assert-ratio 3
fastdiff bench sample --base sd21 --random-weights --layout sdxs-512 --widths 96,192,384 --resolution 256 --decoder tiny
fastdiff bench sample --against openvino
fastdiff bench train
fastdiff bench merge --rounds 3"""


@dataclass(kw_only=True)
class Config(BaseConfig):
    PANEL: ClassVar[str] = "Bench"
    ESSENTIALS: ClassVar[tuple[str, ...]] = (
        "work",
        "base",
        "random_weights",
        "against",
        "num_steps",
        "batch_size",
        "resolution",
        "device",
        "precision",
        "assert_ratio",
    )

    work: Annotated[
        Literal["sample", "train", "merge"], "sample (pictures), train (LCM-LoRA steps) or merge (LoRA into base)"
    ] = field(default=MISSING, metadata={"argument": True})  # type: ignore[assignment]
    random_weights: Annotated[bool, "the base's network sizes with random weights: nothing is downloaded"] = False
    layout: Annotated[str | None, "with --random-weights: a smaller UNet, one of prune's layouts"] = None
    widths: Annotated[str | None, "with --random-weights: channels of its resolutions, as 96,192,384"] = None
    against: Annotated[
        Literal["eager", "compiled", "openvino"],
        "diffusers as it comes, or by its recipe for speed: minutes to compile; or its networks by OpenVINO, in a bare loop",
    ] = "eager"
    decoder: Annotated[Literal["kl", "tiny"], "what fastdiff decodes with; tiny: a TAESD of random weights"] = "kl"
    stock_decoder: Annotated[Literal["kl", "tiny"], "what diffusers decodes with"] = "kl"
    stock_embeds: Annotated[bool, "hand diffusers its prompt encoded, as fastdiff has it from the second call on"] = False
    null: Annotated[bool, "networks that answer zeros at once: what remains is the host's part"] = False
    compile: Annotated[Literal["auto", "off", "max", "openvino"], "as of `sample`; timed when it is there"] = "auto"
    num_steps: Annotated[int, "sampling steps", Range(1, 1000)] = 4
    guidance: Annotated[float, "1 or less = none", Range(0)] = 1.0
    resolution: Annotated[int | None, "pixels a side; default: the family's own", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int | None, "pictures at once; default 1, of train the preset's", Range(1)] = None
    calls: Annotated[int, "timed calls of each way", Range(1)] = 20
    rounds: Annotated[int, "cold starts of each way, and of merge whole runs; 0 = none", Range(0)] = 1
    assert_ratio: Annotated[float | None, "end with exit code 5 unless fastdiff is that many times as fast", Range(above=0)] = (
        None
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to measure"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA, else fp32"] = "auto"
