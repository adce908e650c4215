"""How ComfyUI, A1111 and Forge are set so that they call a network at the timesteps of a recipe.

These programs choose n timesteps from a table of N, here numbered from the smallest, by a named schedule:
    simple         table[N - 1 - int(k N / n)]                           999, 749, 499, 249   for n = 4
    sgm_uniform    n + 1 numbers evenly from the last to the first timestep, without the last of them     999, 749.25, ...
    normal         n numbers evenly from the last to the first timestep  999, 666, 333, 0
    ddim_uniform   every (N // n)-th, from the second on                 751, 501, 251, 1
The table is 0, 1, ..., 999. In ComfyUI after the node ModelSamplingDiscrete set to "lcm", and in the sampler LCM of A1111 and
Forge, it is that of LCM's distillation: 19, 39, ..., 999. Only there the output goes through LCM's boundary condition too.
Numbers between two entries call the network at the nearest entry; only A1111 and Forge call it between those of the full table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastdiff.checkpoints import write
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.checkpoints.locate import stock_config
from fastdiff.checkpoints.recipe import Recipe
from fastdiff.sampling.settings import Settings, listed

Timesteps = tuple[float, ...]
FULL_TABLE, LCM_TABLE = range(1000), range(19, 1000, 20)
COMFYUI = {"ddim": "euler", "euler": "euler", "dpm++": "dpmpp_2m", "dpm++sde": "dpmpp_2m_sde", "lcm": "lcm", "tcd": "euler"}
A1111 = {"ddim": "Euler", "euler": "Euler", "dpm++": "DPM++ 2M", "dpm++sde": "DPM++ 2M SDE", "lcm": "LCM", "tcd": "Euler"}
# The names of the schedules in A1111 and Forge.
LABELS = {"simple": "Simple", "sgm_uniform": "SGM Uniform", "normal": "Normal", "ddim_uniform": "DDIM"}
AS_BASE = "sampler, steps and CFG as for the base."
NEAR = 25  # timesteps that a schedule may be off and still be named, with the difference told


def evenly(first: float, last: float, n: int) -> Timesteps:
    """`n` numbers from `first` to `last`."""
    return tuple(first + (last - first) * k / max(n - 1, 1) for k in range(n))


def called(table: Sequence[int], numbers: Timesteps) -> Timesteps:
    """The timesteps at which the network is called for these numbers: entries of the table, where it leaves timesteps out."""
    if len(table) == len(FULL_TABLE):
        return numbers
    return tuple(min(table, key=lambda entry: (abs(entry - number), -entry)) for number in numbers)


SCHEDULES: dict[str, Callable[[Sequence[int], int], Timesteps]] = {  # (ascending table, n) -> descending timesteps
    "simple": lambda table, n: tuple(table[-(1 + int(k * len(table) / n))] for k in range(n)),
    "ddim_uniform": lambda table, n: tuple(table[1 :: max(len(table) // n, 1)][::-1]),
    "sgm_uniform": lambda table, n: called(table, evenly(table[-1], table[0], n + 1)[:-1]),
    "normal": lambda table, n: called(table, evenly(table[-1], table[0], n)),
}


@dataclass(frozen=True)
class Walk:
    """A schedule over a table, and how near it comes to the wanted timesteps."""

    schedule: str
    table: Sequence[int]
    off: float  # the largest difference in timesteps; infinite where it takes another number of steps

    def timesteps(self, num_steps: int) -> Timesteps:
        """The timesteps of a walk of so many steps, descending."""
        return SCHEDULES[self.schedule](self.table, num_steps)


def nearest(wanted: Sequence[Timesteps], tables: Sequence[Sequence[int]]) -> Walk:
    """Return the schedule whose timesteps are nearest to the wanted walks, one for each number of steps.

    Of those that are equally near to half a timestep, the first table and then the first schedule in the order of `SCHEDULES`.
    """
    walks = [Walk(name, table, 0.0) for table in tables for name in SCHEDULES]
    measured = [replace(walk, off=max(off(walk, steps) for steps in wanted)) for walk in walks]
    best = min(walk.off for walk in measured)
    return next(walk for walk in measured if walk.off <= best + (0.5 if best else 0.0))


def off(walk: Walk, wanted: Timesteps) -> float:
    """Return the largest difference between a walk's timesteps and the wanted ones."""
    own = walk.timesteps(len(wanted))
    return max(abs(a - b) for a, b in zip(own, wanted, strict=True)) if len(own) == len(wanted) else float("inf")


def lines(base: Checkpoint, recipe: Recipe, settings: Settings, *, is_lora: bool, command: str = "") -> list[str]:
    """Say in a line each how ComfyUI, and how A1111 and Forge, draw with these weights, or why they cannot.

    `base` is the checkpoint that the weights are used with, or the checkpoint itself, and `command` makes one file of it.
    """
    if reason := unreadable(base):
        return [f"ComfyUI, A1111, Forge: {reason}; draw with diffusers or `fastdiff sample`."]
    wanted = [timesteps_of(base, settings, n) for n in recipe.step_counts or (settings.num_steps,)]
    put = "put the file into `{}`" if is_lora else f"make one file with `{command}` and put it into `{{}}`"
    comfyui = put.format("models/loras" if is_lora else "models/checkpoints")
    others = put.format("models/Lora" if is_lora else "models/Stable-diffusion")
    if write.blocks_of(base.unet_config) != write.blocks_of(stock_config(base.family)):
        told = f"{in_comfyui(base, recipe, settings, wanted)}{text_layer(base, comfyui=True)}"
        return [f"ComfyUI: {comfyui}; {told}", "A1111, Forge: they read no pruned network."]
    return [
        f"ComfyUI: {comfyui}; {in_comfyui(base, recipe, settings, wanted)}{text_layer(base, comfyui=True)}",
        f"A1111, Forge: {others}; {in_a1111(base, recipe, settings, wanted)}{text_layer(base, comfyui=False)}",
    ]


def text_layer(base: Checkpoint, *, comfyui: bool) -> str:
    """Say how a program takes the text states of another layer than the usual one; empty where the base takes that."""
    if not base.skipped_layers:
        return ""
    usual = base.family.clip_skip_elsewhere
    layer = usual + base.skipped_layers
    if comfyui:
        return f" Before the prompts, the node CLIP Set Last Layer at -{layer}."
    return f" Clip skip {layer}{f', which A1111 does not obey for {base.family.title}' if usual > 1 else ''}."


def unreadable(base: Checkpoint) -> str | None:
    """Return why no program besides diffusers loads a network of this shape; None where there are some."""
    config = base.unet_config
    if not base.family.published:
        return f"they do not read {base.family.title}"
    if config.get("time_cond_proj_dim") is not None:
        return "they do not read a UNet that takes the guidance as an input"
    if not isinstance(config.get("layers_per_block", 2), int) or not write.known_elsewhere(base.family, config):
        return "they do not read a UNet of this shape"
    return None


def timesteps_of(base: Checkpoint, settings: Settings, num_steps: int) -> Timesteps:
    """Return the timesteps at which these settings call the network, with another number of steps."""
    if num_steps != settings.num_steps:
        settings = replace(settings, num_steps=num_steps, timesteps=None, step_guidance=None)
    return tuple(settings.grid(base.schedule(), base.scheduler_config).t.tolist())


def in_comfyui(base: Checkpoint, recipe: Recipe, settings: Settings, wanted: Sequence[Timesteps]) -> str:
    """Say how ComfyUI's KSampler is set."""
    if recipe.scheduler is None:
        return AS_BASE
    kind, distilled = recipe.predicts(base.prediction_type), settings.scheduler in {"lcm", "tcd"}
    # The node's "lcm" reads the output as eps, and one network has one such node.
    walk = nearest(wanted, [FULL_TABLE, *([LCM_TABLE] if distilled and kind == "epsilon" else [])])
    if walk.off > NEAR:
        return refused(wanted)
    node = "lcm" if walk.table is LCM_TABLE else "x0" if kind == "sample" else None
    parts = [f"sampler `{COMFYUI[settings.scheduler]}`, scheduler `{walk.schedule}`, {numbers(recipe, settings, 'cfg')}"]
    if node:
        zsnr = ", `zsnr` on" if base.ends_in_noise else ""
        parts.append(f"before the sampler, the node ModelSamplingDiscrete set to `{node}`{zsnr}")
    if settings.scheduler == "tcd":
        eta = f" (eta {settings.eta:g})" if settings.eta else ""
        parts.append(f"that is TCD without its noise, for ComfyUI has no TCD sampler; the custom node ComfyUI-TCD has one{eta}")
    return "; ".join([*parts, *difference(walk, wanted)]) + "."


def in_a1111(base: Checkpoint, recipe: Recipe, settings: Settings, wanted: Sequence[Timesteps]) -> str:
    """Say how A1111 and Forge are set."""
    if recipe.scheduler is None:
        return AS_BASE
    kind, name = recipe.predicts(base.prediction_type), A1111[settings.scheduler]
    if kind == "sample":
        return "but they draw with no network whose output is x0."
    if settings.scheduler == "lcm" and kind != "epsilon":
        return "but their sampler LCM takes the output for epsilon, which this network does not predict."
    walk = nearest(wanted, [LCM_TABLE if settings.scheduler == "lcm" else FULL_TABLE])
    if walk.off > NEAR:
        return refused(wanted)
    parts = [f"sampler {name}, schedule type {LABELS[walk.schedule]}, {numbers(recipe, settings, 'CFG scale')}"]
    if settings.scheduler == "tcd":
        parts.append("that is TCD without its noise, for they have no TCD sampler")
    return "; ".join([*parts, *difference(walk, wanted)]) + "."


def numbers(recipe: Recipe, settings: Settings, guidance: str) -> str:
    """The numbers of steps and the guidance in words. In these programs, 1.0 means no guidance."""
    steps = recipe.steps_text if recipe.step_counts else Recipe(num_steps=settings.num_steps).steps_text
    return f"{steps}, {guidance} {max(1.0, settings.guidance):.1f}"


def refused(wanted: Sequence[Timesteps]) -> str:
    """Say that no schedule gives the wanted timesteps."""
    return f"but no schedule there calls the network at {listed(wanted[-1])}: draw with diffusers or `fastdiff sample`."


def difference(walk: Walk, wanted: Sequence[Timesteps]) -> list[str]:
    """Say which timesteps the program takes, where they are not exactly the wanted ones; empty where they are."""
    if not walk.off:
        return []
    steps = max(wanted, key=lambda steps: off(walk, steps))
    return [f"its timesteps are {listed(walk.timesteps(len(steps)))}, where the weights know {listed(steps)}"]
