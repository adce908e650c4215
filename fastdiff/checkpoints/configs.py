"""Read the JSON files of a checkpoint, and check their values before a network or a noise schedule is made of them.

Libraries that build networks check little: a wrong value makes them fail with any kind of error, or allocate without end.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastdiff.runtime.errors import InputRefused, UsageError, device_error, quoted

AGAIN = "download or copy the file again"
MOST = 2**16  # of any whole number in a config; the largest that is used is the 49,408 words of CLIP's vocabulary
MOST_LAYERS = 128  # in one place of a network; SDXL's second text encoder has 32
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def parsed(text: str) -> Any:
    """The content of a JSON text. ValueError where it is none, also where it is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} where there is none. InputRefused where it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        content = parsed(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin a file with a mark
    except (ValueError, OSError) as error:
        raise InputRefused(f"{path}: not a JSON file", AGAIN) from error
    if not isinstance(content, dict):
        raise InputRefused(f"{path}: not a JSON object", AGAIN)
    return content


# ---- what values may be


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number from 1 to MOST."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def is_count(value: Any) -> bool:
    """Whether a value is a number of layers."""
    return is_whole(value) and value <= MOST_LAYERS


def is_depth(value: Any) -> bool:
    """Whether a value is a number of transformers in a layer; configs say null or 0 where a layer has none."""
    return value is None or (value == 0 and not isinstance(value, bool)) or is_count(value)


def listed(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for lists of values that pass `check`, of one value at least and of MOST_LAYERS at most."""
    return lambda value: isinstance(value, list | tuple) and 0 < len(value) <= MOST_LAYERS and all(map(check, value))


def either(*checks: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A check for values that pass one of several checks."""
    return lambda value: any(check(value) for check in checks)


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_none(value: Any) -> bool:
    return value is None


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


Rule = tuple[Callable[[Any], bool], str]
NUMBER, POSITIVE = (is_number, "a number"), (is_positive, "a number above 0")
OPTIONAL_NUMBER: Rule = (either(is_none, is_number), "a number")
WHOLE: Rule = (is_whole, f"a whole number from 1 to {MOST}")
OPTIONAL_WHOLE: Rule = (either(is_none, is_whole), WHOLE[1])
COUNT: Rule = (is_count, f"a whole number from 1 to {MOST_LAYERS}")
FLAG: Rule = (is_flag, "true or false")
SIZES: Rule = (listed(is_whole), f"a list of whole numbers from 1 to {MOST}")
NAMES: Rule = (listed(is_text), "a list of names")
SIZE: Rule = (either(is_none, is_whole, listed(is_whole)), "a whole number, or a list of them")
WIDTH: Rule = (either(is_whole, listed(is_whole)), SIZE[1])
COUNTS: Rule = (
    either(is_none, is_count, listed(either(is_count, listed(is_count)))),
    f"a whole number from 1 to {MOST_LAYERS}, or a list of them",
)
DEPTHS: Rule = (either(is_depth, listed(either(is_depth, listed(is_depth)))), f"numbers of layers up to {MOST_LAYERS}")
BLOCKS: Rule = (listed(lambda value: value == 0 or is_count(value)), f"a list of whole numbers from 0 to {MOST_LAYERS}")
UNET: dict[str, Rule] = {
    "sample_size": SIZE, "block_out_channels": SIZES, "layers_per_block": COUNTS, "in_channels": WHOLE, "out_channels": WHOLE,
    "down_block_types": NAMES, "up_block_types": NAMES, "cross_attention_dim": WIDTH, "attention_head_dim": SIZE,
    "num_attention_heads": SIZE, "transformer_layers_per_block": DEPTHS, "reverse_transformer_layers_per_block": DEPTHS,
    "time_cond_proj_dim": OPTIONAL_WHOLE, "addition_time_embed_dim": OPTIONAL_WHOLE, "norm_num_groups": OPTIONAL_WHOLE,
    "projection_class_embeddings_input_dim": OPTIONAL_WHOLE, "norm_eps": NUMBER, "freq_shift": NUMBER, "flip_sin_to_cos": FLAG,
    "mid_block_type": (either(is_none, is_text), "a name"), "use_linear_projection": FLAG,
    "only_cross_attention": (either(is_none, is_flag, listed(is_flag)), "true or false, or a list of them"),
}  # fmt: skip
VAE: dict[str, Rule] = {
    "block_out_channels": SIZES, "layers_per_block": COUNT, "in_channels": WHOLE, "out_channels": WHOLE,
    "latent_channels": WHOLE, "norm_num_groups": WHOLE, "sample_size": SIZE, "scaling_factor": POSITIVE,
    "shift_factor": OPTIONAL_NUMBER, "down_block_types": NAMES, "up_block_types": NAMES,
}  # fmt: skip
TINY_VAE: dict[str, Rule] = {
    "latent_channels": WHOLE, "encoder_block_out_channels": SIZES, "decoder_block_out_channels": SIZES,
    "num_encoder_blocks": BLOCKS, "num_decoder_blocks": BLOCKS,
    "scaling_factor": POSITIVE, "in_channels": WHOLE, "out_channels": WHOLE,
}  # fmt: skip
TEXT: dict[str, Rule] = {
    "hidden_size": WHOLE, "intermediate_size": WHOLE, "num_hidden_layers": COUNT, "num_attention_heads": WHOLE,
    "projection_dim": WHOLE, "vocab_size": WHOLE, "max_position_embeddings": WHOLE, "layer_norm_eps": POSITIVE,
    "hidden_act": (is_text, "a name"),
}  # fmt: skip
SCHEDULER: dict[str, Rule] = {
    "num_train_timesteps": WHOLE, "beta_start": POSITIVE, "beta_end": POSITIVE, "steps_offset": NUMBER,
    "prediction_type": (PREDICTIONS.__contains__, "epsilon, v_prediction or sample"),
    "trained_betas": (either(is_none, lambda v: isinstance(v, list) and 0 < len(v) <= MOST and all(map(is_positive, v))),
                      "a list of numbers"),
}  # fmt: skip
NEEDED = {  # what no network of a kind can be without
    "UNet": ("block_out_channels", "down_block_types", "up_block_types", "in_channels"),
    "VAE": ("block_out_channels",),
    "text encoder": ("hidden_size", "num_attention_heads", "num_hidden_layers"),
}


def check(config: Mapping[str, Any], rules: Mapping[str, Rule], where: str | Path, needed: tuple[str, ...] = ()) -> None:
    """InputRefused, naming `where`, where an entry has a value that it cannot have, or one of those `needed` is missing."""
    for name in needed:
        if name not in config:
            raise InputRefused(f"{where}: {name} is missing", AGAIN)
    for name, value in config.items():
        allowed, what = rules.get(name, (lambda value: not isinstance(value, int) or abs(value) <= MOST, WHOLE[1]))
        if not allowed(value):
            raise InputRefused(f"{where}: {name} is {shown(value)}, where {what} is wanted", "the file is damaged, or another's")


def shown(value: Any) -> str:
    """A value of a config in few characters."""
    text = quoted(json.dumps(value, ensure_ascii=True, default=str))
    return text if len(text) <= 60 else f"{text[:60]} ..."


def check_part(part: str, config: Mapping[str, Any], where: str | Path) -> None:
    """`check` for the config of the component `part` of a base model: its UNet, its VAE or a text encoder."""
    if part == "unet":
        check(config, UNET, where, NEEDED["UNet"])
        levels = len(config["block_out_channels"])
        for name in ("down_block_types", "up_block_types"):
            if len(config[name]) != levels:
                raise InputRefused(f"{where}: {name} has {len(config[name])} entries, block_out_channels {levels}", AGAIN)
    elif part == "vae" and config.get("_class_name") == "AutoencoderTiny":
        check(config, TINY_VAE, where)
    elif part == "vae":
        check(config, VAE, where, NEEDED["VAE"])
    else:
        check(config, TEXT, where, NEEDED["text encoder"])


@contextmanager
def building(where: str | Path, what: str = "network") -> Iterator[None]:
    """Inside the block, any error that a library raises becomes InputRefused: no such thing can be made of the file `where`.

    Our own errors pass, and those of a device or memory.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # libraries raise a dozen kinds
        if clear := device_error(error):
            raise clear from error
        reason = (quoted(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise InputRefused(f"{where}: no {what} can be made of it ({reason})", "the file is damaged, or another's") from error
