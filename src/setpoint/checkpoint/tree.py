"""A tree: nested plain data as one table of tensors, and back, so that a file without pickles can hold it."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from setpoint.checkpoint.model_file import to_host
from setpoint.distributed import is_sharded_tensor
from setpoint.errors import CheckpointError

TREE = "tree"
"""Name of the tensor whose bytes are the JSON text of everything that is no tensor."""

_DICTS: dict[str, type[dict[Any, Any]]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}

_ARRAYS = {
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64", "complex64", "complex128"),
}
"""Kinds of NumPy arrays that have a counterpart in PyTorch."""


def to_tensors(value: Any, sharded: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Nested dicts, lists and tuples of tensors, arrays, numbers, strings and None as tensors in host memory.

    Tensors that share all of their memory are stored once. NumPy's numbers become Python's. Keys of dicts are strings
    or integers. Sharded tensors are put into `sharded`, by their place in the data; without it they are an error.

    Raises:
        CheckpointError: for anything else.

    >>> sorted(to_tensors({"weight": torch.zeros(2), "step": 3}))
    ['0', 'tree']
    """
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
        if sharded is not None and isinstance(value, Tensor) and is_sharded_tensor(value):
            sharded[where] = value
            return {"sharded": where}
        if type(value) is list:
            return [encode(each, f"{where}[{number}]") for number, each in enumerate(value)]
        if type(value) is tuple:
            return {"tuple": encode(list(value), where)}
        if isinstance(value, dict) and all(type(key) in (str, int) for key in value):
            kind = {OrderedDict: "ordered", Counter: "counter"}.get(type(value), "dict")
            return {kind: [[key, encode(each, f"{where}[{key!r}]")] for key, each in value.items()]}
        kind = f"{type(value).__name__} of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise CheckpointError(
            f"{where or 'this'} is a {kind}: a run file holds tensors, plain arrays of numbers, "
            "numbers, strings, None, and dicts, lists and tuples of them"
        )

    text = json.dumps(encode(value, ""))
    tensors[TREE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Any:
    """The data that `to_tensors` was given, from what it returned and put into `sharded`, laid out in memory as it was.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: when the tensors are something else.
    """

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(each) for each in value]
        if not isinstance(value, dict):
            return value
        if "tensor" in value:
            return laid_out(tensors[value["tensor"]], value["stride"], value["complex"])
        if "sharded" in value:
            return tensors[value["sharded"]]
        ((kind, items),) = value.items()
        if kind == "tuple":
            return tuple(decode(items))
        if kind == "array":
            return decode(items).numpy()
        return _DICTS[kind]({key: decode(each) for key, each in items})

    return decode(json.loads(tensors[TREE].numpy().tobytes()))


def laid_out(tensor: Tensor, stride: list[int], is_complex: bool) -> Tensor:
    """A copy of a contiguous tensor with these strides, where they leave no gaps and nothing overlaps."""
    # The file's data may be aligned for single reals only; a copy is aligned for pairs of them too.
    tensor = torch.view_as_complex(tensor.clone()) if is_complex else tensor
    order = sorted(range(tensor.dim()), key=lambda dim: -stride[dim])
    dense = tensor.permute(order).contiguous().permute([order.index(dim) for dim in range(tensor.dim())])
    if list(dense.stride()) == list(stride):
        return dense.clone() if dense.data_ptr() == tensor.data_ptr() else dense
    # Any other strides are kept only if they cover the memory exactly: as many elements as places, and none twice.
    size = 1 + sum((length - 1) * step for length, step in zip(tensor.shape, stride, strict=True))
    if tensor.numel() and size == tensor.numel() and 0 not in stride:
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return dense.clone()
