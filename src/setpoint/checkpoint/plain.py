"""Plain data: states as what any checkpoint can hold and as a table of tensors, random generators, rows of JSON."""

import json
import math
import os
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.distributed import is_sharded_tensor
from setpoint.errors import CheckpointError
from setpoint.messages import a_type

_NUMPY = "numpy"
TREE = "tree"  # name of the tensor whose bytes are the JSON text of everything that is no tensor
_DICTS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}


# States.


def plain(value: Any, where: str) -> Any:
    """A value as nested dicts, lists and tuples of tensors, numbers, strings and None.

    Dataclasses become dicts of their fields, without those whose `metadata` says `"live"`: these point at the model,
    and `restored` takes them from there. NumPy arrays become `{"numpy": tensor}`. Tensors are copied. Anything else,
    which no checkpoint could hold without running its code, is a CheckpointError; `where` names the value in it.

    >>> plain({"age": np.array([1, 2])}, "state")
    {'age': {'numpy': tensor([1, 2])}}
    """
    # First, since NumPy's float64 is a `float` too and would stay NumPy's.
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()  # the run goes on while a framework may still hold the state
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {_NUMPY: torch.from_numpy(value.copy())}
    if is_dataclass(value) and not isinstance(value, type):
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in _stored_fields(value)}
    if isinstance(value, Mapping) and all(isinstance(key, (str, int)) for key in value):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple, deque)) and not hasattr(value, "_fields"):
        items = [plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise CheckpointError(
        f"{where} is {a_type(value)}, which cannot be stored: keep tensors, arrays, numbers and strings in "
        'dataclasses, dicts, lists and tuples, or mark the field live with field(metadata={"live": True})'
    )


def restored(value: Any, like: Any, where: str, device: torch.device) -> Any:
    """The value that `plain` was given, with the live fields of `like`, a value of the same types and shapes.

    Tensors without a counterpart there go to the device. A CheckpointError says what is missing, or is of another shape
    or dtype.
    """

    def refuse(wanted: str) -> NoReturn:
        raise CheckpointError(f"{where} must be {wanted}, got {_kind(value)}")

    if is_dataclass(like) and not isinstance(like, type):
        names = _stored_fields(like)
        if not isinstance(value, dict) or value.keys() != set(names):
            refuse(f"the state of {a_type(like)}")
        found = {name: restored(value[name], getattr(like, name), f"{where}.{name}", device) for name in names}
        return replace(like, **found)
    if isinstance(like, np.ndarray):
        array = _bare(value, device)
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (like.shape, like.dtype):
            refuse(f"an array of {like.dtype} of shape {like.shape}")
        return array
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (like.shape, like.dtype):
            refuse(f"a tensor of {like.dtype} of shape {tuple(like.shape)}")
        return value.to(like.device, copy=True)
    if isinstance(like, Mapping) and not (value is None and not like):
        # An empty one is of before there was anything.
        if not isinstance(value, dict) or (value and like.keys() - value.keys()):
            refuse(f"a dict with the keys {list(like)!r:.200}")
        return {key: restored(item, like.get(key), f"{where}[{key!r}]", device) for key, item in value.items()}
    if isinstance(like, tuple) and like:
        if not isinstance(value, tuple) or len(value) != len(like):
            refuse(f"a tuple of {len(like)}")
        pairs = list(zip(value, like, strict=True))
        if any(isinstance(other, str) and item != other for item, other in pairs):
            raise CheckpointError(f"{where} must be {like!r:.200}: the state is of another model")
        return tuple(restored(item, other, f"{where}[{n}]", device) for n, (item, other) in enumerate(pairs))
    return _bare(value, device)


def _stored_fields(value: Any) -> list[str]:
    return [field.name for field in fields(value) if not field.metadata.get("live")]


def _bare(value: Any, device: torch.device) -> Any:
    """A value restored without a counterpart to check it against."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        if set(value) == {_NUMPY} and isinstance(value[_NUMPY], Tensor):
            return value[_NUMPY].cpu().numpy().copy()
        return {key: _bare(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(item, device) for item in value)
    return value


def _kind(value: Any) -> str:
    inner = value[_NUMPY] if isinstance(value, dict) and set(value) == {_NUMPY} else value
    return f"{inner.dtype} of shape {tuple(inner.shape)}" if isinstance(inner, Tensor) else a_type(inner)


# The random generators.


def rng_state() -> dict[str, Any]:
    """RNG states of PyTorch (GPUs too), NumPy and Python, in tensors, numbers and strings."""
    numpy = np.random.get_state(legacy=False)
    inner = {name: torch.from_numpy(n.copy()) if isinstance(n, np.ndarray) else n for name, n in numpy["state"].items()}
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": {**numpy, "state": inner},
        "python": random.getstate(),
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore the state that `rng_state` returned; states of GPUs that are absent here are skipped."""
    torch.set_rng_state(state["torch"].cpu())
    for device, of_device in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(of_device.cpu(), device)
    numpy = state["numpy"]
    inner = {name: n.cpu().numpy() if isinstance(n, Tensor) else n for name, n in numpy["state"].items()}
    np.random.set_state({**numpy, "state": inner})
    version, numbers, pair = state["python"]
    random.setstate((version, tuple(numbers), pair))


# Tables of tensors.


def to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in host memory; complex numbers as pairs of reals."""
    resolved = tensor.detach().resolve_conj().resolve_neg()
    plain = torch.view_as_real(resolved) if resolved.is_complex() else resolved
    return plain.to("cpu", copy=True).contiguous()


def to_tensors(value: Any) -> dict[str, Tensor]:
    """Nested dicts, lists and tuples of tensors, arrays, numbers, strings and None as tensors in host memory.

    Tensors that share all of their memory are stored once. NumPy's numbers become Python's. Keys of dicts are strings
    or integers. Anything else is a CheckpointError.

    >>> sorted(to_tensors({"weight": torch.zeros(2), "step": 3}))
    ['0', 'tree']
    """
    # JSON for what is no tensor: unlike a pickle it cannot name code.
    tensors: dict[str, Tensor] = {}
    known: dict[Any, str] = {}
    alive: list[Tensor] = []  # a freed tensor's address could be reused, and a new one be taken for it

    def store(tensor: Tensor) -> str:
        layout = (tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
        place = (tensor.device, tensor.data_ptr(), layout)
        if not tensor.numel() or place not in known:
            known[place] = str(len(tensors))
            alive.append(tensor)
            tensors[known[place]] = to_host(tensor)
        return known[place]

    def encode(value: Any, where: str) -> Any:
        # Exact types throughout: an instance of a subclass would come back as one of its base.
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.generic) and type(value.item()) in (bool, int, float, str):
            return value.item()
        if type(value) is np.ndarray and value.dtype.kind in "biufc" and value.dtype.isnative:
            return {"array": encode(torch.from_numpy(np.array(value, order="C")), where)}
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
            if value.is_meta:
                raise CheckpointError(f"{where} is on the meta device and has no data")
            stride = value.stride() if value.numel() else torch.empty(value.shape).stride()  # any will do
            return {"tensor": store(value), "stride": stride, "complex": value.is_complex()}
        if type(value) is list:
            return [encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": encode(list(value), where)}
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            kind = {OrderedDict: "ordered", Counter: "counter"}.get(type(value), "dict")
            return {kind: [[key, encode(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        if isinstance(value, Tensor) and is_sharded_tensor(value):
            raise CheckpointError(
                f"{where} is sharded over ranks: save it by torch.distributed.checkpoint, as docs/distributed.md shows"
            )
        kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(
            f"{where or 'this'} is a {kind}: a run file holds tensors, plain arrays of numbers, "
            "numbers, strings, None, and dicts, lists and tuples of them"
        )

    text = json.dumps(encode(value, ""))
    tensors[TREE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """The data that `to_tensors` was given; for other tensors any error, which `as_written` is to name."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return _laid_out(tensors[value["tensor"]], value["stride"], value["complex"])
        ((kind, items),) = value.items()
        if kind == "tuple":
            return tuple(decode(items))
        if kind == "array":
            return decode(items).numpy()
        return _DICTS[kind]({key: decode(item) for key, item in items})

    return decode(json.loads(tensors[TREE].numpy().tobytes()))


def _laid_out(tensor: Tensor, stride: list[int], is_complex: bool) -> Tensor:
    """A copy of a contiguous tensor with these strides, but for those of a view: its gaps would take memory."""
    # The file's data may be aligned for single reals only; a copy is aligned for pairs of them too.
    tensor = torch.view_as_complex(tensor.clone()) if is_complex else tensor
    places = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, stride, strict=True))
    if places == tensor.numel() and 0 not in stride:
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
    return tensor.clone()


# Rows of JSON.


def without_nan(value: Any) -> Any:
    """The same in what JSON can hold: None in the place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value


def replace_text(file: Path, text: str) -> None:
    """Write a text file in UTF-8 into a folder that exists, at once; on an error nothing stays behind."""
    # A name of its own: several processes of one run may write the same file, and the last one wins.
    unfinished = file.with_name(f"{file.name}.{uuid4().hex}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def json_object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line holds; None for anything else, such as half a line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # a number of thousands of digits is a ValueError, too
        return None
    return value if isinstance(value, dict) else None


def fields_of(kind: type, row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a JSON object that are fields of a dataclass; an integer is a count, a null number NaN.

    A ValueError names the first field of another type.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Cut:
    ...     step: int
    ...     loss: float = 0.0
    >>> fields_of(Cut, {"step": 3, "loss": 1, "more": "of a later version"})
    {'step': 3, 'loss': 1.0}
    """
    return {name: _read(row[name], declared, f"its {name}") for name, declared in _types(kind).items() if name in row}


_types = cache(get_type_hints)


def _read(value: Any, declared: Any, where: str) -> Any:
    origin, inside = get_origin(declared), get_args(declared)
    if origin in (Union, UnionType):
        kinds = [kind for kind in inside if kind is not NoneType]
        # A float may stand as an integer in JSON, so that the first kind is tried where none is the value's own.
        chosen = type(value) if type(value) in kinds else kinds[0]
        return None if value is None and NoneType in inside else _read(value, chosen, where)
    if origin in (tuple, list) and isinstance(value, (list, tuple)):  # JSON has lists only
        return origin(_read(item, inside[0], f"{where}[{number}]") for number, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):  # keys of JSON are strings
        return {key: _read(item, inside[1], f"{where}[{key!r:.80}]") for key, item in value.items()}
    if declared is float and (value is None or type(value) is float):
        return math.nan if value is None else value
    if declared is float and type(value) is int and abs(value) < 1e100:  # larger ones overflow in sums of squares
        return float(value)
    # Above 2**53 a number is no count of steps or units, and no float holds it exactly.
    if declared in (str, bool, int) and type(value) is declared and (declared is not int or 0 <= value <= 2**53):
        return value
    wanted = {int: "a count", float: "a number", str: "a text", bool: "true or false"}.get(declared)
    # Not the `repr` of an object: it may be nested deeper than Python's stack.
    found = a_type(value) if isinstance(value, (dict, list)) else f"{value!r:.80}"
    raise ValueError(f"{where} must be {wanted or ('a list' if origin in (tuple, list) else 'an object')}, got {found}")
