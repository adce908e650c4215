"""A checkpoint: alias, hub id, diffusers folder or single file in; a diffusers folder out. Components load on demand."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.console import InputRefused, UsageError
from fastdiff.io.recipe import Recipe
from fastdiff.schedule import NoiseSchedule

EMOJI = Path(__file__).parent.parent / "assets" / "emoji"
ALIASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd-1b": "segmind/SSD-1B",
}
FAMILIES = ("emoji", "sd15", "sd21", "sdxl")
FAMILY_OF_WIDTH = {128: "emoji", 768: "sd15", 1024: "sd21", 2048: "sdxl"}  # cross-attention width
# What a first run downloads from the hub: configs, tokenizers and one full-precision safetensors file a component.
WANTED = ["model_index.json", "*/*.json", "*/merges.txt", "*/*.safetensors"]
UNWANTED = ["*.fp16.*", "*non_ema*", "*onnx*", "*openvino*", "*flax*", "safety_checker/*", "vae_1_0/*", "vae_*coder/*"]


def missing_weights(ref: str, hub_id: str) -> UsageError:
    return UsageError(
        f"--base {ref}: no weights for it on this machine and the hub ({hub_id}) cannot be reached",
        "give it as (1) a hub id with network access (drop --offline), (2) a diffusers folder: --base path/to/folder, or "
        "(3) a single file: --base model.safetensors",
    )


def locate(ref: str, *, configs_only: bool = False) -> Path:
    """The folder or file behind a --base reference; downloads what is missing unless HF_HUB_OFFLINE is set."""
    if ref == "emoji":
        return EMOJI
    path = Path(ref).expanduser()
    if path.exists():
        return path
    if path.suffix in {".safetensors", ".ckpt", ".pt", ".bin"} or ref.startswith((".", "/", "~")):
        raise UsageError(f"--base {ref}: no such file or folder")
    hub_id = ALIASES.get(ref, ref)
    if hub_id.count("/") != 1:
        known = ", ".join(["emoji", *ALIASES])
        raise UsageError(f"--base {ref}: not an alias ({known}), a hub id (owner/name), a folder or a file")
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "*/*.json", "*/merges.txt"] if configs_only else WANTED
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=UNWANTED))
    except Exception as error:  # the hub client raises a dozen kinds; each means that there is no complete copy
        raise missing_weights(ref, hub_id) from error


def family_of(ref: str) -> str:
    """emoji, sd15, sd21 or sdxl, from the alias or the cross-attention width; cheap, no weights are read."""
    if ref in FAMILIES:
        return ref
    if ref in ALIASES:
        return "sdxl"
    path = locate(ref, configs_only=True)
    if path.is_file():
        return single_file_family(path)
    config = path / "unet" / "config.json"
    if not config.exists():
        raise InputRefused(f"--base {ref}: {config} is missing; a diffusers folder holds unet/, vae/, text_encoder/ ...")
    return family_of_config(json.loads(config.read_text()))


def family_of_config(config: dict[str, Any]) -> str:
    width = config.get("cross_attention_dim")
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return FAMILY_OF_WIDTH.get(width, "sd15")


def single_file_family(path: Path) -> str:
    """From the width of one key's shape in an LDM-layout file's header."""
    if path.suffix != ".safetensors":
        raise InputRefused(f"{path}: only .safetensors checkpoints are read (pickles can run code); convert it first")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                if key.startswith("model.diffusion_model.") and key.endswith("attn2.to_k.weight"):
                    return FAMILY_OF_WIDTH.get(file.get_slice(key).get_shape()[1], "sd15")
    except SafetensorError as error:
        raise InputRefused(f"{path}: not a readable safetensors file ({error})") from error
    raise InputRefused(f"{path}: not a Stable Diffusion checkpoint (no model.diffusion_model.*.attn2.to_k.weight in it)")


@dataclass
class Checkpoint:
    """A base model; `unet`, `vae`, `text_encoders` and `tokenizers` load when first touched, in `dtype`."""

    ref: str
    path: Path
    family: str
    dtype: torch.dtype = torch.float32
    config: Path | None = None  # a diffusers folder of configs and tokenizers, for single files

    @property
    def folder(self) -> Path:
        """Where model_index.json, the configs and the tokenizers are."""
        return self.config if self.path.is_file() and self.config else self.path

    @cached_property
    def index(self) -> dict[str, Any]:
        file = self.folder / "model_index.json"
        if not file.exists():
            raise InputRefused(f"{self.folder}: model_index.json is missing; it is not a diffusers folder")
        return json.loads(file.read_text())

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        return json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())

    @property
    def prediction_type(self) -> str:
        return self.scheduler_config.get("prediction_type", "epsilon")

    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """SDXL's unconditional branch: zero embeddings instead of the encoded empty prompt."""
        return self.family == "sdxl" and self.index.get("force_zeros_for_empty_prompt", True)

    @cached_property
    def unet(self) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return self._component(UNet2DConditionModel, "unet", self.dtype)

    @cached_property
    def vae(self) -> nn.Module:
        """Always fp32: SDXL's overflows in fp16."""
        from diffusers import AutoencoderKL

        return self._component(AutoencoderKL, "vae", torch.float32)

    @cached_property
    def text_encoders(self) -> list[nn.Module]:
        import transformers

        rows = [(k, v[1]) for k, v in self.index.items() if k.startswith("text_encoder") and v[1]]
        return [self._component(getattr(transformers, name), part, torch.float32) for part, name in rows]

    @cached_property
    def tokenizers(self) -> list[Any]:
        from transformers import CLIPTokenizer

        parts = [k for k, v in self.index.items() if k.startswith("tokenizer") and v[1]]
        return [CLIPTokenizer.from_pretrained(self.folder / part, local_files_only=True) for part in parts]

    def release(self, *names: str) -> None:
        """Drop loaded components, so that their memory is free for the next one."""
        for name in names:
            self.__dict__.pop(name, None)

    def _component(self, cls: type, part: str, dtype: torch.dtype) -> nn.Module:
        try:
            if self.path.is_file():
                net = self._from_single_file(cls, part, dtype)
            else:
                kind = {"dtype": dtype} if cls.__module__.startswith("transformers") else {"torch_dtype": dtype}
                net = cls.from_pretrained(self.path / part, local_files_only=True, use_safetensors=True, **kind)
        except (OSError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise InputRefused(f"--base {self.ref}: {part} cannot be loaded from {self.path}: {reason}") from error
        broken = [k for k, v in net.state_dict().items() if v.is_meta or not bool(v.isfinite().all())]
        if broken:
            raise InputRefused(f"--base {self.ref}: {part} has missing or non-finite weights: {', '.join(broken[:3])}")
        return net.eval().requires_grad_(False)

    def _from_single_file(self, cls: type, part: str, dtype: torch.dtype) -> nn.Module:
        if cls.__module__.startswith("diffusers"):
            return cls.from_single_file(str(self.path), config=str(self.config), subfolder=part, torch_dtype=dtype)
        return getattr(self._whole_pipeline, part)

    @cached_property
    def _whole_pipeline(self) -> Any:
        """diffusers converts text encoders out of single files only as part of a pipeline."""
        import diffusers

        cls = getattr(diffusers, self.index["_class_name"])
        return cls.from_single_file(str(self.path), config=str(self.config), local_files_only=True)

    def pipeline(self) -> Any:
        """The stock diffusers pipeline over these components."""
        import diffusers

        scheduler = getattr(diffusers, self.scheduler_config.get("_class_name", "DDIMScheduler"))
        parts: dict[str, Any] = {"unet": self.unet, "vae": self.vae, "scheduler": scheduler.from_config(self.scheduler_config)}
        for i, (encoder, tokenizer) in enumerate(zip(self.text_encoders, self.tokenizers, strict=True)):
            suffix = "" if i == 0 else f"_{i + 1}"
            parts |= {f"text_encoder{suffix}": encoder, f"tokenizer{suffix}": tokenizer}
        if self.family == "sdxl":
            return diffusers.StableDiffusionXLPipeline(
                **parts, force_zeros_for_empty_prompt=self.zeros_for_empty_prompt, add_watermarker=False
            )
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return diffusers.StableDiffusionPipeline(**parts)


def load(ref: str, *, dtype: torch.dtype = torch.float32, config: str | None = None) -> Checkpoint:
    """Open a checkpoint; nothing heavy is read yet.

    A single file needs a folder of configs and tokenizers: `config` (a folder or hub id), else the family's own hub id.
    """
    path = locate(ref)
    family = "emoji" if ref == "emoji" else family_of(str(path))
    folder = None
    if path.is_file():
        try:
            folder = locate(config or family, configs_only=True)
        except UsageError as error:
            raise UsageError(
                f"--base {ref}: a single file needs the {family} configs and tokenizer, and they are not on this machine",
                "give any diffusers folder of that family: --base-config path/to/folder",
            ) from error
    return Checkpoint(ref, path, family, dtype, folder)


def save(checkpoint: Checkpoint, folder: Path, *, recipe: Recipe | None = None) -> None:
    """Write a diffusers folder, staged beside it and renamed, so that a half-written one is never seen."""
    wrapped = [k for k in checkpoint.unet.state_dict() if ".base_layer." in k or "lora_" in k]
    if wrapped:
        raise ValueError(f"the UNet still carries adapters ({wrapped[0]}): fold them before saving")
    if folder.exists() and not (folder / "model_index.json").exists() and any(folder.iterdir()):
        raise UsageError(f"--output {folder}: exists and is not a checkpoint folder; choose another name")
    folder.parent.mkdir(parents=True, exist_ok=True)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    checkpoint.pipeline().save_pretrained(staged, safe_serialization=True)
    if recipe:
        (staged / "fastdiff.json").write_text(json.dumps(recipe.to_metadata(), indent=2) + "\n")
    if folder.exists():
        shutil.rmtree(folder)
    staged.rename(folder)


def fingerprint(net: nn.Module) -> str:
    """sha256 over names and fp32 values of a network's weights: the `parent` of what is distilled from it."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = net.state_dict()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
