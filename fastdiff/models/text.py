"""Encode prompts to Cond: CLIP-L (SD1.5), OpenCLIP-H (SD2.1), CLIP-L + OpenCLIP-bigG (SDXL). B batch, L tokens, D width."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.checkpoints import tokens
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models.denoiser import Cond
from fastdiff.models.fast import text
from fastdiff.models.fast.layers import Unknown, damage_is_unknown, tensors_of


@torch.no_grad()
def encode(base: Checkpoint, prompts: list[str], *, device: torch.device | str = "cpu", batch: int = 64) -> Cond:
    """Encode prompts to tokens (B, L, D), and for SDXL pooled (B, D2); fp32 on the CPU. Time ids are not set: see `size_ids`."""
    parts = [_encode(base, prompts[i : i + batch], device) for i in range(0, len(prompts), batch)]
    return Cond.cat(parts)


def _encode(base: Checkpoint, prompts: list[str], device: torch.device | str) -> Cond:
    states = []
    for encoder, tokenizer in zip(base.text_encoders, base.tokenizers, strict=True):
        length = tokenizer.model_max_length
        ids = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        out = encoder.to(device)(ids.to(device), output_hidden_states=base.family.text_layer != -1)
        last = base.family.text_layer == -1
        states.append((out.last_hidden_state if last else out.hidden_states[base.family.text_layer]).float().cpu())
    pooled = out.text_embeds.float().cpu() if base.family.size_conditioned else None  # of the last encoder
    return Cond(torch.cat(states, -1), pooled)


def encode_unique(base: Checkpoint, captions: Sequence[str], device: torch.device | str) -> Cond:
    """Encode captions to one row each; equal captions are encoded once."""
    rows = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    return encode(base, list(rows), device=device)[torch.tensor([rows[c] for c in captions])]


def unconditional(base: Checkpoint, *, device: torch.device | str = "cpu") -> Cond:
    """Return the unconditional Cond of one row: the encoded empty prompt, or zeros where SDXL's pipeline uses zeros."""
    cond = encode(base, [""], device=device)
    return cond.map(torch.zeros_like) if base.zeros_for_empty_prompt else cond


def size_ids(height_px: int, width_px: int, n: int = 1) -> Tensor:
    """Return SDXL's size conditioning (n, 6) of uncropped pictures, in px: original size, crop (0, 0), target size."""
    return torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]], dtype=torch.float32).expand(n, 6)


class Prompts:
    """Encodes prompts to Cond on the CPU and caches the last KEPT prompts.

    It reads the text encoders itself, without importing transformers. If the base's encoders are already loaded (a LoRA may
    have changed them), or are of an unknown kind, it uses those.
    """

    KEPT = 1024

    def __init__(self, base: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self.base, self.device, self.rows = base, device, OrderedDict()
        self.encoders: list[text.TextEncoder] = []
        self.tokenizers: list[text.Tokenizer] = []
        if "text_encoders" in base.__dict__:
            return
        try:
            tokenizers = tokens.names(base.index)
            self.tokenizers = [text.Tokenizer(base.folder / part) for part in tokenizers]
            for part in base.text_parts:
                with damage_is_unknown():
                    tensors = tensors_of(base, part)
                    if not base.index[part][1].endswith("WithProjection"):
                        tensors.pop("text_projection.weight", None)
                    self.encoders.append(text.TextEncoder(tensors, base.config_of(part), device=device))
        except Unknown:
            self.encoders = []

    def __call__(self, prompts: list[str]) -> Cond:
        """Return tokens (B, L, D), and for SDXL pooled (B, D2), of the prompts."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self.rows]:
            made = self.encode(new)
            self.rows |= {p: made[i : i + 1] for i, p in enumerate(new)}
        for p in prompts:
            self.rows.move_to_end(p)
        cond = Cond.cat([self.rows[p] for p in prompts])
        while len(self.rows) > self.KEPT:
            self.rows.popitem(last=False)
        return cond

    def encode(self, prompts: list[str], batch: int = 64) -> Cond:
        """Encode prompts without the cache, `batch` at a time."""
        if not self.encoders:
            return encode(self.base, prompts, device=self.device)
        parts = []
        for i in range(0, len(prompts), batch):
            pairs = zip(self.encoders, self.tokenizers, strict=True)
            encoded = [encoder(tokenizer(prompts[i : i + batch])) for encoder, tokenizer in pairs]
            family = self.base.family
            states = torch.cat([x.last if family.text_layer == -1 else x.before for x in encoded], -1)
            parts.append(Cond(states.cpu(), encoded[-1].pooled.cpu() if family.size_conditioned else None))
        return Cond.cat(parts)

    def unconditional(self) -> Cond:
        """Return the unconditional Cond of one row, like the function `unconditional`."""
        cond = self([""])
        return cond.map(torch.zeros_like) if self.base.zeros_for_empty_prompt else cond
