"""Sampling settings: scheduler, steps and guidance, taken from the user, a recipe or the family; and warnings on conflicts."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.samplers import SOLVERS, Grid
from fastdiff.runtime import console
from fastdiff.runtime.errors import as_field


@dataclass(frozen=True)
class Settings:
    """How to sample an image. Raises ValueError for an unknown scheduler, or an eta outside [0, 1]."""

    scheduler: str = "dpm++"
    num_steps: int = 25
    guidance: float = 7.5  # w in u + w (c - u); 1 or less: no guidance
    spacing: str | None = None  # of the timesteps; None: the scheduler's default
    eta: float = 0.0  # randomness in [0, 1]; TCD's gamma
    timesteps: tuple[int, ...] | None = None  # explicit, descending; these override spacing and num_steps

    def __post_init__(self) -> None:
        if self.scheduler not in SOLVERS:
            raise ValueError(f"{as_field('scheduler', self.scheduler)}: use one of {', '.join(SOLVERS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, not {self.eta}")

    @classmethod
    def usual(cls, family: Family) -> "Settings":
        """Return the settings with which the family's checkpoints are usually sampled."""
        return cls(*family.sampling)

    @classmethod
    def of(cls, recipe: Recipe, default: "Settings", **given: Any) -> "Settings":
        """Combine settings: given values come first, then the recipe's, then the default's."""
        names = ("scheduler", "num_steps", "guidance", "spacing", "eta", "timesteps")
        from_recipe = {k: v for k, v in vars(recipe).items() if k in names and v is not None}
        chosen = from_recipe | {k: v for k, v in given.items() if v is not None}
        if "scheduler" in chosen and "spacing" not in chosen:
            chosen["spacing"] = None  # the default's spacing belongs to the default's scheduler
        if given.get("spacing") or len(chosen.get("timesteps") or ()) != chosen.get("num_steps"):
            chosen["timesteps"] = None  # explicit timesteps are valid for their own number of steps only
        return replace(default, **chosen)

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance is on."""
        return self.guidance > 1

    @property
    def calls(self) -> int:
        """The number of network evaluations per image; a guided step costs two."""
        return self.num_steps * (2 if self.guided else 1)

    def grid(self, schedule: Any, scheduler_config: dict[str, Any]) -> Grid:
        """Return the timesteps of these settings on a noise schedule, with the options of a diffusers scheduler config."""
        spacing = self.spacing or SOLVERS[self.scheduler].spacing
        if self.timesteps:
            t = torch.tensor(self.timesteps)
        else:
            t = schedule.grid(self.num_steps, spacing, scheduler_config.get("steps_offset", 0))
        final = None if scheduler_config.get("set_alpha_to_one", True) else 0
        return Grid(schedule, t, final, start_scale=spacing in {"trailing", "linspace"}, eta=self.eta)


def asked(recipe: Recipe, default: Settings, **given: Any) -> Settings:
    """Combine settings like `Settings.of`, and warn of given values that contradict the recipe. Given values still win."""
    for name in ("scheduler", "guidance"):
        wants, value = vars(recipe)[name], given.get(name)
        unguided = name == "guidance" and None not in (wants, value) and max(wants, value) <= 1
        if wants is not None and value is not None and wants != value and not unguided:
            console.warn(f"{as_field(name, value)}: the weights were distilled for {name} {wants}")
    steps = given.get("num_steps")
    if recipe.timesteps and steps and steps != recipe.num_steps:
        console.warn(f"{as_field('num_steps', steps)}: the weights know only timesteps {', '.join(map(str, recipe.timesteps))}")
    elif recipe.fixed and steps and steps != recipe.num_steps:
        console.warn(f"{as_field('num_steps', steps)}: the weights were distilled for exactly {recipe.num_steps} steps")
    elif recipe.num_steps and steps and steps > 2 * recipe.num_steps:
        console.warn(f"{as_field('num_steps', steps)}: the weights were distilled for {recipe.num_steps}; more steps do not help")
    return Settings.of(recipe, default, **given)
