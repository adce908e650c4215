"""The `sample` command: draws prompts as PNGs, with the settings that the recipe of the weights asks for."""

import itertools
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.checkpoints import published, references
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.data import control
from fastdiff.data.prompts import prompts_in, read_prompts
from fastdiff.data.teacher import cache_folder
from fastdiff.models.denoiser import Cond
from fastdiff.options.sample import EXAMPLES, Config
from fastdiff.quality import emoji as judge
from fastdiff.runtime import console, outputs, text_file
from fastdiff.runtime.command import Runnable
from fastdiff.runtime.errors import Result, UsageError
from fastdiff.sampling import openvino
from fastdiff.sampling.assemble import pick_device, pick_dtype
from fastdiff.sampling.pictures import portrait, sheet_of, write_picture
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings, asked

CONTROLS = ("controlnet", "control_image", "control", "control_scale")


def wanted(config: Config) -> list[str]:
    """The prompts, from options, a file or standard input. UsageError where there is none."""
    prompts = [words_of(text) for text in config.prompt]
    if config.prompts == "-":
        pipe = getattr(sys.stdin, "buffer", None)  # a stand-in for it may hold text, without bytes
        prompts += prompts_in(pipe.read() if pipe else sys.stdin.read().encode(), "-")
    elif config.prompts:
        prompts += read_prompts(Path(config.prompts))
    if not prompts:
        raise UsageError("no prompt given", 'use --prompt "a red apple", or --prompts FILE (- reads standard input)')
    return prompts


def words_of(text: str) -> str:
    """A prompt of the command line, read again where the terminal wrote it in another encoding than UTF-8.

    Python keeps such bytes as surrogates. UsageError where they are no text.
    """
    if text.isprintable():
        return text
    try:
        words, kinds = text_file.decode(os.fsencode(text))
    except ValueError as error:
        raise UsageError(f"--prompt: {error}", "set the terminal to UTF-8") from error
    words, changed = text_file.clean(words)
    text_file.tell("--prompt", [*kinds, *changed])
    return words


def given(config: Config) -> dict[str, Any]:
    """The sampling options as the user gave them; None leaves a choice to the recipe."""
    return {name: vars(config)[name] for name in ("scheduler", "num_steps", "guidance", "spacing", "eta", "guidance_rescale")}


def open_sampler(config: Config, device: torch.device) -> Sampler:
    """Open the base with its LoRAs, VAE and ControlNet, in the precision that the options ask for."""
    return Sampler(
        config.open_base(pick_dtype(config.precision, device)),
        loras=config.lora,
        vae=config.vae,
        controlnet=config.controlnet,
        control_scale=config.control_scale,
        device=device,
        compile=config.compile,
        allow_partial=config.allow_partial,
        allow_pickle=config.allow_pickle,
        remap=config.remap,
        recipe=config.recipe,
    )


def run(config: Config) -> Result:
    """The `sample` command."""
    if bool(config.controlnet) != bool(config.control_image):
        missing = "--control-image" if config.controlnet else "--controlnet"
        raise UsageError(f"{missing}: a ControlNet and its picture go together", f"give {missing} too")
    if config.control and not config.control_image:
        raise UsageError("--control: takes the control out of --control-image, and there is none", "give --control-image too")
    prompts, device = wanted(config), pick_device(config.device)
    target(config)
    # reports a wrong value before anything heavy is loaded
    Settings.of(published.asked(config.recipe) or Recipe(), Settings(), **given(config))
    if config.compile == "openvino":
        openvino.check(device, config.precision)
    elif config.compile != "off":  # keep compiled kernels from one run to the next
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder() / "compiled"))
    with console.timed("load_s"):
        sampler = open_sampler(config, device)
        base, chosen = sampler.base, asked(sampler.recipe, Settings.usual(sampler.base.family), **given(config))
        resolution_px, control_picture = config.resolution or base.resolution_px, None
        if config.control_image:
            how = control.extractor(config.control) if config.control else None
            control_picture = control.read(Path(config.control_image), resolution_px, how)
        lines = [p for p in prompts for _ in range(config.num_images)]
        cond, uncond = sampler.conds(lines, negative=config.negative, control=control_picture)
    if config.negative and not chosen.guided:
        console.warn("--negative has no effect at guidance 1 or less")
    seeds = [config.seed + i for _ in prompts for i in range(config.num_images)]
    folder, names = places(config, prompts, seeds[:1] if config.fps else seeds)
    if config.fps:
        few = cond[: config.batch_size]
        return real_time(config, sampler, chosen, few, uncond, resolution_px, folder / names[0], prompts[0])
    parts = [slice(i, i + config.batch_size) for i in range(0, len(seeds), config.batch_size)]
    stream = sampler.stream_batches(((cond[rows], uncond, seeds[rows]) for rows in parts), chosen, resolution_px)
    written, drawn = [], []
    # PNGs are packed in a thread while the next batch is drawn: packing takes longer than one step of a small network.
    with console.timed("sampling_s"), console.progress(len(seeds), "sampling") as bar, ThreadPoolExecutor(1) as packer:
        for rows, batch in zip(parts, stream, strict=True):
            for pixels, k in zip(batch, range(len(seeds))[rows], strict=True):
                image = portrait(pixels, facts(config, chosen, lines[k], seeds[k]))
                drawn.append(image)
                written.append(packer.submit(write_picture, image, folder / names[k]))
            bar.update(len(batch))
    paths = [item.result() for item in written]
    if config.grid and len(seeds) > 1:
        paths += sheet_of(drawn, config.num_images).save(folder / "grid.png")
    metrics = {"images": len(seeds), "calls": chosen.calls, "settings": asdict(chosen), "loras": sampler.coverage}
    if base.family.judge_ships:
        stack = torch.stack([torch.from_numpy(np.array(image)) for image in drawn]).permute(0, 3, 1, 2) / 127.5 - 1
        metrics["style"] = judge.style_distance(stack, lines)
    return Result(paths, metrics)


def real_time(
    config: Config, sampler: Sampler, chosen: Settings, cond: Cond, uncond: Cond, resolution_px: int, path: Path, prompt: str
) -> Result:
    """Draw for `--fps` seconds, seed after seed, and measure images per second. One image of the last batch is written."""
    n, seeds = len(cond), itertools.count(config.seed)
    batches = ((cond, uncond, list(itertools.islice(seeds, n))) for _ in itertools.count())
    stream = sampler.stream_batches(batches, chosen, resolution_px)
    with console.timed("first_s"):
        batch = next(stream)
    marks = [time.perf_counter()]
    while marks[-1] < marks[0] + config.fps:
        batch = next(stream)
        marks.append(time.perf_counter())
    gaps = [b - a for a, b in itertools.pairwise(marks)]
    rate = n / statistics.median(gaps)
    console.info(f"{rate:.1f} images/s ({n} at once, median of {len(gaps)} batches)")
    write_picture(portrait(batch[0], facts(config, chosen, prompt, config.seed + n * len(gaps))), path)
    metrics = {"images_per_s": rate, "images": n * len(marks), "batch_size": n, "calls": chosen.calls}
    return Result([path], {**metrics, "settings": asdict(chosen)})


def target(config: Config) -> Path:
    """The file NAME.png or the folder to write to. UsageError where it cannot be written."""
    path = Path(config.output or f"runs/sample-{references.called(config.base)}")
    return outputs.as_file(path) if path.suffix == ".png" else outputs.as_folder(path)


def places(config: Config, prompts: list[str], seeds: list[int]) -> tuple[Path, list[str]]:
    """The folder, which is created, and the file names of the images. UsageError where one file is given for several images."""
    path = target(config)
    if path.suffix == ".png":
        if len(seeds) > 1:
            raise UsageError(f"--output {path}: one file for {len(seeds)} images; give a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.parent, [path.name]
    path.mkdir(parents=True, exist_ok=True)
    return path, [f"{k // config.num_images:04d}-seed{seed}.png" for k, seed in enumerate(seeds)]


def facts(config: Config, chosen: Settings, prompt: str, seed: int) -> dict[str, Any]:
    """Everything needed to draw the image again."""
    return {
        "prompt": prompt,
        "negative": config.negative,
        "seed": seed,
        "base": config.base,
        "lora": config.lora,
        **({k: vars(config)[k] for k in CONTROLS} if config.controlnet else {}),
        **asdict(chosen),
    }


COMMAND = Runnable(Config, run, examples=EXAMPLES)
