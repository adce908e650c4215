"""Layers as plain functions of stored tensors, for inference only.

They need neither torch modules nor diffusers, whose import takes longer than drawing a picture. A network is built from its
tensors by name. If it has a part that is not known here, building it raises Unknown and the caller uses diffusers instead.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints import views
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.folders import plain_name
from fastdiff.runtime.errors import UsageError


class Unknown(Exception):  # noqa: N818  (not an error of the user: the caller runs the network by its own library)
    """The network has a part that the fast layers cannot build."""


@contextmanager
def damage_is_unknown() -> Iterator[None]:
    """Inside the block, what a damaged network makes fail becomes Unknown: its own library then reads it, and tells."""
    try:
        yield
    except UsageError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Unknown(f"{type(error).__name__}: {error}") from error


def tensors_of(base: Checkpoint, part: str) -> dict[str, Tensor]:
    """Return a component's tensors by plain name: from the loaded network, which may have changed, else from its files.

    Raises Unknown if there are no files, or the loaded network has adapters.
    """
    nets = dict(zip(base.text_parts, base.__dict__.get("text_encoders", ()), strict=False)) | base.__dict__
    if part in nets:
        state = nets[part].state_dict()
    elif base.path.is_file():
        weights = base.weights(part)
        return {name: weights[name] for name in weights.shapes}
    else:
        files = [views.opened(path, allow_pickle=base.allow_pickle) for path in base.stored(part, base.path) if path.exists()]
        state = {name: file[name] for file in files for name in file}
    if not state:
        raise Unknown(f"{part} has no files")
    if any(".base_layer." in name for name in state):
        raise Unknown(f"{part} has adapters")
    return {plain_name(part, k): v for k, v in state.items() if not re.search(r"position_ids$|logit_scale$", k)}


class Stored:
    """The tensors of a network by dotted name, converted to one dtype and device. It remembers which were used."""

    def __init__(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, torch.device(device)
        self.asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, *shape: int | None) -> Tensor:
        """Return a tensor. Raises Unknown if it is missing, not finite, or not of the given shape (None: any size)."""
        if name not in self.tensors:
            raise Unknown(f"{name} is missing")
        tensor = self.tensors[name]
        if shape and (len(shape) != tensor.ndim or any(w not in {None, n} for w, n in zip(shape, tensor.shape, strict=True))):
            raise Unknown(f"{name} is {tuple(tensor.shape)}, not {shape}")
        self.asked.add(name)
        if not tensor.is_floating_point() or not (tensor.is_meta or bool(tensor.isfinite().all())):
            raise Unknown(f"{name} is not a finite number everywhere")
        return tensor.detach().to(self.device, self.dtype)

    def optional(self, name: str, *shape: int | None) -> Tensor | None:
        """Return a tensor, or None if it is missing."""
        return self(name, *shape) if name in self else None

    def count(self, pattern: str) -> Iterator[str]:
        """Yield the prefixes of numbered tensors: for `blocks.{}.weight` blocks.0, blocks.1, ... until one is missing."""
        i = 0
        while pattern.format(i) in self:
            yield pattern.split("{}")[0] + str(i)
            i += 1

    def complete(self) -> None:
        """Raise Unknown if a tensor was not used: then the network has a part that was not built."""
        if left := sorted(set(self.tensors) - self.asked):
            raise Unknown(f"{left[0]} is not used by any known layer")


class Linear:
    """A linear layer, x W^T + b, over the last dimension of x."""

    __slots__ = ("bias", "weight")

    def __init__(self, stored: Stored, name: str, width: int | None = None) -> None:
        weight = stored(f"{name}.weight")
        self.weight = weight.flatten(1)  # a 1 x 1 convolution is a linear layer over (B, h w, C)
        if width is not None and self.weight.shape[1] != width:
            raise Unknown(f"{name} takes {self.weight.shape[1]} channels, but gets {width}")
        self.bias = stored.optional(f"{name}.bias", len(weight))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv:
    """A square convolution of (B, C, h, w) that keeps the size, or halves it with stride 2; channels last in memory."""

    __slots__ = ("bias", "padding", "stride", "weight")

    def __init__(self, stored: Stored, name: str, width: int | None = None, stride: int = 1) -> None:
        weight = stored(f"{name}.weight", None, width, None, None)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.stride, self.padding = stored.optional(f"{name}.bias", len(weight)), stride, weight.shape[-1] // 2

    @property
    def width(self) -> int:
        """The number of output channels."""
        return len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def relu(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """Return relu(conv(x) + plus). Where oneDNN can fuse them, this takes a tenth less time, with the same numbers."""
        if not fuses(x):
            y = self(x)
            return (y if plus is None else y.add_(plus)).relu_()
        how = self.weight, self.bias, [self.padding] * 2, [self.stride] * 2, [1, 1], 1
        if plus is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *how, "relu", [], None)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, plus, *how, "add", 1.0, "relu", [], None)


def fuses(x: Tensor) -> bool:
    """Return whether to use torch's fused CPU convolutions: fp32 on the CPU, not while tracing or compiling, if built in."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")  # not in every build


class Norm:
    """Group normalisation of (B, C, ...); with groups = 0, layer normalisation over the last dimension."""

    __slots__ = ("bias", "eps", "groups", "weight")

    def __init__(self, stored: Stored, name: str, eps: float, groups: int = 0, width: int | None = None) -> None:
        self.weight, self.bias = stored(f"{name}.weight", width), stored(f"{name}.bias", width)
        self.eps, self.groups = eps, groups

    def __call__(self, x: Tensor) -> Tensor:
        if self.groups:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def activated(norm: Norm, x: Tensor) -> Tensor:
    """Return silu(norm(x)) for x (B, C, h, w), channels last in memory, as a convolution takes it.

    CUDA's group norm returns channels first. The convolution would copy that; here the activation writes channels last itself,
    which saves one pass over the feature map. On the CPU the norm keeps channels last, and a compiler chooses for itself.
    """
    y = norm(x)
    if torch.compiler.is_compiling() or y.is_contiguous(memory_format=torch.channels_last):
        return F.silu(y, inplace=True)
    return torch.ops.aten.silu.out(y, out=torch.empty_like(y, memory_format=torch.channels_last))


class Resnet:
    """A residual block: twice GroupNorm, SiLU and convolution, plus a shortcut. `shift` carries the timestep embedding."""

    def __init__(self, stored: Stored, name: str, *, width: int, groups: int, eps: float) -> None:
        self.norm1 = Norm(stored, f"{name}.norm1", eps, groups, width)
        self.conv1 = Conv(stored, f"{name}.conv1", width)
        self.norm2 = Norm(stored, f"{name}.norm2", eps, groups, self.conv1.width)
        self.conv2 = Conv(stored, f"{name}.conv2", self.conv1.width)
        cut = f"{name}.conv_shortcut"
        self.shortcut = Conv(stored, cut, width) if f"{cut}.weight" in stored else None
        if self.shortcut is None and width != self.width:
            raise Unknown(f"{name} turns {width} channels into {self.width} without a shortcut")

    @property
    def width(self) -> int:
        """The number of output channels."""
        return self.conv2.width

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Apply the block to x (B, C, h, w). `shift` (1 or B, C') replaces the first convolution's bias and includes it."""
        h, c = activated(self.norm1, x), self.conv1
        if shift is None:
            h = c(h)
        elif len(shift) == 1:
            h = F.conv2d(h, c.weight, shift[0], c.stride, c.padding)
        else:
            h = F.conv2d(h, c.weight, None, c.stride, c.padding).add_(shift[:, :, None, None])
        h = self.conv2(activated(self.norm2, h))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """Return x (B, L, heads d) as a view (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """Multi-head attention, softmax(q k^T / sqrt(d)) v; q, k, v and the result are (B, L, heads d)."""
    q, k, v = (heads_first(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def joined(layers: list[Linear]) -> Callable[[Tensor], Tensor]:
    """Merge layers with the same input into one product; their outputs lie side by side in the last dimension."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer, rows in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight = rows  # a view: the merged weight is the only copy
    return lambda x: F.linear(x, weight, bias)


def upsampled(x: Tensor, size: Any = None) -> Tensor:
    """Upsample x (B, C, h, w) by nearest neighbours to `size` (h, w), by default to twice the size."""
    return F.interpolate(x, size=size, scale_factor=None if size is not None else 2.0, mode="nearest")
