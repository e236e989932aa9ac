"""By method: a model that is trained through another method than its forward, called as if that were the forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from setpoint.errors import LoopError


class MethodForward:
    """Calls a method of a module; where the method calls the module itself, that is the module's own forward."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method
        self.own, self.running = module.__dict__.get("forward"), False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the method returns, or the forward inside of it."""
        kind = type(self.module)
        if self.running:
            return self.own(*args, **kwargs) if self.own else kind.forward(self.module, *args, **kwargs)
        self.running = True
        try:
            return getattr(kind, self.method)(self.module, *args, **kwargs)
        finally:
            self.running = False


def check_method(model: nn.Module, method: str) -> None:
    """Check that the model has this method."""
    if not isinstance(method, str) or not callable(getattr(type(model), method, None)):
        raise LoopError(f"{type(model).__name__} has no method {method!r}: give the one that the training loop calls")


@contextmanager
def called_by(model: nn.Module, method: str) -> Iterator[None]:
    """Inside, a call of the model or of a copy of it is one of this method."""
    if method == "forward":
        yield
        return
    before = model.__dict__.get("forward")
    model.__dict__["forward"] = MethodForward(model, method)
    try:
        yield
    finally:
        del model.__dict__["forward"]
        if before is not None:
            model.__dict__["forward"] = before
