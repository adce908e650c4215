"""Layers as plain functions of stored tensors, for networks that only draw.

Without torch's module machinery and without diffusers: importing that takes longer than drawing a picture. A network is built
from its tensors by name; one with a part that is not known here raises Unknown, and its own library runs it.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints import tensors
from fastdiff.checkpoints.checkpoint import Checkpoint, plain_name


class Unknown(Exception):  # noqa: N818  (not an error of the user: another way runs the network)
    """A network that is not built of the layers known here."""


def tensors_of(base: Checkpoint, part: str) -> dict[str, Tensor]:
    """A component's tensors by plain name: of the network where it is loaded, which may have been changed, else of its files."""
    nets = dict(zip(base.text_parts, base.__dict__.get("text_encoders", ()), strict=False)) | base.__dict__
    if part in nets:
        state = nets[part].state_dict()
    elif base.path.is_file():
        weights = base.weights(part)
        return {name: weights[name] for name in weights.shapes}
    else:
        files = [tensors.open_file(path, allow_pickle=base.allow_pickle) for path in base.stored(part, base.path)]
        state = {name: file[name] for file in files for name in file}
    if not state:
        raise Unknown(f"{part} has no files")
    if any(".base_layer." in name for name in state):
        raise Unknown(f"{part} has adapters")
    return {plain_name(part, k): v for k, v in state.items() if not re.search(r"position_ids$|logit_scale$", k)}


class Stored:
    """The tensors of a network by dotted name, given out once each in one dtype, on one device."""

    def __init__(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, device: torch.device | str) -> None:
        self.tensors, self.dtype, self.device = tensors, dtype, torch.device(device)
        self.asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, *shape: int | None) -> Tensor:
        """A tensor; Unknown where it is not there, not finite, or not of that shape (None: any)."""
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
        return self(name, *shape) if name in self else None

    def count(self, pattern: str) -> Iterator[str]:
        """`blocks.{}.weight` -> blocks.0, blocks.1, ... as far as there are such tensors."""
        i = 0
        while pattern.format(i) in self:
            yield pattern.split("{}")[0] + str(i)
            i += 1

    def complete(self) -> None:
        """Unknown where a tensor was not asked for: the network does something with it that is not done here."""
        if left := sorted(set(self.tensors) - self.asked):
            raise Unknown(f"{left[0]} has no place")


class Linear:
    """x W^T + b over the last dimension."""

    __slots__ = ("bias", "weight")

    def __init__(self, stored: Stored, name: str, width: int | None = None) -> None:
        weight = stored(f"{name}.weight")
        self.weight = weight.flatten(1)  # a 1 x 1 convolution over (B, h w, C) is this too
        if width is not None and self.weight.shape[1] != width:
            raise Unknown(f"{name} takes {self.weight.shape[1]} channels, {width} come in")
        self.bias = stored.optional(f"{name}.bias", len(weight))

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv:
    """A square convolution that keeps the size, or halves it; channels last in memory."""

    __slots__ = ("bias", "padding", "stride", "weight")

    def __init__(self, stored: Stored, name: str, width: int | None = None, stride: int = 1) -> None:
        weight = stored(f"{name}.weight", None, width, None, None)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.bias, self.stride, self.padding = stored.optional(f"{name}.bias", len(weight)), stride, weight.shape[-1] // 2

    @property
    def width(self) -> int:
        """Channels that come out."""
        return len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def relu(self, x: Tensor, plus: Tensor | None = None) -> Tensor:
        """relu(conv(x) + plus), in one pass over the answer where oneDNN does it: the same numbers, a tenth sooner."""
        if not fuses(x):
            y = self(x)
            return (y if plus is None else y.add_(plus)).relu_()
        how = self.weight, self.bias, [self.padding] * 2, [self.stride] * 2, [1, 1], 1
        if plus is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *how, "relu", [], None)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, plus, *how, "add", 1.0, "relu", [], None)


def fuses(x: Tensor) -> bool:
    """Whether this machine's torch has the fused convolutions that its compiler uses, and nobody reads the single layers."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")  # not in every build


class Norm:
    """Group normalisation over (B, C, ...), or without groups layer normalisation over the last dimension."""

    __slots__ = ("bias", "eps", "groups", "weight")

    def __init__(self, stored: Stored, name: str, eps: float, groups: int = 0, width: int | None = None) -> None:
        self.weight, self.bias = stored(f"{name}.weight", width), stored(f"{name}.bias", width)
        self.eps, self.groups = eps, groups

    def __call__(self, x: Tensor) -> Tensor:
        if self.groups:
            return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Resnet:
    """GroupNorm, SiLU, convolution, twice, beside a shortcut; between them the timestep's part, as `shift`."""

    def __init__(self, stored: Stored, name: str, *, width: int, groups: int, eps: float) -> None:
        self.norm1 = Norm(stored, f"{name}.norm1", eps, groups, width)
        self.conv1 = Conv(stored, f"{name}.conv1", width)
        self.norm2 = Norm(stored, f"{name}.norm2", eps, groups, self.conv1.width)
        self.conv2 = Conv(stored, f"{name}.conv2", self.conv1.width)
        cut = f"{name}.conv_shortcut"
        self.shortcut = Conv(stored, cut, width) if f"{cut}.weight" in stored else None
        if self.shortcut is None and width != self.width:
            raise Unknown(f"{name} turns {width} channels to {self.width} without a shortcut")

    @property
    def width(self) -> int:
        return self.conv2.width

    def __call__(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """x (B, C, h, w); shift (1 or B, C') has the first convolution's bias in it."""
        h, c = F.silu(self.norm1(x), inplace=True), self.conv1
        if shift is None:
            h = c(h)
        elif len(shift) == 1:
            h = F.conv2d(h, c.weight, shift[0], c.stride, c.padding)
        else:
            h = F.conv2d(h, c.weight, None, c.stride, c.padding).add_(shift[:, :, None, None])
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(x if self.shortcut is None else self.shortcut(x))


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads d) -> (B, heads, L, d), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, *, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of (B, L, heads d) each."""
    q, k, v = (heads_first(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def joined(layers: list[Linear]) -> Callable[[Tensor], Tensor]:
    """One product for layers of the same input; what each says lies side by side."""
    weight = torch.cat([layer.weight for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    for layer, rows in zip(layers, weight.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight = rows  # the same memory
    return lambda x: F.linear(x, weight, bias)


def upsampled(x: Tensor, size: Any = None) -> Tensor:
    """Nearest neighbours, twice the size unless told."""
    return F.interpolate(x, size=size, scale_factor=None if size is not None else 2.0, mode="nearest")
