"""Given: the model that a function is called with, out of its wrapper, or a sentence about what came instead."""

from __future__ import annotations

from typing import Any

from torch import nn

from setpoint.distributed import unwrapped
from setpoint.errors import CheckpointError


def given_module(what: str, value: Any) -> nn.Module:
    """The module, unwrapped.

    >>> given_module("save", nn.ReLU)
    Traceback (most recent call last):
    setpoint.errors.CheckpointError: save takes a torch.nn.Module, got the class ReLU: give the model itself
    """
    if not isinstance(value, nn.Module):
        found = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise CheckpointError(f"{what} takes a torch.nn.Module, got {found}: give the model itself")
    module: nn.Module = unwrapped(value)
    return module
