"""Random numbers: seeds that no two uses, processes or steps share, and the states of all generators for a resumed run.

torch's CPU generator looks at the low 32 bits of a seed alone, so there are 2**32 start noises. Seeds below 2**31 are the users':
of `sample --seed`, and of the pictures that judge a student. fastdiff's own are above, a block for each use. So no picture that
judges a student starts from a noise that the student was trained on.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch


@dataclass(frozen=True)
class Block:
    """A range of seeds for one use: `block(i)` is seed i of it. It begins anew after `size` seeds."""

    first: int
    size: int

    def __call__(self, i: int) -> int:
        return self.first + i % self.size

    def __contains__(self, seed: int) -> bool:
        return self.first <= seed % 2**32 < self.first + self.size


USERS = Block(0, 2**31)  # pictures that users ask for, and pictures that judge
REFERENCE, DRIFT, DIVERSE, SEARCH, VALIDATION, PREVIEW = (Block(2**31 + k * 2**24, 2**24) for k in range(6))
PAIRS = Block(2**31 + 2**29, 2**29)  # the teacher's samples that students are trained on
STEPS = Block(2**31 + 2**30, 2**30)  # training steps


def seed_for(seed: int, rank: int, step: int) -> int:
    """The seed of one step on one process: the same after a resume, different on every rank."""
    return STEPS((seed * 1_000_003 + rank) * 1_000_003 + step)


def first_pair(seed: int) -> int:
    """The place in PAIRS where a run of this seed begins: far from those of the seeds beside it, so that runs share no pairs."""
    return seed * 0x9E3779B1 % PAIRS.size


def reseed(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch. Numbers that a library drew before have no influence afterwards."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Stream:
    """Random numbers for one of several parts that take turns. Each part continues its own sequence, whatever the others draw."""

    def __init__(self, seed: int | None) -> None:
        self.seed = seed  # None: there is only one part; it draws from the generators as they are
        self.states: tuple[Any, ...] | None = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside the block the generators of Python, NumPy and torch follow this stream."""
        if self.seed is None:
            yield
            return
        if self.states is None:
            reseed(self.seed)
        else:
            python, numpy, cpu, cuda = self.states
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
            if cuda:
                torch.cuda.set_rng_state_all(cuda)
        yield
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        self.states = random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def streams(seed: int, n: int) -> list[Stream]:
    """One stream for each of n parts. The first draws what follows `reseed(seed)`; more parts change no other part's numbers."""
    if n == 1:
        return [Stream(None)]
    return [Stream(seed if i == 0 else seed_for(seed, 32_452_843, i)) for i in range(n)]


def state_dict() -> dict[str, Any]:
    """The states of the generators of Python, NumPy, torch and every CUDA device, as plain values and tensors."""
    kind, keys, *rest = cast("tuple[str, np.ndarray, int, int, float]", np.random.get_state())
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {})


def load_state_dict(state: dict[str, Any]) -> None:
    """Restore the generators from `state_dict`. CUDA states are skipped if the number of devices has changed."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", [])) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
