"""The options of `sample`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from fastdiff.checkpoints.family import SHIPPED
from fastdiff.options.text import TextConfig
from fastdiff.runtime.config import Range

EXAMPLES = """fastdiff sample --prompt "a red apple"
fastdiff sample --lora lcm.safetensors --prompt "a red apple" --seed 1
fastdiff sample --base sdxl --lora lcm.safetensors --lora style.safetensors=0.8 --prompts prompts.txt
fastdiff sample --controlnet emoji --control-image apple.png --control canny --prompt "fruit on blue"
fastdiff sample --prompt "a red apple" --fps 10
echo "a red apple" | fastdiff sample --prompts - --json"""


@dataclass
class Config(TextConfig):
    ESSENTIALS: ClassVar[str] = "prompt prompts base lora num_images seed num_steps guidance resolution output"
    prompt: Annotated[list[str], "what to draw; repeatable"] = field(default_factory=list)
    prompts: Annotated[str | None, "a file of prompts, one a line; - reads standard input"] = None
    negative: Annotated[str, "what to avoid; acts only with guidance above 1"] = ""
    lora: Annotated[list[str], "LoRA as FILE[=WEIGHT], a file or hub id, default weight 1; repeatable"] = field(
        default_factory=list
    )
    recipe: Annotated[
        str,
        "how the weights are sampled: auto, as they say; lcm, lightning-4, hyper-8, dmd2, ...; none, as is usual for the base",
    ] = "auto"
    remap: Annotated[bool, "move LoRAs of the unpruned network to the layers that the pruned --base kept"] = False
    vae: Annotated[str | None, "another VAE: a diffusers folder, a hub id or a single file, AutoencoderKL or tiny (TAESD)"] = None
    controlnet: Annotated[str | None, "ControlNet of the base: a diffusers folder, a hub id, or " + SHIPPED.name] = None
    control_image: Annotated[str | None, "control picture; with --control a picture that the control is extracted from"] = None
    control: Annotated[str | None, "extractor applied to --control-image: canny, or MODULE:FUNCTION"] = None
    control_scale: Annotated[float, "strength of the ControlNet", Range(0)] = 1.0
    allow_partial: Annotated[bool, "apply the fitting modules of a LoRA that does not fit completely"] = False
    num_images: Annotated[int, "images per prompt, with seeds --seed, --seed + 1, ...", Range(1)] = 1
    seed: Annotated[int, "seed of the first image of each prompt", Range(0, 2**63 - 1)] = 0
    scheduler: Annotated[Literal["ddim", "euler", "dpm++", "dpm++sde", "lcm", "tcd"] | None, "sampler; default: the recipe's"] = (
        None
    )
    spacing: Annotated[
        Literal["trailing", "leading", "linspace", "lcm"] | None, "spacing of the timesteps; default: the scheduler's"
    ] = None
    num_steps: Annotated[int | None, "sampling steps; default: the recipe's", Range(1, 1000)] = None
    guidance: Annotated[float | None, "classifier-free guidance, 1 or less = none; default: the recipe's", Range(0)] = None
    guidance_rescale: Annotated[
        float | None,
        "phi of Lin et al. 2024: keeps the contrast of unguided outputs; 0 = off, 0.7 for a zero-SNR base",
        Range(0, 1),
    ] = None
    eta: Annotated[float | None, "TCD's gamma, 0 to 1; default: the recipe's", Range(0, 1)] = None
    resolution: Annotated[int | None, "width and height in pixels; default: the size of the base", Range(8, multiple_of=8)] = None
    batch_size: Annotated[int, "images at once", Range(1)] = 4
    grid: Annotated[bool, "also write grid.png when there are several images"] = True
    output: Annotated[str | None, "a folder, or NAME.png for one image; default runs/sample-<base>"] = field(
        default=None, metadata={"flags": ["-o"]}
    )
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], "where to sample"] = "auto"
    precision: Annotated[Literal["auto", "fp32", "bf16", "fp16"], "auto: bf16 on CUDA (fp16 before Ampere), else fp32"] = "auto"
    compile: Annotated[
        Literal["auto", "off", "max", "openvino"],
        "auto: on CUDA draw by a graph, compile beside it; max: compile first (minutes); openvino: compile on the CPU (seconds)",
    ] = "auto"
    fps: Annotated[
        float | None,
        "draw for this many seconds, report images per second, and write the last image only",
        Range(above=0),
    ] = None
