"""Compares pictures before and after a merge, drawn with the same prompts and seeds on the same base."""

from pathlib import Path
from typing import Any

from fastdiff import lora
from fastdiff.checkpoints import locate
from fastdiff.data.prompts import default_prompts
from fastdiff.lora.file import Lora
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import Sampler
from fastdiff.sampling.settings import Settings
from fastdiff.sampling.sheet import Sheet, in_calls

SEEDS = (0, 1, 2, 3)


def drawn(ref: str, loras: list[tuple[Lora, float]], prompts: list[str], settings: Settings | None) -> tuple[Any, Settings]:
    """Pictures (N, 3, H, W) in [-1, 1] of a base with LoRAs, and the settings they were drawn with.

    Where `settings` is None, the first recipe among the weights decides.
    """
    sampler = Sampler(ref, loras=loras, device="cpu", compile="off")
    settings, px = settings or sampler.settings, sampler.base.resolution_px
    cond, uncond = sampler.conds(prompts)
    return sampler.pixels(cond, uncond, SEEDS[: len(prompts)], settings, resolution_px=px, batch=4), settings


def before_and_after(
    ref: str, loras: list[tuple[Lora, float]], output: Path, *, baked: bool
) -> tuple[list[Path], dict[str, float]]:
    """Draw with the separate LoRAs (left) and with the written file (right): the paths of the sheet, and the differences.

    The differences are on a scale of 0 to 255. `baked`: `output` is a checkpoint and not a LoRA.
    """
    family = locate.family_of(ref)
    prompts = default_prompts(family)[: len(SEEDS)]
    before, settings = drawn(ref, loras, prompts, None)
    after, _ = drawn(str(output), [], prompts, settings) if baked else drawn(ref, [(lora.load(output), 1.0)], prompts, settings)
    columns = [(in_calls(name, settings.calls), drawn) for name, drawn in (("separate LoRAs", before), (output.name, after))]
    sheets = Sheet.of_columns(columns, prompts).save(output.with_name(f"{output.stem}-check.png"))
    apart = (uint8(before).float() - uint8(after).float()).abs()
    return sheets, {"max_difference": apart.max().item(), "mean_difference": apart.mean().item()}
