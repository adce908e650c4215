"""Where training data comes from: `--data emoji | teacher | FOLDER`."""

from pathlib import Path

import torch

from fastdiff.console import UsageError
from fastdiff.data import embedded, folder, teacher
from fastdiff.data.batch import Batch, Encoded
from fastdiff.io.checkpoint import Checkpoint

__all__ = ["Batch", "Encoded", "open_data"]


def open_data(
    base: Checkpoint,
    spec: str | None,
    *,
    prompts: str | None,
    resolution_px: int,
    teacher_samples: int,
    seed: int,
    device: torch.device | str,
) -> Encoded:
    """Encode once; afterwards the VAE and the text encoders may go. None: `emoji` for that base, `teacher` for others."""
    spec = spec or ("emoji" if base.family == "emoji" else "teacher")
    if spec == "emoji":
        if resolution_px != embedded.CELL_PX:
            raise UsageError(f"--data emoji: the pictures are {embedded.CELL_PX} px; use --resolution {embedded.CELL_PX}")
        return embedded.encode(base, device=device)
    if spec in {f"emoji:{style}" for style in embedded.STYLES}:
        return embedded.encode(base, device=device, style=spec.split(":")[1])
    if spec == "teacher":
        lines = teacher.read_prompts(Path(prompts)) if prompts else teacher.default_prompts(base.family)
        return teacher.encode(base, lines, resolution_px, samples=teacher_samples, seed=seed, device=device)
    if Path(spec).is_dir():
        return folder.encode(base, Path(spec), resolution_px, device=device)
    raise UsageError(f"--data {spec}: emoji, emoji:STYLE, teacher, or a folder of images and captions")
