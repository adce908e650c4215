"""Encode prompts to Cond: CLIP-L (SD1.5), OpenCLIP-H (SD2.1), CLIP-L + OpenCLIP-bigG (SDXL). B batch, L tokens, D width.

`models/prompt.py` says how a prompt is read. A prompt of several windows has the states of all of them, one after the other, as
ComfyUI and compel give a network; its pooled state is that of the first.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checkpoints import tokens
from fastdiff.checkpoints.checkpoint import Checkpoint
from fastdiff.models import prompt
from fastdiff.models.denoiser import Cond
from fastdiff.models.fast import text
from fastdiff.models.fast.layers import Unknown, damage_is_unknown, tensors_of
from fastdiff.models.prompt import Tokens, Windows
from fastdiff.runtime.errors import as_field

AT_ONCE = 64  # windows
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # ids (W, L) -> states (W, L, D) and pooled (W, P) or None


class StockTokens:
    """`Tokens` by a tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.length, self.pad = tokenizer, tokenizer.model_max_length, tokenizer.pad_token_id
        self.start, self.end = tokenizer("").input_ids

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without marks."""
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids

    def words(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(ids))


def encode(base: Checkpoint, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> Cond:
    """Encode prompts to tokens (B, L, D), and for SDXL pooled (B, D2); fp32 on the CPU. Time ids are not set: see `size_ids`."""
    return Cond.cat(rows(base, prompts, device=device))


def rows(base: Checkpoint, prompts: Sequence[str], *, device: torch.device | str = "cpu") -> list[Cond]:
    """Encode prompts like `encode`, each to a Cond of one row that is as long as its prompt."""

    def by(encoder: Any) -> Encode:
        @torch.no_grad()
        def states(ids: Tensor) -> tuple[Tensor, Tensor | None]:
            layer, normalised = base.text_layer, base.family.text_layer == -1
            out = encoder.to(device)(ids.to(device), output_hidden_states=layer != -1)
            if layer == -1:
                found = out.last_hidden_state
            else:
                found = norm_of(encoder)(out.hidden_states[layer]) if normalised else out.hidden_states[layer]
            pooled = out.text_embeds if base.family.size_conditioned and encoder is base.text_encoders[-1] else None
            return found, pooled

        return states

    readers = [StockTokens(tokenizer) for tokenizer in base.tokenizers]
    return encoded(prompts, readers, [by(encoder) for encoder in base.text_encoders], base.max_tokens)


def norm_of(encoder: Any) -> Any:
    """The last norm of a CLIPTextModel, with or without projection."""
    inner = getattr(encoder, "text_model", encoder)  # some classes of transformers hold the layers themselves
    return inner.final_layer_norm


def encoded(prompts: Sequence[str], readers: Sequence[Tokens], encoders: Sequence[Encode], max_tokens: int) -> list[Cond]:
    """Encode prompts, each to a Cond of one row, with the tokenizers and text encoders of a checkpoint."""
    made = []
    for i in range(0, len(prompts), AT_ONCE):
        parsed = [prompt.parse(line) for line in prompts[i : i + AT_ONCE]]
        read = [prompt.windows_of(parsed, reader, max_tokens) for reader in readers]
        counts = [max(len(windows.windows) for windows in of) for of in zip(*read, strict=True)]
        outputs = [states_of(of, counts, *pair) for of, pair in zip(read, zip(readers, encoders, strict=True), strict=True)]
        tokens, pooled = torch.cat([states for states, _ in outputs], -1), outputs[-1][1]  # pooled: of the last encoder
        first = 0
        for n in counts:
            of_first = None if pooled is None else pooled[first : first + 1]
            made.append(Cond(tokens[first : first + n].flatten(0, 1)[None], of_first))
            first += n
    return made


def states_of(prompts: Sequence[Windows], counts: Sequence[int], reader: Tokens, encode: Encode) -> tuple[Tensor, Tensor | None]:
    """The states (W, L, D) of all windows of prompts, weighted, and pooled (W, P) or None; fp32 on the CPU.

    A prompt has as many windows as `counts` says; the missing ones are empty.
    """
    windows = [window for of, n in zip(prompts, counts, strict=True) for window in [*of.windows, *[[]] * (n - len(of.windows))]]
    ids, weights = torch.full((len(windows), reader.length), reader.pad), torch.ones(len(windows), reader.length)
    for row, window in enumerate(windows):
        n = len(window)
        ids[row, : n + 2] = torch.tensor([reader.start, *(i for i, _ in window), reader.end])
        weights[row, 1 : n + 1] = torch.tensor([weight for _, weight in window])
    parts = [encode(part) for part in ids.split(AT_ONCE)]
    states = torch.cat([states.float().cpu() for states, _ in parts])
    pooled = None if parts[0][1] is None else torch.cat([pooled.float().cpu() for _, pooled in parts if pooled is not None])
    if bool((weights != 1).any()):
        empty = torch.full((1, reader.length), reader.pad)
        empty[0, :2] = torch.tensor([reader.start, reader.end])
        nothing, w = encode(empty)[0].float().cpu(), weights[..., None]
        states = torch.where(w == 1, states, nothing + w * (states - nothing))
    return states, pooled


def encode_unique(base: Checkpoint, captions: Sequence[str], device: torch.device | str) -> Cond:
    """Encode captions to one row each; equal captions are encoded once."""
    place = {c: i for i, c in enumerate(dict.fromkeys(captions))}
    return encode(base, list(place), device=device)[torch.tensor([place[c] for c in captions])]


def window_counts(base: Checkpoint, lines: Sequence[str]) -> list[int]:
    """In how many windows each prompt is read."""
    found = prompt.windows_of([prompt.parse(line) for line in lines], StockTokens(base.tokenizers[0]), base.max_tokens)
    return [len(windows.windows) for windows in found]


def tell(base: Checkpoint, lines: Sequence[str], source: str, what: str = "prompts") -> None:
    """Say how many of the prompts are cut, split into windows or have more than words, as `prompt.tell` does."""
    prompt.tell(lines, StockTokens(base.tokenizers[0]), base.max_tokens, source, what)


def unconditional(base: Checkpoint, *, device: torch.device | str = "cpu") -> Cond:
    """Return the unconditional Cond of one row: the encoded empty prompt, or zeros where SDXL's pipeline uses zeros."""
    cond = encode(base, [""], device=device)
    return cond.map(torch.zeros_like) if base.zeros_for_empty_prompt else cond


def size_ids(height_px: int, width_px: int, n: int = 1) -> Tensor:
    """Return SDXL's size conditioning (n, 6) of uncropped pictures, in px: original size, crop (0, 0), target size."""
    return torch.tensor([[height_px, width_px, 0, 0, height_px, width_px]], dtype=torch.float32).expand(n, 6)


class Prompts:
    """Encodes prompts to Cond on the CPU and caches the last KEPT prompts. It tells what else than words is in new ones.

    It reads the text encoders itself, without importing transformers. If the base's encoders are already loaded (a LoRA may
    have changed them), or are of an unknown kind, it uses those.
    """

    KEPT = 1024

    def __init__(self, base: Checkpoint, *, device: torch.device | str = "cpu") -> None:
        self.base, self.device = base, device
        self.rows = OrderedDict[str, Cond]()
        self.encoders: list[text.TextEncoder] = []
        self.readers: list[Tokens] = []
        if "text_encoders" in base.__dict__:
            return
        try:
            self.readers = [text.Tokenizer(base.folder / part) for part in tokens.names(base.index)]
            for part in base.text_parts:
                with damage_is_unknown():
                    tensors = tensors_of(base, part)
                    if not base.index[part][1].endswith("WithProjection"):
                        tensors.pop("text_projection.weight", None)
                    self.encoders.append(text.TextEncoder(tensors, base.config_of(part), device=device))
        except Unknown:
            self.encoders, self.readers = [], []

    def __call__(self, prompts: list[str], field: str = "prompt") -> Cond:
        """Return tokens (B, L, D), and for SDXL pooled (B, D2), of the prompts, which the option `field` gave."""
        if new := [p for p in dict.fromkeys(prompts) if p not in self.rows]:
            self.tell(new, field)
            self.rows |= dict(zip(new, self.encode(new), strict=True))
        for p in prompts:
            self.rows.move_to_end(p)
        cond = Cond.cat([self.rows[p] for p in prompts])
        while len(self.rows) > self.KEPT:
            self.rows.popitem(last=False)
        return cond

    def tell(self, prompts: list[str], field: str) -> None:
        """Say how many of the prompts are cut, split into windows or have more than words."""
        reader = self.readers[0] if self.readers else StockTokens(self.base.tokenizers[0])
        prompt.tell(prompts, reader, self.base.max_tokens, as_field(field))

    def encode(self, prompts: list[str]) -> list[Cond]:
        """Encode prompts without the cache, each to a Cond of one row."""
        if not self.encoders:
            return rows(self.base, prompts, device=self.device)
        layer, family = self.base.text_layer, self.base.family

        def by(encoder: text.TextEncoder) -> Encode:
            def states(ids: Tensor) -> tuple[Tensor, Tensor | None]:
                out = encoder(ids, layer, normalised=family.text_layer == -1)
                return out.states, out.pooled if family.size_conditioned else None

            return states

        return encoded(prompts, self.readers, [by(encoder) for encoder in self.encoders], self.base.max_tokens)

    def unconditional(self) -> Cond:
        """Return the unconditional Cond of one row, like the function `unconditional`."""
        cond = self([""])
        return cond.map(torch.zeros_like) if self.base.zeros_for_empty_prompt else cond
