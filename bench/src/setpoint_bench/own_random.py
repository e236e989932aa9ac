"""A cell's own random state, so that what runs between its turns cannot change its result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class OwnRandom:
    """A global random state of one cell's own, in force only while the cell draws."""

    def __init__(self, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._state = _random_state()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Put the state in force, and the previous one back afterwards."""
        with torch.random.fork_rng():
            _set_random_state(self._state)
            try:
                yield
            finally:
                self._state = _random_state()


def _random_state() -> list[Tensor]:
    """Global states of the CPU's generator and of each CUDA device's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_state(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state[1:])
