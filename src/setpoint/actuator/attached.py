"""Attached: the models that a loop is at work on; nobody else may change their sizes."""

from __future__ import annotations

import atexit
import sys
from weakref import WeakSet

from torch import nn

from setpoint.errors import LoopError
from setpoint.messages import warn

ATTACHED: WeakSet[nn.Module] = WeakSet()
"""Models that a loop is at work on; `note_attached` adds one."""

RESUMING: WeakSet[nn.Module] = WeakSet()
"""Those whose loop follows what is loaded: it may have other shapes."""


def note_attached(model: nn.Module) -> None:
    """Note that a loop is at work on a model, and warn at the end of the process if it still is."""
    ATTACHED.add(model)
    atexit.unregister(_warn_of_unfinished)  # once, however many models there are
    atexit.register(_warn_of_unfinished)


def check_not_attached(model: nn.Module) -> None:
    """Check that no loop is at work on the model, on a part of it, or on what it is a part of, or raise LoopError."""
    if _attached_with(model):
        raise LoopError("this model has a loop already: call finish() or detach() on that loop first")


def check_loads(model: nn.Module) -> None:
    """Check that no loop is at work on the model which would not follow when a state gives it other shapes."""
    if not _attached_with(model) <= set(RESUMING):
        raise LoopError(
            "this model has a loop already, and the state has other shapes: load the loop's own state first, or attach "
            "with resume=True; loop.detach() lets the model be loaded by itself. Nothing was changed"
        )


def _attached_with(model: nn.Module) -> set[nn.Module]:
    """Models with a loop that are this one, a part of it, or what it is a part of."""
    parts = set(model.modules())
    return {other for other in ATTACHED if other in parts or model in set(other.modules())}


def _warn_of_unfinished() -> None:
    # After an exception Python has reported what ended the run.
    if ATTACHED and getattr(sys, "last_value", None) is None:
        warn(
            "the process ends, and a run was not finished: whether it met its budget was not checked. Call "
            "loop.finish() after the last step; it returns the summary"
        )
