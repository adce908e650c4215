"""The ways in which teachers and students are sampled when they are judged."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.family import Family
from fastdiff.diffusion.samplers import SOLVERS
from fastdiff.diffusion.schedule import timesteps_from
from fastdiff.options.teacher_row import read_teacher_row
from fastdiff.quality import emoji as judge
from fastdiff.sampling.settings import Settings

STEPS = (1, 2, 4, 8)  # judged where neither the caller nor the student's recipe fixes the steps


def teacher_ways(base: Checkpoint, calls: int) -> list[Settings]:
    """The ways to sample a teacher in exactly `calls` network calls: a few-step one by its recipe, else `undistilled_ways`."""
    if not base.recipe.few_steps:
        return undistilled_ways(base.family, calls)
    one = Settings.of(base.recipe, Settings.usual(base.family), num_steps=calls)
    if not one.guided:
        return [one]
    return [Settings.of(base.recipe, Settings.usual(base.family), num_steps=calls // 2)] if calls % 2 == 0 else []


def undistilled_ways(family: Family, calls: int) -> list[Settings]:
    """The strongest known ways to sample an undistilled teacher in exactly `calls` network calls, that any diffusers user has.

    They are the stock solvers that measured best on `emoji`: one call at the last timestep and one at three quarters of the
    schedule; more calls without guidance, with guidance, and with guidance in the middle steps alone (a "guidance interval"),
    or for an odd number of calls after the first step. For `emoji` itself they are the shipped best settings.
    """
    usual = Settings.usual(family)
    ways = [replace(usual, scheduler="ddim" if calls == 1 else "dpm++", num_steps=calls, guidance=1.0, spacing="trailing")]
    if calls > 1 and calls % 2 == 0 and usual.guided:
        ways.append(replace(usual, scheduler="dpm++", num_steps=calls // 2, spacing="trailing"))
    if family.judge_ships and (known := list(dict.fromkeys(judge.shipped().undistilled(calls).values()))):
        return known + [way for way in ways if way.guided not in {k.guided for k in known}]
    if calls == 1:
        ways.append(Settings("ddim", 1, 1.0, timesteps=timesteps_from(749, 1)))
    if usual.guided and calls > 2:
        weights = (1.0, *[usual.guidance] * ((calls - 1) // 2), *([1.0] if calls % 2 == 0 else []))
        ways.append(Settings("dpm++", len(weights), spacing="trailing", step_guidance=weights))
    return ways


def teacher_row(row: Settings | str, family: Family) -> Settings:
    """The settings of a row of the undistilled teacher, given as they are or as "scheduler=dpm++ steps=5 guidance=1,3,3,3,1".

    What the text does not say is as usual for the family. UsageError for a text that is not understood.
    """
    if isinstance(row, Settings):
        return row
    usual, values = Settings.usual(family), read_teacher_row(row)
    scheduler, weights = values.get("scheduler", usual.scheduler), values.get("guidance", (usual.guidance,))
    return Settings(
        scheduler,
        values["steps"],
        weights[0],
        values.get("spacing", SOLVERS[scheduler].spacing),
        timesteps=timesteps_from(values["start"], values["steps"]) if "start" in values else values.get("timesteps"),
        step_guidance=weights if len(weights) > 1 else None,
    )


def ladder_of(recipe: Any, family: Family, num_steps: Sequence[int] | None) -> list[Settings]:
    """A student's settings for each number of steps: `num_steps`, or those of its recipe, or 1, 2, 4 and 8."""
    return [Settings.of(recipe, Settings.usual(family), num_steps=n) for n in num_steps or recipe.own_counts or STEPS]
