"""The options of `bench`."""

from dataclasses import dataclass, field
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
    ESSENTIALS: ClassVar[str] = "work base random_weights against num_steps batch_size resolution device precision assert_ratio"

    work: Annotated[
        Literal["sample", "train", "merge"], "sample (pictures), train (LCM-LoRA steps) or merge (LoRA into base)"
    ] = field(metadata={"argument": True})
    random_weights: Annotated[bool, "use random weights in the base's network sizes; nothing is downloaded"] = False
    layout: Annotated[str | None, "with --random-weights: a smaller UNet, one of prune's layouts"] = None
    widths: Annotated[str | None, "with --random-weights: channels at each resolution, as 96,192,384"] = None
    against: Annotated[
        Literal["eager", "compiled", "openvino"],
        "stock way: diffusers as it is, compiled by its own guide (minutes), or its networks in OpenVINO",
    ] = "eager"
    decoder: Annotated[Literal["kl", "tiny"], "decoder of fastdiff; tiny: a TAESD with random weights"] = "kl"
    stock_decoder: Annotated[Literal["kl", "tiny"], "decoder of diffusers"] = "kl"
    stock_embeds: Annotated[bool, "give diffusers the encoded prompt, as fastdiff has it from the second call on"] = False
    null: Annotated[bool, "replace the networks by zeros: measures the host's part alone"] = False
    compile: Annotated[Literal["auto", "off", "max", "openvino"], "as in sample; timing starts when compilation is done"] = "auto"
    num_steps: Annotated[int, "sampling steps", Range(1, 1000)] = 4
    guidance: Annotated[float, "classifier-free guidance; 1 or less = none", Range(0)] = 1.0
    resolution: Annotated[int | None, "width and height in pixels; default: the size of the base", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int | None, "pictures at once; default 1, for train the preset's batch", Range(1)] = None
    calls: Annotated[int, "timed calls of each way", Range(1)] = 20
    rounds: Annotated[int, "cold starts of each way, 0 = none; for merge whole runs, at least 1", Range(0)] = 1
    assert_ratio: Annotated[float | None, "exit with code 5 unless fastdiff is this many times faster", Range(above=0)] = None
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to measure"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA (fp16 before Ampere), else fp32"] = "auto"
