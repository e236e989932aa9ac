"""Step hooks: what is called before the first and after the last optimizer of a step."""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from setpoint.distributed import local
from setpoint.host.host import Unseen

Mark = tuple["weakref.ref[Tensor]", int] | None


class StepHooks:
    """Watches optimizers through their own hooks; a step is done when each of them has stepped.

    `before` is called ahead of the first optimizer's update, behind its closure if it has one, with what gradients are
    still multiplied by, or None; `after` when the last one has moved its weights; `loading` with an optimizer and the
    state dict that it is about to load.

    Under a GradScaler with several optimizers, call `scaler.unscale_` for all of them before the first steps: the scale
    of the others' gradients cannot be seen from there. A step in which the scaler skips any optimizer is not counted.
    Such a step ends when an optimizer that has stepped, or that came before it in the last whole step, is about to
    step; before there was a whole step, when gradients of the others are not finite.
    """

    def __init__(
        self,
        optimizers: tuple[Optimizer, ...],
        before: Callable[[Tensor | None], None],
        after: Callable[[], None],
        loading: Callable[[Optimizer, dict[str, Any]], None] = lambda optimizer, saved: None,
    ) -> None:
        self.before, self.after = before, after
        self._optimizers = {id(optimizer): optimizer for optimizer in optimizers}
        self._order: list[int] = []
        self._took: dict[int, Mark] = {}
        self._stepped: list[int] = []
        self.unseen = Unseen(optimizers)
        # Traced into a compiled step, a hook would run once, while it is traced.
        ahead, behind = _not_compiled(self._ahead), _not_compiled(self._behind)
        self._handles = [optimizer.register_step_pre_hook(ahead) for optimizer in optimizers]
        self._handles += [optimizer.register_step_post_hook(behind) for optimizer in optimizers]
        self._handles += [optimizer.register_load_state_dict_pre_hook(loading) for optimizer in optimizers]

    @property
    def within_step(self) -> bool:
        """Whether some of the optimizers have stepped and others have yet to, with gradients that they can take."""
        left = self._left() if self._stepped else []
        return any(_gradients(optimizer) and not _overflowed(optimizer) for optimizer in left)

    def _left(self) -> list[Optimizer]:
        return [optimizer for number, optimizer in self._optimizers.items() if number not in self._stepped]

    def remove(self) -> None:
        self.unseen.stop()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _ahead(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._handles:
            return None
        self.unseen.step_begins()
        if self._stepped and self._ends_by(id(optimizer)):
            self._stepped.clear()
        if self._stepped:
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)  # args[0] is the optimizer itself
        if not callable(closure):
            self.before(_grad_scale(optimizer))
            return None

        def closure_then_sense() -> Any:
            loss = closure()
            self.before(_grad_scale(optimizer))
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": closure_then_sense}
        return (args[0], closure_then_sense, *args[2:]), kwargs

    def _behind(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._handles:
            return
        self.unseen.step_ends(optimizer)
        self._stepped.append(id(optimizer))
        self._took[id(optimizer)] = _mark(optimizer)
        left = self._left()
        if not left and any(map(self._is_stale, self._optimizers)):
            self._stepped.clear()  # a GradScaler let some step in this iteration and others in an earlier one
        elif not left:
            self._order, self._stepped = self._stepped, []
            self.after()
        elif not self._order and any(map(_overflowed, left)):
            self._stepped.clear()

    def _is_stale(self, number: int) -> bool:
        """Whether an optimizer stepped in an iteration before this one, in which its gradients have overflowed."""
        optimizer, took = self._optimizers[number], self._took[number]
        now = _mark(optimizer)
        same = took is not None and now is not None and took[0]() is now[0]() and took[1] == now[1]
        return not same and _overflowed(optimizer)

    def _ends_by(self, number: int) -> bool:
        """Whether the step that is under way has ended, as this optimizer begins another."""
        if number in self._stepped:
            return True
        order = self._order
        return bool(order) and all(order.index(number) < order.index(stepped) for stepped in self._stepped)


def _not_compiled(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, left out of what `torch.compile(optimizer.step)` traces."""
    if "torch._dynamo" not in sys.modules:  # not imported for it
        return hook
    left_out: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return left_out


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _mark(optimizer: Optimizer) -> Mark:
    """Its first gradient and how often that was written to: the same again if there was no backward pass between."""
    gradient = next(iter(_gradients(optimizer)), None)
    return None if gradient is None else (weakref.ref(gradient), gradient._version)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether any of its gradients is not finite, so that a GradScaler skips it."""
    dense = (local(grad.coalesce().values() if grad.is_sparse else grad) for grad in _gradients(optimizer))
    return not all(bool(torch.isfinite(values).all()) for values in dense)


def _grad_scale(optimizer: Optimizer) -> Tensor | None:
    """What a GradScaler left for a fused optimizer to divide by; NaN if it found infinite gradients."""
    scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if found_inf is None:
        return scale
    return torch.where(found_inf > 0, torch.nan, torch.ones_like(found_inf) if scale is None else scale)
