"""LoRA on a UNet through peft: several on one base, each worn only by the role it belongs to, and the factors back out."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora, from_peft, layers_told
from fastdiff.lora.kinds import Dense, low_rank_of
from fastdiff.runtime.errors import UsageError

# The layers of the published LCM- and DMD2-LoRAs: rank 64 on these is 67,252,224 parameters on SD1.5, 196,751,360 on SDXL.
# fmt: off
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = (
    *ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)
# fmt: on
LAYERS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()  # that have adapters, of each network


def attach(
    unet: nn.Module, rank: int, alpha: float, name: str = "student", targets: Sequence[str] = TARGETS
) -> list[nn.Parameter]:
    """Freeze the UNet and put a fresh adapter on it beside those that it has; returns its trainable factors, in fp32

    whatever the base is stored in. It starts as zero.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    trained = [p for p in unet.parameters() if p.requires_grad and is_adapted(unet)]
    LAYERS.pop(unet, None)
    unet.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)), adapter_name=name)
    cast_training_params(unet, torch.float32)
    mine = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(True)
    return mine


@torch.no_grad()
def start_from(unet: nn.Module, start: Lora, name: str) -> None:
    """Give a fresh adapter what a LoRA of the same base does, or the nearest of its own rank.

    UsageError where the LoRA does not fit or changes a layer that the adapter does not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = {key: unet.get_submodule(layer) for key, layer in apply.names(unet).items()}
    adapted = {key: m for key, m in modules.items() if isinstance(m, BaseTunerLayer)}
    weights = {key: adapted[key].base_layer.weight if key in adapted else m.weight for key, m in modules.items()}
    bare = {f"{layer}.weight": tuple(weights[key].shape) for key, layer in apply.names(unet).items()}
    (fitted,) = apply.fit([(start, 1.0)], apply.places(bare, "lora_unet_"))
    homeless = [key for key in fitted.modules if key not in adapted]
    if homeless:
        raise UsageError(
            f"{start.source}: {len(homeless)} of its layers have no adapter here ({homeless[0]})", "`lora_layers=all`"
        )
    for key, update in fitted.modules.items():
        layer = adapted[key]
        if update.needs_weight:
            update = Dense(update.delta(layer.base_layer.weight.float().cpu()))
        down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
        near, _, _ = low_rank_of(update, len(down))
        down[: near.rank].copy_(near.down.reshape(near.rank, *down.shape[1:]))
        up[:, : near.rank].copy_(near.up.reshape(len(up), near.rank, *up.shape[2:]) / layer.scaling[name])


def encoder_layers(unet: nn.Module) -> list[str]:
    """The names of the layers that an adapter of the down and mid blocks alone acts on."""
    ends = tuple(f".{name}" for name in TARGETS)
    names = (name.replace(".base_layer", "") for name, _ in unet.named_modules() if ".lora_" not in name)
    return list(dict.fromkeys(n for n in names if n.startswith(("down_blocks.", "mid_block.")) and n.endswith(ends)))


def adapted_layers(net: nn.Module) -> list[Any]:
    """The layers that have an adapter, looked for once: a walk over the network takes as long as a block of it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if net not in LAYERS:
        LAYERS[net] = [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
    return LAYERS[net]


def layers_with(unet: nn.Module, name: str) -> Iterator[Any]:
    """The layers that have that adapter."""
    return (layer for layer in adapted_layers(unet) if name in layer.lora_A)


def parameters(unet: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for layer in layers_with(unet, name) for p in (layer.lora_A[name].weight, layer.lora_B[name].weight)]


@torch.no_grad()
def imitate(unet: nn.Module, source: str, name: str) -> None:
    """Give one adapter the factors of another of its shape."""
    for mine, its in zip(parameters(unet, name), parameters(unet, source), strict=True):
        mine.copy_(its)


def reset(unet: nn.Module, name: str) -> None:
    """A fresh start: zero again."""
    for layer in layers_with(unet, name):
        layer.reset_lora_parameters(name, init_lora_weights=True)


@torch.no_grad()
def plain(unet: nn.Module, worn: Lora | None = None) -> nn.Module:
    """A trainable fp32 copy without adapters, with a LoRA folded in."""
    state = {k.replace(".base_layer.", "."): v.float() for k, v in unet.state_dict().items() if ".lora_" not in k}
    with torch.device("meta"):
        copy = type(unet).from_config(unet.config)
    copy.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    if worn:
        apply.fold(copy, [(worn, 1.0)])
    return copy.train().requires_grad_(True)


def encoder(unet: nn.Module) -> nn.Module:
    """A trainable fp32 copy that ends with the mid block, without adapters."""
    copy = plain(unet)
    copy.up_blocks = nn.ModuleList()
    copy.conv_norm_out = copy.conv_out = None
    return copy


def is_adapted(net: nn.Module) -> bool:
    return getattr(net, "_hf_peft_config_loaded", False)  # a mark of diffusers; other networks wear no adapters


@contextmanager
def wearing(net: nn.Module, name: str | None) -> Iterator[None]:
    """That adapter alone is on inside, or with None the bare base; afterwards what was on before.

    peft's own setters also turn requires_grad off on the other adapters, and a backward pass after that leaves gradients of
    exactly zero with no word. Here requires_grad is left alone, so the active list is written directly.
    """
    if not is_adapted(net):
        yield
        return
    layers = adapted_layers(net)
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name] if name else []
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            layer._active_adapter = kept


def worn(net: nn.Module) -> str | None:
    """The adapter that is on."""
    layer = next(iter(adapted_layers(net)), None)
    return layer.active_adapters[0] if layer is not None and layer.active_adapters else None


def checkpoint_gradients(net: nn.Module) -> None:
    """Gradient checkpointing that recomputes a block with the adapter of its forward pass, whichever is on at backward."""
    from torch.utils.checkpoint import checkpoint

    def run(block: nn.Module, *args: Any) -> Any:
        name = worn(net)

        def again(*args: Any) -> Any:
            with wearing(net, name):
                return block(*args)

        return checkpoint(again, *args, use_reentrant=False)

    net.enable_gradient_checkpointing(run)


def factors(unet: nn.Module, alpha: float, name: str = "student") -> dict[str, Factors]:
    """The adapter as canonical LoRA modules, its scale folded in."""
    from peft import get_peft_model_state_dict

    return from_peft(get_peft_model_state_dict(unet, adapter_name=name), alpha)


def save_adapter(
    role: Any, path: str | Path, *, recipe: Recipe | None = None, alpha: float | None = None, adapter: str | None = None
) -> Path:
    """Write the adapter that a role wears as a LoRA, in the layout that every program loads, with its recipe in the header.

    `role`: a `Denoiser`; or a UNet, with the name of the `adapter` ("student" unless given). `alpha` is the adapter's own unless
    given. `Sampler(base, loras={path: 1.0})` then obeys the recipe.
    """
    held = dict(role.named_children()).get("net")  # a Denoiser's network; a UNet has no part of that name
    net, worn_name = (role, None) if held is None else (held, role.adapter)
    name = adapter or worn_name or "student"
    if not is_adapted(net) or name not in net.peft_config:
        raise UsageError(f"`adapter={name}`: the network has no adapter of that name", "put one on with `fastdiff.lora.attach`")
    modules = factors(net, net.peft_config[name].lora_alpha if alpha is None else alpha, name)
    told = {**(recipe or Recipe()).to_metadata(), **layers_told(net.config)}
    return Lora(modules, told).save(path)
