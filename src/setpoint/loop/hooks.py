"""Step hooks: what is called before the first and after the last optimizer of a step has moved the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class StepHooks:
    """Watches optimizers through their own hooks; a step is done when each of them has stepped.

    `before` is called ahead of the first optimizer's update, when all gradients are expected to be
    ready; `after` when the last one has moved its weights. An optimizer that steps twice in between
    counts once. If the first optimizer is given a closure, `before` is called behind it, since
    that is where the gradients come from.

    Under a GradScaler with several optimizers, call `scaler.unscale_` for all of them before the
    first steps: the scale of the others' gradients cannot be seen from there.

    Args:
        optimizers: the optimizers of one training step.
        before: called with what the gradients are still multiplied by, or None.
        after: called without arguments.
        loading: called with an optimizer and the state dict that it is about to load.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        before: Callable[[Tensor | None], None],
        after: Callable[[], None],
        loading: Callable[[Optimizer, dict[str, Any]], None] | None = None,
    ) -> None:
        self._before = before
        self._after = after
        self._waiting_for = {id(optimizer) for optimizer in optimizers}
        self._stepped: set[int] = set()
        self._handles = [optimizer.register_step_pre_hook(self._ahead) for optimizer in optimizers]
        self._handles += [optimizer.register_step_post_hook(self._behind) for optimizer in optimizers]
        if loading is not None:
            self._handles += [optimizer.register_load_state_dict_pre_hook(loading) for optimizer in optimizers]

    @property
    def within_step(self) -> bool:
        """Whether some of the optimizers have stepped and others have not."""
        return bool(self._stepped)

    def remove(self) -> None:
        """Take all hooks away; may be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ahead(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._stepped or not self._handles:
            return None
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._behind_closure(optimizer, kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer itself
            return (args[0], self._behind_closure(optimizer, args[1]), *args[2:]), kwargs
        self._before(_grad_scale(optimizer))
        return None

    def _behind_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_sense() -> Any:
            loss = closure()
            self._before(_grad_scale(optimizer))
            return loss

        return closure_then_sense

    def _behind(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._handles:
            return
        self._stepped.add(id(optimizer))
        if self._stepped == self._waiting_for:
            self._stepped.clear()
            self._after()


def _grad_scale(optimizer: Optimizer) -> Tensor | None:
    """What a GradScaler left for a fused optimizer to divide by; NaN if it found infinite gradients."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return scale
    return torch.where(found_inf > 0, torch.nan, torch.ones_like(found_inf) if scale is None else scale)
