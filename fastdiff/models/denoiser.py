"""Denoiser: wraps any UNet so that it returns Prediction(x0, eps), whatever the UNet was trained to output."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.diffusion.guidance import rescale
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, PredictionType
from fastdiff.lora import adapters
from fastdiff.models.sharding import is_split


@dataclass(frozen=True)
class Cond:
    """What a UNet is conditioned on besides x_t and t. B batch, L tokens, D width, H W pixels."""

    tokens: Tensor  # (B, L, D); in a data set also rows of it that are read when indexed: `data.store`
    pooled: Tensor | None = None  # (B, D2)  SDXL
    time_ids: Tensor | None = None  # (B, 6)  SDXL: original height, width, crop top, left, target height, width
    guidance: Tensor | None = None  # (B,)  for guidance-embedded networks: w in u + w (c - u)
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1]: the control picture, for a ControlNet

    def map(self, f) -> "Cond":
        """Return a Cond with `f` applied to every tensor that is not None."""
        return Cond(**{k: f(v) if v is not None else None for k, v in vars(self).items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Cond":
        return self.map(lambda v: v[index])

    def expand(self, n: int) -> "Cond":
        """Repeat a Cond of one row to n rows."""
        return self.map(lambda v: v.expand(n, *v.shape[1:]))

    @staticmethod
    def cat(parts: list["Cond"]) -> "Cond":
        """Concatenate along the batch. A field that is None in any part is None in the result.

        Tokens of different lengths are brought to one, as `of_one_length` does.
        """
        columns = {x.name: [vars(p)[x.name] for p in parts] for x in fields(Cond)}
        columns["tokens"] = of_one_length(columns["tokens"])
        return Cond(**{k: torch.cat(v) if all(x is not None for x in v) else None for k, v in columns.items()})

    def with_guidance(self, w: Tensor | None) -> "Cond":
        """Return a copy with guidance weights w (B,)."""
        return replace(self, guidance=w)

    def with_control(self, pictures: Tensor | None) -> "Cond":
        """Return a copy with control pictures (B, 3, H, W) in [0, 1]."""
        return replace(self, control=pictures)


def of_one_length(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Repeat states (..., L, D) until all are as long: to the least common multiple of their lengths L.

    This changes no answer of a network: attention over states that are all repeated as often is attention over the states.
    """
    length = math.lcm(*(states.shape[-2] for states in tokens))
    return [torch.cat([states] * (length // states.shape[-2]), -2) for states in tokens]


LOG_10000 = math.log(10_000)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Embed guidance weights w (B,) as sines and cosines (B, width), as the LCM pipelines do: w = CFG scale - 1, times 1000."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=w.device) * -(LOG_10000 / (half - 1)))
    angle = 1000 * w.float()[:, None] * frequency
    embedding = torch.cat([angle.sin(), angle.cos()], 1)
    return nn.functional.pad(embedding, (0, width % 2))


def dtype_of(net: Any) -> torch.dtype:
    """Return the dtype that a network computes in. diffusers' own `dtype` visits every module before the first parameter."""
    parameters = net.parameters() if isinstance(net, nn.Module) else iter(())  # a folded network says its dtype itself
    first = next((p for p in parameters if p.is_floating_point()), net)
    return first.dtype


class Reached(Exception):  # noqa: N818  (not an error: it ends a forward pass early)
    """Raised by a hook to end a forward pass once all requested features are computed."""


class Denoiser(nn.Module):
    """A UNet in one role (teacher, student, ...): the network, its noise schedule, its prediction type and its adapter.

    Several denoisers may share one network: each switches its own `adapter` on while it runs; None means the base without
    adapters. A `controlnet` adds its residuals for `Cond.control`, times `strength` (Zhang 2023, ControlNet); it does not run
    if `Cond.control` is None. Raises ValueError for an epsilon network with a zero-terminal-SNR schedule: alpha_T = 0 leaves
    x0 undefined there (Lin 2024).

    With `full_precision` the networks compute in the dtype of their weights, also under autocast.
    """

    full_precision = False
    guidance_rescale = 0.0  # phi of `diffusion.guidance.rescale`, in `guided`

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        kind: PredictionType,
        adapter: str | None = None,
        controlnet: nn.Module | None = None,
        strength: float = 1.0,
    ) -> None:
        super().__init__()
        if schedule.zero_terminal_snr and kind == "epsilon":
            raise ValueError("a zero-terminal-SNR schedule needs v_prediction or sample; this checkpoint predicts epsilon")
        self.net, self.schedule, self.kind, self.adapter = net, schedule, kind, adapter
        self.controlnet, self.strength = controlnet, strength

    @classmethod
    def of(cls, base: Checkpoint, adapter: str | None = None) -> "Denoiser":
        """Build a denoiser from the base's UNet, schedule and prediction type, with the named adapter or without adapters.

        All denoisers of one base share its UNet, so a teacher and a LoRA student need the memory of one.
        """
        return cls(base.unet, base.schedule(), base.prediction_type, adapter)

    def networks(self) -> list[nn.Module]:
        """Return the networks that this denoiser calls: the UNet, and the ControlNet if there is one."""
        return [self.net] if self.controlnet is None else [self.net, self.controlnet]

    @property
    def guidance_embedded(self) -> bool:
        """Whether the UNet takes the guidance weight as an input (`Cond.guidance`)."""
        return self.net.config.time_cond_proj_dim is not None

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """Predict x0 and eps, each (B, C, h, w) in fp32, from x_t (B, C, h, w) and timesteps t, a scalar or (B,)."""
        t = t.to(x_t.device).expand(len(x_t))
        return self.schedule.predict(self.answer(x_t, t, cond), x_t, t, self.kind)

    def answer(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the raw network output (B, C, h, w) in the network's dtype; t is a scalar or (B,) on the network's device."""
        t, dtype, extra = t.expand(len(x_t)), dtype_of(self.net), self.extra(cond)
        as_weights = torch.autocast(x_t.device.type, enabled=False) if self.full_precision else nullcontext()
        with as_weights, adapters.using(self.net, self.adapter):
            residuals = self.controlled(x_t, t, cond, extra)
            return self.net(x_t.to(dtype), t, cond.tokens.to(dtype), return_dict=False, **extra, **residuals)[0]

    def extra(self, cond: Cond) -> dict[str, Any]:
        """Return the network's keyword arguments besides the tokens, by diffusers' names.

        Raises ValueError if the network embeds guidance and `cond.guidance` is None.
        """
        dtype, kwargs = dtype_of(self.net), {}
        if cond.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids.to(dtype)}
        if self.guidance_embedded:
            if cond.guidance is None:
                raise ValueError("this network has a guidance embedding: Cond.guidance must not be None")
            width = self.net.config.time_cond_proj_dim
            kwargs["timestep_cond"] = guidance_embedding(cond.guidance - 1, width).to(dtype)
        return kwargs

    def controlled(self, x_t: Tensor, t: Tensor, cond: Cond, extra: dict[str, Any]) -> dict[str, Any]:
        """Return the ControlNet's residuals for the UNet, by diffusers' names; {} without a ControlNet or control picture."""
        if self.controlnet is None or cond.control is None:
            return {}
        dtype = dtype_of(self.controlnet)
        down, middle = self.controlnet(
            x_t.to(dtype),
            t,
            cond.tokens.to(dtype),
            cond.control.to(dtype),
            conditioning_scale=self.strength,
            return_dict=False,
            **extra,
        )
        own = dtype_of(self.net)
        return {
            "down_block_additional_residuals": [x.to(own) for x in down],
            "mid_block_additional_residual": middle.to(own),
        }

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: float | Tensor) -> Prediction:
        """Predict with classifier-free guidance of weight w, in one batch of 2 B rows; w = 1 skips the unconditional half.

        The outputs are rescaled by `guidance_rescale`. A network that embeds guidance predicts the guided answer itself.
        """
        t = t.to(x_t.device).expand(len(x_t))
        if self.guidance_embedded:
            weights = w.expand(len(x_t)) if isinstance(w, Tensor) else torch.full((len(x_t),), float(w), device=x_t.device)
            return self(x_t, t, cond.with_guidance(weights))
        if isinstance(w, int | float) and w == 1:
            return self(x_t, t, cond)
        uncond = uncond.with_control(cond.control)  # guidance is about the text: both halves get the same control picture
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, uncond]))
        c, u = (Prediction(*(part.chunk(2)[i] for part in both)) for i in (0, 1))
        return self.combined(c, u, w, x_t, t, self.guidance_rescale)

    def combined(
        self, cond: Prediction, uncond: Prediction, w: float | Tensor, x_t: Tensor, t: Tensor, phi: float = 0.0
    ) -> Prediction:
        """Guide the prediction `cond` with weight w, a scalar or (B,), and rescale the network's output by `phi`."""
        guided = cond.guide(uncond, w)
        if not phi:
            return guided
        out, plain = (self.schedule.output(p, t, self.kind) for p in (guided, cond))
        return self.schedule.predict(rescale(out, plain, phi), x_t, t, self.kind)

    @contextmanager
    def tap(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of the named modules during forward passes inside the `with`, in the yielded dict.

        Of a module that returns a tuple, the first element is recorded.
        """
        outputs: dict[str, Tensor] = {}

        def note(name: str):
            def hook(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
                outputs[name] = out if isinstance(out, Tensor) else out[0]

            return hook

        handles = [self.net.get_submodule(name).register_forward_hook(note(name)) for name in names]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def bottleneck(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the bottleneck features (B, D, h', w'): of the mid block, or of the last down block if there is no mid block."""
        return self.encoded(x_t, t, cond)[-1]

    def encoded(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """Return feature maps (B, D_i, h_i, w_i): of every down block before it downsamples, then of the mid block, if any.

        The decoder is skipped, except in a network that is split over processes: there all blocks must run in turn.
        """
        blocks, maps = list(self.net.down_blocks), []
        split = is_split(next(self.net.parameters()))

        def note(module: nn.Module, args: tuple, out: Tensor | tuple) -> None:
            if isinstance(out, Tensor):
                maps.append(out)  # the mid block
            else:
                _, states = out
                maps.append(states[-2] if module.downsamplers else states[-1])
            if module is last and not split:
                raise Reached

        last = self.net.mid_block if self.net.mid_block is not None else blocks[-1]
        handles = [block.register_forward_hook(note) for block in (*blocks, *([last] if last is not blocks[-1] else []))]
        try:
            self(x_t, t, cond)
        except Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        assert len(maps) == len(handles), "the last block was not reached"
        return maps


def trainable_copy(net: nn.Module) -> nn.Module:
    """Return a trainable copy of a network in fp32, whatever the dtype of the original."""
    return deepcopy(net).float().train().requires_grad_(True)
