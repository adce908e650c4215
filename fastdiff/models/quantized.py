"""A frozen UNet in 8 bits: half the memory of bf16, for training adapters on it.

    weight = stored * scale          stored: float8_e4m3fn or int8 (out, in[, kh, kw]);  scale: fp32 (out, 1[, 1, 1])

Activations, adapters and sums keep their precision: each layer restores its weight while it runs, and again in the backward
pass, so that no graph holds a restored weight. Both tensors are kept as integers (the bits of fp8 and fp32), because
`.to(dtype)`, `.half()` and `.float()` of a network convert every floating-point tensor in it.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

Kind = Literal["fp8", "int8"]
# In full precision stay the first and the last layer, and the few that every block depends on: what embeds the timestep.
KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "time_emb_proj")


@torch.no_grad()
def quantize(net: nn.Module, kind: Kind) -> None:
    """Turn the linear and convolution layers of a frozen network into quantised ones, in place, except those in KEPT.

    The network must have no adapters yet. Its `state_dict` still has plain weights, rounded to what 8 bits can say.
    """
    for name, layer in net.named_modules():
        own = {nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d}.get(type(layer))
        if own and not any(part in KEPT for part in name.split(".")):
            weight = layer._parameters.pop("weight")
            assert weight is not None
            layer.__class__ = own
            layer.hold(weight, kind)


def is_quantized(net: nn.Module) -> bool:
    """Whether any layer of a network is quantised."""
    return any(isinstance(layer, Quantized) for layer in net.modules())


class Quantized(nn.Module):
    """What the quantised layers share: how the weight is stored and restored. Made by `quantize`."""

    kind: Kind
    stored: Tensor  # int8, or the bits of fp8 as uint8
    scale_bits: Tensor  # the bits of the fp32 scale as int32
    like: Tensor  # without elements; its dtype is that of `weight`, and follows `.to(dtype)`

    def hold(self, weight: Tensor, kind: Kind) -> None:
        """Store a weight: the largest value of each output channel becomes the largest number of the 8-bit format."""
        exact = weight.detach().float()
        limit = torch.finfo(torch.float8_e4m3fn).max if kind == "fp8" else 127
        scale = exact.abs().amax(tuple(range(1, exact.ndim)), keepdim=True) / limit
        scale[scale == 0] = 1
        exact = exact / scale
        stored = exact.to(torch.float8_e4m3fn).view(torch.uint8) if kind == "fp8" else exact.round_().to(torch.int8)
        self.kind = kind
        self.register_buffer("stored", stored, persistent=False)
        self.register_buffer("scale_bits", scale.view(torch.int32), persistent=False)
        self.register_buffer("like", weight.detach().new_empty(0), persistent=False)

    @torch.no_grad()
    def restored(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype. The product is computed in fp32 and rounded once."""
        scale = self.scale_bits.view(torch.float32)
        if self.kind == "fp8":
            return self.stored.view(torch.float8_e4m3fn).to(dtype).mul_(scale)  # every dtype that trains holds fp8 exactly
        return torch.mul(self.stored, scale, out=torch.empty_like(self.stored, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """The restored weight, anew at each access: changing it changes nothing."""
        return self.restored(self.like.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer computes with a weight of the dtype of x."""
        raise NotImplementedError

    def pull_back(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of that shape, from the gradient of the output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))  # as autocast does for the plain layer
        return Restoring.apply(x, self)


class Restoring(torch.autograd.Function):
    """A quantised layer's output. The backward pass restores the weight again; a frozen weight needs no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Quantized) -> Tensor:
        ctx.layer, ctx.dtype, ctx.shape = layer, x.dtype, x.shape
        return layer.apply_weight(x, layer.restored(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.pull_back(grads[0], ctx.layer.restored(ctx.dtype), ctx.shape), None


class QuantizedLinear(Quantized, nn.Linear):  # type: ignore[override]  # `weight` is a property here
    """nn.Linear with a frozen 8-bit weight."""

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias if self.bias is None else self.bias.to(x.dtype))

    def pull_back(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return grad @ weight


class QuantizedConv2d(Quantized, nn.Conv2d):  # type: ignore[override]  # `weight` is a property here
    """nn.Conv2d with a frozen 8-bit weight."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain layer where one is asked for: peft makes an adapter's convolutions by the class of the layer under it."""
        return nn.Conv2d(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def apply_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        bias = self.bias if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, weight, bias)

    def pull_back(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return conv2d_input(shape, weight, grad, self.stride, self.padding, self.dilation, self.groups)
