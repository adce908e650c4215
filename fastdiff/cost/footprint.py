"""Count what a pass through a network costs from its shapes alone: it runs on the meta device, without weights or memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.lora import adapters
from fastdiff.models.denoiser import Cond

CHECKPOINTED = ("ResnetBlock2D", "BasicTransformerBlock")  # blocks that diffusers' UNets recompute under gradient checkpointing


@dataclass(frozen=True)
class Footprint:
    """Sizes of a UNet of which an adapter or everything trains."""

    parameters: int
    trained: int
    saved_bytes: int  # kept for the backward pass, per picture
    checkpointed_bytes: int  # the same under gradient checkpointing
    flops: int  # of the forward pass, per picture


def condition(base: Checkpoint, rows: int, device: torch.device | str = "cpu") -> Cond:
    """A random condition of `rows` prompts with the base's shapes: tokens (B, L, D), for SDXL also pooled and time_ids (B, 6)."""
    config = base.unet_config
    length = base.config_of(base.text_parts[0]).get("max_position_embeddings", 77)
    tokens = torch.randn(rows, length, config["cross_attention_dim"], device=device)
    if not base.family.size_conditioned:
        return Cond(tokens)
    width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    side = float(base.resolution_px)
    ids = torch.tensor([[side, side, 0, 0, side, side]], device=device).expand(rows, 6)
    return Cond(tokens, torch.randn(rows, width, device=device), ids)


def of_unet(base: Checkpoint, resolution_px: int, dtype: torch.dtype, rank: int | None, layers: tuple[str, ...]) -> Footprint:
    """The footprint of the base's UNet at a resolution. An adapter of `rank` on `layers` trains; None: all of it."""
    net = base.skeleton("unet").requires_grad_(rank is None)
    parameters = sum(p.numel() for p in net.parameters())
    if rank:
        with torch.device("meta"):
            adapters.attach(net, rank, rank, targets=layers)
    for p in net.parameters():  # as under autocast, which casts the adapter's fp32 weights
        p.data = p.data.to(dtype)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    side = resolution_px // base.pixels_per_latent
    ledger = Ledger(net)
    with ledger.watching():
        cond = condition(base, 1, "meta").map(lambda v: v.to(dtype))
        extra = {"added_cond_kwargs": {"text_embeds": cond.pooled, "time_ids": cond.time_ids}} if cond.pooled is not None else {}
        if net.config.time_cond_proj_dim:
            extra["timestep_cond"] = torch.empty(1, net.config.time_cond_proj_dim, device="meta", dtype=dtype)
        x = torch.empty(1, net.config.in_channels, side, side, device="meta", dtype=dtype)
        net(x, torch.zeros(1, device="meta"), cond.tokens, return_dict=False, **extra)
    return Footprint(parameters, trained, ledger.saved, ledger.checkpointed, ledger.flops)


def encoding_flops(base: Checkpoint, resolution_px: int) -> int:
    """FLOP of encoding one picture of that size with the VAE."""
    from torch.utils.flop_counter import FlopCounterMode

    vae = base.skeleton("vae")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encoder(torch.empty(1, 3, resolution_px, resolution_px, device="meta"))
    return counter.get_total_flops()


class Ledger:
    """Counts the FLOP of a pass, and the bytes that autograd keeps in each block."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.flops = net, 0
        self.blocks: dict[nn.Module | None, int] = {None: 0}
        self.inputs: dict[nn.Module, int] = {}
        self.running: nn.Module | None = None
        self.seen: dict[int, Any] = {}  # storages by id: one that two operations keep counts once

    @property
    def saved(self) -> int:
        """Bytes kept for the backward pass."""
        return sum(self.blocks.values())

    @property
    def checkpointed(self) -> int:
        """Bytes kept with gradient checkpointing: all outside the blocks, the blocks' inputs, and the largest block."""
        inside = [size for block, size in self.blocks.items() if block is not None]
        return self.blocks[None] + sum(self.inputs.values()) + max(inside, default=0)

    def keep(self, tensor: Tensor) -> Tensor:
        """Hook for saved tensors: count the storage for the running block, unless it is a weight or was counted."""
        storage = tensor.untyped_storage()
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if not weight and storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # keep the storage alive, so that its id is not reused
            self.blocks[self.running] = self.blocks.get(self.running, 0) + storage.nbytes()
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count everything that the network does inside the block."""
        from torch.utils.flop_counter import FlopCounterMode

        handles = []
        for block in self.net.modules():
            if type(block).__name__ in CHECKPOINTED:
                handles += [
                    block.register_forward_pre_hook(self.enter, with_kwargs=True),
                    block.register_forward_hook(self.leave),
                ]
        real = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self.attention
        counter = FlopCounterMode(display=False)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda t: t), counter:
                yield
        finally:
            F.scaled_dot_product_attention = real
            self.flops += counter.get_total_flops()
            for handle in handles:
                handle.remove()

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.running = block
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        self.inputs[block] = given[0].nbytes  # the other inputs, text and time, are shared by all blocks

    def leave(self, *_: Any) -> None:
        self.running = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """Stand-in for fused attention as it runs on a device: it keeps inputs and output, but no attention matrix."""
        self.flops += 4 * q.shape[:-1].numel() * k.shape[-2] * q.shape[-1]
        return Fused.apply(q, k, v)


class Fused(torch.autograd.Function):
    """Attention that returns tensors of the right shape and computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
