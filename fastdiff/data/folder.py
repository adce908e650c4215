"""A folder of images with captions: `a.png` beside `a.txt`, or one `metadata.jsonl` of {"file_name", "text"} rows."""

import json
from pathlib import Path

import torch
from torch import Tensor

from fastdiff import console, stop
from fastdiff.console import InputRefused, UsageError
from fastdiff.data.batch import Encoded
from fastdiff.io.checkpoint import Checkpoint
from fastdiff.models import autoencoder, text

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def captioned(folder: Path) -> list[tuple[Path, str]]:
    """(image, caption) pairs in name order; images without a caption are an error that counts them."""
    table = folder / "metadata.jsonl"
    images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not images:
        raise UsageError(f"--data {folder}: no images in it ({', '.join(sorted(SUFFIXES))})")
    if table.exists():
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions = {folder / row["file_name"]: row["text"] for row in rows}
    else:
        sides = {p: p.with_suffix(".txt") for p in images}
        captions = {p: side.read_text(encoding="utf-8").strip() for p, side in sides.items() if side.exists()}
    missing = [p for p in images if p not in captions]
    if missing:
        raise UsageError(
            f"--data {folder}: {len(missing)} of {len(images)} images have no caption, the first is {missing[0].name}",
            "put the caption into a .txt file of the same name, or give a metadata.jsonl",
        )
    return [(p, captions[p]) for p in images]


def square(path: Path, side_px: int) -> tuple[Tensor, list[int]]:
    """Resize the short side, crop the centre: pixels (3, S, S) in [-1, 1] and SDXL's six numbers, height first."""
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputRefused(f"{path}: not a readable image ({error})") from error
    scale = side_px / min(image.size)
    width, height = (max(side_px, round(x * scale)) for x in image.size)
    left, top = (width - side_px) // 2, (height - side_px) // 2
    cropped = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + side_px, top + side_px))
    pixels = torch.from_numpy(np.array(cropped)).permute(2, 0, 1) / 127.5 - 1
    return pixels, [image.height, image.width, top, left, side_px, side_px]


def encode(base: Checkpoint, folder: Path, resolution_px: int, *, device: torch.device | str = "cpu") -> Encoded:
    """Every image through the VAE once, every distinct caption through the text encoders once."""
    pairs = captioned(folder)
    rows = {caption: i for i, caption in enumerate(dict.fromkeys(c for _, c in pairs))}
    texts, uncond = text.encode(base, list(rows), device=device), text.unconditional(base, device=device)
    base.release("text_encoders", "tokenizers")
    moments, sizes, vae = [], [], base.vae.to(device)
    with console.progress(len(pairs), "encoding images") as bar:
        for path, _ in pairs:
            stop.check()
            pixels, size = square(path, resolution_px)
            moments.append(autoencoder.encode_moments(vae, pixels[None]).cpu())
            sizes.append(size)
            bar.update(1)
    return Encoded(
        moments=torch.cat(moments),
        texts=texts,
        captions=torch.tensor([[rows[caption]] for _, caption in pairs]),
        weights=torch.ones(1),
        uncond=uncond,
        time_ids=torch.tensor(sizes, dtype=torch.float32) if base.family == "sdxl" else None,
    )
