"""LoRAs from elsewhere: published few-step ones get the settings that their authors document, in place of a header of ours."""

from collections.abc import Mapping
from pathlib import Path

from fastdiff.checkpoints import published
from fastdiff.checkpoints.published import Found
from fastdiff.checkpoints.recipe import PREFIX
from fastdiff.lora.kinds import Factors, Update
from fastdiff.lora.layouts import TARGETS
from fastdiff.runtime import console

# What LCM-LoRA and its successors have: this rank, on every kind of layer in TARGETS and on no other.
FEW_STEP_RANK = 64
LAYERS = tuple("_" + name.replace(".", "_") for name in TARGETS)


def identify(path: Path, metadata: Mapping[str, str], modules: Mapping[str, Update], family: str | None) -> Found | None:
    """What published few-step LoRA a file is; None for any other. They change the UNet alone."""
    if not modules or any(not key.startswith("lora_unet_") for key in modules):
        return None
    return published.recognised(path, metadata, family=family)


def looks_few_step(metadata: Mapping[str, str], modules: Mapping[str, Update], *, unscaled: bool) -> bool:
    """Whether a LoRA is built as the published few-step LoRAs are, and its header says nothing of how it was made.

    `unscaled`: alpha is the rank in every module, as theirs is.
    """
    if not unscaled or any(key.startswith(PREFIX) or key in published.TRAINED for key in metadata):
        return False
    if not all(isinstance(m, Factors) and m.rank == FEW_STEP_RANK and k.startswith("lora_unet_") for k, m in modules.items()):
        return False
    kinds = {next((layer for layer in LAYERS if key.endswith(layer)), "another") for key in modules}
    return kinds == set(LAYERS)


def header(
    path: Path, metadata: Mapping[str, str], modules: Mapping[str, Update], family: str | None, *, unscaled: bool
) -> dict[str, str]:
    """The header of a LoRA file, with the recipe of a published few-step LoRA if it is one. The user is told.

    A LoRA that only looks like one is named in a warning.
    """
    if found := identify(path, metadata, modules, family):
        console.note(f"{path}: {found.text}")
        return {**metadata, **found.entries}
    if looks_few_step(metadata, modules, unscaled=unscaled):
        console.warn(
            f"{path}: looks like a few-step LoRA, but nothing names its settings, so it is drawn with the base's many steps; "
            "`recipe` of sample and merge-lora gives them"
        )
    return dict(metadata)
