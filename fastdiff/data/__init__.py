"""Where training data comes from: `--data emoji | teacher | FOLDER`."""

from pathlib import Path
from typing import Literal

import torch

from fastdiff.console import UsageError
from fastdiff.data import embedded, folder, teacher
from fastdiff.data.batch import Batch, Encoded
from fastdiff.io.checkpoint import Checkpoint
from fastdiff.sampling import DEFAULTS, Settings

__all__ = ["Batch", "Encoded", "Wants", "open_data"]


Wants = Literal["latents", "pairs", "prompts"]


def open_data(
    base: Checkpoint,
    spec: str | None,
    *,
    prompts: str | None,
    resolution_px: int,
    pairs: int,
    seed: int,
    device: torch.device | str,
    sampling: Settings | None = None,
    wants: Wants = "latents",
) -> Encoded:
    """Encode once; afterwards the VAE and the text encoders may go. None: `emoji` for that base, `teacher` for others.

    The teacher makes `pairs` samples with `sampling` (default: the family's), and none where only prompts are wanted.
    Pairs of noise and sample come from the teacher alone.
    """
    spec = spec or ("emoji" if base.family == "emoji" else "teacher")
    if wants == "pairs" and spec != "teacher":
        raise UsageError(f"--data {spec}: regression needs pairs of noise and picture", "use --data teacher, or --lambda-reg 0")
    if spec == "emoji":
        if resolution_px != embedded.CELL_PX:
            raise UsageError(f"--data emoji: the pictures are {embedded.CELL_PX} px; use --resolution {embedded.CELL_PX}")
        return embedded.encode(base, device=device)
    if spec in {f"emoji:{style}" for style in embedded.STYLES}:
        return embedded.encode(base, device=device, style=spec.split(":")[1])
    if spec == "teacher":
        lines = teacher.read_prompts(Path(prompts)) if prompts else teacher.default_prompts(base.family)
        chosen = sampling or DEFAULTS[base.family]
        n = 0 if wants == "prompts" else pairs
        return teacher.encode(base, lines, resolution_px, chosen, pairs=n, seed=seed, device=device)
    if Path(spec).is_dir():
        return folder.encode(base, Path(spec), resolution_px, device=device)
    raise UsageError(f"--data {spec}: emoji, emoji:STYLE, teacher, or a folder of images and captions")
