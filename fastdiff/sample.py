"""The `sample` command: prompts to PNGs, with the settings that the weights' own recipe asks for."""

import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from fastdiff import console, judge
from fastdiff.assemble import Assembled, assemble, load_loras, pick_device, pick_dtype, recipe_of
from fastdiff.config import Range
from fastdiff.console import Result, UsageError
from fastdiff.data import control
from fastdiff.data.teacher import read_prompts
from fastdiff.io.checkpoint import BaseConfig
from fastdiff.io.recipe import Recipe
from fastdiff.models import text
from fastdiff.sampling import DEFAULTS, Settings, contact_sheet, uint8
from fastdiff.solvers import SOLVERS

PRESETS: dict[str, dict[str, Any]] = {}
CONTROLS = ("controlnet", "control_image", "control", "control_scale")
EXAMPLES = """fastdiff sample --prompt "a red apple"
fastdiff sample --lora lcm.safetensors --prompt "a red apple" --seed 1
fastdiff sample --base sdxl --lora lcm.safetensors --lora style.safetensors=0.8 --prompts prompts.txt
fastdiff sample --controlnet emoji --control-image apple.png --control canny --prompt "fruit on blue"
echo "a red apple" | fastdiff sample --prompts - --json"""


@dataclass
class Config(BaseConfig):
    prompt: Annotated[list[str], "what to draw; repeat it for more"] = field(default_factory=list)
    prompts: Annotated[str | None, "a file of prompts, one a line; - reads standard input"] = None
    negative: Annotated[str, "what to avoid; acts only with guidance above 1"] = ""
    lora: Annotated[list[str], "FILE[=WEIGHT], weight 1 unless given; repeat it for more"] = field(default_factory=list)
    remap: Annotated[bool, "the LoRAs are of the network that --base was pruned from: move them to the layers that it kept"] = (
        False
    )
    vae: Annotated[str | None, "another VAE: a diffusers folder or hub id, AutoencoderTiny or AutoencoderKL"] = None
    controlnet: Annotated[str | None, "ControlNet of the base: a diffusers folder, a hub id, or emoji"] = None
    control_image: Annotated[str | None, "what it is shown: a control picture, or with --control one that it is taken from"] = (
        None
    )
    control: Annotated[str | None, "takes the control out of --control-image: canny, or MODULE:FUNCTION"] = None
    control_scale: Annotated[float, "how strongly it acts", Range(0)] = 1.0
    allow_partial: Annotated[bool, "apply what fits of a LoRA that does not fit whole"] = False
    num_images: Annotated[int, "images a prompt, with seeds seed, seed + 1, ...", Range(1)] = 1
    seed: Annotated[int, "of the first image of each prompt", Range(0, 2**63 - 1)] = 0
    scheduler: Annotated[str | None, f"one of {', '.join(SOLVERS)}; default: the recipe's"] = None
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


def wanted(config: Config) -> list[str]:
    prompts = list(config.prompt)
    if config.prompts == "-":
        prompts += [line.strip() for line in sys.stdin if line.strip()]
    elif config.prompts:
        prompts += read_prompts(Path(config.prompts))
    if not prompts:
        raise UsageError("no prompt given", 'use --prompt "a red apple", or --prompts FILE (- reads standard input)')
    return prompts


def settings(config: Config, recipe: Recipe, family: str) -> Settings:
    """Given flags first, then the recipe; a flag that contradicts the recipe is obeyed and warned of."""
    given = {k: getattr(config, k) for k in ("scheduler", "num_steps", "guidance", "spacing", "eta")}
    for name in ("scheduler", "guidance"):
        asked, told = getattr(recipe, name), given[name]
        unguided = name == "guidance" and None not in (asked, told) and max(asked, told) <= 1
        if asked is not None and told is not None and asked != told and not unguided:
            console.warn(f"--{name} {told}: the weights were distilled for {name} {asked}")
    steps = given["num_steps"]
    if recipe.timesteps and steps and steps != recipe.num_steps:
        console.warn(f"--num-steps {steps}: the weights know only timesteps {', '.join(map(str, recipe.timesteps))}")
    elif recipe.fixed and steps and steps != recipe.num_steps:
        console.warn(f"--num-steps {steps}: the weights were distilled for {recipe.num_steps} steps, and for those alone")
    elif recipe.num_steps and steps and steps > 2 * recipe.num_steps:
        console.warn(f"--num-steps {steps}: the weights were distilled for {recipe.num_steps}; more steps do not help")
    if recipe.family and recipe.family != family:
        raise UsageError(f"--lora: distilled from {recipe.family}, but --base is {family}", f"use --base {recipe.family}")
    return Settings.of(recipe, DEFAULTS[family], **given)


def open_sampler(config: Config, device: torch.device) -> tuple[Assembled, Settings]:
    """The base with its LoRAs folded in, in the precision asked for, and how to walk."""
    base = config.open_base(pick_dtype(config.precision, device))
    how = dict(allow_partial=config.allow_partial)
    loras = load_loras(base, config.lora, remap=config.remap, allow_pickle=config.allow_pickle, **how)
    chosen = settings(config, recipe_of(base, loras), base.family)  # a mismatch is told before anything heavy loads
    control = dict(controlnet=config.controlnet, strength=config.control_scale)
    return assemble(base, loras, vae=config.vae, device=device, **control, **how), chosen


def run(config: Config) -> Result:
    """The `sample` command."""
    if bool(config.controlnet) != bool(config.control_image):
        missing = "--control-image" if config.controlnet else "--controlnet"
        raise UsageError(f"{missing}: a ControlNet and its picture go together", f"give {missing} too")
    if config.control and not config.control_image:
        raise UsageError("--control: takes the control out of --control-image, and there is none", "give --control-image too")
    prompts, device = wanted(config), pick_device(config.device)
    with console.timed("load_s"):
        opened, chosen = open_sampler(config, device)
        sampler, base = opened.sampler, opened.sampler.base
        resolution_px = config.resolution or base.resolution_px
        uncond = (
            text.encode(base, [config.negative], device=device) if config.negative else text.unconditional(base, device=device)
        )
        cond = text.encode(base, [p for p in prompts for _ in range(config.num_images)], device=device)
        if config.control_image:
            shown = control.read(Path(config.control_image), resolution_px, config.control and control.extractor(config.control))
            cond = cond.with_control(shown.to(device).expand(len(cond), -1, -1, -1))
    if config.negative and not chosen.guided:
        console.warn("--negative has no effect at guidance 1 or less")
    seeds = [config.seed + i for _ in prompts for i in range(config.num_images)]
    folder, names = places(config, prompts, seeds)
    images, outputs = [], []
    with console.timed("sampling_s"), console.progress(len(seeds), "sampling") as bar:
        for i in range(0, len(seeds), config.batch_size):
            rows = slice(i, i + config.batch_size)
            images.append(sampler.pixels(cond[rows], uncond, seeds[rows], chosen, resolution_px=resolution_px))
            for pixels, k in zip(images[-1], range(len(seeds))[rows], strict=True):
                prompt = prompts[k // config.num_images]
                outputs.append(write_png(folder / names[k], pixels, facts(config, chosen, prompt, seeds[k])))
            bar.update(len(seeds[rows]))
    stack = torch.cat(images)
    if config.grid and len(seeds) > 1:
        columns = config.num_images if config.num_images > 1 else math.ceil(len(seeds) ** 0.5)
        blank = torch.ones(-len(stack) % columns, *stack.shape[1:])
        padded = torch.cat([stack, blank])
        outputs.append(folder / "grid.png")
        contact_sheet([padded[c::columns] for c in range(columns)]).save(outputs[-1])
    metrics = {"images": len(seeds), "calls": chosen.calls, "settings": asdict(chosen), "loras": opened.coverage}
    if base.family == "emoji":
        metrics["style"] = judge.style_distance(stack, [p for p in prompts for _ in range(config.num_images)])
    return Result(outputs, metrics)


def places(config: Config, prompts: list[str], seeds: list[int]) -> tuple[Path, list[str]]:
    """The folder and the file names of the images."""
    target = Path(config.output or f"runs/sample-{Path(config.base).stem or config.base}")
    if target.suffix == ".png":
        if len(seeds) > 1:
            raise UsageError(f"--output {target}: one file for {len(seeds)} images; give a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.parent, [target.name]
    target.mkdir(parents=True, exist_ok=True)
    return target, [f"{k // config.num_images:04d}-seed{seed}.png" for k, seed in enumerate(seeds)]


def facts(config: Config, chosen: Settings, prompt: str, seed: int) -> dict[str, Any]:
    """Everything needed to draw the image again."""
    return {
        "prompt": prompt,
        "negative": config.negative,
        "seed": seed,
        "base": config.base,
        "lora": config.lora,
        **({k: getattr(config, k) for k in CONTROLS} if config.controlnet else {}),
        **asdict(chosen),
    }


def write_png(path: Path, pixels: torch.Tensor, told: dict[str, Any]) -> Path:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("prompt", told["prompt"])
    info.add_text("fastdiff", json.dumps(told))
    Image.fromarray(uint8(pixels).permute(1, 2, 0).numpy()).save(path, pnginfo=info)
    return path
