"""Translate between diffusers' parameter names and the LDM layout of single files (ComfyUI, A1111, Forge, model sites).

With n layers a block, the LDM names of layer j are:
    down block i    resnet input_blocks.{i(n+1)+j+1}.0, attention input_blocks.{i(n+1)+j+1}.1
    its downsampler input_blocks.{(i+1)(n+1)}.0.op
    up block i      resnet output_blocks.{i(n+1)+j}.0, attention output_blocks.{i(n+1)+j}.1
    its upsampler   output_blocks.{i(n+1)+n}, after resnet and attention
Text encoders of transformers keep their names, with `text_model.` in front; those of open_clip stack q, k and v.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.tensors import Entry, TensorFile
from fastdiff.runtime.errors import InputRefused

FIXED = {  # diffusers -> LDM: UNet modules outside the blocks
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # an LCM's guidance input, in no other program's layout
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {  # diffusers -> LDM: layers of a resnet
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = (  # regular expression for diffusers' name, replacement
    (r"^(encoder)\.down_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.down.\2.block.\3."),
    (r"^(encoder)\.down_blocks\.(\d+)\.downsamplers\.0\.", r"\1.down.\2.downsample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
OPEN_CLIP = (  # regular expression for transformers' name, replacement
    (r"^text_model\.embeddings\.token_embedding\.weight$", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"transformer.resblocks.\1.ln_\2."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.resblocks.\1.mlp.c_fc."),
    (r"^text_model\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.resblocks.\1.mlp.c_proj."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.resblocks.\1.attn.out_proj."),
    (r"^text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)$", r"transformer.resblocks.\1.attn.in_proj_\2"),
)
# Tensors that we do not need: buffers, averaged weights, unused layers of open_clip, and what training leaves in a file.
IGNORED = re.compile(
    r"position_ids$|\.logit_scale$|^cond_stage_model\.model\.text_projection$|^model_ema\.|"
    r"^(alphas|betas|sqrt|log_one|posterior|logvar|lvlb|denoiser|loss|optimizer|global_step|embedding_manager)|"
    r"^(v_pred|ztsnr|state_dict)$|^first_stage_model\.(loss|discriminator)|\.attn_mask$"
)


@dataclass(frozen=True)
class Slot:
    """One tensor of an LDM file, made of one or more diffusers parameters stacked along the first axis."""

    name: str  # in the file
    parts: tuple[str, ...]  # diffusers' names
    form: str = "plain"  # plain, transposed, or conv: a linear layer (out, in) stored as (out, in, 1, 1)


def unet_paths(levels: int, layers: int, up_attention: Iterable[int]) -> dict[str, str]:
    """The LDM path of every diffusers module path of a UNet. `up_attention` lists the up blocks that have attention."""
    paths, n = dict(FIXED), layers + 1
    for i in range(levels):
        for j in range(layers):
            paths[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{i * n + j + 1}.0"
            paths[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{i * n + j + 1}.1"
        paths[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * n}.0.op"
        for j in range(n):
            paths[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{i * n + j}.0"
            paths[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{i * n + j}.1"
        place = 2 if i in up_attention else 1
        paths[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * n + layers}.{place}.conv"
    paths |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    return paths | {"mid_block.resnets.1": "middle_block.2"}


def config_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """`unet_paths` for a UNet's config; InputRefused for an uneven network, which has no LDM layout."""
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) or isinstance(layers, bool):
        raise InputRefused(f"layers_per_block {layers}: an uneven UNet has no single-file layout", "keep the diffusers folder")
    up = config["up_block_types"]
    return unet_paths(len(config["block_out_channels"]), layers, [i for i, kind in enumerate(up) if "CrossAttn" in kind])


def unet_name(name: str, paths: Mapping[str, str]) -> str:
    """The LDM name of a diffusers UNet parameter, by the table `paths` of `unet_paths`; InputRefused where it has none."""
    pieces = name.split(".")
    for cut in range(len(pieces) - 1, 0, -1):
        if path := paths.get(".".join(pieces[:cut])):
            rest = pieces[cut:]
            if ".resnets." in name and rest[0] in RESNET:
                rest[0] = RESNET[rest[0]]
            return ".".join([path, *rest])
    raise InputRefused(f"{name}: this UNet layer has no place in the single-file layout", "keep the diffusers folder")


def vae_name(name: str, levels: int) -> str:
    """The LDM name of a diffusers AutoencoderKL parameter. LDM numbers the decoder's levels in the opposite order."""
    up = re.match(r"^decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.*)", name)
    if up:
        inner = f"block.{up[2]}" if up[2] else "upsample"
        name = f"decoder.up.{levels - 1 - int(up[1])}.{inner}.{up[3]}"
    for pattern, new in VAE:
        name = re.sub(pattern, new, name)
    return name


def vae_slots(prefix: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """The tensors of an LDM file that hold an AutoencoderKL of this config, each named with `prefix` in front."""
    levels = len(config["block_out_channels"])
    flat = lambda name: ".mid_block.attentions." in name and len(shapes[name]) == 2
    return [Slot(prefix + vae_name(name, levels), (name,), "conv" if flat(name) else "plain") for name in shapes]


def slots(family: Family, part: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """The tensors of an LDM file that hold the component `part`, whose parameters are given as diffusers name -> shape.

    InputRefused where a parameter has no place in the LDM layout.
    """
    prefix = family.prefixes[part]
    if part == "unet":
        paths = config_paths(config)
        return [Slot(prefix + unet_name(name, paths), (name,)) for name in shapes]
    if part == "vae":
        return vae_slots(prefix, config, shapes)
    if part not in family.open_clip:
        return [Slot(prefix + name, (name,)) for name in shapes]
    result = []
    for name in shapes:
        if re.search(r"\.self_attn\.[kv]_proj\.", name):
            continue  # part of the slot of q
        new = next((re.sub(pattern, text, name) for pattern, text in OPEN_CLIP if re.search(pattern, name)), None)
        if new is None:
            raise InputRefused(f"{name}: this text encoder layer has no place in the single-file layout")
        stacked = tuple(name.replace(".q_proj.", f".{x}_proj.") for x in "qkv") if ".q_proj." in name else (name,)
        result.append(Slot(prefix + new, stacked, "transposed" if new == "text_projection" else "plain"))
    return result


class Weights(Mapping[str, Tensor]):
    """The tensors of a component by diffusers name, each read on access. `shapes` are the model's, `dtypes` those stored."""

    def __init__(
        self, readers: dict[str, Callable[[], Tensor]], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        self.readers, self.shapes = readers, {name: tuple(shapes[name]) for name in readers}
        self.dtypes = dtypes

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Weights":
        """Wrap tensors that are already in memory."""
        readers: dict[str, Callable[[], Tensor]] = {name: partial(tensors.__getitem__, name) for name in tensors}
        return cls(readers, {k: tuple(t.shape) for k, t in tensors.items()}, {k: t.dtype for k, t in tensors.items()})

    def __getitem__(self, name: str) -> Tensor:
        return self.readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.readers)

    def __contains__(self, name: object) -> bool:  # the method of Mapping would read the tensor
        return name in self.readers

    def __len__(self) -> int:
        return len(self.readers)


def name_in_file(name: str, file: Mapping[str, Any]) -> str:
    """The name that `file` has for the tensor `name`.

    Some files lack the level `text_model.`: NovelAI's, and those that fastdiff wrote with transformers 5.6.
    """
    flat = name.replace(".text_model.", ".", 1)
    return flat if name not in file and flat in file else name


def missing(file: Mapping[str, Any], wanted: Iterable[Slot]) -> list[str]:
    """The names of the wanted tensors that are not in the file."""
    return [slot.name for slot in wanted if name_in_file(slot.name, file) not in file]


def unknown(file: Mapping[str, Any], wanted: Iterable[Slot], prefixes: Iterable[str]) -> list[str]:
    """The names of tensors with one of these prefixes that are in no slot, so that reading would lose them."""
    known = {slot.name for slot in wanted}
    known |= {name.replace(".text_model.", ".", 1) for name in known}
    # SD2 uses the output of open_clip's second to last layer. Files still hold the last layer; networks lack it.
    layers = {int(m[2]): m[1] for k in known if (m := re.match(r"(cond_stage_model\.model\.transformer\.resblocks\.)(\d+)\.", k))}
    if layers:
        known |= {k for k in file if k.startswith(f"{layers[0]}{max(layers) + 1}.")}
    return [k for k in file if k.startswith(tuple(prefixes)) and k not in known and not IGNORED.search(k)]


def read(file: TensorFile, wanted: Iterable[Slot], shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Read a component from an LDM file, in the `shapes` of the model. InputRefused names a tensor of another shape."""
    readers: dict[str, Callable[[], Tensor]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for slot in wanted:
        name = name_in_file(slot.name, file)
        stored = file.layouts[name].shape
        first = shapes[slot.parts[0]]
        model = first[::-1] if slot.form == "transposed" else (first[0] * len(slot.parts), *first[1:])
        if strip(stored) != strip(model):
            raise InputRefused(f"{file.path}: {name} is {stored}, the model has {tuple(model)}")
        for i, part in enumerate(slot.parts):
            readers[part] = partial(read_part, file, name, slot, i, shapes[part])
            dtypes[part] = file.layouts[name].dtype
    return Weights(readers, shapes, dtypes)


def strip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without the trailing 1 x 1 of a convolution, which then equals the shape of a linear layer."""
    return tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)


def read_part(file: TensorFile, name: str, slot: Slot, i: int, shape: tuple[int, ...]) -> Tensor:
    """Read part `i` of the stored tensor `name`, in the model's shape."""
    tensor = file[name]
    part = tensor.T if slot.form == "transposed" else tensor.chunk(len(slot.parts))[i]
    return part.reshape(shape)


def read_reshaped(file: TensorFile, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read a whole stored tensor, in the model's shape."""
    return file[name].reshape(shape)


def stack_parts(weights: Weights, slot: Slot, dtype: torch.dtype) -> Tensor:
    """The tensor of a slot as an LDM file stores it."""
    tensors = [weights[part] for part in slot.parts]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    if slot.form == "transposed":
        return tensor.T.contiguous().to(dtype)
    return (tensor[..., None, None] if slot.form == "conv" else tensor).to(dtype)


def entries(weights: Weights, wanted: Iterable[Slot], dtype: torch.dtype | None) -> Iterator[Entry]:
    """The tensors to write for a component, each made just before it is written. `dtype` None keeps the stored dtypes."""
    for slot in wanted:
        slot_dtype = dtype or weights.dtypes[slot.parts[0]]
        first = weights.shapes[slot.parts[0]]
        shape = first[::-1] if slot.form == "transposed" else (first[0] * len(slot.parts), *first[1:])
        shape = (*shape, 1, 1) if slot.form == "conv" else tuple(shape)
        yield Entry(slot.name, slot_dtype, shape, partial(stack_parts, weights, slot, slot_dtype))


# ---- flat names, as LoRA files have them: underscores instead of dots


def flat_table(layers: int = 2) -> dict[str, str]:
    """The flat diffusers path of every flat LDM path, whichever blocks have attention; the longest LDM paths come first.

    `layers` is the number of layers in a block of the base UNet.
    """
    rows = [*unet_paths(4, layers, ()).items(), *unet_paths(4, layers, range(4)).items()]
    table = {ldm.replace(".", "_"): ours.replace(".", "_") for ours, ldm in rows}
    return dict(sorted(table.items(), key=lambda row: -len(row[0])))


def from_flat(name: str, table: Mapping[str, str]) -> str | None:
    """Turn a flat LDM name into diffusers', as input_blocks_1_0_in_layers_2 into down_blocks_0_resnets_0_conv1.

    None where it is no LDM name. `table` is that of `flat_table`.
    """
    for ldm, ours in table.items():
        if name == ldm:
            return ours
        if name.startswith(ldm + "_"):
            rest = name.removeprefix(ldm + "_")
            inner = {new.replace(".", "_"): old for old, new in RESNET.items()}
            return f"{ours}_{inner.get(rest, rest) if '_resnets_' in ours else rest}"
    return None


def to_flat(name: str, layers: int = 2) -> str:
    """Turn a flat diffusers name into LDM's. This works for SDXL alone, where every up block with an upsampler has attention."""
    for ours, ldm in sorted(unet_paths(4, layers, range(4)).items(), key=lambda row: -len(row[0])):
        flat = ours.replace(".", "_")
        if name == flat or name.startswith(flat + "_"):
            rest = name.removeprefix(flat).removeprefix("_")
            rest = RESNET.get(rest, rest).replace(".", "_") if ".resnets." in ours else rest
            return "_".join(filter(None, (ldm.replace(".", "_"), rest)))
    return name
