"""An accumulated gradient: what backward passes left in a parameter and nobody has discarded since."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from setpoint.distributed import is_sharded_tensor, local
from setpoint.regrowth.sentinel import graph_task


class Accumulated:
    """The gradient of a leaf parameter as the last backward pass left it."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._left: tuple[Tensor | None, int] = None, -1

    def note(self) -> None:
        """Remember the present gradient as what a backward pass left."""
        gradient = self._parameter.grad
        # The version counts in-place changes, of which identity alone shows none.
        self._left = gradient, -1 if gradient is None else gradient._version

    @property
    def untouched(self) -> bool:
        """Whether the gradient is that object, unchanged."""
        gradient, (left, version) = self._parameter.grad, self._left
        return gradient is not None and gradient is left and gradient._version == version

    @property
    def discarded(self) -> bool:
        """Whether it is gone or zero, as after `zero_grad`; a host sync if it was changed."""
        gradient = self._parameter.grad
        return gradient is None or not (self.untouched or bool(local(gradient).any()))


class RunningSum:
    """A sum over the backward passes whose gradients lie in a parameter's `.grad`, and over no others.

    A value brought in a backward pass counts once the pass has accumulated a gradient in the parameter, which
    `torch.autograd.grad` does not do, and until that gradient is discarded. For a sharded parameter every value counts:
    gradients accumulate in another tensor there.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._sum: Tensor | None = None
        self._coming: tuple[int, Tensor | None] = -1, None
        self._gradient = None if is_sharded_tensor(parameter) else Accumulated(parameter)
        self._handles: list[Any] = []
        if self._gradient is not None:
            self._handles = [
                parameter.register_hook(self._arriving),  # type: ignore[no-untyped-call]
                parameter.register_post_accumulate_grad_hook(self._arrived),  # type: ignore[no-untyped-call]
            ]

    def bring(self, value: Tensor) -> None:
        """Add a value in a backward pass that has yet to reach the parameter; may be called again in it."""
        if self._gradient is None:
            self._sum = _added(self._sum, value)
            return
        task, before = self._coming
        self._coming = graph_task(), _added(before if task == graph_task() else None, value)

    def total(self) -> Tensor | None:
        """The present sum; None if nothing counts."""
        return None if self._gradient is not None and self._gradient.discarded else self._sum

    def stop(self) -> None:
        """Remove the hooks; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arriving(self, _: Tensor) -> None:
        # Runs before accumulation: a gradient discarded since the last pass is still absent, so the sum restarts.
        self._sum = self.total()

    def _arrived(self, _: Tensor) -> None:
        (task, value), self._coming = self._coming, (-1, None)
        if value is not None and task == graph_task():
            self._sum = _added(self._sum, value)
        assert self._gradient is not None
        self._gradient.note()


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value
