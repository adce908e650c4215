"""CLIP's text encoders as plain functions of their weights, and its tokenizer, without importing transformers."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checkpoints import configs, tokens
from fastdiff.models.fast.layers import Linear, Norm, Stored, Unknown, attend, joined

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}


class Encoded(NamedTuple):
    """The outputs of a text encoder. B prompts, L tokens, D width, P projected width."""

    states: Tensor  # (B, L, D)
    pooled: Tensor | None  # (B, P): the projected state of the end token; None without a projection


class TextEncoder:
    """A CLIPTextModel or CLIPTextModelWithProjection, from its config and its tensors (names begin with `text_model.`); fp32.

    Raises Unknown if the config or tensors have a part that is not built here.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, device: torch.device | str = "cpu") -> None:
        stored = Stored(tensors, dtype=torch.float32, device=device)
        if config.get("hidden_act", "quick_gelu") not in ACTIVATIONS:
            raise Unknown(f"hidden_act {config['hidden_act']}")
        self.act, self.heads = ACTIVATIONS[config.get("hidden_act", "quick_gelu")], config["num_attention_heads"]
        self.end, eps = config.get("eos_token_id", 2), config.get("layer_norm_eps", 1e-5)
        self.device, width = torch.device(device), config["hidden_size"]
        self.tokens = stored("text_model.embeddings.token_embedding.weight", None, width)
        self.positions = stored("text_model.embeddings.position_embedding.weight", None, width)
        self.layers = []
        for name in stored.count("text_model.encoder.layers.{}.layer_norm1.weight"):
            self.layers.append(
                SimpleNamespace(
                    norms=[Norm(stored, f"{name}.layer_norm{i}", eps, width=width) for i in (1, 2)],
                    qkv=joined([Linear(stored, f"{name}.self_attn.{x}_proj", width) for x in "qkv"]),
                    out=Linear(stored, f"{name}.self_attn.out_proj", width),
                    up=Linear(stored, f"{name}.mlp.fc1", width),
                    down=Linear(stored, f"{name}.mlp.fc2"),
                )
            )
        self.norm = Norm(stored, "text_model.final_layer_norm", eps, width=width)
        self.projection = Linear(stored, "text_projection") if "text_projection.weight" in stored else None
        stored.complete()

    @torch.no_grad()
    def __call__(self, ids: Tensor, layer: int = -1, *, normalised: bool = True) -> Encoded:
        """Encode token ids (B, L). The states are those of a layer, -1 the last, after the final norm where `normalised`."""
        ids = ids.to(self.device)
        x = self.tokens[ids] + self.positions[: ids.shape[1]]
        states, wanted = x, len(self.layers) + 1 + layer  # 0 is the embedding
        for number, block in enumerate(self.layers, 1):
            one, two = block.norms
            x = x + block.out(attend(*block.qkv(one(x)).chunk(3, -1), self.heads, causal=True))
            x = x + block.down(self.act(block.up(two(x))))
            states = x if number == wanted else states
        last = self.norm(x)
        if normalised:
            states = last if layer == -1 else self.norm(states)
        if self.projection is None:
            return Encoded(states, None)
        # Configs from before transformers fixed their eos_token_id say 2; the end token then is the highest id.
        place = ids.argmax(1) if self.end == 2 else (ids == self.end).int().argmax(1)
        return Encoded(states, self.projection(last[torch.arange(len(ids), device=self.device), place]))


class Tokenizer:
    """`prompt.Tokens` by a folder's tokenizer.json, equal to CLIPTokenizer's.

    Raises Unknown if there is no such file, and InputRefused if the files are damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").exists():
            raise Unknown(f"{folder}: no tokenizer.json")
        from tokenizers import Tokenizer as Fast

        config = tokens.settings_of(folder)
        pad = config.get("pad_token", "<|endoftext|>")
        pad = pad["content"] if isinstance(pad, dict) else pad
        self.length = config["model_max_length"]
        with configs.building(folder, "tokenizer"):
            self.model = Fast.from_file(str(folder / "tokenizer.json"))
            self.model.no_truncation()
            self.model.no_padding()
            self.start, self.end = self.model.encode("").ids
            if (pad_id := self.model.token_to_id(pad)) is None:
                raise ValueError(f"its vocabulary has no {pad}, the token that fills windows")
            self.pad = pad_id

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without marks."""
        return [encoded.ids for encoded in self.model.encode_batch(list(texts), add_special_tokens=False)]

    def words(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return " ".join(self.model.decode(list(ids)).replace("</w>", " ").split())  # </w> marks the end of a word
