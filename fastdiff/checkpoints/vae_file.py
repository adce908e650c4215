"""Read a VAE from a single file of any known layout, and write TAESD's own.

    LDM          encoder.down.0.block.0.*, decoder.up.3.upsample.*, with or without `first_stage_model.`; whole checkpoints too
    diffusers    encoder.down_blocks.*, decoder.up_blocks.*                                  AutoencoderKL
    diffusers    encoder.layers.*, decoder.layers.*                                          AutoencoderTiny
    TAESD        0.weight, 1.conv.0.weight, ...: one file for the encoder, one for the decoder, whose clamp counts as layer 0

Such files say nothing of the network but its tensors, so its config is read from their shapes. What shapes do not tell, such as
the scaling of latents, is taken from the VAE of the base model.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import configs, single_file, tensors
from fastdiff.checkpoints.family import LDM
from fastdiff.checkpoints.folders import plain_name
from fastdiff.checkpoints.tensors import TensorFile
from fastdiff.runtime.console import info
from fastdiff.runtime.errors import InputRefused, as_field

PREFIXES = (LDM["vae"], "vae.", "")
TAESD_PARTS = ("taesd_decoder.", "taesd_encoder.")  # the prefixes of one file that holds both
SHIFT = {"decoder": 1, "encoder": 0}  # TAESD's decoder counts its clamp of the latents as a layer, diffusers' does not
PLAIN_TAESD = re.compile(r"\d{1,4}\.(weight|bias|(conv|skip)\.)")
BLOCKS_OF_UNET = re.compile(r"(unet\.)?(down_blocks|mid_block|input_blocks|middle_block)\.")
LAYER = re.compile(r"taesd_(de|en)coder\.|(de|en)coder\.(layers\.\d|conv_in\.|down(_blocks)?\.|up(_blocks)?\.|mid(_block)?\.)")
TAESD_LAYER = re.compile(r"(de|en)coder\.layers\.\d{1,4}\.(weight|bias|(conv|skip)\.)")
SCALING = 0.18215  # of SD1's latents
LAST_OF_ENCODER = "encoder.layers.14.weight"  # in TAESD's shape; zeros in an encoder that nobody trained
TAESD_WIDTH, TAESD_BLOCKS = 64, {"decoder": (3, 3, 3, 1), "encoder": (1, 3, 3, 3)}
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class VaeFile:
    """The config and tensors of a VAE, by the names of diffusers."""

    config: dict[str, Any]
    state: dict[str, Tensor]


def config_beside(path: Path) -> Path | None:
    """The config.json of a diffusers folder whose weights `path` is, so that the config need not be read from shapes."""
    config = path.with_name("config.json")
    return config if path.stem == "diffusion_pytorch_model" and config.exists() else None


def read(path: Path, ref: str, option: str, *, like: Mapping[str, Any], allow_pickle: bool = False) -> VaeFile:
    """Read the VAE in a file that `option` names as `ref`. `like` is the config of the base's VAE.

    InputRefused where the file is no VAE, or lacks layers of one.
    """
    file = tensors.open_file(path, allow_pickle=allow_pickle)
    return of_file(file, as_field(option, ref), like=like, allow_pickle=allow_pickle)


def of_file(file: TensorFile, where: str, *, like: Mapping[str, Any], allow_pickle: bool = False) -> VaeFile:
    """The VAE in an open file, which messages call `where`; the rest is as in `read`."""
    names = plain_names(file)
    if kind := next((kind for kind in ("decoder", "encoder") if is_taesd(names.values(), kind)), None):
        both = {**taesd_layers(file, names, kind), **partner(file.path, kind, where, allow_pickle)}
        return finished(both, where)
    if any(name.startswith(TAESD_PARTS) for name in names.values()):
        both = {}
        for kind in ("decoder", "encoder"):
            own = {key: name.split(".", 1)[1] for key, name in names.items() if name.startswith(f"taesd_{kind}.")}
            if strange := next((key for key, name in own.items() if not PLAIN_TAESD.match(name)), None):
                raise InputRefused(f"{where}: {strange} is no layer of TAESD")
            both |= taesd_layers(file, own, kind)
        return finished(both, where)
    if any(name.startswith("decoder.layers.") for name in names.values()):
        if strange := next((key for key, name in names.items() if not TAESD_LAYER.match(name)), None):
            raise InputRefused(f"{where}: {strange} is no layer of AutoencoderTiny")
        return finished({name: file[key] for key, name in names.items()}, where)
    return read_kl(file, names, where, like)


def is_alone(file: TensorFile) -> bool:
    """Whether a file is a VAE, or part of one, and no more: it has layers of a VAE and none of a UNet. Only names are asked."""
    if any(name.startswith(LDM["unet"]) or BLOCKS_OF_UNET.match(name) for name in file):
        return False
    names = [*plain_names(file).values()]
    return any(is_taesd(names, kind) for kind in SHIFT) or any(map(LAYER.match, names))


def sizes(shapes: Shapes, name: str, where: str) -> tuple[int, ...]:
    """The shape of a convolution's weights: (outputs, inputs, height, width).

    InputRefused where there is no such tensor, or it is none of a convolution.
    """
    if name not in shapes:
        raise InputRefused(f"{where}: a layer of the VAE is missing: {name}")
    shape = shapes[name]
    if len(shape) != 4 or 0 in shape:
        raise InputRefused(f"{where}: {name} is {tuple(shape)}, and no convolution")
    return shape


def stored_dtype(path: Path, *, allow_pickle: bool = False) -> torch.dtype:
    """The dtype of most tensors of a VAE in a diffusers folder, of a whole checkpoint too, or in a single file."""
    if path.is_dir():
        home = path / "vae" if (path / "model_index.json").exists() else path
        path = next(iter(sorted(home.glob("diffusion_pytorch_model*.safetensors"))), home / "diffusion_pytorch_model.bin")
    file = tensors.open_file(path, allow_pickle=allow_pickle)
    return Counter(file.layouts[name].dtype for name in plain_names(file)).most_common(1)[0][0]


def plain_names(file: TensorFile) -> dict[str, str]:
    """The tensors of the VAE in a file: name in the file -> name without the prefix that all of them have."""
    prefix = next(prefix for prefix in PREFIXES if not prefix or any(name.startswith(prefix) for name in file))
    return {name: name.removeprefix(prefix) for name in file if name.startswith(prefix)}


def is_taesd(names: Iterable[str], kind: str) -> bool:
    """Whether a file has TAESD's layout of its decoder or encoder: numbered layers from 1 or from 0 on."""
    names = set(names)
    return (
        bool(names)
        and all(map(PLAIN_TAESD.match, names))
        and f"{SHIFT[kind]}.weight" in names
        and (kind == "encoder" or "0.weight" not in names)
    )


def taesd_layers(file: TensorFile, names: Mapping[str, str], kind: str) -> dict[str, Tensor]:
    """The tensors of one of TAESD's files by the names of diffusers; `names` are without prefix."""
    numbered = {key: name.split(".", 1) for key, name in names.items()}
    return {f"{kind}.layers.{int(number) - SHIFT[kind]}.{rest}": file[key] for key, (number, rest) in numbered.items()}


def partner(path: Path, kind: str, where: str, allow_pickle: bool) -> dict[str, Tensor]:
    """The other half of TAESD, from the file beside that is named alike; without an encoder it stays empty, which is told."""
    other = {"decoder": "encoder", "encoder": "decoder"}[kind]
    beside = path.with_name(path.name.replace(kind, other))
    if beside != path and beside.exists():
        info(f"{path.name}: TAESD's {kind}; its {other} is {beside.name} beside it")
        file = tensors.open_file(beside, allow_pickle=allow_pickle)
        names = plain_names(file)
        if not is_taesd(names.values(), other):
            raise InputRefused(f"{beside}: not TAESD's {other}, which the name says", "give the two files that belong together")
        return taesd_layers(file, names, other)
    if kind == "encoder":
        raise encoder_alone(where)
    info(f"{path.name}: TAESD's decoder alone; without an encoder it draws pictures and encodes none")
    return {}


def encoder_alone(where: str) -> InputRefused:
    """The error for a VAE that cannot decode."""
    return InputRefused(f"{where}: TAESD's encoder, which draws no pictures", "give the file of the decoder")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def finished(state: dict[str, Tensor], where: str) -> VaeFile:
    """A tiny VAE; without an encoder it gets one that encodes to zeros, as `distill-vae` leaves it.

    InputRefused where it has no decoder, or none whose layers make a network.
    """
    if not any(name.startswith("decoder.") for name in state):
        raise encoder_alone(where)
    config = tiny_config(shapes_of(state), where)
    configs.check_part("vae", config, where)
    if not any(name.startswith("encoder.") for name in state):
        from diffusers import AutoencoderTiny

        with configs.building(where):
            made = AutoencoderTiny.from_config(config).encoder.state_dict()
        state = {**state, **{f"encoder.{name}": torch.zeros_like(tensor) for name, tensor in made.items()}}
    return VaeFile(config, state)


def tiny_config(shapes: Shapes, where: str) -> dict[str, Any]:
    """The config of a diffusers AutoencoderTiny whose parameters have these shapes. Its latents are scaled ones, as TAESD's.

    InputRefused, in which the file is called `where`, for a decoder without its first layer or of a single one.
    """
    blocks = {part: stages(shapes, part) for part in ("decoder", "encoder")}
    if "decoder.layers.0.weight" not in shapes:
        raise InputRefused(f"{where}: its decoder has no first layer (decoder.layers.0.weight)")
    first = sizes(shapes, "decoder.layers.0.weight", where)
    if not blocks["decoder"]:
        raise InputRefused(f"{where}: the decoder has one layer, and no blocks")
    widths = (first[0],) * len(blocks["decoder"])
    return {
        "_class_name": "AutoencoderTiny",
        "latent_channels": first[1],
        "decoder_block_out_channels": widths,
        "encoder_block_out_channels": widths,
        "num_decoder_blocks": blocks["decoder"],
        "num_encoder_blocks": blocks["encoder"] or tuple(reversed(blocks["decoder"])),
        "scaling_factor": 1.0,
        "force_upcast": False,
    }


def stages(shapes: Shapes, part: str) -> tuple[int, ...]:
    """The numbers of residual blocks at each resolution, read from the order of the layers; () without such a part.

    A convolution ends each resolution of the decoder and begins each of the encoder; one more lies at the other end.
    """
    named = [name.split(".", 3)[2:] for name in shapes if name.startswith(f"{part}.layers.")]
    residual = {int(number) for number, rest in named if rest.startswith("conv.")}
    counts = [0]
    for number in sorted({int(number) for number, _ in named}):
        if number in residual:
            counts[-1] += 1
        else:
            counts.append(0)
    return tuple(counts[1:-1])


def read_kl(file: TensorFile, names: Mapping[str, str], where: str, like: Mapping[str, Any]) -> VaeFile:
    """Read an AutoencoderKL with the names of LDM or of diffusers."""
    shapes = {name: file.layouts[key].shape for key, name in names.items()}
    ldm = "decoder.mid.block_1.conv1.weight" in shapes
    first = "encoder.down.{}.block.{}.conv2.weight" if ldm else "encoder.down_blocks.{}.resnets.{}.conv2.weight"
    if first.format(0, 0) not in shapes or "decoder.conv_in.weight" not in shapes:
        raise InputRefused(
            f"{where}: not a VAE ({', '.join(sorted(shapes)[:2]) or 'no tensors'}, ...)",
            "a file of AutoencoderKL, in the layout of diffusers or of single files, or of TAESD",
        )
    config = kl_config(shapes, first, like, where)
    configs.check_part("vae", config, where)
    with configs.building(where):
        wanted = expected(config)
    if ldm:
        prefix = next(iter(names)).removesuffix(next(iter(names.values())))
        slots = single_file.vae_slots(prefix, config, wanted)
        missing, unknown = single_file.missing(file, slots), single_file.unknown(file, slots, [prefix])
    else:
        plain = {plain_name("vae", name): key for key, name in names.items()}
        missing, unknown = [k for k in wanted if k not in plain], [k for k in plain if k not in wanted]
    for problem, layers in (("are missing", missing), ("have no place in it", unknown)):
        if layers:
            raise InputRefused(f"{where}: {len(layers)} layers of the VAE {problem}: {', '.join(layers[:3])}")
    if ldm:
        weights: Mapping[str, Tensor] = single_file.read(file, slots, wanted)
    else:
        for name, key in plain.items():
            if single_file.strip(file.layouts[key].shape) != single_file.strip(wanted[name]):
                raise InputRefused(f"{where}: {key} is {file.layouts[key].shape}, the model has {wanted[name]}")
        weights = {k: file[plain[k]].reshape(wanted[k]) for k in wanted}
    return VaeFile(config, {name: weights[name] for name in wanted})


def kl_config(shapes: Shapes, first: str, like: Mapping[str, Any], where: str = "the VAE") -> dict[str, Any]:
    """The config of a diffusers AutoencoderKL whose parameters have these shapes.

    `first` is the name of the second convolution of a layer of the encoder. Groups of the norms, scaling and precision are those
    of `like`, where its widths allow. InputRefused, in which the file is called `where`, where an outer layer is missing.
    """
    count = lambda at: next(n for n in range(1000) if first.format(*at(n)) not in shapes)
    levels, layers = count(lambda n: (n, 0)), count(lambda n: (0, n))
    widths = tuple(sizes(shapes, first.format(level, 0), where)[0] for level in range(levels))
    groups = like.get("norm_num_groups", 32)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": sizes(shapes, "encoder.conv_in.weight", where)[1],
        "out_channels": sizes(shapes, "decoder.conv_out.weight", where)[0],
        "latent_channels": sizes(shapes, "decoder.conv_in.weight", where)[1],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": groups if all(width % groups == 0 for width in widths) else 32,
        "sample_size": like.get("sample_size", 512),
        "scaling_factor": like.get("scaling_factor", SCALING),
        "force_upcast": like.get("force_upcast", True),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(".mid.attn_1." in name or ".mid_block.attentions." in name for name in shapes),
    }


def expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the AutoencoderKL of a config, by name."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL

    with init_empty_weights():
        return shapes_of(AutoencoderKL.from_config(dict(config)).state_dict())


# ---- TAESD's own layout


def unlike_taesd(config: Mapping[str, Any], shapes: Shapes) -> str | None:
    """Say what keeps a tiny VAE from being written as TAESD's files, which name no shapes; None where nothing does."""
    if config.get("_class_name", "AutoencoderTiny") != "AutoencoderTiny":
        return f"{config['_class_name']} has no such layout"
    width, latents = shapes["decoder.layers.0.weight"][:2]
    for part, blocks in TAESD_BLOCKS.items():
        if (own := stages(shapes, part)) != blocks:
            return f"its {part} has {', '.join(map(str, own))} residual blocks, TAESD's {', '.join(map(str, blocks))}"
    if width != TAESD_WIDTH or latents != 4:
        return f"it has {width} channels and {latents} of latents, TAESD {TAESD_WIDTH} and 4"
    if config.get("scaling_factor", 1.0) != 1.0:
        return f"its latents are scaled by {config['scaling_factor']}, TAESD's by 1"
    return None


def write_taesd(state: Mapping[str, Tensor], folder: Path, name: str, dtype: torch.dtype | None = None) -> list[Path]:
    """Write an AutoencoderTiny as NAME_decoder.safetensors and NAME_encoder.safetensors into a folder; returns the paths.

    The numbers are those of the published files. `dtype` None keeps the tensors' own.
    """
    paths = []
    for part, shift in SHIFT.items():
        numbered = {}
        for key, tensor in state.items():
            if key.startswith(f"{part}.layers."):
                number, rest = key.removeprefix(f"{part}.layers.").split(".", 1)
                numbered[f"{int(number) + shift}.{rest}"] = tensor.to(dtype or tensor.dtype)
        path = folder / f"{name}_{part}.safetensors"
        tensors.verify(path, tensors.write(path, tensors.entries(numbered), {"format": "pt"}))
        paths.append(path)
    return paths
