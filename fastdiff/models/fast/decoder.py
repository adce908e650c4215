"""The decoders of diffusers' AutoencoderKL and AutoencoderTiny as plain functions of their weights, for inference only."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models.fast.layers import (
    Conv,
    Linear,
    Norm,
    Resnet,
    Stored,
    Unknown,
    activated,
    attend,
    damage_is_unknown,
    tensors_of,
    upsampled,
)


class Decoder:
    """Decodes scaled latents (B, C, h, w) to pixels (B, 3, H, W), fp32, not clamped. Encoder tensors are ignored.

    Raises Unknown if the decoder has a part that is not built here.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.dtype, self.device = SimpleNamespace(**config), dtype, torch.device(device)
        mine = {k: v for k, v in tensors.items() if k.startswith(("decoder.", "post_quant_conv."))}
        stored = Stored(mine, dtype=dtype, device=device)
        if config.get("act_fn", "silu") not in {"silu", "relu"} or config.get("latents_mean") is not None:
            raise Unknown("a decoder of another kind")
        tiny = "decoder.layers.0.weight" in stored
        if tiny != (config.get("act_fn") == "relu"):
            raise Unknown(f"act_fn {config.get('act_fn')}")
        self.run = TinyDecoder(stored, config) if tiny else KLDecoder(stored, config)
        stored.complete()

    def __call__(self, latents: Tensor) -> Tensor:
        z = (latents / self.config.scaling_factor).to(self.device, self.dtype)
        return self.run(z.contiguous(memory_format=torch.channels_last)).float()


def decoder_of(
    base: Checkpoint, vae: nn.Module | None = None, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Return the fast decoder of the checkpoint or of `vae`, or the diffusers VAE itself if its decoder is of an unknown kind."""
    try:
        with damage_is_unknown():
            if vae is not None:
                return Decoder(vae.state_dict(), dict(vae.config), dtype=dtype, device=device)
            return Decoder(tensors_of(base, "vae"), base.config_of("vae"), dtype=dtype, device=device)
    except Unknown:
        return base.vae if vae is None else vae


class KLDecoder:
    """The decoder of AutoencoderKL: latents (B, C, h, w), not scaled -> pixels (B, 3, H, W)."""

    def __init__(self, stored: Stored, config: Mapping[str, Any]) -> None:
        groups, width, eps = config.get("norm_num_groups", 32), config["latent_channels"], 1e-6
        self.post = Conv(stored, "post_quant_conv", width) if "post_quant_conv.weight" in stored else None
        self.enter = Conv(stored, "decoder.conv_in", width)
        width = self.enter.width
        self.middle: list[Any] = []
        for name in stored.count("decoder.mid_block.resnets.{}.conv1.weight"):
            self.middle.append(Resnet(stored, name, width=width, groups=groups, eps=eps))
            attention = name.replace(".resnets.", ".attentions.")
            if f"{attention}.to_q.weight" in stored:
                self.middle.append(SpatialAttention(stored, attention, groups, width))
        self.blocks: list[Any] = []
        for i in range(len(config["block_out_channels"])):
            for name in stored.count(f"decoder.up_blocks.{i}.resnets.{{}}.conv1.weight"):
                self.blocks.append(Resnet(stored, name, width=width, groups=groups, eps=eps))
                width = self.blocks[-1].width
            if f"decoder.up_blocks.{i}.upsamplers.0.conv.weight" in stored:
                conv = Conv(stored, f"decoder.up_blocks.{i}.upsamplers.0.conv", width)
                self.blocks.append(lambda x, conv=conv: conv(upsampled(x)))
        self.last = Norm(stored, "decoder.conv_norm_out", eps, groups, width)
        self.leave = Conv(stored, "decoder.conv_out", width)

    def __call__(self, z: Tensor) -> Tensor:
        x = self.enter(z if self.post is None else self.post(z))
        for part in (*self.middle, *self.blocks):
            x = part(x)
        return self.leave(activated(self.last, x))


class SpatialAttention:
    """Self-attention with one head over all positions of a feature map (B, C, h, w)."""

    def __init__(self, stored: Stored, name: str, groups: int, width: int) -> None:
        self.norm = Norm(stored, f"{name}.group_norm", 1e-6, groups, width)
        self.qkv = [Linear(stored, f"{name}.to_{x}", width) for x in "qkv"]
        self.out = Linear(stored, f"{name}.to_out.0", width)

    def __call__(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        y = self.out(attend(*(layer(y) for layer in self.qkv), 1))
        return y.reshape(b, h, w, c).permute(0, 3, 1, 2) + x


class TinyDecoder:
    """The decoder of AutoencoderTiny (TAESD), made of convolutions and ReLU: latents (B, C, h, w) -> pixels (B, 3, H, W)."""

    def __init__(self, stored: Stored, config: Mapping[str, Any]) -> None:
        if config.get("upsample_fn", "nearest") != "nearest" or config.get("upsampling_scaling_factor", 2) != 2:
            raise Unknown("a tiny decoder with another upsampling")
        self.enter, self.parts = Conv(stored, "decoder.layers.0", config["latent_channels"]), []
        i = 2  # layer 1 is the activation
        for blocks in config["num_decoder_blocks"]:
            for _ in range(blocks):
                self.parts.append(TinyBlock(stored, f"decoder.layers.{i}"))
                i += 1
            if f"decoder.layers.{i}.weight" not in stored:
                self.parts.append(upsampled)
                i += 1
            self.parts.append(Conv(stored, f"decoder.layers.{i}"))
            i += 1

    def __call__(self, z: Tensor) -> Tensor:
        x = self.enter.relu(torch.tanh(z / 3) * 3)
        for part in self.parts:
            x = part(x)
        return x.mul(2).sub(1)


class TinyBlock:
    """TAESD's residual block: three convolutions with ReLU beside a skip connection."""

    def __init__(self, stored: Stored, name: str) -> None:
        self.convs = [Conv(stored, f"{name}.conv.{i}") for i in (0, 2, 4)]
        self.skip = Conv(stored, f"{name}.skip") if f"{name}.skip.weight" in stored else None

    def __call__(self, x: Tensor) -> Tensor:
        one, two, three = self.convs
        return three.relu(two.relu(one.relu(x)), x if self.skip is None else self.skip(x))
