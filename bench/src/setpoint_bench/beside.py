"""What acts on a training beside a loop, by hooks of its own on the optimizer."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Beside(Protocol):
    """A penalty, gates or scores; its seconds and FLOPs are the method's own."""

    @property
    def seconds(self) -> float:
        """Seconds that it has taken."""
        ...

    @property
    def flops(self) -> float:
        """FLOPs that it has taken beside those of the optimizer steps."""
        ...

    def observe(self, loss: Tensor) -> None:
        """Told the loss of each step before the optimizer moves."""
        ...

    def remove(self) -> None:
        """Leave model and optimizer alone; may be called again."""
        ...
