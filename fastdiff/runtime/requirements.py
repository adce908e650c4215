"""The oldest torch that fastdiff works with, checked without loading torch: pip lets users override what we require."""

import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from fastdiff.runtime.errors import Failed

# Before 2.11, a pass without gradients leaves casts in autocast's cache that cut the gradients of the next pass in the context.
OLDEST_TORCH = (2, 11)


@cache
def check_torch() -> None:
    """Raise Failed where torch is missing or too old. A version that cannot be read counts as new enough."""
    needed = ".".join(map(str, OLDEST_TORCH))
    hint = f'pip install "torch>={needed}"'
    try:
        installed = version("torch")
    except PackageNotFoundError:
        raise Failed("torch is not installed", hint) from None
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        raise Failed(
            f"torch {installed} is installed, but fastdiff needs {needed} or newer: with older ones it trains wrong", hint
        )
