"""What training a tiny decoder starts from and shows: pictures decoded once, and the two decoders side by side."""

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.data.batch import Buckets, Data, Encoded
from fastdiff.models import autoencoder
from fastdiff.quality import decoders
from fastdiff.runtime import console, stop
from fastdiff.sampling.pictures import contact_sheet, uint8
from fastdiff.sampling.sampler import at_once
from fastdiff.training.run import Run
from fastdiff.training.scene import Scene

PICTURES_GIB = 8  # of decoded pictures kept in memory


class Decoded:
    """What the run shows: held-out latents by the VAE's own decoder and the tiny one."""

    def __init__(self, scene: Scene, config: Any) -> None:
        self.scene, self.config = scene, config
        self.held_out: Encoded | None = None
        self.prompt = scene.base.family.example_prompt

    def begin(self, method: Any) -> None:
        assert self.held_out is not None
        self.latents = self.held_out.latents.to(self.scene.device)

    def sheet(self, method: Any) -> Any:
        return sheet(method, self.latents)

    def figures(self, method: Any, run: Run) -> dict[str, Any]:
        student = autoencoder.load(str(run.folder / "tiny-vae")).to(self.scene.device)
        metrics = figures(self.scene, student, self.latents, method.distance, self.config)
        rows = [[name, f"{value:.4g}"] for name, value in metrics.items() if isinstance(value, int | float)]
        console.table(f"against the VAE's own decoder, {len(self.latents)} pictures", ["figure", "value"], rows)
        return metrics


def decode_once(base: Checkpoint, data: Data, device: torch.device) -> None:
    """Decode every latent before training, as bytes, unless they are drawn anew each time or take too much memory.

    Decoding is most of a step's cost otherwise: six times that of training the tiny decoder at SDXL's size.
    """
    if isinstance(data, Buckets) or data.moments[:1].chunk(2, 1)[1].any():
        return
    mean = data.latents
    if 3 * 64 * mean[:, 0].numel() > PICTURES_GIB * 2**30:
        return
    base.vae.to(device)
    with console.progress(len(mean), "decoding pictures") as bar:
        found = []
        for part in mean.split(at_once(mean.shape[-1])):
            stop.check()
            found.append(uint8(autoencoder.decode(base.vae, part.float().to(device), chunk=len(part))).cpu())
            bar.update(len(part))
    data.pixels = torch.cat(found)


def figures(scene: Scene, student: nn.Module, latents: Tensor, distance: nn.Module | None, config: Any) -> dict[str, Any]:
    """What a user wants to know: how near, how much detail, how much cheaper."""
    base, side = scene.base, scene.latent_side
    cost = [decoders.macs(vae, side) for vae in (base.vae, student)]
    kl_ms, tiny_ms = decoders.latencies_ms([base.vae, student], latents[:1])
    parameters = [sum(p.numel() for p in vae.decoder.parameters()) for vae in (base.vae, student)]
    found = decoders.compare(base.vae, student, latents, distance.to(latents.device) if distance is not None else None)
    found |= {"kl_gmac": cost[0] / 1e9, "tiny_gmac": cost[1] / 1e9, "times_cheaper": cost[0] / cost[1]}
    found |= {"kl_ms": kl_ms, "tiny_ms": tiny_ms, "times_faster": kl_ms / tiny_ms}
    found |= {"kl_parameters": parameters[0], "tiny_parameters": parameters[1]}
    if config.encoder:
        pictures = autoencoder.decode(base.vae, latents)
        found["encoder_error"] = decoders.encoder_error(base.vae, student, pictures)
    return found


def sheet(method: Any, latents: Tensor) -> Any:
    """The VAE's own picture | the tiny decoder's | their difference, four times as strong on grey."""
    z = latents[:6]
    a, b = (autoencoder.decode(vae, z).cpu() for vae in (method.teacher, method.student))
    return contact_sheet([a, b, (4 * (b - a)).clamp(-1, 1)], scale=max(1, 128 // a.shape[-1]))
