"""Compares a student VAE decoder with its teacher: picture quality, multiply-adds and latency."""

import statistics
import time
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.diffusion import losses
from fastdiff.models import autoencoder

ROUNDS = 7  # timed calls of each decoder
AT_ONCE = 8  # pictures that are compared at once; fewer if they are large


def high_frequencies(pixels: Tensor) -> Tensor:
    """Mean spectral energy (B,) of pictures (B, 3, H, W) above half of the highest frequency. Blur removes this part first."""
    spectrum = torch.fft.fft2(pixels.float()).abs().square()
    y, x = (torch.fft.fftfreq(n).abs() for n in pixels.shape[-2:])
    high = torch.maximum(y[:, None], x[None]) > 0.25  # on the CPU, so that the device need not be waited for
    count = pixels.shape[1] * int(high.sum())
    return (spectrum * high.to(pixels.device)).sum((1, 2, 3)) / count / pixels[0, 0].numel()


def compare(teacher: nn.Module, student: nn.Module, latents: Tensor, distance: nn.Module | None = None) -> dict[str, Any]:
    """Decode the same scaled latents (N, C, h, w) with both VAEs and compare the pictures.

    Returns `psnr_db` and `ssim` to the teacher's pictures, `detail` (the student's high-frequency energy over the teacher's),
    and `lpips` where a `distance` network is given.
    """
    rows: list[list[float]] = []  # of each picture: PSNR, SSIM, the two energies, and the distance
    side = latents.shape[-2] * latents.shape[-1] * autoencoder.factor(teacher) ** 2
    for z in latents.split(autoencoder.at_once(teacher, side, AT_ONCE)):
        a, b = (autoencoder.decode(vae, z) for vae in (teacher, student))
        unit = [(p + 1) / 2 for p in (a, b)]
        errors = (unit[0] - unit[1]).square().flatten(1).mean(1)
        columns = [-10 * errors.clamp(min=1e-10).log10(), losses.ssim(*unit), high_frequencies(a), high_frequencies(b)]
        if distance is not None:
            with torch.no_grad():
                columns.append(distance(b, a))
        rows += torch.stack(columns, 1).tolist()
    psnr_db, ssim, own, other, *lpips = (statistics.fmean(column) for column in zip(*rows, strict=True))
    metrics = {"psnr_db": psnr_db, "ssim": ssim, "detail": other / own}
    return metrics | ({"lpips": lpips[0]} if lpips else {})


def encoder_error(teacher: nn.Module, student: nn.Module, latents: Tensor) -> float:
    """Mean squared difference of the two encoders' latents of the teacher's pictures, over the variance of the teacher's.

    The pictures are those of scaled latents (N, C, h, w).
    """
    parts = []
    for z in latents.split(AT_ONCE):
        pixels = autoencoder.decode(teacher, z)
        parts.append([autoencoder.target_latents(vae, pixels) for vae in (teacher, student)])
    a, b = (torch.cat(column) for column in zip(*parts, strict=True))
    return (losses.squared(a, b) / a.var()).item()


def macs(vae: nn.Module, side: int) -> int:
    """Multiply-adds to decode one latent of `side` x `side`, counted on the meta device without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    # A copy whose parameters never exist: a copy of the real ones would need a second place for them on the device.
    absent = lambda p: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
    net = deepcopy(vae, {id(p): absent(p) for p in vae.parameters()}).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.decode(torch.empty(1, vae.config.latent_channels, side, side, device="meta"))
    return counter.get_total_flops() // 2


def latencies_ms(nets: list[nn.Module], latents: Tensor) -> list[float]:
    """Milliseconds that each VAE takes to decode `latents`: the median of a few rounds in which they take turns."""
    times: list[list[float]] = [[] for _ in nets]
    for _ in range(ROUNDS + 1):
        for vae, row in zip(nets, times, strict=True):
            began = time.perf_counter()
            autoencoder.decode(vae, latents)
            if latents.device.type == "cuda":
                torch.cuda.synchronize()
            row.append(1000 * (time.perf_counter() - began))
    return [statistics.median(row[1:]) for row in times]  # the first round warms up
