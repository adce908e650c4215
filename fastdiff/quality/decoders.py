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


def high_frequencies(pixels: Tensor) -> float:
    """Mean spectral energy of pictures (B, 3, H, W) above half of the highest frequency. Blur removes this part first."""
    spectrum = torch.fft.fft2(pixels.float()).abs().square()
    y, x = (torch.fft.fftfreq(n).abs() for n in pixels.shape[-2:])
    return spectrum[..., torch.maximum(y[:, None], x[None]) > 0.25].mean().item() / pixels[0, 0].numel()


def compare(teacher: nn.Module, student: nn.Module, latents: Tensor, distance: nn.Module | None = None) -> dict[str, Any]:
    """Decode the same scaled latents (N, C, h, w) with both VAEs and compare the pictures.

    Returns `psnr_db` and `ssim` to the teacher's pictures, `detail` (the student's high-frequency energy over the teacher's),
    and `lpips` where a `distance` network is given.
    """
    a, b = (autoencoder.decode(vae, latents) for vae in (teacher, student))
    unit = [(p + 1) / 2 for p in (a, b)]
    errors = (unit[0] - unit[1]).square().flatten(1).mean(1)
    metrics = {
        "psnr_db": (-10 * errors.clamp(min=1e-10).log10()).mean().item(),
        "ssim": losses.ssim(*unit).mean().item(),
        "detail": high_frequencies(b) / high_frequencies(a),
    }
    if distance is not None:
        with torch.no_grad():
            rows = [distance(q, p) for p, q in zip(a.split(8), b.split(8), strict=True)]
        metrics["lpips"] = torch.cat(rows).mean().item()
    return metrics


def encoder_error(teacher: nn.Module, student: nn.Module, pixels: Tensor) -> float:
    """Mean squared difference of the two encoders' latents of pictures (N, 3, H, W), over the variance of the teacher's."""
    with torch.no_grad():
        a, b = (torch.cat([autoencoder.mean_latents(vae, part) for part in pixels.split(16)]) for vae in (teacher, student))
    return (losses.squared(a, b) / a.var()).item()


def macs(vae: nn.Module, side: int) -> int:
    """Multiply-adds to decode one latent of `side` x `side`, counted on the meta device without memory."""
    from torch.utils.flop_counter import FlopCounterMode

    net = deepcopy(vae).to("meta")
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
