"""What a look at a model must leave as it was: RNG states, training modes, Python's garbage, other threads."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LOCK = threading.RLock()
_holders: list[int] = []
"""The thread that holds the lock, once for each time that it has taken it."""


def one_at_a_time(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, run by one thread at a time: threads share random generators and PyTorch's tracer."""

    @wraps(function)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Connected ranks run it together, and may be threads themselves.
        connected = torch.distributed.is_available() and torch.distributed.is_initialized()
        with nullcontext() if connected else _held():
            return function(*args, **kwargs)

    return alone


@contextmanager
def _held() -> Iterator[None]:
    with _LOCK:
        _holders.append(threading.get_ident())
        try:
            yield
        finally:
            _holders.pop()


def elsewhere() -> bool:
    """Whether another thread holds the lock: what PyTorch says of its tracer is then not about this thread."""
    return bool(_holders) and _holders[-1] != threading.get_ident()


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


def rng_state() -> dict[str, Any]:
    """RNG states of PyTorch (GPUs too), NumPy and Python, in tensors, numbers and strings."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": _mapped(np.random.get_state(legacy=False), np.ndarray, torch.from_numpy),
        "python": random.getstate(),
    }


def check_rng_state(state: Mapping[str, Any]) -> None:
    """Try RNG states on throwaway generators; KeyError, TypeError, ValueError or RuntimeError for what is none."""
    torch.Generator().set_state(state["torch"].cpu())
    random.Random().setstate(_nested(state["python"]))
    numpy = _mapped(state["numpy"], Tensor, lambda tensor: tensor.cpu().numpy())
    generator = np.random.RandomState(getattr(np.random, numpy["bit_generator"])())
    like = generator.get_state(legacy=False)
    if _shapes(numpy) != _shapes(like):  # NumPy itself accepts states that are too long
        raise ValueError(f"the state of NumPy's generator has the parts {_shapes(numpy)}, not {_shapes(like)}")
    generator.set_state(numpy)
    if not all(isinstance(of_device, Tensor) for of_device in state["cuda"]):
        raise TypeError("the state of a GPU's generator is a tensor")


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `rng_state` returned; states of GPUs that are absent here are skipped."""
    torch.set_rng_state(state["torch"].cpu())
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device.cpu(), device)
    numpy = _mapped(state["numpy"], Tensor, lambda tensor: tensor.cpu().numpy())
    if np.random.get_state(legacy=False)["bit_generator"] != numpy["bit_generator"]:
        np.random.set_bit_generator(getattr(np.random, numpy["bit_generator"])())  # type: ignore[attr-defined]
    np.random.set_state(numpy)
    random.setstate(_nested(state["python"]))


def _mapped(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _mapped(part, kind, function) for key, part in value.items()}
    return function(value.copy() if isinstance(value, np.ndarray) else value) if isinstance(value, kind) else value


def _shapes(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _shapes(part) if isinstance(part, Mapping) else np.shape(part) for key, part in value.items()}


def _nested(state: Sequence[Any]) -> tuple[Any, ...]:
    version, numbers, pair = state
    return version, tuple(numbers), pair
