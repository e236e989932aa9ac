"""One at a time: threads wait for each other where they would share random generators and PyTorch's tracer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()
_at_it: list[int] = []
"""The thread that holds the lock, once for each time that it has taken it."""


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run by one thread of this process at a time.

    Not where ranks are connected: they run it together, and may be threads themselves.
    """

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        with nullcontext() if together else _held():
            return function(*args, **kwargs)

    return alone


@contextmanager
def _held() -> Iterator[None]:
    with _LOCK:
        _at_it.append(threading.get_ident())
        try:
            yield
        finally:
            _at_it.pop()


def elsewhere() -> bool:
    """Whether another thread is at it: what PyTorch says of its tracer is then not about this thread."""
    return bool(_at_it) and _at_it[-1] != threading.get_ident()
