"""Open a base model: an alias, a hub id, a diffusers folder or a single file.

Its components load on first use. A component with a layer missing or too many is refused as a whole.
"""

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.checkpoints import component, configs, folders, published, single_file, supported, text_reading, tokens, views
from fastdiff.checkpoints.detect import Detection, check_kind, detect, detect_prediction, infer_unet
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.fingerprint import fingerprint as fingerprint
from fastdiff.checkpoints.locate import config_folder, family_of, locate, shape_tables
from fastdiff.checkpoints.published import Found
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Slot, Weights
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.diffusion.schedule import NoiseSchedule, PredictionType
from fastdiff.runtime.console import info, note, warn
from fastdiff.runtime.errors import InputRefused, as_field, quoted


@dataclass
class Checkpoint:
    """A base model. `unet`, `vae`, `text_encoders` and `tokenizers` load when first used, the UNet in `dtype`."""

    ref: str  # the alias, hub id or path that the user gave
    path: Path  # of the folder or single file
    family: Family
    dtype: torch.dtype = torch.float32
    config: Path | None = None  # a diffusers folder of configs and tokenizers, for single files
    detected: Detection | None = None  # what a single file turned out to be
    prediction: str | None = None  # overrides the prediction type that the files state
    allow_pickle: bool = False
    zero_snr: bool = False  # the user says that the noise schedule ends in pure noise; files may say it too
    max_tokens: int = text_reading.MAX_TOKENS  # of a prompt that are read, in windows of 75
    clip_skip: int | None = None  # last layers of the text encoders that are left out; None: as the files say
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of components that get another shape than the files'

    # ---- configs

    @property
    def folder(self) -> Path:
        """The folder with model_index.json, the configs and the tokenizers."""
        return self.config if self.path.is_file() and self.config else self.path

    @property
    def own_config(self) -> bool:
        """Whether this is a single file that uses the configs that ship with fastdiff, not a folder given as `base_config`."""
        return self.path.is_file() and self.folder == self.family.home

    @property
    def opening(self) -> dict[str, str | bool]:
        """The options, beside `base`, that opened this checkpoint and that open it again: {option: value}."""
        given = self.path.is_file() and self.config is not None and not self.own_config
        how = {
            "base_config": str(self.config) if given else None,
            "prediction_type": self.prediction,
            "zero_snr": self.zero_snr,
            "allow_pickle": self.allow_pickle,
        }
        return {name: value for name, value in how.items() if value}

    @cached_property
    def index(self) -> dict[str, Any]:
        """The content of model_index.json; InputRefused where it is missing."""
        file = self.folder / "model_index.json"
        if not file.exists():
            raise InputRefused(f"{self.folder}: model_index.json is missing; it is not a diffusers folder")
        return configs.read(file)

    @property
    def stored_scheduler_config(self) -> dict[str, Any]:
        """The diffusers scheduler config of the folder as it is stored there, whatever a single file or the user states.

        InputRefused where it is missing, or has a value that it cannot have.
        """
        if not self.scheduler_file.is_file():
            raise InputRefused(f"{self.scheduler_file}: missing; {self.folder} is no complete diffusers folder")
        config = configs.read(self.scheduler_file)
        configs.check(config, configs.SCHEDULER, self.scheduler_file)
        return config

    @property
    def scheduler_file(self) -> Path:
        """The file with the scheduler config."""
        return self.folder / "scheduler" / "scheduler_config.json"

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The diffusers scheduler config, with the prediction type that a single file or the user states."""
        config = self.stored_scheduler_config
        if self.detected and (self.own_config or self.detected.certain):
            config["prediction_type"] = self.detected.prediction_type
        if self.zero_snr or (self.detected and self.detected.zero_snr):
            config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config | ({"prediction_type": self.prediction} if self.prediction else {})

    @property
    def prediction_type(self) -> PredictionType:
        """What the UNet outputs: epsilon, v_prediction or sample."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def states_prediction(self) -> bool:
        """Whether the files or the user say what the UNet outputs; False where that is a guess or the family's default."""
        return self.prediction is not None or self.detected is None or self.detected.certain

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        return self.config_of("unet")

    def config_of(self, part: str) -> dict[str, Any]:
        """The config of a component; the UNet of a single file has the blocks of the file.

        InputRefused where it is missing, or has a value that it cannot have.
        """
        if part in self.configs:
            return self.configs[part]
        path = self.folder / part / "config.json"
        if not path.exists():
            raise InputRefused(f"{path}: missing; {self.folder} is no complete diffusers folder")
        config = configs.read(path)
        configs.check_part(part, config, path)
        if part == "unet" and self.own_config and self.family.published:
            config = infer_unet(self.file, config)
            if self.family.epsilon_latent_side and self.prediction_type != "v_prediction":
                config["sample_size"] = self.family.epsilon_latent_side
        return config

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet takes the guidance as an input, as that of a whole LCM does."""
        return self.unet_config.get("time_cond_proj_dim") is not None

    @property
    def resolution_px(self) -> int:
        """Side in px of the pictures that the network was trained on."""
        size = self.unet_config.get("sample_size") or 64
        return (size if isinstance(size, int) else size[0]) * self.pixels_per_latent

    @property
    def pixels_per_latent(self) -> int:
        """Side of a picture in px divided by the side of its latent."""
        return 2 ** (len(self.config_of("vae")["block_out_channels"]) - 1)

    @property
    def ends_in_noise(self) -> bool:
        """Whether the noise schedule ends in pure noise (zero terminal SNR), as the files or the user say."""
        return bool(self.scheduler_config.get("rescale_betas_zero_snr"))

    def schedule(self) -> NoiseSchedule:
        """The noise schedule of the scheduler config; InputRefused where it is not supported.

        So it is where it ends in pure noise and the UNet predicts epsilon: pure noise says nothing of x0 (Lin et al. 2024).
        """
        if self.ends_in_noise and self.prediction_type == "epsilon":
            raise InputRefused(
                f"{as_field('base', self.ref)}: its noise schedule ends in pure noise (zero terminal SNR), where a network that "
                "predicts epsilon is undefined",
                "if it predicts v, give `prediction_type=v_prediction`" + (", or leave out `zero_snr`" if self.zero_snr else ""),
            )
        with configs.building(self.scheduler_file, "noise schedule"):
            schedule = NoiseSchedule.from_config(self.scheduler_config)
        if not bool(torch.stack([schedule.alpha, schedule.sigma]).isfinite().all()):
            raise InputRefused(f"{self.scheduler_file}: its betas make no noise schedule: they leave the range from 0 to 1")
        return schedule

    @property
    def stated_clip_skip(self) -> int | None:
        """The number of layers that the user or the files say; None where nobody does."""
        return self.stored_recipe.clip_skip if self.clip_skip is None else self.clip_skip

    @property
    def skipped_layers(self) -> int:
        """How many last layers of the text encoders are left out, as diffusers counts them in `clip_skip`.

        It is what the user says, else what the files do.
        """
        return self.stated_clip_skip or 0

    @property
    def text_layer(self) -> int:
        """Whose states of each text encoder the UNet takes: -1 for the last layer, -2 for the one before it, and so on."""
        return self.family.text_layer - self.skipped_layers

    def reading(self, max_tokens: int | None = None, clip_skip: int | None = None, *, said_by: str = "") -> "Checkpoint":
        """A copy of this checkpoint that reads prompts otherwise; None leaves a value as it is. The components are shared.

        `said_by` is the file that states `clip_skip`, where the user does not. UsageError, or InputRefused for a file, where
        `clip_skip` leaves no layer of a text encoder; UsageError where `max_tokens` is no multiple of 75.
        """
        if max_tokens is None and clip_skip is None:
            return self
        other = copy(self)
        other.max_tokens = self.max_tokens if max_tokens is None else text_reading.checked_tokens(max_tokens)
        if clip_skip is not None:
            other.clip_skip = clip_skip
        stated = said_by or (self.ref if other.clip_skip is None else "")
        text_reading.checked_layers(other, stated)
        return other

    def with_unet(self, net: nn.Module, kind: PredictionType) -> "Checkpoint":
        """A copy of this checkpoint with `net` as the UNet, which outputs `kind`. Other components are shared."""
        other, settings = copy(self), self.scheduler_config
        changed = kind != self.prediction_type
        other.__dict__ |= {"unet": net, "scheduler_config": settings | ({"prediction_type": kind} if changed else {})}
        return other

    def shaped(self, part: str, config: dict[str, Any]) -> "Checkpoint":
        """A copy of this checkpoint whose component `part` has another config. The caller provides the weights for it."""
        other = copy(self)
        other.__dict__ = {k: v for k, v in self.__dict__.items() if k not in {part, f"{part}_config"}}
        other.configs = {**self.configs, part: config}
        return other

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether the unconditional prediction takes zero embeddings instead of the encoded empty prompt, as SDXL does."""
        return self.family.zeros_for_empty_prompt and self.index.get("force_zeros_for_empty_prompt", True)

    @cached_property
    def header(self) -> dict[str, str]:
        """What the checkpoint says of itself: the header of a single file, or fastdiff.json of a folder; else empty."""
        file = self.folder / "fastdiff.json"
        if self.path.is_file():
            return self.file.metadata
        content = configs.read(file)
        if wrong := [name for name, value in content.items() if not isinstance(value, str)]:
            raise InputRefused(f"{file}: {wrong[0]} is {configs.shown(content[wrong[0]])}, where a text is wanted")
        return content

    @property
    def published(self) -> Found | None:
        """The published few-step checkpoint that this is by its name, where its header is none of ours; None for any other."""
        return published.recognised(self.path, self.header, whole=True, family=self.family.name, ref=self.ref)

    @property
    def recipe(self) -> Recipe:
        """The sampling settings of a distilled checkpoint; empty for any other. InputRefused where they are malformed.

        Those of a published one are its authors', and a line says so. A network that takes the guidance as an input was
        distilled, as LCM was, and is sampled so where no file tells.
        """
        if found := self.published:
            note(f"{self.ref}: {found.text}")
            return found.row.recipe
        recipe = self.stored_recipe
        if recipe.scheduler is None and self.embeds_guidance:
            told = {name: value for name, value in vars(recipe).items() if value is not None}
            usual = {"family": self.family.name, "prediction_type": self.prediction_type}
            return replace(published.WHOLE_LCM.recipe, **(usual | told))
        return recipe

    @property
    def stored_recipe(self) -> Recipe:
        """The recipe in the header; InputRefused where it is malformed."""
        try:
            return Recipe.from_metadata(self.header)
        except ValueError as error:
            where = self.path if self.path.is_file() else self.folder / "fastdiff.json"
            raise InputRefused(f"{where}: the header is malformed ({quoted(error)})") from error

    # ---- weights

    @property
    def text_parts(self) -> list[str]:
        """The names of the text encoders: text_encoder, and for SDXL text_encoder_2 too."""
        return [part for part in self.index if part.startswith("text_encoder") and supported.class_of(self.index, part)]

    @property
    def parts(self) -> list[str]:
        """The names of the components that have weights."""
        return ["unet", "vae", *self.text_parts]

    @cached_property
    def file(self) -> TensorFile:
        """The single file, opened."""
        return views.opened(self.path, allow_pickle=self.allow_pickle)

    def skeleton(self, part: str) -> nn.Module:
        """A component as a network without weights: its parameters are on the meta device."""
        with configs.building(self.folder / part / "config.json"):
            return component.skeleton(part, self.config_of(part), self.index)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter that the component needs, by name.

        The shapes of published networks come from a table: building the network would import diffusers and transformers, which
        takes longer than reading a file.
        """
        home, stock = self.family.home, self.family.published and self.folder == self.family.home
        if stock and self.config_of(part) == configs.read(home / part / "config.json"):
            return shape_tables()[self.family.name][part]
        return {folders.plain_name(part, k): tuple(v.shape) for k, v in self.skeleton(part).state_dict().items()}

    def slots(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
        """The tensors of a single file that hold the component's parameters, given as name -> shape."""
        return single_file.slots(self.family, part, self.config_of(part), shapes)

    def weights(self, part: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Weights:
        """The stored tensors of a component, each read on access.

        InputRefused names layers that are missing, that have no place in the model, or that have another shape than its.
        """
        shapes = shapes or self.shapes(part)
        if part == "unet" and self.path.is_file() and views.is_diffusers_unet(self.file):
            return folders.weights_in(part, shapes, [self.file], self.path)
        if self.path.is_file():
            wanted = self.slots(part, shapes)
            missing = single_file.missing(self.file, wanted)
            prefix = self.family.prefixes[part]
            unknown = single_file.unknown(self.file, wanted, [prefix])
            if len(missing) == len(wanted) and self.config and not self.own_config and self.stored(part, self.config):
                info(f"{self.path}: has no {part}; taken from {self.config}")
                return self.from_folder(part, shapes, self.config)
            if len(missing) == len(wanted):
                hint = f"give a whole diffusers folder of its family: `base_config=FOLDER`, whose {part} is then used"
                raise InputRefused(f"{self.path}: has no {part} ({prefix}*)", hint)
            folders.require_complete(part, missing, unknown, self.path)
            return single_file.read(self.file, wanted, shapes)
        return self.from_folder(part, shapes, self.path)

    def stored(self, part: str, folder: Path) -> list[Path]:
        """The weight files of a component in a diffusers folder, as `folders.stored` finds them."""
        return folders.stored(folder, part, allow_pickle=self.allow_pickle)

    def from_folder(self, part: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Weights:
        """The tensors of a component of a diffusers folder, each read on access; InputRefused as in `weights`."""
        paths = self.stored(part, folder)
        if not paths or not all(path.exists() for path in paths):
            problem, hint = folders.why_missing(folder, part, allow_pickle=self.allow_pickle)
            raise InputRefused(f"{as_field('base', self.ref)}: {problem}", hint)
        files = [views.opened(path, allow_pickle=self.allow_pickle) for path in paths]
        return folders.weights_in(part, shapes, files, folder / part)

    # ---- networks

    def network(self, part: str, dtype: torch.dtype) -> nn.Module:
        """Load a component in `dtype` and freeze it. InputRefused as in `weights`, and for values that are NaN or infinite."""
        net = self.skeleton(part)
        names = {key: folders.plain_name(part, key) for key in net.state_dict()}
        weights = self.weights(part, {names[k]: tuple(v.shape) for k, v in net.state_dict().items()})
        state = {}
        for key, name in names.items():
            tensor = weights[name]
            if not tensor.is_floating_point():
                raise InputRefused(f"{as_field('base', self.ref)}: {part}: {name} is {tensor.dtype}, not floating point")
            state[key] = tensor.to(dtype).contiguous()
            if not bool(state[key].isfinite().all()):
                raise InputRefused(f"{as_field('base', self.ref)}: {part} has NaN or infinite values ({name})")
        net.load_state_dict(state, assign=True)
        assert not any(p.is_meta for p in net.parameters())
        return net.eval().requires_grad_(False)

    @cached_property
    def unet(self) -> nn.Module:
        """The UNet in `dtype`, frozen."""
        return self.network("unet", self.dtype)

    @cached_property
    def vae(self) -> nn.Module:
        """The VAE, frozen. It is always fp32, because SDXL's overflows in fp16."""
        return self.network("vae", torch.float32)

    @cached_property
    def text_encoders(self) -> list[nn.Module]:
        """The text encoders in fp32, frozen."""
        return [self.network(part, torch.float32) for part in self.text_parts]

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The tokenizers, as `tokens.tokenizers` makes them."""
        return tokens.tokenizers(self.folder, self.index)

    def release(self, *names: str) -> None:
        """Drop loaded components by name (unet, vae, text_encoders, tokenizers), which frees their memory."""
        for name in names:
            self.__dict__.pop(name, None)

    def pipeline(self) -> Any:
        """The diffusers pipeline of the family with these components, which all load now."""
        import diffusers

        name = self.scheduler_config.get("_class_name", "DDIMScheduler")
        scheduler = getattr(diffusers, str(name), None)  # the class that the folder names, where there is one
        if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
            raise InputRefused(f"{self.scheduler_file}: _class_name is {configs.shown(name)}, which is no scheduler of diffusers")
        with configs.building(self.scheduler_file, "scheduler"):
            parts: dict[str, Any] = {"scheduler": scheduler.from_config(self.scheduler_config)}
        parts |= {"unet": self.unet, "vae": self.vae}
        for i, (encoder, tokenizer) in enumerate(zip(self.text_encoders, self.tokenizers, strict=True)):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.family.safety_checker:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        else:
            parts |= {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt, "add_watermarker": False}
        return getattr(diffusers, self.family.pipeline)(**parts)  # the class that the family names


def load(
    ref: str,
    *,
    dtype: torch.dtype = torch.float32,
    config: str | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    zero_snr: bool = False,
    max_tokens: int = text_reading.MAX_TOKENS,
    clip_skip: int | None = None,
) -> Checkpoint:
    """Open the checkpoint that `ref` names: an alias, a hub id, a diffusers folder or a single file. Weights are read later.

    `config`, a diffusers folder or hub id, provides the configs of a single file of unusual shape; others need none.
    `prediction` (epsilon, v_prediction) overrides the prediction type that the files state. `zero_snr` says of files that do not
    that the noise schedule ends in pure noise (Lin et al. 2024). Of a prompt `max_tokens` are read, a multiple of 75. `clip_skip`
    last layers of the text encoders are left out, as diffusers counts them (default: as the files say, else none). UsageError
    where `ref` cannot be found or `clip_skip` leaves no layer, InputRefused where it is no supported checkpoint, or `zero_snr` is
    given for one that predicts epsilon.
    """
    opened = opened_as(ref, dtype, config, prediction, allow_pickle=allow_pickle, zero_snr=zero_snr)
    return opened.reading(max_tokens, clip_skip)


def opened_as(
    ref: str, dtype: torch.dtype, config: str | None, prediction: str | None, *, allow_pickle: bool, zero_snr: bool
) -> Checkpoint:
    """The checkpoint that `load` opens, before it is said how it reads prompts."""
    path = locate(ref, allow_pickle=allow_pickle)
    if not path.is_file():
        if config:
            warn(f"{as_field('base_config', config)}: is for single files; {ref} has configs of its own, which count")
        supported.check_folder(path)
        return checked(Checkpoint(ref, path, family_of(str(path)), dtype, None, None, prediction, allow_pickle, zero_snr))
    file = views.opened(path, allow_pickle=allow_pickle)
    how: dict[str, Any] = dict(prediction=prediction, allow_pickle=allow_pickle, zero_snr=zero_snr)
    return of_file(ref, file, dtype=dtype, config=config, **how)


def of_file(
    ref: str,
    file: TensorFile,
    *,
    dtype: torch.dtype = torch.float32,
    config: str | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
    zero_snr: bool = False,
) -> Checkpoint:
    """The checkpoint of a single file that is open; the rest is as in `load`."""
    if config:
        check_kind(file, whole=False)
        folder = config_folder(config, file, allow_pickle=allow_pickle)
        supported.check_folder(folder)
        family = family_of(str(folder))
        if not any(name.startswith(tuple(family.prefixes.values())) for name in file) and not views.is_diffusers_unet(file):
            raise supported.refusal(file.path, f"not a Stable Diffusion checkpoint: no {family.prefixes['unet']}* in it")
        detected = detect_prediction(file, family)
    else:
        detected = detect(file)
        folder = detected.family.home
    opened = Checkpoint(ref, file.path, detected.family, dtype, folder, detected, prediction, allow_pickle, zero_snr)
    opened.__dict__["file"] = file
    return checked(opened)


def checked(opened: Checkpoint) -> Checkpoint:
    """Compare what the user says of a checkpoint with its own files: tell of a contradiction, refuse an impossible pair."""
    if opened.prediction or opened.zero_snr:
        own = replace(opened, prediction=None, zero_snr=False)
        if "file" in opened.__dict__:
            own.__dict__["file"] = opened.file
        if opened.prediction not in {None, own.prediction_type} and own.states_prediction:
            given = as_field("prediction_type", opened.prediction)
            warn(f"{given}: the files of {opened.ref} say {own.prediction_type}; what you give counts")
        if opened.zero_snr and own.scheduler_config.get("rescale_betas_zero_snr") is False and not opened.own_config:
            warn(f"`zero_snr`: the scheduler config of {opened.folder} says the opposite; what you give counts")
    if opened.zero_snr:
        opened.schedule()
    return opened
