"""Plain data: states as tensors, numbers and strings that any checkpoint can hold, and as one table of tensors.

Those of the random generators are among them.
"""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.distributed import is_sharded_tensor
from setpoint.errors import CheckpointError
from setpoint.messages import a_type

_NUMPY = "numpy"
TREE = "tree"
"""Name of the tensor whose bytes are the JSON text of everything that is no tensor."""

_DICTS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}

_ARRAYS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
"""Kinds of NumPy arrays that have a counterpart in PyTorch."""


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
        kept = [field.name for field in fields(value) if not field.metadata.get("live")]
        return {name: plain(getattr(value, name), f"{where}.{name}") for name in kept}
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
    if is_dataclass(like) and not isinstance(like, type):
        names = {field.name for field in fields(like) if not field.metadata.get("live")}
        if not isinstance(value, dict) or set(value) != names:
            raise CheckpointError(f"{where} is not the state of {a_type(like)}, got {_kind(value)}")
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
        return {key: restored(item, like.get(key), f"{where}[{key!r}]", device) for key, item in value.items()}
    if isinstance(like, tuple) and like:
        if not isinstance(value, tuple) or len(value) != len(like):
            raise CheckpointError(f"{where} must be a tuple of {len(like)}, got {_kind(value)}")
        pairs = list(zip(value, like, strict=True))
        if any(isinstance(other, str) and item != other for item, other in pairs):
            raise CheckpointError(f"{where} must be {like!r:.200}: the state is of another model")
        return tuple(restored(item, other, f"{where}[{n}]", device) for n, (item, other) in enumerate(pairs))
    return _bare(value, device)


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
    if isinstance(inner, Tensor):
        return f"{inner.dtype} of shape {tuple(inner.shape)}"
    return a_type(inner)


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
        if tensor.numel() and place in known:
            return known[place]
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
        if type(value) is np.ndarray and value.dtype.name in _ARRAYS and value.dtype.isnative:
            return {"array": encode(torch.from_numpy(np.array(value, order="C")), where)}
        if type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_quantized:
            if value.is_meta:
                raise CheckpointError(f"{where} is on the meta device and has no data")
            return {"tensor": store(value), "stride": value.stride(), "complex": value.is_complex()}
        if isinstance(value, Tensor) and is_sharded_tensor(value):
            raise CheckpointError(
                f"{where} is sharded over ranks: save it by torch.distributed.checkpoint, as docs/resume.md shows"
            )
        if type(value) is list:
            return [encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": encode(list(value), where)}
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            kind = {OrderedDict: "ordered", Counter: "counter"}.get(type(value), "dict")
            return {kind: [[key, encode(item, f"{where}[{key!r}]")] for key, item in value.items()]}
        kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(
            f"{where or 'this'} is a {kind}: a run file holds tensors, plain arrays of numbers, "
            "numbers, strings, None, and dicts, lists and tuples of them"
        )

    text = json.dumps(encode(value, ""))
    tensors[TREE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """The data that `to_tensors` was given; other tensors are a KeyError, TypeError, ValueError or RuntimeError."""

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
    """A copy of a contiguous tensor with these strides, where they cover as many places in memory as it has elements.

    Others would take memory for the gaps of a view that nobody can see any more.
    """
    # The file's data may be aligned for single reals only; a copy is aligned for pairs of them too.
    tensor = torch.view_as_complex(tensor.clone()) if is_complex else tensor
    places = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, stride, strict=True))
    if places == tensor.numel() and 0 not in stride:
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return tensor.clone()


def rng_state() -> dict[str, Any]:
    """RNG states of PyTorch (GPUs too), NumPy and Python, in tensors, numbers and strings."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": _mapped(np.random.get_state(legacy=False), np.ndarray, lambda array: torch.from_numpy(array.copy())),
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
    return function(value) if isinstance(value, kind) else value


def _shapes(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _shapes(part) if isinstance(part, Mapping) else np.shape(part) for key, part in value.items()}


def _nested(state: Sequence[Any]) -> tuple[Any, ...]:
    version, numbers, pair = state
    return version, tuple(numbers), pair
