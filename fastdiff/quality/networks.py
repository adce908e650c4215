"""The networks that judge pictures of any subject: Inception-v3 from torch-fidelity and CLIP from open_clip. N pictures."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.checkpoints import hub_errors, tensors
from fastdiff.checkpoints.hub_client import asking
from fastdiff.options.evaluate import CLIP
from fastdiff.runtime.download import weight_file
from fastdiff.runtime.errors import UsageError, as_field, quoted

EXTRA = 'pip install "fastdiff[eval]"'
PATCH_PX = 299  # side of Inception's input: it sees a centre crop of that size at native resolution


class Inception(nn.Module):
    """Maps pictures (N, 3, H, W) uint8 to FID's features (N, 2048), with torch-fidelity's network and resizing to 299 px.

    `weights` is a file, or None for torch's cache and then a download. UsageError where torch-fidelity or the weights are
    missing, or where the file is not this network.
    """

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        except ImportError as error:
            raise UsageError("`metrics=fid`: torch-fidelity is not installed", EXTRA) from error
        path = weight_file(weights, URL_INCEPTION_V3, option="inception_weights", what="FID", instead="or leave fid and kid out")
        file = tensors.open_file(path, allow_pickle=True)
        with tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles its file without a safety check, so it gets a file of ours with the same tensors.
            safe = Path(folder) / "inception.pth"
            torch.save({key: file[key] for key in file}, safe)
            try:
                self.net = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(safe))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                what = f"{as_field('inception_weights', path)}: not torch-fidelity's Inception-v3 ({quoted(reason)})"
                raise UsageError(what) from error

    def forward(self, pictures: Tensor) -> Tensor:
        return self.net(pictures)[0]


def resized(pictures: Tensor, side_px: int | None) -> Tensor:
    """Resize pictures (N, 3, H, W) uint8 to `side_px` with PIL's Lanczos filter, as the published protocols do.

    None leaves them as they are.
    """
    if side_px is None or pictures.shape[-1] == side_px:
        return pictures
    import numpy as np
    from PIL import Image

    def one(picture: Tensor) -> Tensor:
        image = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize((side_px, side_px), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return torch.stack([one(p) for p in pictures.cpu()])


def patch(pictures: Tensor, side_px: int = PATCH_PX) -> Tensor:
    """The centre crop (N, 3, S, S) of pictures at native size (Lin 2024, section 5). Smaller pictures stay whole."""
    top, left = ((n - min(n, side_px)) // 2 for n in pictures.shape[-2:])
    return pictures[..., top : top + side_px, left : left + side_px]


class Clip(nn.Module):
    """CLIP's normalised embeddings (N, D) of pictures and texts. `spec` is MODEL:TAG or MODEL:FILE in open_clip's names.

    UsageError where open-clip-torch is not installed, `spec` names no model, or the weights cannot be read or downloaded.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        try:
            import open_clip
        except ImportError as error:
            raise UsageError("`metrics=clip`: open-clip-torch is not installed", EXTRA) from error
        name, _, weights = spec.partition(":")
        if name not in open_clip.list_models() or not weights:
            raise UsageError(f"{as_field('clip', spec)}: MODEL:TAG or MODEL:FILE, MODEL one of open_clip's", f"as {CLIP}")
        known = open_clip.list_pretrained_tags_by_model(name)
        if not Path(weights).is_file() and weights not in known:
            tags = f"tags: {', '.join(known[:6]) or 'none'}"
            raise UsageError(f"{as_field('clip', spec)}: neither a file nor a tag of {name}", tags)
        try:
            with asking():
                net = open_clip.create_model(name, pretrained=weights, require_pretrained=True)
            self.net = net.eval().requires_grad_(False)
        except Exception as error:  # the hub, urllib and pickle raise many kinds; each means that there are no weights
            reason = hub_errors.in_words(error)
            raise UsageError(
                f"{as_field('clip', spec)}: its weights cannot be read or downloaded ({reason})",
                f"(1) run once with network access, (2) `clip={name}:FILE`, open_clip's file for {name}, or leave clip out",
            ) from error
        self.spec, self.tokenizer = spec, open_clip.get_tokenizer(name)
        self.side_px: int = open_clip.get_model_preprocess_cfg(self.net)["size"]
        if not isinstance(self.side_px, int):
            self.side_px = self.side_px[0]
        preprocessing: dict[str, Any] = open_clip.get_model_preprocess_cfg(self.net)
        self.register_buffer("mean", torch.tensor(preprocessing["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(preprocessing["std"])[:, None, None], persistent=False)

    def pictures(self, pictures: Tensor) -> Tensor:
        """Embeddings (N, D) of pictures (N, 3, H, W) uint8, resized by antialiased bicubic as in CLIP's own preprocessing."""
        x = pictures.to(self.mean.device).float() / 255
        x = F.interpolate(x, (self.side_px, self.side_px), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        return F.normalize(self.net.encode_image((x - self.mean) / self.std).float(), dim=-1)

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (N, D) of prompts."""
        return F.normalize(self.net.encode_text(self.tokenizer(list(prompts)).to(self.mean.device)).float(), dim=-1)
