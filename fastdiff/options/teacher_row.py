"""Read a row that `evaluate` adds for the undistilled teacher, given as text: "scheduler=dpm++ steps=5 guidance=1,3,3,3,1".

It is read without torch, so a mistake is refused before anything is loaded.
"""

from typing import Any, NamedTuple

from fastdiff.checkpoints.family import LAST_TIMESTEP
from fastdiff.runtime.errors import UsageError, as_field

LCM_GRID = 50  # how many timesteps "lcm" spacing chooses from
NAMES = {"scheduler": ("ddim", "euler", "dpm++", "dpm++sde", "lcm", "tcd"), "spacing": ("trailing", "leading", "linspace", "lcm")}


class Numbers(NamedTuple):
    """What a key accepts."""

    kind: type
    low: float
    high: float
    many: bool  # whether several, with commas, are accepted


NUMBERS = {
    "steps": Numbers(int, 1, LAST_TIMESTEP + 1, False),
    "timesteps": Numbers(int, 0, LAST_TIMESTEP, True),
    "start": Numbers(int, 0, LAST_TIMESTEP, False),
    "guidance": Numbers(float, 0, 1000, True),
}


def read_teacher_row(row: str) -> dict[str, Any]:
    """Return the values of a row by key: names, numbers, or tuples of numbers for `timesteps` and `guidance`.

    `steps` is always there. Raises UsageError for a word that is not understood, and for values that contradict each other.
    """
    values: dict[str, Any] = {}
    for word in row.split():
        key, _, text = word.partition("=")
        if key not in NAMES and key not in NUMBERS:
            raise refusal(row, f"{word!r} is not understood", f"the keys are {', '.join([*NAMES, *NUMBERS])}, as KEY=VALUE")
        if key in values:
            raise refusal(row, f"{key} is there twice", "give it once")
        values[key] = name_of(row, key, text) if key in NAMES else numbers_of(row, key, text)
    if "timesteps" in values:
        check_timesteps(row, values)
        values["steps"] = len(values["timesteps"])
    check_steps(row, values)
    return values


def refusal(row: str, why: str, fix: str) -> UsageError:
    return UsageError(f"{as_field('teacher_row', row)}: {why}", fix)


def name_of(row: str, key: str, text: str) -> str:
    """Return the name that the text of a key is. UsageError for an unknown one."""
    if text not in NAMES[key]:
        raise refusal(row, f"{key} {text!r} is not known", f"use one of {', '.join(NAMES[key])}")
    return text


def numbers_of(row: str, key: str, text: str) -> Any:
    """Return the number, or the tuple of numbers, that the text of a key is. UsageError for any other text."""
    kind, low, high, many = NUMBERS[key]
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (len(numbers) > 1 and not many) or not all(low <= n <= high for n in numbers):
        one = "whole number" if kind is int else "number"
        what = f"{one}s with commas, each" if many else f"one {one}"
        raise refusal(row, f"{key} {text!r} is not understood", f"give {what} from {low:g} to {high:g}")
    return numbers if many else numbers[0]


def check_timesteps(row: str, values: dict[str, Any]) -> None:
    """Raise UsageError unless the timesteps descend and no other key contradicts them."""
    timesteps = values["timesteps"]
    if timesteps != tuple(sorted(set(timesteps), reverse=True)):
        raise refusal(row, "the timesteps do not descend", "give each once, the largest first")
    if "start" in values or values.get("steps", len(timesteps)) != len(timesteps):
        raise refusal(row, "timesteps already say the start and the number of steps", "leave out start and steps")


def check_steps(row: str, values: dict[str, Any]) -> None:
    """Raise UsageError unless the number of steps is known and the other keys fit it."""
    if "steps" not in values:
        raise refusal(row, "the number of steps is missing", "give steps=N, or timesteps")
    steps = values["steps"]
    if "start" in values and "spacing" in values:
        raise refusal(row, "after the start the steps are spaced evenly", "leave out spacing")
    if "start" in values and steps > values["start"] + 1:
        raise refusal(row, f"only {values['start'] + 1} timesteps lie between 0 and the start", "give fewer steps")
    spacing = values.get("spacing", "lcm" if values.get("scheduler") in {"lcm", "tcd"} else None)
    if spacing == "lcm" and steps > LCM_GRID and not {"start", "timesteps"} & values.keys():
        raise refusal(row, f"lcm spacing has {LCM_GRID} timesteps", "give fewer steps, or another spacing")
    if len(values.get("guidance", ())) not in {0, 1, steps}:
        raise refusal(row, f"{len(values['guidance'])} guidances for {steps} steps", "give one, or one for each step")
