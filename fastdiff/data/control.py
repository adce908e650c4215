"""Control pictures: what a ControlNet is shown, taken out of pictures by a library's extractor."""

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
from fastdiff.runtime import console, stop
from fastdiff.runtime.errors import UsageError, as_field
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import at_once

Extractor = Callable[[Any], Any]  # numpy RGB (H, W, 3) uint8 -> (H, W) or (H, W, 3) uint8
THRESHOLDS = (100, 200)  # of the gradient's size: OpenCV's and diffusers' usual ones


def opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UsageError("`control=canny`: OpenCV is not installed", 'pip install "fastdiff[control]"') from error
    return cv2


def canny(picture: Any) -> Any:
    """Edges, 255 on 0 (OpenCV)."""
    return opencv().Canny(picture, *THRESHOLDS)


def extractor(name: str) -> Extractor:
    """canny, or MODULE:FUNCTION of your own, which gets and gives arrays as `Extractor` says."""
    if name == "canny":
        opencv()  # told now, not after the pictures have been made
        return canny
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute or "")  # a stranger's attribute by its name
    except (ImportError, AttributeError, ValueError) as error:
        hint = "canny, or MODULE:FUNCTION that can be imported"
        raise UsageError(f"{as_field('control', name)}: no such extractor", hint) from error
    return function


def extract(pictures: Tensor, how: Extractor) -> Tensor:
    """Pictures (N, 3, H, W) uint8 -> controls (N, 1 or 3, H, W) uint8. UsageError where the extractor answers something else."""
    controls = []
    for picture in pictures:
        answer = torch.from_numpy(how(picture.permute(1, 2, 0).contiguous().numpy()).copy())
        control = answer[None] if answer.ndim == 2 else answer.permute(2, 0, 1)
        if control.dtype != torch.uint8 or control.shape[0] not in (1, 3) or control.shape[1:] != picture.shape[1:]:
            raise UsageError(
                f"`control`: the extractor answered {tuple(answer.shape)} {answer.dtype} for a picture of {tuple(picture.shape[1:])}",
                "(H, W) or (H, W, 3) in bytes, of the picture's size",
            )
        controls.append(control)
    return torch.stack(controls)


def of_samples(vae: nn.Module, data: Encoded, how: Extractor) -> None:
    """Give every item the control picture of its own decoded latent: noise, picture and control are a triple (SDXS, 3.2)."""
    z, controls = data.latents, []
    with console.progress(len(z), "control pictures") as bar:
        for part in z.split(at_once(z.shape[-1])):
            stop.check()
            controls.append(extract(uint8(autoencoder.decode(vae, part.to(vae.device), chunk=len(part))).cpu(), how))
            bar.update(len(part))
    data.controls = torch.cat(controls)


def read(path: Path, side_px: int, how: Extractor | None) -> Tensor:
    """A control picture from a file, (3, S, S) in [0, 1]; with an extractor the file is a picture that it is taken from."""
    if not path.is_file():
        raise UsageError(f"{as_field('control_image', path)}: no such file")
    pixels, _ = square(path, side_px)
    if how is None:
        return pixels / 2 + 0.5
    return (extract(uint8(pixels)[None], how)[0].float() / 255).expand(3, -1, -1)


def agreement(a: Tensor, b: Tensor, tolerance_px: int = 1) -> Tensor:
    """F1 (B,) of edge maps (B, 1, H, W) uint8: an edge is found where the other map has one within the tolerance."""
    a, b = (x[:, :1].float() > 127 for x in (a, b))
    near = lambda x: F.max_pool2d(x.float(), 2 * tolerance_px + 1, 1, tolerance_px) > 0
    part = lambda x, y: (x & near(y)).flatten(1).sum(1) / x.flatten(1).sum(1).clamp(min=1)
    precision, recall = part(b, a), part(a, b)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-9)
