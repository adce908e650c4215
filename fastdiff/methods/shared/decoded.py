"""Decodes the training pictures of a tiny decoder once, and compares the tiny decoder with the VAE's own."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Buckets, Data, Encoded
from fastdiff.models import autoencoder
from fastdiff.quality import decoders
from fastdiff.runtime import console, stop
from fastdiff.sampling.pictures import uint8
from fastdiff.sampling.sampler import at_once
from fastdiff.sampling.sheet import Sheet
from fastdiff.training.exhibit import Exhibit
from fastdiff.training.method import Method
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

PICTURES_GIB = 8  # most memory that decoded pictures may take


class Decoded(Exhibit):
    """Decodes the latents that were held out of training, with the VAE's own decoder and with the tiny one."""

    def __init__(self, scene: Scene, config: Any) -> None:  # nothing of the usual exhibit: a decoder draws no prompts
        self.scene, self.config = scene, config
        self.held_out: Encoded | None = None
        self.prompt = scene.base.family.example_prompt

    def begin(self, method: Method) -> None:
        """Move the held-out latents to the device."""
        assert self.held_out is not None
        self.latents = self.held_out.latents.to(self.scene.device)

    def sheet(self, method: Any) -> Sheet:
        """Decode six latents in three columns: the VAE's own picture, the tiny decoder's, and four times their difference."""
        assert self.held_out is not None
        own, tiny = (autoencoder.decode(vae, self.latents[:6]).cpu() for vae in (method.teacher, method.student))
        columns = [
            ("the VAE's own", own),
            ("tiny decoder", tiny),
            ("4 x difference", (4 * (tiny - own)).clamp(-1, 1)),
        ]
        return Sheet.of_columns(columns, (self.held_out.names or [])[:6])

    def figures(self, method: Any, run: Run) -> dict[str, Any]:
        """Compare the written decoder with the VAE's own on the held-out latents."""
        student = autoencoder.load(str(run.folder / "tiny-vae")).to(self.scene.device)
        metrics = figures(self.scene, student, self.latents, method.distance, self.config)
        rows = [[name, f"{value:.4g}"] for name, value in metrics.items() if isinstance(value, int | float)]
        console.table(f"against the VAE's own decoder, {len(self.latents)} pictures", ["figure", "value"], rows)
        return metrics


def decode_once(base: Checkpoint, data: Data, device: torch.device) -> None:
    """Decode every latent before training and keep the pictures as bytes, (N, 3, H, W).

    Decoding in each step would cost six times as much as training the tiny decoder does, at SDXL's size. It is still done there
    for latents that are drawn anew each time, for several picture sizes, and for pictures that take more than `PICTURES_GIB`.
    """
    if isinstance(data, Buckets) or data.moments[:1].chunk(2, 1)[1].any():
        return
    mean = data.latents
    if 3 * 64 * mean[:, 0].numel() > PICTURES_GIB * 2**30:
        return
    base.vae.to(device)
    with console.progress(len(mean), "decoding pictures") as bar:
        pictures = []
        for part in mean.split(at_once(mean.shape[-1])):
            stop.check()
            pictures.append(uint8(autoencoder.decode(base.vae, part.float().to(device), most=len(part))).cpu())
            bar.update(len(part))
    data.pixels = torch.cat(pictures)


def figures(scene: Scene, student: nn.Module, latents: Tensor, distance: nn.Module | None, config: Any) -> dict[str, Any]:
    """Measure the tiny decoder against the VAE's own on latents (N, C, h, w): distances, detail, cost and time in ms."""
    base, side = scene.base, scene.latent_side
    cost = [decoders.macs(vae, side) for vae in (base.vae, student)]
    kl_ms, tiny_ms = decoders.latencies_ms([base.vae, student], latents[:1])
    parameters = [sum(p.numel() for p in vae.get_submodule("decoder").parameters()) for vae in (base.vae, student)]
    metrics: dict[str, Any] = decoders.compare(
        base.vae, student, latents, distance.to(latents.device) if distance is not None else None
    )
    metrics |= {"kl_gmac": cost[0] / 1e9, "tiny_gmac": cost[1] / 1e9, "times_cheaper": cost[0] / cost[1]}
    metrics |= {"kl_ms": kl_ms, "tiny_ms": tiny_ms, "times_faster": kl_ms / tiny_ms}
    metrics |= {"kl_parameters": parameters[0], "tiny_parameters": parameters[1]}
    if config.encoder:
        metrics["encoder_error"] = decoders.encoder_error(base.vae, student, latents)
    return metrics
