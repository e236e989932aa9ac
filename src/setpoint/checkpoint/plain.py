"""Plain data: the state of a part as tensors, numbers and strings that any checkpoint can hold, and back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setpoint.errors import CheckpointError
from setpoint.messages import a_type

_NUMPY = "numpy"


def plain(value: Any, where: str) -> Any:
    """A value as nested dicts, lists and tuples of tensors, numbers, strings and None.

    Dataclasses become dicts of their fields, without those whose `metadata` says `"live"`: these point at the model,
    and `restored` takes them from there. NumPy arrays become `{"numpy": tensor}`. Tensors are copied. `where` names
    the value in messages.

    Raises:
        CheckpointError: for anything else, which no checkpoint could hold without running its code.

    >>> plain({"age": np.array([1, 2])}, "state")
    {'age': {'numpy': tensor([1, 2])}}
    """
    # First, since NumPy's float64 is a `float` too and would stay NumPy's.
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {_NUMPY: torch.from_numpy(value.copy())}
    if is_dataclass(value) and not isinstance(value, type):
        kept = [each.name for each in fields(value) if not each.metadata.get("live")]
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in kept}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {key: plain(each, f"{where}[{key!r}]") for key, each in value.items()}
    if isinstance(value, (list, tuple, deque)) and not hasattr(value, "_fields"):
        items = [plain(each, f"{where}[{number}]") for number, each in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CheckpointError(
        f"{where} is {a_type(value)}, which cannot be stored: keep tensors, arrays, numbers and strings in "
        'dataclasses, dicts, lists and tuples, or mark the field live with field(metadata={"live": True})'
    )


def restored(value: Any, like: Any, where: str, device: torch.device) -> Any:
    """The value that `plain` was given, with the live fields of `like`, a value of the same types and shapes.

    Tensors without a counterpart there go to the device; `where` names the value in messages.

    Raises:
        CheckpointError: when it has other types or shapes.
    """
    if is_dataclass(like) and not isinstance(like, type):
        names = {each.name for each in fields(like) if not each.metadata.get("live")}
        if not isinstance(value, dict) or set(value) != names:
            raise CheckpointError(f"{where} is not the state of {a_type(like)}, got {_kind(value)}")
        for each in fields(like):
            if (
                each.name in names
                and value[each.name] is None
                and not _may_be_none(each.type, getattr(like, each.name))
            ):
                raise CheckpointError(f"{where}.{each.name} must be {_kind(getattr(like, each.name))}, got None")
        found = {name: restored(value[name], getattr(like, name), f"{where}.{name}", device) for name in sorted(names)}
        return replace(like, **found)
    if isinstance(like, np.ndarray):
        array = _bare(value, device)
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (like.shape, like.dtype):
            raise CheckpointError(f"{where} must be an array of {like.dtype} of shape {like.shape}, got {_kind(value)}")
        return array
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
            shape = tuple(like.shape)
            raise CheckpointError(f"{where} must be a tensor of {like.dtype} of shape {shape}, got {_kind(value)}")
        return value.to(like.device, copy=True)
    if isinstance(like, Mapping):
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} must be a dict, got {_kind(value)}")
        if value and like.keys() - value.keys():  # an empty one is of before there was anything
            raise CheckpointError(f"{where} lacks {min(map(repr, like.keys() - value.keys()))}")
        return {key: restored(each, like.get(key), f"{where}[{key!r}]", device) for key, each in value.items()}
    if isinstance(like, tuple) and like:
        if not isinstance(value, tuple) or len(value) != len(like):
            raise CheckpointError(f"{where} must be a tuple of {len(like)}, got {_kind(value)}")
        named = [(one, other) for one, other in zip(value, like, strict=True) if isinstance(other, str)]
        if any(one != other for one, other in named):
            raise CheckpointError(f"{where} must be {like!r:.200}: the state is of another model")
        pairs = enumerate(zip(value, like, strict=True))
        return tuple(restored(each, other, f"{where}[{number}]", device) for number, (each, other) in pairs)
    kinds = ((bool, bool), ((int, float), (int, float)), (str, str))
    expected = next((kind for own, kind in kinds if isinstance(like, own)), None)
    if expected is not None and value is not None and not (isinstance(value, expected) and _alike(value, like)):
        raise CheckpointError(f"{where} must be {_kind(like)}, got {_kind(value)}")
    return _bare(value, device)


def _may_be_none(declared: Any, like: Any) -> bool:
    """Whether a field may be None: what is a number at the beginning is not always declared as one."""
    return like is None or "None" in str(declared) or "Any" in str(declared)


def _alike(value: Any, like: Any) -> bool:
    return isinstance(value, bool) == isinstance(like, bool)  # True is an int to Python, and no count


def _bare(value: Any, device: torch.device) -> Any:
    """A value restored without a counterpart to check it against."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        if set(value) == {_NUMPY} and isinstance(value[_NUMPY], Tensor):
            return value[_NUMPY].cpu().numpy().copy()
        return {key: _bare(each, device) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(each, device) for each in value)
    return value


def _kind(value: Any) -> str:
    inner = value[_NUMPY] if isinstance(value, dict) and set(value) == {_NUMPY} else value
    if isinstance(inner, Tensor):
        return f"{inner.dtype} of shape {tuple(inner.shape)}"
    return a_type(inner)
