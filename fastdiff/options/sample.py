"""The options of `sample`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import SHIPPED
from fastdiff.options.base import BaseConfig
from fastdiff.runtime.config import Range

SCHEDULERS = ("ddim", "euler", "dpm++", "lcm", "tcd")  # the names in diffusion/solvers.py
EXAMPLES = """fastdiff sample --prompt "a red apple"
fastdiff sample --lora lcm.safetensors --prompt "a red apple" --seed 1
fastdiff sample --base sdxl --lora lcm.safetensors --lora style.safetensors=0.8 --prompts prompts.txt
fastdiff sample --controlnet emoji --control-image apple.png --control canny --prompt "fruit on blue"
fastdiff sample --prompt "a red apple" --fps 10
echo "a red apple" | fastdiff sample --prompts - --json"""


@dataclass
class Config(BaseConfig):
    ESSENTIALS: ClassVar[tuple[str, ...]] = (
        "prompt",
        "prompts",
        "base",
        "lora",
        "num_images",
        "seed",
        "num_steps",
        "guidance",
        "resolution",
        "output",
    )
    prompt: Annotated[list[str], "what to draw; repeat it for more"] = field(default_factory=list)
    prompts: Annotated[str | None, "a file of prompts, one a line; - reads standard input"] = None
    negative: Annotated[str, "what to avoid; acts only with guidance above 1"] = ""
    lora: Annotated[list[str], "FILE[=WEIGHT], weight 1 unless given; repeat it for more"] = field(default_factory=list)
    remap: Annotated[bool, "the LoRAs are of the network that --base was pruned from: move them to the layers that it kept"] = (
        False
    )
    vae: Annotated[str | None, "another VAE: a diffusers folder or hub id, AutoencoderTiny or AutoencoderKL"] = None
    controlnet: Annotated[str | None, "ControlNet of the base: a diffusers folder, a hub id, or " + SHIPPED.name] = None
    control_image: Annotated[str | None, "what it is shown: a control picture, or with --control one that it is taken from"] = (
        None
    )
    control: Annotated[str | None, "takes the control out of --control-image: canny, or MODULE:FUNCTION"] = None
    control_scale: Annotated[float, "how strongly it acts", Range(0)] = 1.0
    allow_partial: Annotated[bool, "apply what fits of a LoRA that does not fit whole"] = False
    num_images: Annotated[int, "images a prompt, with seeds seed, seed + 1, ...", Range(1)] = 1
    seed: Annotated[int, "of the first image of each prompt", Range(0, 2**63 - 1)] = 0
    scheduler: Annotated[str | None, f"one of {', '.join(SCHEDULERS)}; default: the recipe's"] = None
    spacing: Annotated[Literal["trailing", "leading", "linspace", "lcm"] | None, "of the timesteps; default: the scheduler's"] = (
        None
    )
    num_steps: Annotated[int | None, "sampling steps; default: the recipe's", Range(1, 1000)] = None
    guidance: Annotated[float | None, "classifier-free guidance, 1 or less = none; default: the recipe's", Range(0)] = None
    eta: Annotated[float | None, "TCD's gamma, 0 to 1; default: the recipe's", Range(0, 1)] = None
    resolution: Annotated[int | None, "pixels a side; default: the family's own", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int, "images at once", Range(1)] = 4
    grid: Annotated[bool, "also write grid.png when there are several images"] = True
    output: Annotated[str | None, "a folder, or NAME.png for one image; default runs/sample-<base>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to sample"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA, else fp32"] = "auto"
    compile: Annotated[
        Literal["auto", "off", "max", "openvino"],
        "on CUDA auto: one graph at once, compiled while it draws; max: compiled first, minutes; openvino: on the CPU, seconds",
    ] = "auto"
    fps: Annotated[
        float | None,
        "seconds to draw as fast as it goes, telling images a second; only the last image is written",
        Range(above=0),
    ] = None
