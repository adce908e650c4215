"""Random numbers: seeds that no two processes or steps share, and the generators' states for a resumed run."""

import random
from typing import Any

import numpy as np
import torch


def seed_for(seed: int, rank: int, step: int) -> int:
    """Noise of one step on one process: the same after a resume, different on every rank."""
    return (seed * 1_000_003 + rank) * 1_000_003 + step


def reseed(seed: int) -> None:
    """Python's, NumPy's and torch's generators; a library's own draws between two steps then move nothing."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def state_dict() -> dict[str, Any]:
    """Python's, NumPy's, torch's and every CUDA device's generator, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    found = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return found | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def load_state_dict(state: dict[str, Any]) -> None:
    """Put the generators where they were; those of devices that are not here any more are left out."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
