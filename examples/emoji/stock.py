"""A way to sample with a stock diffusers scheduler: its options, free timesteps, and guidance for every network evaluation.

`Setting.made` returns the scheduler, and `piped` draws pictures with a stock diffusers pipeline.
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

HEUN = "HeunDiscreteScheduler"


@dataclass(frozen=True)
class Setting:
    """A way to sample: a diffusers scheduler, options for its config, timesteps, and guidance for every network evaluation."""

    scheduler: str  # class name
    options: tuple[tuple[str, Any], ...]
    guidance: tuple[float, ...]  # w in u + w (c - u), in the order of the evaluations; 1: unguided
    timesteps: tuple[int, ...] | None = None  # None: the scheduler spaces them

    @property
    def calls(self) -> int:
        """Network calls per picture."""
        return sum(1 if w == 1 else 2 for w in self.guidance)

    @property
    def num_steps(self) -> int:
        """Steps of the scheduler. Heun's evaluate the network twice, except the last."""
        return (len(self.guidance) + 1) // 2 if self.scheduler == HEUN else len(self.guidance)

    def unset(self, config: dict[str, Any]) -> Any:
        """Return the diffusers scheduler for a checkpoint's scheduler config, without timesteps."""
        # getattr: a setting names the diffusers class
        return getattr(diffusers, self.scheduler).from_config(config, **dict(self.options))

    def made(self, config: dict[str, Any]) -> Any:
        """Return the diffusers scheduler, ready to step."""
        made = self.unset(config)
        if self.timesteps is None:
            made.set_timesteps(self.num_steps)
        else:
            made.set_timesteps(timesteps=list(self.timesteps))
        if len(made.timesteps) != len(self.guidance):
            raise ValueError(f"{self.scheduler} evaluates {len(made.timesteps)} times, for {len(self.guidance)} guidance weights")
        return made

    @property
    def line(self) -> str:
        """The setting in one line."""
        options = " ".join(f"{k}={v}" for k, v in self.options)
        grid = "" if self.timesteps is None else f" at {','.join(map(str, self.timesteps))}"
        return f"{self.scheduler.removesuffix('Scheduler')} {options}{grid} w={','.join(f'{w:g}' for w in self.guidance)}"


def setting(scheduler: str, options: dict[str, Any], guidance: tuple[float, ...], timesteps: Any = None) -> Setting:
    """Make a setting from plain values; equal settings are equal, whatever the order of their options."""
    grid = None if timesteps is None else tuple(int(t) for t in timesteps)
    return Setting(scheduler, tuple(sorted(options.items())), tuple(float(w) for w in guidance), grid)


def piped(pipe: Any, s: Setting, prompts: list[str], **inputs: Any) -> Any:
    """Draw prompts by a setting with a stock StableDiffusionPipeline, freshly opened, since the setting changes its scheduler.

    The pipeline has one guidance weight. A callback sets the next one after every evaluation, and gives the encoded empty
    prompts only to guided evaluations, so that an unguided one costs one call.
    """
    pipe.scheduler = s.unset(pipe.scheduler.config)
    cond, uncond = pipe.encode_prompt(prompts, pipe.device, 1, True)

    def set_guidance(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = w = (*s.guidance, 1.0)[i + 1]
        return {"prompt_embeds": torch.cat([uncond, cond]) if w > 1 else cond}

    grid = {"num_inference_steps": s.num_steps} if s.timesteps is None else {"timesteps": list(s.timesteps)}
    return pipe(
        prompt_embeds=cond,
        negative_prompt_embeds=uncond,
        guidance_scale=s.guidance[0],
        callback_on_step_end=set_guidance,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        **grid,
        **inputs,
    )
