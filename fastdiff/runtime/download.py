"""Find the weight file of a third-party network: a given path, torch's cache, or a download."""

from pathlib import Path

import torch

from fastdiff.runtime import console, network
from fastdiff.runtime.errors import UsageError, as_field


def weight_file(given: str | None, url: str, *, option: str, what: str, instead: str = "") -> Path:
    """Path of a weight file: `given`, else the copy in torch's cache, else downloaded from `url` to that cache.

    The file name in `url` ends in the first digits of the file's SHA-256, which the download checks. `option` is the field that
    `given` comes from, `what` the purpose, `instead` another way out for the message. Raises UsageError if there is no file.
    """
    name = url.rsplit("/", 1)[1]
    if given is not None:
        if not Path(given).is_file():
            raise UsageError(f"{as_field(option, given)}: no such file", f"give {name}, from {url}")
        return Path(given)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    if cached.exists():
        return cached
    fix = f"(1) run once with network access, (2) {as_field(option, name)}, the file from {url}{instead and f', {instead}'}"
    if network.offline():
        raise UsageError(f"{as_field(option)}: {what} needs {name}, and {cached} is not there (`offline`)", fix)
    console.info(f"downloading {name} for {what} to {cached}")
    try:
        with network.silence_ends():
            torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # urllib's and torch's many kinds; each means that there is no file
        if full := network.full_disk(error, cached.parent, "set TORCH_HOME to a folder on another disk"):
            raise full from error
        raise UsageError(f"{as_field(option)}: {what} needs {name}, and the download failed: {why(error, url)}", fix) from error
    return cached


def why(error: Exception, url: str) -> str:
    """What went wrong with the download of an address, in words."""
    host = network.host_of(url)
    if (status := network.status_of(error)) is not None:
        return f"{host} has a fault of its own ({status})" if status >= 500 else f"{host} refuses it ({status})"
    if found := network.cause(error, host):
        return found[0]
    if "invalid hash value" in str(error):
        return f"{host} sent another file, or a part of it (its hash is wrong)"
    return network.one_line(error)
