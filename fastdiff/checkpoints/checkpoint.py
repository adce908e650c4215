"""A checkpoint: alias, hub id, diffusers folder or single file in. Components load on demand, every layer or none."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import single_file, tensors
from fastdiff.checkpoints.detect import Found, detect, infer_unet
from fastdiff.checkpoints.detect import prediction as prediction_told
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.locate import clip_vocabulary, family_of, locate, shape_tables
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Slot, Weights
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.diffusion.schedule import NoiseSchedule, PredictionType
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import InputRefused, as_field


def plain_name(part: str, name: str) -> str:
    """A stored parameter's name as we say it: `text_model.` in front (transformers 5.6 drops it), today's VAE attention."""
    if part.startswith("text_encoder"):
        return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
    if part == "vae" and (old := re.search(r"\.attentions\.0\.(query|key|value|proj_attn)\.", name)):
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old[1]]
        return name.replace(f".{old[1]}.", f".{new}.")
    return name


@dataclass
class Checkpoint:
    """A base model; `unet`, `vae`, `text_encoders` and `tokenizers` load when first touched, in `dtype`."""

    ref: str
    path: Path
    family: Family
    dtype: torch.dtype = torch.float32
    config: Path | None = None  # a diffusers folder of configs and tokenizers, for single files
    found: Found | None = None  # what a single file is
    prediction: str | None = None  # overrides what the files tell
    allow_pickle: bool = False
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of components that are to be of another shape

    # ---- configs

    @property
    def folder(self) -> Path:
        """Where model_index.json, the configs and the tokenizers are."""
        return self.config if self.path.is_file() and self.config else self.path

    @property
    def own_config(self) -> bool:
        """A single file on the configs that we ship, not on a folder that was given for it."""
        return self.path.is_file() and self.folder == self.family.home

    @cached_property
    def index(self) -> dict[str, Any]:
        file = self.folder / "model_index.json"
        if not file.exists():
            raise InputRefused(f"{self.folder}: model_index.json is missing; it is not a diffusers folder")
        return json.loads(file.read_text())

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        config = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        if self.found and (self.own_config or self.found.told):
            config["prediction_type"] = self.found.prediction_type
            if self.found.zero_snr:
                config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return config | ({"prediction_type": self.prediction} if self.prediction else {})

    @property
    def prediction_type(self) -> PredictionType:
        return self.scheduler_config.get("prediction_type", "epsilon")

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        return self.config_of("unet")

    def config_of(self, part: str) -> dict[str, Any]:
        """The config of a component; a single file's UNet has the blocks that are in the file."""
        if part in self.configs:
            return self.configs[part]
        path = self.folder / part / "config.json"
        if not path.exists():
            raise InputRefused(f"{path}: missing; {self.folder} is no complete diffusers folder")
        config = json.loads(path.read_text())
        if part == "unet" and self.own_config and self.family.published:
            config = infer_unet(self.file, config)
            if self.family.epsilon_latent_side and self.prediction_type == "epsilon":
                config["sample_size"] = self.family.epsilon_latent_side
        return config

    @property
    def resolution_px(self) -> int:
        """Pixels a side that the network was trained at."""
        size = self.unet_config.get("sample_size") or 64
        return (size if isinstance(size, int) else size[0]) * self.pixels_per_latent

    @property
    def pixels_per_latent(self) -> int:
        """A side of the picture over a side of its latent."""
        return 2 ** (len(self.config_of("vae")["block_out_channels"]) - 1)

    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    def with_unet(self, net: nn.Module, kind: PredictionType) -> "Checkpoint":
        """The same checkpoint around another UNet, which outputs `kind`."""
        other, told = copy(self), self.scheduler_config
        changed = kind != self.prediction_type
        other.__dict__ |= {"unet": net, "scheduler_config": told | ({"prediction_type": kind} if changed else {})}
        return other

    def shaped(self, part: str, config: dict[str, Any]) -> "Checkpoint":
        """The same checkpoint with a component of another shape, none of it loaded; its weights are the caller's to give."""
        other = copy(self)
        other.__dict__ = {k: v for k, v in self.__dict__.items() if k not in {part, f"{part}_config"}}
        other.configs = {**self.configs, part: config}
        return other

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """The unconditional branch of SDXL: zero embeddings instead of the encoded empty prompt."""
        return self.family.zeros_for_empty_prompt and self.index.get("force_zeros_for_empty_prompt", True)

    @property
    def recipe(self) -> Recipe:
        """How a distilled checkpoint wants to be sampled."""
        file = self.folder / "fastdiff.json"
        if self.path.is_file():
            return Recipe.from_metadata(self.file.metadata)
        return Recipe.from_metadata(json.loads(file.read_text())) if file.exists() else Recipe()

    # ---- weights

    @property
    def text_parts(self) -> list[str]:
        """text_encoder and for SDXL text_encoder_2."""
        return [part for part, row in self.index.items() if part.startswith("text_encoder") and row[1]]

    @property
    def parts(self) -> list[str]:
        return ["unet", "vae", *self.text_parts]

    @cached_property
    def file(self) -> TensorFile:
        return tensors.open_file(self.path, allow_pickle=self.allow_pickle)

    def skeleton(self, part: str) -> nn.Module:
        """A component without weights, all parameters on the meta device."""
        from accelerate import init_empty_weights

        config = self.config_of(part)
        with init_empty_weights():
            if part.startswith("text_encoder"):
                import transformers

                cls = getattr(transformers, self.index[part][1])  # the class that the folder names
                return cls(cls.config_class.from_dict(config))
            from diffusers import AutoencoderKL, UNet2DConditionModel

            return (UNet2DConditionModel if part == "unet" else AutoencoderKL).from_config(config)

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """What the component needs: parameter -> shape; out of a table where the network is a family's own.

        Building it, on the meta device, would import diffusers and transformers, which takes longer than reading a file.
        """
        home, stock = self.family.home, self.family.published and self.folder == self.family.home
        if stock and self.config_of(part) == json.loads((home / part / "config.json").read_text()):
            return shape_tables()[self.family.name][part]
        return {plain_name(part, k): tuple(v.shape) for k, v in self.skeleton(part).state_dict().items()}

    def slots(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
        """What a single file calls the component's parameters."""
        return single_file.slots(self.family, part, self.config_of(part), shapes)

    def weights(self, part: str, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Weights:
        """The stored tensors of a component, read one by one; a layer that is missing or left over is refused by name."""
        shapes = shapes or self.shapes(part)
        if self.path.is_file():
            wanted = self.slots(part, shapes)
            gone = single_file.missing(self.file, wanted)
            prefix = self.family.prefixes[part]
            left = single_file.unknown(self.file, wanted, [prefix])
            if len(gone) == len(wanted) and self.config and not self.own_config and self.stored(part, self.config):
                info(f"{self.path}: has no {part}; taken from {self.config}")
                return self.from_folder(part, shapes, self.config)
            if len(gone) == len(wanted):
                hint = f"give a whole diffusers folder of its family: `base_config=FOLDER`, whose {part} is then used"
                raise InputRefused(f"{self.path}: has no {part} ({prefix}*)", hint)
            self.complete(part, gone, left, self.path)
            return single_file.read(self.file, wanted, shapes)
        return self.from_folder(part, shapes, self.path)

    def complete(self, part: str, gone: list[str], left: list[str], where: Path) -> None:
        for what, names in (("are missing", gone), ("have no place in the model", left)):
            if names:
                told = f"{where}: {part}: {len(names)} layers {what}: {', '.join(names[:3])}"
                raise InputRefused(told, "the file is damaged or another model; for unusual networks give `base_config`")

    def stored(self, part: str, folder: Path) -> list[Path]:
        """The weight files of a component in a diffusers folder: full precision first, shards, then the fp16 variant."""
        home = folder / part
        for stem in ("diffusion_pytorch_model", "model"):
            for variant in ("", ".fp16"):
                index = home / f"{stem}.safetensors.index{variant}.json"
                if index.exists():
                    return [home / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
                if (one := home / f"{stem}{variant}.safetensors").exists():
                    return [one]
            if self.allow_pickle and (one := home / f"{stem}.bin").exists():
                return [one]
            if stem == "model" and (one := home / "pytorch_model.bin").exists() and self.allow_pickle:
                return [one]
        return []

    def from_folder(self, part: str, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> Weights:
        files = [tensors.open_file(path, allow_pickle=self.allow_pickle) for path in self.stored(part, folder)]
        if not files:
            raise InputRefused(
                f"{as_field('base', self.ref)}: {folder / part} has no safetensors weights",
                "a .bin is read with `allow_pickle=True`",
            )
        readers: dict[str, Callable[[], Tensor]] = {}
        dtypes: dict[str, torch.dtype] = {}
        left = []
        for file in files:
            for key in file:
                name = plain_name(part, key)
                if name not in shapes:
                    left += [] if re.search(r"position_ids$|logit_scale$|text_projection", name) else [key]
                    continue
                if single_file.strip(file.layouts[key].shape) != single_file.strip(shapes[name]):
                    raise InputRefused(f"{file.path}: {key} is {file.layouts[key].shape}, the model has {shapes[name]}")
                readers[name] = lambda file=file, key=key, shape=shapes[name]: file[key].reshape(shape)
                dtypes[name] = file.layouts[key].dtype
        self.complete(part, [name for name in shapes if name not in readers], left, folder / part)
        return Weights(readers, shapes, dtypes)

    # ---- networks

    def network(self, part: str, dtype: torch.dtype) -> nn.Module:
        """A component in `dtype`, frozen; nothing on the meta device, everything finite."""
        net = self.skeleton(part)
        names = {key: plain_name(part, key) for key in net.state_dict()}
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
        return self.network("unet", self.dtype)

    @cached_property
    def vae(self) -> nn.Module:
        """Always fp32: SDXL's overflows in fp16."""
        return self.network("vae", torch.float32)

    @cached_property
    def text_encoders(self) -> list[nn.Module]:
        return [self.network(part, torch.float32) for part in self.text_parts]

    @cached_property
    def tokenizers(self) -> list[Any]:
        """The folder's own, else CLIP's vocabulary, which is one for all families and ships with us."""
        from transformers import CLIPTokenizer

        found = []
        for part in [k for k, v in self.index.items() if k.startswith("tokenizer") and v[1]]:
            home = self.folder / part
            if (home / "vocab.json").exists() or (home / "tokenizer.json").exists():
                found.append(CLIPTokenizer.from_pretrained(home, local_files_only=True))
            else:
                vocab, merges = clip_vocabulary()
                told = json.loads((home / "tokenizer_config.json").read_text())
                found.append(
                    CLIPTokenizer(vocab=vocab, merges=merges, **{k: v for k, v in told.items() if k != "tokenizer_class"})
                )
        return found

    def release(self, *names: str) -> None:
        """Drop loaded components, so that their memory is free for the next one."""
        for name in names:
            self.__dict__.pop(name, None)

    def pipeline(self) -> Any:
        """The stock diffusers pipeline over these components."""
        import diffusers

        # the class that the folder names
        scheduler = getattr(diffusers, self.scheduler_config.get("_class_name", "DDIMScheduler"))
        parts: dict[str, Any] = {"unet": self.unet, "vae": self.vae, "scheduler": scheduler.from_config(self.scheduler_config)}
        for i, (encoder, tokenizer) in enumerate(zip(self.text_encoders, self.tokenizers, strict=True)):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.family.safety_checker:
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        else:
            parts |= {"force_zeros_for_empty_prompt": self.zeros_for_empty_prompt, "add_watermarker": False}
        return getattr(diffusers, self.family.pipeline)(**parts)  # the class that the row names


def load(
    ref: str,
    *,
    dtype: torch.dtype = torch.float32,
    config: str | None = None,
    prediction: str | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a checkpoint; nothing heavy is read yet.

    A single file needs no more than itself: configs and CLIP's vocabulary ship with us. `config`, a diffusers folder or hub
    id, is for networks of unusual shape. `prediction` (epsilon, v_prediction) overrides what the files tell.
    """
    path = locate(ref)
    if not path.is_file():
        return Checkpoint(ref, path, family_of(str(path)), dtype, None, None, prediction, allow_pickle)
    file = tensors.open_file(path, allow_pickle=allow_pickle)
    if config:
        folder = locate(config, configs_only=True)
        found = prediction_told(file, family_of(str(folder)))
    else:
        found = detect(file)
        folder = found.family.home
    opened = Checkpoint(ref, path, found.family, dtype, folder, found, prediction, allow_pickle)
    opened.__dict__["file"] = file
    return opened


def fingerprint(net: nn.Module) -> str:
    """sha256 over names and fp32 values of a network's weights: the `parent` of what is distilled from it."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = net.state_dict()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
