"""Trainable LoRA adapters on a UNet, through peft.

One UNet may carry several adapters. `using` switches one of them on for a while, and `factors` reads one out as a LoRA.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.lora import apply
from fastdiff.lora.file import Factors, Lora, from_peft, layers_told
from fastdiff.lora.kinds import Dense, low_rank_of
from fastdiff.lora.layouts import ATTENTION as ATTENTION
from fastdiff.lora.layouts import TARGETS
from fastdiff.runtime.errors import InputRefused, UsageError

if TYPE_CHECKING:  # networks are cast to these: torch types every attribute of a module as a tensor or a module
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

LAYERS: WeakKeyDictionary[nn.Module, "list[LoraLayer]"] = WeakKeyDictionary()  # network -> its layers that have adapters


def attach(
    unet: nn.Module, rank: int, alpha: float, name: str = "student", targets: Sequence[str] = TARGETS
) -> list[nn.Parameter]:
    """Freeze the UNet, add a new adapter to it and return the parameters of the adapter, which are trainable and in fp32.

    Adapters that the UNet already has stay, and those that trained still do. The new one starts as no change at all. It acts
    on the layers whose names end in one of `targets`.
    """
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    trained = [p for p in unet.parameters() if p.requires_grad and is_adapted(unet)]
    LAYERS.clear()  # also the lists of blocks
    unet.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is intended
        # peft annotates lora_alpha as int and takes any number
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
        cast("UNet2DConditionModel", unet).add_adapter(config, adapter_name=name)
    cast_training_params(unet, torch.float32)
    added = [p for p in unet.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(True)
    return added


def check_start(start: Lora, base: Checkpoint, layers: Sequence[str] | None) -> None:
    """Check that an adapter on `layers` of the base's UNet can be set to the LoRA `start`. No weights are read.

    Without `layers` the LoRA is to be added to the weights themselves, which fits any layer.
    InputRefused where the LoRA is for another network or another type of prediction; UsageError where it changes other layers.
    """
    kind = start.recipe.prediction_type
    if kind not in {None, base.prediction_type}:
        theirs, ours = (apply.NAMED.get(name, name) for name in (kind, base.prediction_type))  # a header may say anything
        raise InputRefused(
            f"{start.source}: with it a network predicts {theirs}, but the base predicts {ours}",
            "the one-step LoRA of lightning predicts x0: give the one of two steps" if kind == "sample" else "",
        )
    apply.warn_of_prediction(base, [start])  # by the headers of other programs, which are less certain
    table = apply.places(base.shapes("unet"), "lora_unet_")
    try:
        (fitted,) = apply.fit([(start, 1.0)], table, family=base.family)
    except InputRefused as error:
        raise InputRefused(str(error), "`init` takes a LoRA for a network of the base's shape") from error
    if layers is not None:
        adapted = tuple(f".{name}.weight" for name in layers)
        check_adapted(start, [key for key in fitted.modules if not f".{table[key].name}".endswith(adapted)])


def check_adapted(start: Lora, others: Sequence[str]) -> None:
    """Raise UsageError where the LoRA `start` changes `others`: layers, by canonical key, that have no adapter."""
    if others:
        raise UsageError(
            f"{start.source}: {len(others)} of its layers have no adapter here ({others[0]})", "give `lora_layers=all`"
        )


@torch.no_grad()
def start_from(unet: nn.Module, start: Lora, name: str) -> None:
    """Set a new adapter to the LoRA `start` of the same base, or to the best approximation that the adapter's rank allows.

    InputRefused where the LoRA does not fit the UNet; UsageError where it changes a layer that has no adapter.
    """
    from peft.tuners.lora import LoraLayer

    modules = {key: unet.get_submodule(layer) for key, layer in apply.names(unet).items()}
    adapted = {key: module for key, module in modules.items() if isinstance(module, LoraLayer)}
    # Weights are not collected: those of a quantised network are restored at each access.
    shapes = {f"{layer}.weight": tuple(base_weight(modules[key]).shape) for key, layer in apply.names(unet).items()}
    (fitted,) = apply.fit([(start, 1.0)], apply.places(shapes, "lora_unet_"))
    check_adapted(start, [key for key in fitted.modules if key not in adapted])
    for key, update in fitted.modules.items():
        layer = adapted[key]
        if update.needs_weight:
            update = Dense(update.delta(base_weight(modules[key]).float().cpu()))
        down, up = weight_pair(layer, name)
        best, _, _ = low_rank_of(update, len(down))
        down[: best.rank].copy_(best.down.reshape(best.rank, *down.shape[1:]))
        up[:, : best.rank].copy_(best.up.reshape(len(up), best.rank, *up.shape[2:]) / layer.scaling[name])
    torch.clear_autocast_cache()  # it may hold casts of the old values


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a linear or convolution layer, without the adapters that it may have."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.weight


def weight_pair(layer: "LoraLayer", name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """The weights of the adapter `name` on a layer: down (r, in[, kh, kw]) and up (out, r[, 1, 1])."""
    down, up = layer.lora_A[name], layer.lora_B[name]
    assert isinstance(down.weight, nn.Parameter)
    assert isinstance(up.weight, nn.Parameter)
    return down.weight, up.weight


def encoder_layers(unet: nn.Module) -> list[str]:
    """The names of the layers in the down and mid blocks that an adapter can act on."""
    ends = tuple(f".{name}" for name in TARGETS)
    names = (name.replace(".base_layer", "") for name, _ in unet.named_modules() if ".lora_" not in name)
    return list(dict.fromkeys(n for n in names if n.startswith(("down_blocks.", "mid_block.")) and n.endswith(ends)))


def adapted_layers(net: nn.Module) -> "list[LoraLayer]":
    """The layers of a network that have adapters. The result is kept, because a search takes as long as running a block."""
    from peft.tuners.lora import LoraLayer

    if net not in LAYERS:
        LAYERS[net] = [m for m in net.modules() if isinstance(m, LoraLayer)]
    return LAYERS[net]


def layers_with(unet: nn.Module, name: str) -> "Iterator[LoraLayer]":
    """The layers that have the adapter `name`."""
    return (layer for layer in adapted_layers(unet) if name in layer.lora_A)


def parameters(unet: nn.Module, name: str) -> list[nn.Parameter]:
    """The parameters of an adapter, down and up of one layer after the other."""
    return [parameter for layer in layers_with(unet, name) for parameter in weight_pair(layer, name)]


@torch.no_grad()
def copy_adapter(unet: nn.Module, source: str, name: str) -> None:
    """Overwrite the adapter `name` with the values of the adapter `source`, which has the same layers and rank."""
    for target, value in zip(parameters(unet, name), parameters(unet, source), strict=True):
        target.copy_(value)
    torch.clear_autocast_cache()  # it may hold casts of the old values


def reset(unet: nn.Module, name: str) -> None:
    """Initialise an adapter again, so that it changes nothing."""
    for layer in layers_with(unet, name):
        layer.reset_lora_parameters(name, init_lora_weights=True)
    torch.clear_autocast_cache()  # it may hold casts of the old values


@torch.no_grad()
def plain(unet: nn.Module, lora: Lora | None = None) -> nn.Module:
    """A trainable fp32 copy of a UNet without adapters, with `lora` added to the weights where one is given."""
    weights = {k.replace(".base_layer.", "."): v for k, v in unet.state_dict().items() if ".lora_" not in k}
    with torch.device("meta"):
        configured = cast("ConfigMixin", unet)
        copy = cast(nn.Module, type(configured).from_config(configured.config))
    copy.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in weights.items()}, assign=True)
    if lora:
        apply.fold(copy, [(lora, 1.0)])
    return copy.train().requires_grad_(True)


def encoder(unet: nn.Module) -> nn.Module:
    """A trainable fp32 copy of a UNet without adapters, which ends with the mid block."""
    copy = plain(unet)
    copy.up_blocks = nn.ModuleList()
    copy.register_module("conv_norm_out", None)
    copy.register_module("conv_out", None)
    return copy


def is_adapted(net: nn.Module) -> bool:
    """Whether a network has adapters."""
    return getattr(net, "_hf_peft_config_loaded", False)  # set by diffusers; other networks have no adapters


@contextmanager
def using(net: nn.Module, name: str | None) -> Iterator[None]:
    """Context manager in which the adapter `name` alone is active, or no adapter for None. It restores the active ones after."""
    if not is_adapted(net):
        yield
        return
    with active(adapted_layers(net), name):
        yield


@contextmanager
def active(layers: "list[LoraLayer]", name: str | None) -> "Iterator[None]":
    """Context manager in which these layers use the adapter `name` alone, or none. It restores the active ones after."""
    # peft's own setters also turn off requires_grad of all other adapters. A backward pass after that gives them gradients of
    # exactly zero, and no warning. So the list of active adapters is written directly, and requires_grad stays as it is.
    # It is written into `vars`, because a module's own way to set an attribute takes ten times as long, in every pass.
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        vars(layer)["_active_adapter"] = [name] if name else []
    try:
        yield
    finally:
        for layer, kept in zip(layers, before, strict=True):
            vars(layer)["_active_adapter"] = kept


def active_adapter(net: nn.Module) -> str | None:
    """The name of the active adapter; None where none is active."""
    layer = next(iter(adapted_layers(net)), None)
    return layer.active_adapters[0] if layer is not None and layer.active_adapters else None


def checkpoint_gradients(net: nn.Module) -> None:
    """Switch on gradient checkpointing that respects adapters.

    The backward pass recomputes each block with the adapter that was active in the forward pass, even if another is active by
    then.
    """
    from torch.utils.checkpoint import checkpoint

    def run(block: nn.Module, *args: Any) -> Any:
        name = active_adapter(net)

        def forward(*args: Any) -> Any:
            with active(adapted_layers(block), name):
                return block(*args)

        return checkpoint(forward, *args, use_reentrant=False)

    cast("ModelMixin", net).enable_gradient_checkpointing(run)


def factors(unet: nn.Module, alpha: float, name: str = "student") -> dict[str, Factors]:
    """The adapter `name` as LoRA modules by canonical name; the scale alpha / r is multiplied in."""
    from peft import get_peft_model_state_dict

    return from_peft(get_peft_model_state_dict(unet, adapter_name=name), alpha)


def save_adapter(
    role: Any, path: str | Path, *, recipe: Recipe | None = None, alpha: float | None = None, adapter: str | None = None
) -> Path:
    """Write an adapter to a LoRA file in kohya's layout, which every program loads, and return the path.

    `role` is a `Denoiser`, whose adapter is written, or a UNet; `adapter` names another one ("student" for a UNet unless given).
    `recipe` goes into the header, where `Sampler(base, loras={path: 1.0})` finds its settings. `alpha` is the adapter's own
    unless given. UsageError where the network has no such adapter.
    """
    inner = dict(role.named_children()).get("net")  # a Denoiser's network; a UNet has no part of that name
    net, own_name = (role, None) if inner is None else (inner, role.adapter)
    name = adapter or own_name or "student"
    if not is_adapted(net) or name not in net.peft_config:
        raise UsageError(f"`adapter={name}`: the network has no adapter of that name", "put one on with `fastdiff.lora.attach`")
    modules = factors(net, net.peft_config[name].lora_alpha if alpha is None else alpha, name)
    metadata = {**(recipe or Recipe()).to_metadata(), **layers_told(net.config)}
    return Lora({**modules}, metadata).save(path)
