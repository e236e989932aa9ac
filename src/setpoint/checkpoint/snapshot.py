"""A snapshot of models, optimizers and whatever else has a state: all of it can be put back after a failed change."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from setpoint.actuator.tensors import swap
from setpoint.distributed import is_sharded_tensor

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def snapshot(*parts: Any) -> Callable[[], None]:
    """A function that puts everything in these parts back: tensors with shapes and hooks, tables, attributes.

    Objects keep their identity. Followed are modules, optimizers, what has a `state_dict`, and Setpoint's own objects.
    The global random generators are put back too. Values wait in host memory. Tensors that `fully_shard` has made are
    left as they are.

    >>> layer = nn.Linear(2, 3)
    >>> put_back = snapshot(layer)
    >>> layer.out_features, layer.weight.data = 1, torch.ones(1, 2)
    >>> put_back()
    >>> layer, layer.weight.shape
    (Linear(in_features=2, out_features=3, bias=True), torch.Size([3, 2]))
    """
    undo: list[Callable[[], None]] = []
    # It holds the objects as well: an address may be given away again.
    seen: dict[int, Any] = {}
    waiting: list[Any] = [parts]
    while waiting:  # no recursion, since chains of objects may be longer than Python's stack
        value = waiting.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            waiting.extend(_held(value, undo))
    generators = rng_state()

    def put_back() -> None:
        for restore in undo:
            restore()
        set_rng_state(generators)

    return put_back


def _held(value: Any, undo: list[Callable[[], None]]) -> Iterable[Any]:
    """What an object holds that is to be put back too; how to put back the object itself goes to `undo`."""
    if isinstance(value, Tensor):
        if not is_sharded_tensor(value):
            undo.append(_tensor(value))
    elif isinstance(value, np.ndarray):
        if value.flags.writeable and not value.dtype.hasobject:
            undo.append(partial(np.copyto, value, value.copy()))
    elif isinstance(value, DistributedDataParallel):
        return [value.module]  # a reducer must not come back: the host makes it for the present parameters
    elif isinstance(value, dict):
        undo.append(_table(value))
        return [*value, *value.values()]
    elif isinstance(value, (list, deque, set)):
        undo.append(_items(value))
        return list(value)
    elif isinstance(value, (tuple, frozenset)):
        return value
    elif _has_state(value):
        return [vars(value)]
    return ()


def _has_state(value: Any) -> bool:
    if isinstance(value, type) or not hasattr(value, "__dict__"):
        return False
    own = type(value).__module__.partition(".")[0] == "setpoint"
    return own or isinstance(value, (nn.Module, Optimizer)) or hasattr(type(value), "state_dict")


def _tensor(tensor: Tensor) -> Callable[[], None]:
    memory = tensor.detach()  # what it lies in; a change of shape gives it other memory
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    stored = plain and not (tensor.is_meta or tensor.is_quantized or tensor.is_inference())
    # Entries of an expanded tensor share memory, and `copy_` into such a tensor raises.
    overlaps = stored and any(
        step == 0 and length > 1 for step, length in zip(tensor.stride(), tensor.shape, strict=True)
    )
    values = memory.to("cpu", copy=True) if stored and not overlaps else None
    gradient = tensor.grad if tensor.is_leaf else None
    hooks = [set(getattr(tensor, name, None) or ()) for name in _HOOKS]

    @torch.no_grad()
    def put_back() -> None:
        now, before = [(each.shape, each.dtype, each.data_ptr() if stored else 0) for each in (tensor, memory)]
        if now != before:
            swap(tensor, memory, ExitStack())
        if values is not None:
            memory.copy_(values)
        if tensor.is_leaf:
            tensor.grad = gradient
        # Masks put hooks on parameters; a mask of a run that was refused must not go on zeroing gradients.
        for name, known in zip(_HOOKS, hooks, strict=True):
            table = getattr(tensor, name, None) or {}
            for number in set(table) - known:
                del table[number]

    return put_back


def _table(table: dict[Any, Any]) -> Callable[[], None]:
    before = dict(table)

    def put_back() -> None:
        if not _same([*table, *table.values()], [*before, *before.values()]):
            table.clear()
            table.update(before)

    return put_back


def _items(items: Any) -> Callable[[], None]:
    before = list(items)

    def put_back() -> None:
        if not _same(list(items), before):
            items.clear()
            (items.update if isinstance(items, set) else items.extend)(before)

    return put_back


def _same(ones: list[Any], others: list[Any]) -> bool:
    """Whether two lists hold the same objects; what has not changed is not touched."""
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


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
