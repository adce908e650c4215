"""Any UNet as a Denoiser that answers Prediction(x0, eps), whatever it was trained to output."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.diffusion.schedule import NoiseSchedule, Prediction, PredictionType
from fastdiff.lora import adapters
from fastdiff.models.sharding import is_split


@dataclass(frozen=True)
class Cond:
    """Everything a UNet is conditioned on besides x_t and t. B batch, L tokens, D width."""

    tokens: Tensor  # (B, L, D)
    pooled: Tensor | None = None  # (B, D2)  SDXL
    time_ids: Tensor | None = None  # (B, 6)  SDXL: original height, width, crop top, left, target height, width
    guidance: Tensor | None = None  # (B,)  guidance-embedded networks: w of u + w (c - u)
    control: Tensor | None = None  # (B, 3, H, W) in [0, 1]: the picture that a ControlNet looks at

    def map(self, f) -> "Cond":
        """`f` applied to every tensor that is there."""
        tensors = vars(self)
        return Cond(**{k: f(v) if v is not None else None for k, v in tensors.items()})

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Cond":
        return self.map(lambda v: v[index])

    def expand(self, n: int) -> "Cond":
        """One row, repeated to a batch of n."""
        return self.map(lambda v: v.expand(n, *v.shape[1:]))

    @staticmethod
    def cat(parts: list["Cond"]) -> "Cond":
        columns = {x.name: [vars(p)[x.name] for p in parts] for x in fields(Cond)}
        return Cond(**{k: torch.cat(v) if all(x is not None for x in v) else None for k, v in columns.items()})

    def with_guidance(self, w: Tensor | None) -> "Cond":
        return replace(self, guidance=w)

    def with_control(self, pictures: Tensor | None) -> "Cond":
        return replace(self, control=pictures)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding (B, width) of LCM's guidance w = CFG - 1, times 1000, as the LCM pipelines compute it."""
    half = width // 2
    frequency = torch.exp(torch.arange(half, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)).item())
    angle = 1000 * w.float()[:, None] * frequency
    embedding = torch.cat([angle.sin(), angle.cos()], 1)
    return nn.functional.pad(embedding, (0, width % 2))


class Reached(Exception):  # noqa: N818  (not an error: it ends a forward pass early)
    """All features that were asked for are there."""


class Denoiser(nn.Module):
    """One role of a UNet: the network with its schedule, prediction type and the adapter that it wears.

    Several roles may share one network: `adapter` is on while this role runs, and None is the bare base. A `controlnet` adds
    what it makes of `Cond.control`, times `strength` (Zhang 2023, ControlNet); without a picture it does not run.
    Zero-terminal-SNR schedules are refused for epsilon networks: alpha_T = 0 leaves x0 undefined there (Lin 2024).
    """

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
        """The base's network with its schedule and prediction type, wearing an adapter of that name, or bare.

        All roles of one base share its network, so that a teacher and a LoRA student cost the memory of one.
        """
        return cls(base.unet, base.schedule(), base.prediction_type, adapter)

    def networks(self) -> list[nn.Module]:
        """What it calls: the UNet, and the ControlNet where it has one."""
        return [self.net] if self.controlnet is None else [self.net, self.controlnet]

    @property
    def guidance_embedded(self) -> bool:
        return self.net.config.time_cond_proj_dim is not None

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Prediction:
        """x_t (B, C, h, w), t scalar or (B,) -> Prediction, fp32."""
        t = t.to(x_t.device).expand(len(x_t))
        return self.schedule.predict(self.answer(x_t, t, cond), x_t, t, self.kind)

    def answer(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network itself puts out (B, C, h, w), in its dtype; t scalar or (B,), on its device."""
        t, dtype, extra = t.expand(len(x_t)), self.net.dtype, self.extra(cond)
        residuals = self.controlled(x_t, t, cond, extra)
        with adapters.wearing(self.net, self.adapter):
            return self.net(x_t.to(dtype), t, cond.tokens.to(dtype), return_dict=False, **extra, **residuals)[0]

    def extra(self, cond: Cond) -> dict[str, Any]:
        """What the network is kwargs besides the prompt's tokens, by diffusers' names."""
        dtype, kwargs = self.net.dtype, {}
        if cond.pooled is not None:
            kwargs["added_cond_kwargs"] = {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids.to(dtype)}
        if self.guidance_embedded:
            if cond.guidance is None:
                raise ValueError("this network has a guidance embedding: Cond.guidance must be given")
            width = self.net.config.time_cond_proj_dim
            kwargs["timestep_cond"] = guidance_embedding(cond.guidance - 1, width).to(dtype)
        return kwargs

    def controlled(self, x_t: Tensor, t: Tensor, cond: Cond, extra: dict[str, Any]) -> dict[str, Any]:
        """What the ControlNet adds to each skip connection and to the middle of the UNet."""
        if self.controlnet is None or cond.control is None:
            return {}
        dtype = self.controlnet.dtype
        down, middle = self.controlnet(
            x_t.to(dtype),
            t,
            cond.tokens.to(dtype),
            cond.control.to(dtype),
            conditioning_scale=self.strength,
            return_dict=False,
            **extra,
        )
        own = self.net.dtype
        return {
            "down_block_additional_residuals": [x.to(own) for x in down],
            "mid_block_additional_residual": middle.to(own),
        }

    def guided(self, x_t: Tensor, t: Tensor, cond: Cond, uncond: Cond, w: float | Tensor) -> Prediction:
        """Classifier-free guidance, both halves in one batch of 2B; w of 1 needs no second half."""
        t = t.to(x_t.device).expand(len(x_t))
        if isinstance(w, int | float) and w == 1:
            return self(x_t, t, cond)
        uncond = uncond.with_control(cond.control)  # guidance is of the text alone
        both = self(torch.cat([x_t, x_t]), torch.cat([t, t]), Cond.cat([cond, uncond]))
        c, u = (Prediction(*(part.chunk(2)[i] for part in both)) for i in (0, 1))
        return c.guide(u, w)

    @contextmanager
    def tap(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the modules of those names put out in passes inside, by name; of blocks that answer several things the first."""
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
        """The network's narrowest feature map (B, D, h', w'), after the mid block or the last down block where there is none."""
        return self.encoded(x_t, t, cond)[-1]

    def encoded(self, x_t: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """The feature maps (B, D_i, h_i, w_i) of every down block before it halves the picture, and the bottleneck.

        The decoder does not run, but where the network is split over processes: its blocks are gathered in turn, to the end.
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
    """A copy that trains: fp32 master weights whatever the original is stored in."""
    return deepcopy(net).float().train().requires_grad_(True)
