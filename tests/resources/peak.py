"""The peak memory of a piece of code, by its live tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from setpoint.resources.tape import LiveBytes


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Peak memory in bytes while `run` runs."""
    live = LiveBytes(held)
    with live:
        run()
    return live.peak_bytes
