"""Few-step weights that others have published: how each is recognised, and the settings that its authors document.

Their files say nothing about sampling, so a row here stands for the header that fastdiff's own files have. A file is recognised
by its name, by the hub repository whose download folder it lies in, or by the title in its header. Every word must match: a name
that only resembles one of these is nobody's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.checkpoints.recipe import PREFIX, Recipe
from fastdiff.runtime.console import warn
from fastdiff.runtime.errors import UsageError, as_field

AUTO, NONE = "auto", "none"  # what `recipe` says for the files' own recipe, and for the usual settings of the base
UNNAMED = {"pytorch-lora-weights", "adapter-model", "diffusion-pytorch-model", "model"}  # their folder tells what they are
FOLDER = "its folder"
TITLES = ("modelspec.title", "ss_output_name")  # entries of a header that name the file
SUFFIX = r"(-?(fp16|fp32|bf16|f16|converted))*"  # what people add to a name and what does not change the model
# sd-scripts writes these where it trained on pictures. No LoRA of this table was made so.
TRAINED = ("ss_dataset_dirs", "ss_tag_frequency", "ss_datasets", "ss_bucket_info", "ss_num_train_images")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published model, or one that exists for several families with the same settings."""

    name: str  # that `recipe` takes
    title: str  # in messages
    recipe: Recipe
    made_for: tuple[str, ...]  # the names of the families that it was made for
    lora: str = ""  # regular expression for the whole name of its LoRA file, as `plain` writes names; "": there is none
    whole: str = ""  # and of its checkpoint
    lora_hubs: tuple[str, ...] = ()  # hub repositories in which every LoRA is this one
    whole_hubs: tuple[str, ...] = ()  # and those of whole checkpoints

    def suits(self, name: str | None) -> bool:
        """Whether it was made for the family of that name; None, an unknown one, may be any."""
        return name is None or name in self.made_for


class Found(NamedTuple):
    """What a file was recognised as, and by what."""

    row: Published
    by: str  # "its name", "its folder", "its hub repository" or "the title in its header"

    @property
    def text(self) -> str:
        """The sentence for the user."""
        return f"{self.row.title}, by {self.by}: {settings_text(self.row.recipe)}"

    @property
    def entries(self) -> dict[str, str]:
        """The entries that the file's header lacks."""
        return {**self.row.recipe.to_metadata(), f"{PREFIX}published": self.row.name}


def few(method: str, scheduler: str, num_steps: int, guidance: float = 1.0, **more: Any) -> Recipe:
    """A recipe. Guidance 1 is none: pipelines of diffusers, and so the authors' pages, call that 0 or 1."""
    return Recipe(method=method, scheduler=scheduler, num_steps=num_steps, guidance=guidance, **more)


BOTH, ANY = ("sd15", "sdxl"), ("sd15", "sd21", "sdxl")
SD15 = r"sd-?v?1-?5"  # of a plain name
ROWS = (
    # huggingface.co/latent-consistency: LCMScheduler, 2 to 8 steps, guidance 0 or 1 to 2
    Published(
        name="lcm",
        title="LCM-LoRA",
        recipe=few("lcm", "lcm", 4),
        made_for=BOTH,
        lora=rf"lcm-lora-(weights-)?({SD15}|sdxl|ssd-?1b)|({SD15}|sdxl|ssd-?1b)-lcm-lora|lcm-({SD15}|sdxl|ssd-?1b)-lora",
        lora_hubs=(
            "latent-consistency/lcm-lora-sdv1-5",
            "latent-consistency/lcm-lora-sdxl",
            "latent-consistency/lcm-lora-ssd-1b",
            "segmind/segmind-vegart",
        ),
    ),  # fmt: skip
    # The guidance is an input of the network; the card draws with 8.
    Published(
        name="lcm-full",
        title="LCM Dreamshaper v7",
        recipe=few("lcm", "lcm", 4, 8.0),
        made_for=("sd15",),
        whole=r"lcm-dreamshaper-v7(-4k)?",
        whole_hubs=("simianluo/lcm_dreamshaper_v7",),
    ),
    # huggingface.co/ByteDance/SDXL-Lightning: EulerDiscreteScheduler, trailing, guidance 0
    Published(
        name="lightning-1",
        title="SDXL-Lightning, 1 step",
        recipe=few("lightning", "euler", 1, spacing="trailing", prediction_type="sample"),
        made_for=("sdxl",),
        whole=r"sdxl-lightning-1step-(unet-)?x0",
    ),
    *(
        Published(
            name=f"lightning-{n}",
            title=f"SDXL-Lightning, {n} steps",
            recipe=few("lightning", "euler", n, spacing="trailing"),
            made_for=("sdxl",),
            lora=rf"sdxl-lightning-{n}steps?-lora",
            whole=rf"sdxl-lightning-{n}steps?(-unet)?",
        )
        for n in (2, 4, 8)
    ),
    # huggingface.co/ByteDance/Hyper-SD: DDIMScheduler, trailing, guidance 0; the "1 step" LoRA is for 1 to 8, TCDScheduler, eta 1
    Published(
        name="hyper-1",
        title="Hyper-SD, the LoRA for 1 to 8 steps",
        recipe=few("hyper-sd", "tcd", 1, eta=1.0, step_counts=tuple(range(1, 9))),
        made_for=BOTH,
        lora=rf"hyper-({SD15}|sdxl)-1steps?-lora",
    ),
    Published(
        name="hyper-1-unet",
        title="Hyper-SDXL, the UNet for 1 step",
        recipe=few("hyper-sd", "lcm", 1, timesteps=(800,)),
        made_for=("sdxl",),
        whole=r"hyper-sdxl-1steps?-unet(-comfyui)?",
    ),
    *(
        Published(
            name=f"hyper-{n}",
            title=f"Hyper-SD, {n} steps",
            recipe=few("hyper-sd", "ddim", n, spacing="trailing"),
            made_for=BOTH,
            lora=rf"hyper-({SD15}|sdxl)-{n}steps?-lora|sdxl-hyper-sd-{n}steps?-lora",
        )
        for n in (2, 4, 8)
    ),
    # "support 5~8 guidance scales"
    *(
        Published(
            name=f"hyper-{n}-cfg",
            title=f"Hyper-SD, {n} steps with guidance",
            recipe=few("hyper-sd", "ddim", n, 5.0, spacing="trailing"),
            made_for=BOTH,
            lora=rf"hyper-({SD15}|sdxl)-{n}steps?-cfg-?lora",
        )
        for n in (8, 12)
    ),
    # huggingface.co/tianweiy/DMD2: LCMScheduler with timesteps of its own, guidance 0
    Published(
        name="dmd2",
        title="DMD2, 4 steps",
        recipe=few("dmd2", "lcm", 4, timesteps=(999, 749, 499, 249)),
        made_for=("sdxl",),
        lora=r"dmd2-sdxl-4steps?-lora",
        whole=r"dmd2-sdxl-4steps?(-unet)?",
    ),
    Published(
        name="dmd2-1",
        title="DMD2, 1 step",
        recipe=few("dmd2", "lcm", 1, timesteps=(399,)),
        made_for=("sdxl",),
        whole=r"dmd2-sdxl-1steps?(-unet)?",
    ),
    # huggingface.co/h1t: TCDScheduler, guidance 0, eta 0.3
    Published(
        name="tcd",
        title="TCD-LoRA",
        recipe=few("tcd", "tcd", 4, eta=0.3),
        made_for=ANY,
        lora=rf"tcd-({SD15}|sdxl|sd-?2-?1-base)-lora",
        lora_hubs=("h1t/tcd-sd15-lora", "h1t/tcd-sd21-base-lora", "h1t/tcd-sdxl-lora"),
    ),
    # huggingface.co/wangfuyun/PCM_Weights: DDIMScheduler, trailing; "small CFG" is 1 to 2
    *(
        Published(
            name=f"pcm-{n}",
            title=f"PCM, {n} steps, small guidance",
            recipe=few("pcm", "ddim", n, spacing="trailing"),
            made_for=BOTH,
            lora=rf"pcm-({SD15}|sdxl)-smallcfg-{n}steps?",
        )
        for n in (2, 4, 8, 16)
    ),
    # "2.5 - 3.5 with 4 steps and 3 - 6 with 8 steps"; 7.5 in the authors' demo with 16
    *(
        Published(
            name=f"pcm-{n}-cfg",
            title=f"PCM, {n} steps, normal guidance",
            recipe=few("pcm", "ddim", n, guidance, spacing="trailing"),
            made_for=BOTH,
            lora=rf"pcm-({SD15}|sdxl)-normalcfg-{n}steps?",
        )
        for n, guidance in ((4, 3.0), (8, 4.5), (16, 7.5))
    ),
    Published(
        name="pcm-lcm",
        title="PCM like LCM",
        recipe=few("pcm", "lcm", 4),
        made_for=BOTH,
        lora=rf"pcm-({SD15}|sdxl)-lcmlike-lora",
    ),
    # huggingface.co/jasperai: LCMScheduler, 4 steps, guidance 0
    Published(
        name="flash",
        title="Flash Diffusion",
        recipe=few("flash", "lcm", 4),
        made_for=BOTH,
        lora_hubs=("jasperai/flash-sd", "jasperai/flash-sdxl"),
    ),
    # huggingface.co/stabilityai: Euler, trailing, 1 to 4 steps, guidance 0
    Published(
        name="turbo",
        title="SD-Turbo or SDXL-Turbo",
        recipe=few("turbo", "euler", 1, spacing="trailing", step_counts=(1, 2, 3, 4)),
        made_for=("sd21", "sdxl"),
        whole=r"sd-turbo|sdxl-turbo|sd-xl-turbo-1-0",
        whole_hubs=("stabilityai/sd-turbo", "stabilityai/sdxl-turbo"),
    ),
)
BY_NAME: Mapping[str, Published] = {row.name: row for row in ROWS}
WHOLE_LCM = BY_NAME["lcm-full"]  # how any network is sampled that takes the guidance as an input, where nothing tells


def plain(name: str) -> str:
    """A name with small letters and single hyphens, without the number that browsers add to a second download."""
    return re.sub(r"[\s._-]+", "-", re.sub(r"\s*\(\d+\)$", "", name.strip()).lower()).strip("-")


def hub_of(path: Path) -> str:
    """The hub repository, owner/name, in whose cache folder a path lies; "" elsewhere."""
    parts = [part for part in path.absolute().parts if part.startswith("models--") and part.count("--") >= 2]
    return "/".join(parts[-1].split("--")[1:3]) if parts else ""


@dataclass(frozen=True)
class Clue:
    """One thing that may tell what a file is: a name, or a hub repository."""

    by: str  # what it is, in messages
    text: str
    hub: bool = False

    def fits(self, row: Published, *, whole: bool) -> bool:
        """Whether this names the published LoRA of a row, or its whole checkpoint."""
        names, hubs = (row.whole, row.whole_hubs) if whole else (row.lora, row.lora_hubs)
        if self.hub:
            return self.text.lower() in hubs
        if self.by == FOLDER and plain(self.text) in {plain(hub.partition("/")[2]) for hub in hubs}:
            return True
        return bool(names) and re.fullmatch(f"({names}){SUFFIX}", plain(self.text)) is not None


def clues(path: Path, metadata: Mapping[str, str], ref: str = "") -> list[Clue]:
    """What may tell what the file or folder `path` is. `ref` is the name that the user gave for it."""
    own = path.stem if path.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"} else path.name
    found = [Clue("its name", own)]
    if plain(own) in UNNAMED:
        found = [Clue(FOLDER, path.absolute().parent.name)]
    found += [Clue("the title in its header", metadata[key]) for key in TITLES if metadata.get(key)]
    if hub := hub_of(path):
        found.append(Clue("its hub repository", hub, hub=True))
    if ref.count("/") == 1 and not ref.startswith((".", "~")):
        found.append(Clue("its hub repository", ref, hub=True))
    return found


def recognised(
    path: Path, metadata: Mapping[str, str], *, whole: bool = False, family: str | None = None, ref: str = ""
) -> Found | None:
    """What published few-step weights a file is: a LoRA, or with `whole` a checkpoint. None where it is none, or not for sure.

    A header of fastdiff says itself how the file is sampled, and one of a training on pictures that it is another's. `family` is
    the one that the tensors are for, where they tell; `ref` the hub id that the file was opened by. Clues must agree.
    """
    if any(key.startswith(PREFIX) for key in metadata) or any(key in metadata for key in TRAINED):
        return None
    hits = [Found(row, clue.by) for clue in clues(path, metadata, ref) for row in ROWS if clue.fits(row, whole=whole)]
    rows = {hit.row.name for hit in hits}
    return hits[0] if len(rows) == 1 and hits[0].row.suits(family) else None


def named(name: str) -> Recipe:
    """The recipe that `recipe` names; UsageError lists those that exist. "none" is empty: the base's usual settings."""
    if (name := name.lower()) == NONE:
        return Recipe()
    if name not in BY_NAME:
        raise UsageError(f"{as_field('recipe', name)}: no such recipe", f"use one of {', '.join(BY_NAME)}, or {NONE}")
    return BY_NAME[name].recipe


def asked(recipe: str | Recipe | None) -> Recipe | None:
    """A recipe itself, or the one of that name; None where the files are to tell."""
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    return None if recipe.lower() == AUTO else named(recipe)


def warn_of_family(recipe: Recipe, family: str | None) -> None:
    """Warn where a recipe is that of published weights which were not made for this family; None, an unknown one, may be any."""
    rows = [row for row in ROWS if row.recipe == recipe]
    if rows and not any(row.suits(family) for row in rows):
        made = " and ".join(rows[0].made_for)
        warn(f"{as_field('recipe', rows[0].name)}: {rows[0].title} was made for {made}, and these weights are for {family}")


def changed(recipe: Recipe, **given: Any) -> Recipe:
    """The recipe with single settings replaced by those given (`num_steps`, `scheduler`, `guidance`, `eta`, `timesteps`).

    What belonged to the old settings goes with them: timesteps to their number of steps, a spacing and eta to their scheduler.
    UsageError where the result names no scheduler: a file has a whole recipe or none.
    """
    given = {k: v for k, v in given.items() if v is not None}
    if not given:
        return recipe
    if given.get("eta") and given.get("scheduler", recipe.scheduler) not in {"tcd", None}:
        raise UsageError(f"{as_field('eta', given['eta'])}: has an effect with the scheduler tcd alone, as TCD's gamma")
    if not (given.get("scheduler") or recipe.scheduler):
        first = next(iter(given))
        raise UsageError(f"{as_field(first, given[first])}: there is no recipe to change", "give `recipe` or `scheduler` too")
    if given.get("scheduler", recipe.scheduler) != recipe.scheduler:
        recipe = replace(recipe, spacing=None, eta=None)
    if "timesteps" in given:
        given["num_steps"] = len(given["timesteps"])
    elif given.get("num_steps", recipe.num_steps) != recipe.num_steps:
        recipe = replace(recipe, timesteps=None)
    if "num_steps" in given:
        recipe = replace(recipe, step_counts=None)
    return replace(recipe, **given)


def settings_text(recipe: Recipe) -> str:
    """A recipe in words: "4 steps, scheduler lcm, guidance 1, timesteps 999, 749, 499, 249"."""
    parts = [recipe.steps_text] if recipe.num_steps else []
    parts += [f"scheduler {recipe.scheduler}"] if recipe.scheduler else []
    parts += [f"guidance {recipe.guidance:g}"] if recipe.guidance is not None else []
    parts += [f"eta {recipe.eta:g}"] if recipe.eta else []
    parts += [f"timesteps {', '.join(map(str, recipe.timesteps))}"] if recipe.timesteps else []
    parts += [f"clip skip {recipe.clip_skip}"] if recipe.clip_skip else []
    parts += ["predicts x0"] if recipe.prediction_type == "sample" else []
    return ", ".join(parts)
