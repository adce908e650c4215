"""Training without images: the teacher's own samples of the prompts, made once and cached by content."""

import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fastdiff import console
from fastdiff.console import UsageError
from fastdiff.data import embedded
from fastdiff.data.batch import Encoded
from fastdiff.io.checkpoint import Checkpoint, fingerprint
from fastdiff.models import autoencoder, text
from fastdiff.models.denoiser import Denoiser
from fastdiff.sampling import DEFAULTS, Sampler, with_size

PROMPTS = Path(__file__).parent.parent / "assets" / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; blank lines and lines that start with # do not count."""
    if not path.exists():
        raise UsageError(f"--prompts {path}: no such file")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"--prompts {path}: no prompts in it (one a line)")
    return prompts


def default_prompts(family: str) -> list[str]:
    if family != "emoji":
        return read_prompts(PROMPTS)
    return [embedded.caption(p, b) for p in range(len(embedded.pictures())) for b in range(len(embedded.BACKGROUNDS))]


def cache_folder() -> Path:
    return Path(os.environ.get("FASTDIFF_CACHE", Path.home() / ".cache" / "fastdiff"))


def encode(
    base: Checkpoint,
    prompts: list[str],
    resolution_px: int,
    *,
    samples: int,
    seed: int,
    device: torch.device | str = "cpu",
    batch: int = 8,
) -> Encoded:
    """`samples` latents of the prompts in turn, sampled with the family's default settings."""
    texts, uncond = text.encode(base, prompts, device=device), text.unconditional(base, device=device)
    base.release("text_encoders", "tokenizers")
    if base.family == "sdxl":
        texts, uncond = (with_size(c, resolution_px) for c in (texts, uncond))
    of = torch.arange(samples) % len(prompts)
    sampler = Sampler(base, Denoiser(base.unet, base.schedule(), base.prediction_type), base.vae, device=device)
    base.release("vae")  # only its size was needed
    settings = DEFAULTS[base.family]
    key = repr((fingerprint(base.unet), prompts, resolution_px, samples, seed, settings))
    path = cache_folder() / f"teacher-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        latents = load_file(path)["latents"]
    else:
        side = resolution_px // autoencoder.factor(sampler.vae)
        parts = []
        with console.progress(samples, "sampling the teacher") as bar:
            for rows in torch.arange(samples).split(batch):
                seeds = (seed + rows).tolist()
                parts.append(sampler.latents(texts[of[rows]], uncond, seeds, settings, (side, side)).cpu())
                bar.update(len(rows))
        latents = torch.cat(parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": latents}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    sizes = None if texts.time_ids is None else texts.time_ids[of]
    moments = torch.cat([latents, torch.zeros_like(latents)], 1)  # samples, not posteriors: no spread
    return Encoded(moments, texts, of[:, None], torch.ones(1), uncond, sizes)
