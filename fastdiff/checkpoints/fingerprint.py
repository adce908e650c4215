"""The sha256 of a network's weights, by which recipes name their `parent` and caches their network."""

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

# The last fingerprint of every network in memory, with the state of its weights at that time.
KNOWN: "WeakKeyDictionary[nn.Module, tuple[Any, str]]" = WeakKeyDictionary()


def fingerprint(net: nn.Module) -> str:
    """Return the sha256 of the names and fp32 values of a network's weights.

    A network whose weights have not changed since the last call is not hashed again, even if it has moved to another device.
    """
    state = state_of(net)
    known = KNOWN.get(net)
    if known is None or known[0] != state:
        KNOWN[net] = known = state, hashed(net)
    return known[1]


def hashed(net: nn.Module) -> str:
    """Compute the fingerprint, tensor by tensor, without a copy of the whole network."""
    digest = hashlib.sha256()
    state: dict[str, Tensor] = net.state_dict()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def state_of(net: nn.Module) -> list[tuple[Any, ...]]:
    """Return, of each tensor of a network, what differs when its values do: name, dtype, shape, number of writes, and sums.

    The number of writes alone would miss those through `.data`. The sums take a fiftieth of the time of a hash.
    """
    state: dict[str, Tensor] = net.state_dict(keep_vars=True)
    writes = lambda v: None if v.is_inference() else v._version
    return [(k, v.dtype, tuple(v.shape), writes(v), *bit_sums(v.detach())) for k, v in state.items()]


def bit_sums(tensor: Tensor) -> tuple[int, int]:
    """Return two sums of a tensor's bits, read as 8-byte integers: of all, and of the first half."""
    flat = tensor.contiguous().flatten()
    if flat.storage_offset() * flat.element_size() % 8:  # 8-byte integers begin at multiples of 8 bytes
        flat = flat.clone()
    whole = flat.nbytes // 8 * 8 // flat.element_size()
    words, rest = flat[:whole].view(torch.int64), flat[whole:].view(torch.uint8)
    return int(words.sum() + rest.sum()), int(words[: len(words) // 2].sum())
