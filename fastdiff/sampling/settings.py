"""Sampling settings: scheduler, steps and guidance, taken from the user, a recipe or the family; and warnings on conflicts."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS, Grid
from fastdiff.runtime import console
from fastdiff.runtime.errors import as_field


@dataclass(frozen=True)
class Settings:
    """How to sample an image.

    With explicit `timesteps`, `num_steps` is their number. Wherever they begin, the walk begins with standard normal noise, as
    with the diffusers schedulers that take `timesteps=`. Only "euler" scales it by sigma of the first timestep, as
    EulerDiscreteScheduler does with trailing (the default) and linspace spacing; with leading spacing it does not. DDIMScheduler
    takes no timesteps: "ddim" with explicit ones equals EulerDiscreteScheduler with leading spacing.

    With `step_guidance`, `guidance` is the largest of them. A published guidance interval is the case (1, ..., w, ..., 1).

    Raises ValueError for an unknown scheduler, an eta or guidance_rescale outside [0, 1], timesteps that do not descend, or a
    `step_guidance` of another length than `num_steps`.
    """

    scheduler: str = "dpm++"
    num_steps: int = 25
    guidance: float = 7.5  # w in u + w (c - u); 1 or less: no guidance
    spacing: str | None = None  # of the timesteps; None: the scheduler's default
    eta: float = 0.0  # randomness in [0, 1]; TCD's gamma
    timesteps: tuple[int, ...] | None = None  # explicit, descending; these override spacing and num_steps
    step_guidance: tuple[float, ...] | None = None  # w of each step; a step of 1 or less calls the network once, any other twice
    guidance_rescale: float = 0.0  # phi in [0, 1] of Lin et al. 2024: how far guided outputs keep the spread of unguided ones

    def __post_init__(self) -> None:
        if self.scheduler not in SOLVERS:
            raise ValueError(f"{as_field('scheduler', self.scheduler)}: use one of {', '.join(SOLVERS)}")
        for name in ("eta", "guidance_rescale"):
            if not 0 <= vars(self)[name] <= 1:
                raise ValueError(f"`{name}` must be between 0 and 1, not {vars(self)[name]}")
        if self.timesteps is not None:
            timesteps = tuple(self.timesteps)
            if not timesteps or timesteps != tuple(sorted({t for t in timesteps if t >= 0}, reverse=True)):
                raise ValueError(f"explicit timesteps must descend to 0 or above, not {listed(timesteps)}")
            self._set(timesteps=timesteps, num_steps=len(timesteps))
        if self.step_guidance is not None:
            weights = tuple(max(1.0, float(w)) for w in self.step_guidance)
            if len(weights) != self.num_steps:
                raise ValueError(f"step_guidance: {len(weights)} weights for {self.num_steps} steps; give one for each step")
            self._set(guidance=max(weights), step_guidance=weights if len(set(weights)) > 1 else None)

    def _set(self, **values: Any) -> None:
        """Bring fields of a new object into their one form, so that settings that draw alike are equal."""
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the class is frozen

    def __repr__(self) -> str:
        """The fields in order, those that came late only where they are set: cached teacher samples are named by this text."""
        return f"Settings({', '.join(f'{k}={v!r}' for k, v in self.fields_set().items())})"

    def fields_set(self) -> dict[str, Any]:
        """The fields in order, without `step_guidance` and `guidance_rescale` where they are not set."""
        unset = {"step_guidance": None, "guidance_rescale": 0.0}
        return {k: v for k, v in vars(self).items() if k not in unset or v != unset[k]}

    @classmethod
    def usual(cls, family: Family) -> "Settings":
        """Return the settings with which the family's checkpoints are usually sampled."""
        return cls(*family.sampling)

    @classmethod
    def of_base(cls, base: Checkpoint) -> "Settings":
        """Return the settings with which a base is sampled: by the recipe of a few-step checkpoint, else as is usual."""
        return cls.of(base.recipe, cls.usual(base.family))

    @classmethod
    def of(cls, recipe: Recipe, default: "Settings", **given: Any) -> "Settings":
        """Combine settings: given values come first, then the recipe's, then the default's.

        Explicit timesteps and guidance of single steps are kept only as long as no value before them names another number of
        steps, another spacing or another guidance.
        """
        given = {k: v for k, v in given.items() if v is not None}
        chosen = dict[str, Any]()
        for values in (vars(default), vars(recipe), given):
            new = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
            if "timesteps" in new:
                new["num_steps"] = len(new["timesteps"])
            other_steps = "num_steps" in new and new["num_steps"] != chosen.get("num_steps")
            if "scheduler" in new:
                chosen["spacing"] = None  # an earlier spacing belongs to the earlier scheduler
            if other_steps or "spacing" in new:
                chosen["timesteps"] = None
            if other_steps or "guidance" in new:
                chosen["step_guidance"] = None
            chosen |= new
        return cls(**chosen)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on, in any step."""
        return self.guidance > 1

    @property
    def weights(self) -> tuple[float, ...]:
        """The guidance w of each step (num_steps,)."""
        return self.step_guidance or (self.guidance,) * self.num_steps

    @property
    def calls(self) -> int:
        """The number of network evaluations per image; a guided step costs two."""
        return sum(2 if w > 1 else 1 for w in self.weights)

    def grid(self, schedule: Any, scheduler_config: dict[str, Any]) -> Grid:
        """Return the timesteps of these settings on a noise schedule, with the options of a diffusers scheduler config.

        ValueError where they are not timesteps of the schedule.
        """
        spacing = self.spacing or SOLVERS[self.scheduler].spacing
        explicit = self.timesteps is not None or spacing == "lcm"  # DDIMScheduler knows neither
        if self.timesteps is None:
            t = schedule.grid(self.num_steps, spacing, scheduler_config.get("steps_offset", 0))
        elif self.timesteps[0] < len(schedule):
            t = torch.tensor(self.timesteps)
        else:
            raise ValueError(f"explicit timesteps must be below {len(schedule)}, not {listed(self.timesteps)}")
        final = None if scheduler_config.get("set_alpha_to_one", True) or explicit else 0
        scaled = spacing in {"trailing", "linspace"}
        walked = schedule.off_zero() if SOLVERS[self.scheduler].off_zero else schedule
        return Grid(walked, t, final, start_scale=scaled, eta=self.eta, explicit=explicit)


def listed(values: Iterable[float]) -> str:
    """Numbers as text with commas: 1, 7.5, 1."""
    return ", ".join(f"{v:g}" for v in values)


def asked(recipe: Recipe, default: Settings, **given: Any) -> Settings:
    """Combine settings like `Settings.of`, and warn of given values that contradict the recipe. Given values still win."""
    for name in ("scheduler", "guidance"):
        wants, value = vars(recipe)[name], given.get(name)
        unguided = name == "guidance" and None not in (wants, value) and max(wants, value) <= 1
        if wants is not None and value is not None and wants != value and not unguided:
            console.warn(f"{as_field(name, value)}: the weights were distilled for {name} {wants}")
    steps = given.get("num_steps")
    if steps and (doubt := doubt_of(recipe, steps)):
        console.warn(f"{as_field('num_steps', steps)}: {doubt}")
    chosen = Settings.of(recipe, default, **given)
    if given.get("eta") and not SOLVERS[chosen.scheduler].takes_eta:
        console.warn(f"`eta` has no effect with {chosen.scheduler}: it is TCD's gamma")
    if given.get("guidance_rescale") and not chosen.guided:
        console.warn("`guidance_rescale` has no effect at guidance 1 or less")
    return chosen


def doubt_of(recipe: Recipe, num_steps: int) -> str | None:
    """Say why weights with this recipe were not made for so many steps; None where they were, or draw in any number."""
    own = recipe.own_counts
    if num_steps == recipe.num_steps or num_steps in own:
        return None
    if recipe.timesteps:
        return f"the weights know only timesteps {', '.join(map(str, recipe.timesteps))}"
    if own or (recipe.scheduler == "ddim" and recipe.num_steps):  # DDIM's recipes are of jumps from edge to edge of a phase
        return f"the weights were distilled for exactly {recipe.steps_text}"
    if recipe.num_steps and num_steps > 2 * recipe.num_steps:
        return f"the weights were distilled for {recipe.num_steps}; more steps do not help"
    return None
