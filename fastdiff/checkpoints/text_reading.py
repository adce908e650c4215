"""How a checkpoint reads prompts: how many tokens of each, and from which layer of its text encoders."""

from typing import TYPE_CHECKING

from fastdiff.checkpoints import configs
from fastdiff.runtime.console import note
from fastdiff.runtime.errors import InputRefused, UsageError, as_field

if TYPE_CHECKING:
    from fastdiff.checkpoints.checkpoint import Checkpoint

WINDOW, MOST_WINDOWS = 75, 4
MAX_TOKENS = 3 * WINDOW  # as most trainers' longest captions


def checked_tokens(max_tokens: int) -> int:
    """The value of `max_tokens`; UsageError where it is none."""
    whole = isinstance(max_tokens, int) and not isinstance(max_tokens, bool)
    if not whole or max_tokens % WINDOW or not 1 <= max_tokens // WINDOW <= MOST_WINDOWS:
        raise UsageError(f"{as_field('max_tokens', max_tokens)}: not a multiple of {WINDOW}", "give 75, 150, 225 or 300")
    return max_tokens


def checked_layers(base: "Checkpoint", said_by: str = "") -> None:
    """Check that `base.skipped_layers` leaves a layer of each text encoder, and say which it takes.

    `said_by` is the file that states the number, else the user does: UsageError then, InputRefused for the file.
    """
    skipped = base.skipped_layers
    given, refused = as_field("clip_skip", skipped), InputRefused if said_by else UsageError
    given = f"{said_by}: clip skip {skipped}" if said_by else given
    if not isinstance(skipped, int) or isinstance(skipped, bool) or skipped < 0:
        raise refused(f"{given}: not a number of layers", "give 0, 1, 2, ...")
    for part in base.text_parts if skipped else ():
        layers = base.config_of(part).get("num_hidden_layers")
        if not isinstance(layers, int):
            raise InputRefused(f"{base.folder / part / 'config.json'}: num_hidden_layers is {configs.shown(layers)}")
        if base.text_layer < -layers:
            raise refused(f"{given}: {part} has {layers} layers", f"it can be at most {layers + base.family.text_layer}")
    if skipped:
        usual = base.family.clip_skip_elsewhere
        note(
            f"{given}: {skipped} layer{'s' * (skipped > 1)} less of each text encoder than is usual for {base.family}, as "
            f"diffusers counts; other programs call this clip skip {usual + skipped}, and their {usual} is 0 here"
        )
