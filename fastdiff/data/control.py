"""Control pictures for ControlNets, such as edges, extracted from pictures."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.data.batch import Encoded
from fastdiff.data.folder import square
from fastdiff.models import autoencoder
from fastdiff.models.fast.decoder import Decoder
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.pictures import control_file, control_of, uint8
from fastdiff.sampling.sampler import at_once

Extractor = Callable[[Any], Any]  # numpy RGB (H, W, 3) uint8 -> (H, W) or (H, W, 3) uint8
THRESHOLDS = (100, 200)  # lower and upper threshold of the gradient: the usual ones of OpenCV and diffusers


def opencv() -> Any:
    """Import OpenCV. Raises UsageError if it is not installed."""
    try:
        import cv2
    except ImportError as error:
        raise UsageError("`control=canny`: OpenCV is not installed", 'pip install "fastdiff[control]"') from error
    return cv2


def canny(picture: Any) -> Any:
    """Extract Canny edges from a picture (H, W, 3) uint8: (H, W) uint8, 255 on edges, else 0 (OpenCV)."""
    return opencv().Canny(picture, *THRESHOLDS)


def extractor(name: str) -> Extractor:
    """Return the extractor `canny`, or the function MODULE:FUNCTION, which must be an `Extractor`.

    Raises UsageError if the function cannot be imported or OpenCV is missing.
    """
    if name == "canny":
        opencv()  # fail now, not after the pictures have been drawn
        return canny
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute or "")  # the function is named by the user
    except (ImportError, AttributeError, ValueError) as error:
        hint = "use canny, or MODULE:FUNCTION that can be imported"
        raise UsageError(f"{as_field('control', name)}: no such extractor", hint) from error
    return function


def extract(pictures: Tensor, how: Extractor) -> Tensor:
    """Extract controls (N, 1 or 3, H, W) uint8 from pictures (N, 3, H, W) uint8.

    Raises UsageError if the extractor returns another shape or dtype.
    """
    controls = []
    for picture in pictures:
        answer = torch.from_numpy(how(picture.permute(1, 2, 0).contiguous().numpy()).copy())
        control = answer[None] if answer.ndim == 2 else answer.permute(2, 0, 1)
        size = tuple(picture.shape[1:])
        if control.dtype != torch.uint8 or control.shape[0] not in (1, 3) or control.shape[1:] != size:
            raise UsageError(
                f"`control`: the extractor returned {tuple(answer.shape)} {answer.dtype} for a picture of {size}",
                "it must return uint8 of (H, W) or (H, W, 3), as large as the picture",
            )
        controls.append(control)
    return torch.stack(controls)


def of_samples(vae: nn.Module | Decoder, data: Encoded, how: Extractor) -> None:
    """Set `data.controls` to the controls of the decoded latents: noise, picture and control form triples (SDXS, section 3.2)."""
    z, controls = data.latents, []
    with console.progress(len(z), "control pictures") as bar:
        for part in z.split(at_once(z.shape[-1])):
            stop.check()
            controls.append(extract(uint8(autoencoder.decode(vae, part.to(vae.device), most=len(part))).cpu(), how))
            bar.update(len(part))
    data.controls = torch.cat(controls)


def read(path: Path, side_px: int, how: Extractor | None) -> Tensor:
    """Read a control picture (3, S, S) in [0, 1], S = `side_px`. With an extractor, the file is a picture to extract it from.

    Transparent parts are black in a control picture, and white in a picture to extract it from. Raises UsageError if the file
    does not exist, and InputRefused if it is not a readable picture.
    """
    if how is None:
        return control_of(path, side_px)
    pixels, _ = square(control_file(path), side_px)
    return (extract(uint8(pixels)[None], how)[0].float() / 255).expand(3, -1, -1)


def agreement(a: Tensor, b: Tensor, tolerance_px: int = 1) -> Tensor:
    """Return the F1 score (B,) of two edge maps (B, 1, H, W) uint8. Edges match if they are at most `tolerance_px` apart."""
    a, b = (x[:, :1].float() > 127 for x in (a, b))
    near = lambda x: F.max_pool2d(x.float(), 2 * tolerance_px + 1, 1, tolerance_px) > 0
    part = lambda x, y: (x & near(y)).flatten(1).sum(1) / x.flatten(1).sum(1).clamp(min=1)
    precision, recall = part(b, a), part(a, b)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
