"""What a look at a model must leave as it was: RNG states, training modes, Python's garbage."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run by one thread at a time: threads share random generators and PyTorch's tracer."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Connected ranks run it together, and may be threads themselves.
        connected = torch.distributed.is_available() and torch.distributed.is_initialized()
        with nullcontext() if connected else _LOCK:
            return function(*args, **kwargs)

    return alone


@contextmanager
def preserved_rng_state(model: nn.Module) -> Iterator[None]:
    """Preserve the RNG state of PyTorch (host and the model's devices), NumPy and Python."""
    devices = {parameter.device for parameter in model.parameters()}
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; then each module gets its own mode back, also a frozen norm.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2).eval())
    >>> with in_eval_mode(model):
    ...     model.training
    False
    >>> [module.training for module in model.modules()]
    [True, True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def gc_paused() -> Iterator[None]:
    """While inside, cyclic garbage is not collected. Afterwards collection is on if it was before."""
    # Discovery makes objects by the hundred thousand that stay; each collection would look at all of torch's, too.
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
