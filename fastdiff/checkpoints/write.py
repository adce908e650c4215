"""Write checkpoints: a diffusers folder, or a single file in the LDM layout.

Tensors are made and written one by one, under a temporary name that is changed to the right one at the end.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastdiff.checkpoints import single_file, tensors, views, words
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.detect import SPREAD, guess_by_bias
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.folders import plain_name
from fastdiff.checkpoints.locate import stock_config
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.checkpoints.single_file import Slot, Weights
from fastdiff.checkpoints.tensors import Entry
from fastdiff.checkpoints.tokens import clip_vocabulary
from fastdiff.runtime import secrets
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

if TYPE_CHECKING:  # networks are cast to these: torch types every attribute of a module as a tensor or a module
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def loaded(base: Checkpoint, part: str) -> nn.Module | None:
    """The component's network if it is in memory, where it may have been changed; None if it is not."""
    if part.startswith("text_encoder"):
        nets = base.__dict__.get("text_encoders")
        return nets[base.text_parts.index(part)] if nets else None
    return base.__dict__.get(part)


def weights_of(base: Checkpoint, part: str) -> Weights:
    """The tensors of a component: of the network in memory if there is one, else as stored.

    ValueError where the network still carries adapters.
    """
    net = loaded(base, part)
    if net is None:
        return base.weights(part)
    state = net.state_dict()
    wrapped = [k for k in state if ".base_layer." in k or ".lora_" in k]
    if wrapped:
        raise ValueError(f"the {part} still carries adapters ({wrapped[0]}): fold them before saving")
    return Weights.of({plain_name(part, key): value for key, value in state.items()})


def config_of(base: Checkpoint, part: str) -> dict[str, Any]:
    """The config of a component. A UNet in memory has its own, because a method may have changed its shape."""
    net = loaded(base, part)
    if part == "unet" and net is not None:
        return json.loads(cast("UNet2DConditionModel", net).to_json_string())
    return base.config_of(part)


def network_to_folder(net: nn.Module, folder: Path, recipe: Recipe | None = None) -> None:
    """Save a single network (a VAE, a ControlNet) as diffusers does, but without the path it came from; replaces `folder`."""
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    cast("ModelMixin", net).save_pretrained(staged)
    config = json.loads((staged / "config.json").read_text())
    write_json(staged / "config.json", {k: v for k, v in config.items() if k != "_name_or_path"})
    if recipe:
        write_json(staged / "fastdiff.json", recipe.to_metadata())
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def to_folder(
    base: Checkpoint,
    folder: Path,
    *,
    changed: Mapping[str, Weights] | None = None,
    dtype: torch.dtype | None = None,
    recipe: Recipe | None = None,
    said: Mapping[str, str] | None = None,
) -> None:
    """Write `base` as a diffusers folder. It gets its name when it is complete, so no program sees a half-written one.

    `changed` holds the components whose weights differ from the base's. `dtype` is for the UNet and the text encoders; the VAE
    keeps its own, because SDXL's overflows in fp16. Text encoders get the prefix `text_model.`, which every version of
    transformers reads. `said` are the entries of `words` for people; None: the
    base's own. UsageError where `folder` exists and is not a checkpoint.
    """
    changed = changed or {}
    if folder.exists() and not (folder / "model_index.json").exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{as_field('output', folder)}: exists and is not a checkpoint folder; choose another name")
    say_precision(base, dtype)
    sources = {part: changed.get(part) or weights_of(base, part) for part in base.parts}
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        for part, weights in sources.items():
            stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            part_dtype = None if part == "vae" else dtype
            rows = [
                Entry(name, part_dtype or weights.dtypes[name], shape, partial(weights.__getitem__, name))
                for name, shape in weights.shapes.items()
            ]
            tensors.write(staged / part / f"{stem}.safetensors", rows, {"format": "pt"})
            write_json(staged / part / "config.json", config_of(base, part))
        kind = (recipe or Recipe()).predicts(base.prediction_type)  # of the written weights, which a LoRA may have changed
        changed_kind = {"prediction_type": kind} if kind != base.prediction_type else {}
        write_json(staged / "scheduler" / "scheduler_config.json", base.scheduler_config | changed_kind)
        for part in [k for k, v in base.index.items() if k.startswith("tokenizer") and v[1]]:
            write_tokenizer(base.folder / part, staged / part)
        write_json(staged / "model_index.json", index_of(base))
        if notes := {**words_for(base, recipe, said), **(recipe.to_metadata() if recipe else {})}:
            write_json(staged / "fastdiff.json", notes)
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def index_of(base: Checkpoint) -> dict[str, Any]:
    """The content of model_index.json, without a safety checker and the components that serve it."""
    index = dict(base.index)
    if "scheduler" in index:
        index["scheduler"] = ["diffusers", base.scheduler_config.get("_class_name", index["scheduler"][1])]
    if "vae" in index:
        index["vae"] = ["diffusers", config_of(base, "vae").get("_class_name", index["vae"][1])]
    if base.family.safety_checker:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        index.pop("image_encoder", None)
    return index


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file, in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(secrets.hidden_in(dict(value)), indent=2) + "\n")


def write_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer in `source`. One without a vocabulary gets CLIP's, in files that every version of transformers reads."""
    if (source / "vocab.json").exists() or (source / "tokenizer.json").exists():
        shutil.copytree(source, target)
        return
    vocab, merges = clip_vocabulary()
    target.mkdir(parents=True)
    (target / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    text = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
    (target / "merges.txt").write_text(text, encoding="utf-8")
    shutil.copy(source / "tokenizer_config.json", target / "tokenizer_config.json")


# ---- one file


def slots_of(base: Checkpoint, part: str, weights: Weights) -> list[Slot]:
    """The tensors of the single file that hold a component."""
    return single_file.slots(base.family, part, config_of(base, part), weights.shapes)


def rows_of(base: Checkpoint, changed: Mapping[str, Weights], dtype: torch.dtype | None) -> Iterator[Entry]:
    """Every tensor of the single file, each made just before it is written."""
    for part in base.parts:
        weights = changed.get(part) or weights_of(base, part)
        yield from single_file.entries(weights, slots_of(base, part, weights), None if part == "vae" else dtype)
    yield from extras(base, changed, dtype)


def extras(base: Checkpoint, changed: Mapping[str, Weights], dtype: torch.dtype | None) -> Iterator[Entry]:
    """Tensors that other programs expect in the file: position ids, v-prediction markers, layer 24 of SD2's text encoder."""
    prefix = base.family.prefixes["text_encoder"]
    if "text_encoder" not in base.family.open_clip:
        length = base.config_of("text_encoder")["max_position_embeddings"]
        ids = lambda: torch.arange(length).reshape(1, length)
        yield Entry(f"{prefix}text_model.embeddings.position_ids", torch.int64, (1, length), ids)
    else:
        weights = changed.get("text_encoder") or weights_of(base, "text_encoder")
        layers = 1 + max(int(name.split(".")[3]) for name in weights.shapes if ".layers." in name)
        last = [s for s in slots_of(base, "text_encoder", weights) if f".resblocks.{layers - 1}." in s.name]
        for row in single_file.entries(weights, last, dtype):  # the copy is never used: the layer before it is
            name = row.name.replace(f".resblocks.{layers - 1}.", f".resblocks.{layers}.")
            yield Entry(name, row.dtype, row.shape, row.read)
        width = weights.shapes["text_model.final_layer_norm.weight"][0]
        norm_dtype = dtype or weights.dtypes["text_model.final_layer_norm.weight"]
        yield Entry(f"{prefix}text_projection", norm_dtype, (width, width), lambda: torch.eye(width))
        yield Entry(f"{prefix}logit_scale", norm_dtype, (), lambda: torch.tensor(1.0))
    empty = lambda: torch.empty(0)
    if base.family.marks_v and base.prediction_type == "v_prediction":
        yield Entry("v_pred", torch.float32, (0,), empty)
    if base.ends_in_noise:
        yield Entry("ztsnr", torch.float32, (0,), empty)


def metadata_of(base: Checkpoint, title: str, recipe: Recipe | None, said: Mapping[str, str] | None = None) -> dict[str, str]:
    """The header of the single file: entries of modelspec, of the recipe, and `said` for people (None: the base's own)."""
    v = base.prediction_type == "v_prediction"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/stablediffusion",
        "modelspec.architecture": base.family.architecture_v if v else base.family.architecture,
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if v else "epsilon",
        "modelspec.resolution": f"{base.resolution_px}x{base.resolution_px}",
        "fastdiff.prediction_type": base.prediction_type,
    }
    return {**metadata, **words_for(base, recipe, said), **(recipe.to_metadata() if recipe else {})}


def words_for(base: Checkpoint, recipe: Recipe | None, said: Mapping[str, str] | None) -> dict[str, str]:
    """What the written checkpoint says to people: `said`, or the base's own without a hint about another recipe's settings."""
    own = dict(words.of(base.header) if said is None else said)
    if said is None and recipe and recipe.scheduler and recipe != Recipe.from_metadata(base.header):
        own.pop(words.HINT, None)
    return own


def to_file(
    base: Checkpoint,
    path: Path,
    *,
    changed: Mapping[str, Weights] | None = None,
    dtype: torch.dtype | None = None,
    recipe: Recipe | None = None,
    said: Mapping[str, str] | None = None,
    force: bool = False,
) -> list[Path]:
    """Write `base` as a single file in the LDM layout, for ComfyUI, A1111 and Forge; returns the paths written.

    A yaml is written beside the file where those programs need one. `changed`, `dtype` and `said` are as in `to_folder`. The
    file is read back and compared tensor by tensor; GateFailed where it differs. InputRefused for a UNet with uneven layers, and
    without `force` for one that no other program reads as a single file.
    """
    changed = changed or {}
    refuse_unreadable(base, force=force)
    say_precision(base, dtype)
    say_prediction(base, path, changed)
    digests = tensors.write(path, rows_of(base, changed, dtype), metadata_of(base, path.stem, recipe, said))
    written = [path]
    if needs_yaml(base):
        yaml_path = path.with_suffix(".yaml")
        yaml_path.write_text(yaml_of(base))
        written.append(yaml_path)
    tensors.verify(path, digests)
    return written


def say_precision(base: Checkpoint, dtype: torch.dtype | None) -> None:
    """Say what becomes of weights that are stored in fp8, where the stored precision is kept."""
    if dtype is None and (count := fp8_count(base)):
        info(f"{base.ref}: {count} tensors are stored in fp8; they are written as fp16, which holds every number of fp8")


def fp8_count(base: Checkpoint) -> int:
    """How many tensors of the components are stored in fp8. Only headers are read."""
    if base.path.is_file():
        files = [base.file]
    else:
        paths = [path for part in base.parts for path in base.stored(part, base.path) if path.suffix == ".safetensors"]
        files = [views.opened(path) for path in paths if path.exists()]
    return sum(file.fp8_count for file in files if isinstance(file, views.View))


def seen_by_comfyui(base: Checkpoint, changed: Mapping[str, Weights]) -> str:
    """What ComfyUI takes the network of a single file for: epsilon or v_prediction, where nothing but its weights tells."""
    if base.family.predicts_either:
        weights = changed.get("unet") or weights_of(base, "unet")
        slot = next((slot for slot in slots_of(base, "unet", weights) if slot.name == SPREAD), None)
        return guess_by_bias(weights[slot.parts[0]]) if slot else "epsilon"
    return "v_prediction" if base.family.marks_v and base.prediction_type == "v_prediction" else "epsilon"


def say_prediction(base: Checkpoint, path: Path, changed: Mapping[str, Weights]) -> None:
    """Say what to set in ComfyUI where it would take the file for another type of prediction than it has; it reads no yaml."""
    names = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
    own, seen = base.prediction_type, seen_by_comfyui(base, changed)
    if own == seen:
        return
    zsnr = ", with zsnr on" if base.ends_in_noise and not base.family.marks_v else ""
    node = f'a node "ModelSamplingDiscrete" set to "{names[own]}"{zsnr}'
    info(f"{path.name}: ComfyUI takes it for {seen}; put {node} after its loader")


def needs_yaml(base: Checkpoint) -> bool:
    """Whether the single file needs a yaml beside it: without one, A1111 and Forge take SD1 for epsilon and guess for SD2."""
    return not base.family.marks_v and (base.family.predicts_either or base.prediction_type == "v_prediction")


def yaml_of(base: Checkpoint) -> str:
    """The text of the LDM configuration of an SD1 or SD2 checkpoint, as A1111 and Forge read it."""
    unet, vae = base.unet_config, base.config_of("vae")
    widths = unet["block_out_channels"]
    attention = [2**i for i, kind in enumerate(unet["down_block_types"]) if "CrossAttn" in kind]
    heads = unet.get("attention_head_dim", 8)
    head = "num_head_channels: 64" if isinstance(heads, list) else f"num_heads: {heads}"
    open_clip = "text_encoder" in base.family.open_clip
    encoder = "FrozenOpenCLIPEmbedder" if open_clip else "FrozenCLIPEmbedder"
    encoder_params = '\n      params: {freeze: True, layer: "penultimate"}' if open_clip else ""
    schedule = base.scheduler_config
    return f"""model:
  base_learning_rate: 1.0e-4
  target: single_file.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "{"v" if base.prediction_type == "v_prediction" else "eps"}"
    linear_start: {schedule["beta_start"]}
    linear_end: {schedule["beta_end"]}
    num_timesteps_cond: 1
    timesteps: {schedule.get("num_train_timesteps", 1000)}
    first_stage_key: "jpg"
    cond_stage_key: "txt"
    image_size: {unet.get("sample_size") or 64}
    channels: 4
    cond_stage_trainable: false
    conditioning_key: crossattn
    scale_factor: {vae.get("scaling_factor", 0.18215)}
    use_ema: False
    unet_config:
      target: single_file.modules.diffusionmodules.openaimodel.UNetModel
      params:
        use_checkpoint: False
        image_size: 32
        in_channels: 4
        out_channels: 4
        model_channels: {widths[0]}
        attention_resolutions: {attention}
        num_res_blocks: {unet["layers_per_block"]}
        channel_mult: {[width // widths[0] for width in widths]}
        {head}
        use_spatial_transformer: True
        use_linear_in_transformer: {bool(unet.get("use_linear_projection"))}
        transformer_depth: 1
        context_dim: {unet["cross_attention_dim"]}
        legacy: False
    first_stage_config:
      target: single_file.models.autoencoder.AutoencoderKL
      params:
        embed_dim: 4
        monitor: val/rec_loss
        ddconfig:
          double_z: true
          z_channels: 4
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: {vae["block_out_channels"][0]}
          ch_mult: {[width // vae["block_out_channels"][0] for width in vae["block_out_channels"]]}
          num_res_blocks: {vae["layers_per_block"]}
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config:
      target: single_file.modules.encoders.modules.{encoder}{encoder_params}
"""


def known_elsewhere(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether any program besides fastdiff and diffusers reads a UNet of this config from a single file."""
    crossed = config.get("only_cross_attention")
    if any(crossed) if isinstance(crossed, list | tuple) else crossed:
        return False
    if family.known_depths is None:
        return True
    depths = config.get("transformer_layers_per_block", 1)
    rows = depths if isinstance(depths, list | tuple) else [depths] * len(config["block_out_channels"])
    layers = config["layers_per_block"]
    attended = ["CrossAttn" in kind for kind in config["down_block_types"]]
    layer_depths = [
        (row if isinstance(row, list | tuple) else [row] * layers) if a else [0] * layers
        for row, a in zip(rows, attended, strict=True)
    ]
    return tuple(depth for row in layer_depths for depth in row) in family.known_depths


def blocks_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a UNet's config that pruning changes."""
    names = ("down_block_types", "layers_per_block", "mid_block_type", "transformer_layers_per_block")
    return {name: config.get(name) or (1 if name == "transformer_layers_per_block" else None) for name in names}


def refuse_unreadable(base: Checkpoint, *, force: bool) -> None:
    """Raise InputRefused for a UNet without a single-file layout, and without `force` for one that other programs do not know."""
    config = config_of(base, "unet")
    if config_of(base, "vae").get("_class_name") == "AutoencoderTiny":
        raise InputRefused(
            f"{as_field('base', base.ref)}: a tiny VAE has no place in a single file; ComfyUI reads it from files of its own",
            "export the checkpoint as a folder, or its tiny VAE by itself with `format=taesd`",
        )
    if not isinstance(config.get("layers_per_block"), int):
        raise InputRefused(f"{as_field('base', base.ref)}: an uneven UNet has no single-file layout", "export it as a folder")
    if config.get("time_cond_proj_dim") is not None and not force:
        raise InputRefused(
            f"{as_field('base', base.ref)}: its UNet takes the guidance as an input, "
            "which no other program reads from a single file",
            "export it as a folder, which diffusers loads; `force=True` writes the file for fastdiff alone",
        )
    if not known_elsewhere(base.family, config):
        if not force:
            raise InputRefused(
                f"{as_field('base', base.ref)}: ComfyUI, A1111 and Forge cannot read a UNet of this shape from a single file",
                "export it as a folder, which diffusers loads; `force=True` writes the file for fastdiff and diffusers "
                "(from_single_file with config=FOLDER)",
            )
    elif base.family.published and blocks_of(config) != blocks_of(stock_config(base.family)):
        info(f"{base.ref}: pruned; ComfyUI, fastdiff and diffusers (config=FOLDER) read the file, A1111 and Forge do not")
