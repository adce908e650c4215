"""How to walk from noise to an image: sampler, steps, guidance; what a recipe asks for, and what was asked against it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff.checkpoints.family import Family
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.diffusion.solvers import SOLVERS, Grid
from fastdiff.runtime import console
from fastdiff.runtime.errors import as_field


@dataclass(frozen=True)
class Settings:
    """How to walk from noise to an image."""

    scheduler: str = "dpm++"
    num_steps: int = 25
    guidance: float = 7.5  # u + w (c - u); 1 or less = the conditional network alone
    spacing: str | None = None  # None: the scheduler's own
    eta: float = 0.0
    timesteps: tuple[int, ...] | None = None  # explicit, descending; they go before spacing and num_steps

    def __post_init__(self) -> None:
        if self.scheduler not in SOLVERS:
            raise ValueError(f"{as_field('scheduler', self.scheduler)}: one of {', '.join(SOLVERS)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` must be between 0 and 1, not {self.eta}")

    @classmethod
    def usual(cls, family: Family) -> "Settings":
        """How the family's checkpoints are usually sampled."""
        return cls(*family.sampling)

    @classmethod
    def of(cls, recipe: Recipe, default: "Settings", **given: Any) -> "Settings":
        """Given values first, then the recipe's, then the default's."""
        names = ("scheduler", "num_steps", "guidance", "spacing", "eta", "timesteps")
        from_recipe = {k: v for k, v in vars(recipe).items() if k in names and v is not None}
        chosen = from_recipe | {k: v for k, v in given.items() if v is not None}
        if "scheduler" in chosen and "spacing" not in chosen:
            chosen["spacing"] = None  # a spacing belongs to the scheduler it came with
        if given.get("spacing") or len(chosen.get("timesteps") or ()) != chosen.get("num_steps"):
            chosen["timesteps"] = None  # and timesteps to their number
        return replace(default, **chosen)

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    @property
    def calls(self) -> int:
        """Network evaluations per image: a guided step costs two."""
        return self.num_steps * (2 if self.guided else 1)

    def grid(self, schedule: Any, scheduler_config: dict[str, Any]) -> Grid:
        spacing = self.spacing or SOLVERS[self.scheduler].spacing
        if self.timesteps:
            t = torch.tensor(self.timesteps)
        else:
            t = schedule.grid(self.num_steps, spacing, scheduler_config.get("steps_offset", 0))
        final = None if scheduler_config.get("set_alpha_to_one", True) else 0
        return Grid(schedule, t, final, start_scale=spacing in {"trailing", "linspace"}, eta=self.eta)


def asked(recipe: Recipe, default: Settings, **given: Any) -> Settings:
    """Given values first, then the recipe's; one that contradicts the recipe is obeyed and warned of."""
    for name in ("scheduler", "guidance"):
        wants, value = vars(recipe)[name], given.get(name)
        unguided = name == "guidance" and None not in (wants, value) and max(wants, value) <= 1
        if wants is not None and value is not None and wants != value and not unguided:
            console.warn(f"{as_field(name, value)}: the weights were distilled for {name} {wants}")
    steps = given.get("num_steps")
    if recipe.timesteps and steps and steps != recipe.num_steps:
        console.warn(f"{as_field('num_steps', steps)}: the weights know only timesteps {', '.join(map(str, recipe.timesteps))}")
    elif recipe.fixed and steps and steps != recipe.num_steps:
        console.warn(
            f"{as_field('num_steps', steps)}: the weights were distilled for {recipe.num_steps} steps, and for those alone"
        )
    elif recipe.num_steps and steps and steps > 2 * recipe.num_steps:
        console.warn(f"{as_field('num_steps', steps)}: the weights were distilled for {recipe.num_steps}; more steps do not help")
    return Settings.of(recipe, default, **given)
