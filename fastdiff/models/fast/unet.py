"""A UNet for a fixed list of timesteps and prompts: everything that depends only on those is computed once ("folded").

    shift[k, resnet] = b_conv1 + W_proj silu(emb(t_k)) + b_proj      of all resnets in one product; used as conv1's bias
    kv[layer]        = tokens [W_k, W_v]^T                           of all cross-attentions in one product

It computes the same function as diffusers' UNet2DConditionModel (checked by tests/test_folded.py).
"""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    joined,
    tensors_of,
    upsampled,
)

# The only supported values of these config fields; any other value raises Unknown.
NEUTRAL: dict[str, Any] = {
    "act_fn": "silu", "addition_embed_type_num_heads": 64, "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": None, "downsample_padding": 1, "dual_cross_attention": False, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "mid_block_scale_factor": 1, "num_class_embeds": None, "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False, "resnet_time_scale_shift": "default", "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
}  # fmt: skip
BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"}
MIDDLES = {"UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None}


def sinusoid(value: Tensor, width: int, *, flip: bool, shift: float) -> Tensor:
    """Embed positions (N,) as sines and cosines (N, width), fp32; `flip` puts the cosines first (Ho 2020)."""
    half = width // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=value.device) / (half - shift))
    angle = value.float()[:, None] * frequency
    parts = (angle.cos(), angle.sin()) if flip else (angle.sin(), angle.cos())
    return F.pad(torch.cat(parts, 1), (0, width % 2))


class Folded(NamedTuple):
    """The folded timesteps and prompts of a walk, as two tensors that a captured CUDA graph can read from fixed places."""

    kv: Tensor  # (B, L, sum of 2 C): keys and values of all cross-attentions, side by side
    shift: Tensor  # (n, 1 or B, sum of C): for every step, the shifts of all resnets side by side


class Attention:
    """Self-attention, or with `cross` a cross-attention that reads its folded keys and values from offset `place`."""

    def __init__(self, stored: Stored, name: str, heads: int, width: int, cross: bool) -> None:
        self.heads, self.width, self.place = heads, width, 0
        self.q = Linear(stored, f"{name}.to_q", width)
        self.kv = [Linear(stored, f"{name}.to_{x}") for x in "kv"]
        self.out = Linear(stored, f"{name}.to_out.0")
        self.qkv = None if cross else joined([self.q, *self.kv])

    def __call__(self, x: Tensor, kv: Tensor) -> Tensor:
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, -1)
        else:
            q, (k, v) = self.q(x), kv.narrow(2, self.place, 2 * self.width).chunk(2, -1)
        return self.out(attend(q, k, v, self.heads))


class Transformer:
    """Transformer blocks on a feature map (B, C, h, w): self-attention, cross-attention and a gated feed-forward layer each."""

    def __init__(self, stored: Stored, name: str, heads: int, width: int, groups: int, only_cross: bool) -> None:
        self.norm = Norm(stored, f"{name}.norm", 1e-6, groups, width)
        self.enter, self.leave = Linear(stored, f"{name}.proj_in", width), Linear(stored, f"{name}.proj_out")
        inner = len(self.enter.weight)
        if inner % heads:
            raise Unknown(f"{name} has {inner} channels, which {heads} heads do not divide")
        self.blocks = []
        for block in stored.count(f"{name}.transformer_blocks.{{}}.norm1.weight"):
            self.blocks.append(
                SimpleNamespace(
                    norms=[Norm(stored, f"{block}.norm{i}", 1e-5, width=inner) for i in (1, 2, 3)],
                    attn1=Attention(stored, f"{block}.attn1", heads, inner, only_cross),
                    attn2=Attention(stored, f"{block}.attn2", heads, inner, True),
                    up=Linear(stored, f"{block}.ff.net.0.proj", inner),
                    down=Linear(stored, f"{block}.ff.net.2"),
                )
            )

    def __call__(self, x: Tensor, kv: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.enter(self.norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c))
        for block in self.blocks:
            one, two, three = block.norms
            y = y + block.attn1(one(y), kv)
            y = y + block.attn2(two(y), kv)
            value, gate = block.up(three(y)).chunk(2, -1)
            y = y + block.down(value * F.gelu(gate))
        return self.leave(y).reshape(b, h, w, c).permute(0, 3, 1, 2) + x


class FoldedUNet:
    """A UNet from a diffusers config and state dict. Raises Unknown if it has a part that is not built here."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        check(config)
        # Defaults of fields that older config files lack.
        whole = {"time_cond_proj_dim": None, "flip_sin_to_cos": True, "freq_shift": 0} | dict(config)
        self.config, self.dtype, self.device = SimpleNamespace(**whole), dtype, device
        widths, stored = list(config["block_out_channels"]), Stored(tensors, dtype=dtype, device=device)
        self.groups, self.eps = config.get("norm_num_groups", 32), config.get("norm_eps", 1e-5)
        self.resnets: list[Resnet] = []
        self.cross: list[Attention] = []
        self.projections: list[Linear] = []
        self._embedding(stored, config)
        self.enter = Conv(stored, "conv_in", config["in_channels"])
        width, skips = self.enter.width, [self.enter.width]
        heads = spread(config.get("num_attention_heads") or config.get("attention_head_dim", 8), len(widths))
        only = config.get("only_cross_attention", False)
        middle = config.get("mid_block_only_cross_attention")
        middle = bool(only) if middle is None and isinstance(only, bool) else bool(middle)
        only = spread(only, len(widths))
        self.down = []
        for i in range(len(widths)):
            block = self._block(stored, f"down_blocks.{i}", width, heads[i], only[i])
            skips += [r.width for r in block.resnets]
            width = skips[-1]
            if block.sampler:
                skips.append(block.sampler.width)
            self.down.append(block)
        self.middle = self._block(stored, "mid_block", width, heads[-1], middle)
        if self.middle.resnets:
            width = self.middle.resnets[-1].width
        self.up = []
        for i in range(len(widths)):
            self.up.append(self._block(stored, f"up_blocks.{i}", width, heads[-1 - i], only[-1 - i], skips))
            width = self.up[-1].resnets[-1].width
        self.last = Norm(stored, "conv_norm_out", self.eps, self.groups, width)
        self.leave = Conv(stored, "conv_out", width)
        stored.complete()
        place = 0
        for layer in self.cross:
            layer.place, place = place, place + 2 * layer.width
        self.cross_kv = joined([part for layer in self.cross for part in layer.kv]) if self.cross else None
        # The first convolutions' biases go into the shifts, in fp32: one rounding, not two.
        self.shift_weight = torch.cat([p.weight for p in self.projections])
        self.shift_bias = torch.cat(
            [p.bias.float() + r.conv1.bias.float() for p, r in zip(self.projections, self.resnets, strict=True)]
        )
        self.shift_widths = [r.conv1.width for r in self.resnets]

    def _embedding(self, stored: Stored, config: Mapping[str, Any]) -> None:
        self.time = [Linear(stored, f"time_embedding.linear_{i}") for i in (1, 2)]
        self.time_guidance = Linear(stored, "time_embedding.cond_proj") if config.get("time_cond_proj_dim") else None
        added = config.get("addition_embed_type") == "text_time"
        self.added = [Linear(stored, f"add_embedding.linear_{i}") for i in (1, 2)] if added else None

    def _block(
        self, stored: Stored, name: str, width: int, heads: int, only_cross: bool, skips: list[int] | None = None
    ) -> SimpleNamespace:
        """Build the resnets, transformers and sampler of a down, middle or up block. Up blocks pop widths off `skips`."""
        resnets, transformers = [], []
        for one in stored.count(f"{name}.resnets.{{}}.conv1.weight"):
            if skips is not None and not skips:
                raise Unknown(f"{one} has nothing to join")
            joint = width + (skips.pop() if skips else 0)
            resnet = Resnet(stored, one, width=joint, groups=self.groups, eps=self.eps)
            self.projections.append(Linear(stored, f"{one}.time_emb_proj"))
            self.resnets.append(resnet)
            resnets.append((resnet, len(self.resnets) - 1))
            width = resnet.width
            other = one.replace(".resnets.", ".attentions.")
            if f"{other}.norm.weight" in stored:
                made = Transformer(stored, other, heads, width, self.groups, only_cross)
                self.cross += [layer for b in made.blocks for layer in (b.attn1, b.attn2) if layer.qkv is None]
                transformers.append(made)
            else:
                transformers.append(None)
        sampler = None
        for kind, stride in (("downsamplers", 2), ("upsamplers", 1)):
            if f"{name}.{kind}.0.conv.weight" in stored:
                sampler = Conv(stored, f"{name}.{kind}.0.conv", width, stride)
        layers = list(zip(resnets, transformers, strict=True))
        return SimpleNamespace(layers=layers, resnets=[r for r, _ in resnets], sampler=sampler)

    @torch.no_grad()
    def fold(
        self,
        t: Tensor,
        tokens: Tensor,
        *,
        pooled: Tensor | None = None,
        time_ids: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Folded:
        """Fold timesteps t (n,), or (n, B) if rows differ, with tokens (B, L, D).

        SDXL also needs pooled (B, D2) and time_ids (B, 6); guidance-embedded networks need the embedding `guidance` (B, W).
        """
        t, c = t.to(self.device), self.config
        t = t[:, None] if t.ndim == 1 else t
        n = len(t)
        each = lambda x: x.to(self.device, self.dtype)
        flip, zero = c.flip_sin_to_cos, c.freq_shift
        wave = sinusoid(t.flatten(), c.block_out_channels[0], flip=flip, shift=zero).unflatten(0, t.shape)  # (n, 1 or B, D)
        wave = each(wave)
        if self.time_guidance is not None:
            wave = wave + self.time_guidance(each(guidance))
        emb = self.time[1](F.silu(self.time[0](wave)))
        if self.added is not None:
            ids = sinusoid(time_ids.to(self.device).flatten(), c.addition_time_embed_dim, flip=flip, shift=zero)
            joint = torch.cat([each(pooled), each(ids).reshape(len(pooled), -1)], 1)
            emb = emb + self.added[1](F.silu(self.added[0](joint)))
        shift = (F.linear(F.silu(emb), self.shift_weight).float() + self.shift_bias).to(self.dtype)
        kv = self.cross_kv(each(tokens)) if self.cross_kv else each(tokens)[..., :0]
        return Folded(kv, shift.reshape(n, -1, shift.shape[-1]))

    def step(self, x: Tensor, folded: Folded, k: int, residuals: Mapping[str, Any] | None = None) -> Tensor:
        """Return the raw output (B, C, h, w) for x at the k-th timestep; `residuals` of a ControlNet have diffusers' names."""
        shifts = folded.shift[k].split(self.shift_widths, -1)
        residuals = residuals or {}
        x = self.enter(x.to(self.dtype).contiguous(memory_format=torch.channels_last))
        skips = [x]

        def run(block: SimpleNamespace, x: Tensor, *, join: bool = False, keep: bool = False) -> Tensor:
            for (resnet, i), transformer in block.layers:
                x = resnet(torch.cat([x, skips.pop()], 1) if join else x, shifts[i])
                x = transformer(x, folded.kv) if transformer else x
                if keep:
                    skips.append(x)
            return x

        for block in self.down:
            x = run(block, x, keep=True)
            if block.sampler:
                x = block.sampler(x)
                skips.append(x)
        for i, extra in enumerate(residuals.get("down_block_additional_residuals", ())):
            skips[i] = skips[i] + extra
        x = run(self.middle, x)
        if (extra := residuals.get("mid_block_additional_residual")) is not None:
            x = x + extra
        for block in self.up:
            x = run(block, x, join=True)
            if block.sampler:
                x = block.sampler(upsampled(x, skips[-1].shape[-2:]))
        return self.leave(activated(self.last, x))

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        tokens: Tensor,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        timestep_cond: Tensor | None = None,
        return_dict: bool = False,
        **residuals: Any,
    ) -> tuple[Tensor]:
        """Call it like diffusers' UNet2DConditionModel; folds anew at every call."""
        added = added_cond_kwargs or {}
        t = t.reshape(1, -1) if t.ndim else t.reshape(1)
        folded = self.fold(t, tokens, pooled=added.get("text_embeds"), time_ids=added.get("time_ids"), guidance=timestep_cond)
        return (self.step(x, folded, 0, residuals),)


def unet_of(base: Checkpoint, *, device: torch.device | str = "cpu") -> Any:
    """Return the checkpoint's UNet as a FoldedUNet, or diffusers' UNet if it has a part that is not known here."""
    try:
        with damage_is_unknown():
            return FoldedUNet(tensors_of(base, "unet"), base.unet_config, dtype=base.dtype, device=device)
    except Unknown:
        return base.unet


def spread(value: Any, n: int) -> Sequence[Any]:
    """Return a list as it is, and any other value repeated n times."""
    return list(value) if isinstance(value, list | tuple) else [value] * n


def check(config: Mapping[str, Any]) -> None:
    """Raise Unknown if the config asks for a part that is not built here."""
    for key, neutral in NEUTRAL.items():
        if config.get(key, neutral) != neutral:
            raise Unknown(f"{key} {config[key]}")
    wrong = {*config["down_block_types"], *config["up_block_types"]} - BLOCKS
    wrong |= {config.get("mid_block_type", "UNetMidBlock2DCrossAttn")} - MIDDLES
    if wrong or config.get("addition_embed_type") not in {None, "text_time"}:
        raise Unknown(f"{', '.join(map(str, wrong)) or config['addition_embed_type']}")
