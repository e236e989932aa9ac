"""An accumulated gradient: what backward passes have left in a parameter, told from what was thrown away since."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from setpoint.distributed import is_spread, local
from setpoint.sensor.sentinel import graph_task


class Accumulated:
    """The gradient of a parameter, as the last backward pass has left it.

    Args:
        parameter: a leaf that gradients are accumulated in.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        self._left: tuple[Tensor | None, int] = None, -1

    def note(self) -> None:
        """A backward pass has left it as it is now."""
        gradient = self._parameter.grad
        self._left = gradient, -1 if gradient is None else gradient._version

    @property
    def untouched(self) -> bool:
        """Whether nobody has set or changed it since."""
        gradient, (left, version) = self._parameter.grad, self._left
        return gradient is not None and gradient is left and gradient._version == version

    @property
    def discarded(self) -> bool:
        """Whether nothing is there any more, as after `zero_grad`. Waits for the device if somebody has changed it."""
        gradient = self._parameter.grad
        return gradient is None or not (self.untouched or bool(local(gradient).any()))


class RunningSum:
    """A sum over the backward passes whose gradients lie in a parameter's `.grad`, and over no others.

    What is brought in a backward pass counts once the pass has accumulated a gradient in the parameter, which
    `torch.autograd.grad` does not do, and until that gradient is thrown away, as it is after a step that a GradScaler
    skips, or when other losses had the parameter's gradients before.

    Of a parameter that `fully_shard` has spread over ranks everything counts that is brought: what is accumulated
    there is another tensor.

    Args:
        parameter: a leaf that gradients are accumulated in.
    """

    def __init__(self, parameter: Tensor) -> None:
        self._sum: Tensor | None = None
        self._coming: tuple[int, Tensor | None] = -1, None
        self._gradient = None if is_spread(parameter) else Accumulated(parameter)
        self._handles: list[Any] = []
        if self._gradient is not None:
            self._handles = [
                parameter.register_hook(self._arriving),  # type: ignore[no-untyped-call]
                parameter.register_post_accumulate_grad_hook(self._arrived),  # type: ignore[no-untyped-call]
            ]

    def bring(self, value: Tensor) -> None:
        """Add something, in a backward pass that is about to reach the parameter; may be called again in it."""
        if self._gradient is None:
            self._sum = _added(self._sum, value)
            return
        task, before = self._coming
        self._coming = graph_task(), _added(before if task == graph_task() else None, value)

    def total(self) -> Tensor | None:
        """The sum as it is now; None if nothing of it counts."""
        return None if self._gradient is not None and self._gradient.discarded else self._sum

    def stop(self) -> None:
        """Bring nothing any more; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _arriving(self, _: Tensor) -> None:
        self._sum = self.total()

    def _arrived(self, _: Tensor) -> None:
        (task, value), self._coming = self._coming, (-1, None)
        if value is not None and task == graph_task():
            self._sum = _added(self._sum, value)
        assert self._gradient is not None
        self._gradient.note()


def _added(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value
