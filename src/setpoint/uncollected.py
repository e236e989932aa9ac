"""Uncollected: Python's collection of cyclic garbage waits while many objects are made that stay for now."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """While inside, objects that refer to each other in a circle stay. Afterwards collection is on if it was before.

    A collection looks at every object of the process, torch's hundreds of thousands included.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
