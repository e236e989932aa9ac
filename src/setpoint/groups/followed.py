"""Followed: a digest of the calls that a forward makes, on a copy of the model whose tensors have no data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from setpoint.groups.example import Example, tensors_of
from setpoint.groups.rehearsal import Rehearsal

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...), range, np.generic),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size),
)
_MOST_ENTRIES = 2**20
_DEVICES = ("cpu", "cuda")
_BY_ADDRESS = {Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage, Tensor.numpy, Tensor.__array__}
_TUPLE_ITERATOR = type(iter(()))


class _UnknownError(Exception):
    """A call has something that a digest cannot hold."""


def followed(model: nn.Module, example: Example) -> str:
    """The digest, in hexadecimal; "" where no forward without data runs, or a call has what no digest holds.

    Tensors on the meta device would be quicker, but autocast leaves them alone, and code may ask for the device.
    """
    calls = _Calls()

    def prepare(twin: nn.Module) -> None:
        calls.begin()
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            calls.name(tensor, name)
        twin.register_forward_pre_hook(calls.enter, prepend=True, with_kwargs=True)

    try:
        with calls:
            shapes = Rehearsal(model, example).run(prepare, exactly=True)
    except Exception:  # noqa: BLE001 - any failure of a foreign forward counts
        return ""
    calls.text("returned", *map(str, shapes))
    return calls.digest


class _Calls(TorchFunctionMode):
    """Takes down each call of PyTorch: its name, which tensors it reads and makes, and all other arguments.

    A tensor of the model goes by its name, and any other by its number, in the order in which they occur. One that
    was there before, such as a table in a library, goes by its content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Forget what was taken down, and wait for the forward to begin."""
        self._inside = False
        self._hash = hashlib.sha256()
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no two tensors have one id

    @property
    def digest(self) -> str:
        """In hexadecimal."""
        return self._hash.hexdigest()

    def name(self, tensor: Tensor, name: str) -> None:
        """Call a tensor by this name, unless it has one."""
        if id(tensor) not in self._names:
            self._names[id(tensor)] = name
            self._alive.append(tensor)

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """The forward begins with these inputs."""
        self._inside = True
        for number, tensor in enumerate(tensors_of([args, kwargs])):
            self.name(tensor, f"input {number}")

    def text(self, *parts: str) -> None:
        """Texts, each with its length."""
        self._hash.update("".join([f"{len(part)}:{part}" for part in parts]).encode(errors="surrogatepass"))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside:
            return func(*args, **kwargs)
        if func in _BY_ADDRESS:
            raise _UnknownError("code that asks for an address")
        of = getattr(func, "__self__", None)  # an attribute of a tensor is asked of its descriptor
        self.text(getattr(func, "__module__", None) or "", getattr(of, "__name__", ""), getattr(func, "__name__", ""))
        self.text(*(f"{torch.is_autocast_enabled(kind)} {torch.get_autocast_dtype(kind)}" for kind in _DEVICES))
        self._given(args)
        if kwargs:
            self.text(*map(str, kwargs))
            self._given(kwargs.values())
        result = func(*args, **kwargs)
        made = tuple(result) if isinstance(result, _TUPLE_ITERATOR) else result  # a tensor is unpacked
        for each in pytree.tree_leaves(made):
            if isinstance(each, Tensor):
                self.name(each, str(len(self._names)))
                self._tensor(each)
        return iter(made) if made is not result else result

    def _given(self, values: Iterable[Any]) -> None:
        for each in values:
            if isinstance(each, Tensor):
                if id(each) not in self._names:
                    self._found(each)
                self._tensor(each)
            elif isinstance(each, _PLAIN):
                self.text(type(each).__qualname__, repr(each))
            elif isinstance(each, slice):
                self.text("slice")
                self._given((each.start, each.stop, each.step))
            elif isinstance(each, np.ndarray) and each.dtype != object:
                self._content(each)
            elif isinstance(each, type):
                self.text("class", f"{each.__module__}.{each.__qualname__}")
            elif (leaves := pytree.tree_leaves(each)) and leaves[0] is each:
                raise _UnknownError(type(each).__qualname__)
            else:
                self._given(leaves)

    def _found(self, tensor: Tensor) -> None:
        """A tensor that no call has made."""
        if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout != torch.strided:
            raise _UnknownError("a tensor that was made where nothing is seen")
        with unset_fake_temporarily():
            self._content(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.name(tensor, str(len(self._names)))

    def _content(self, array: np.ndarray) -> None:
        if array.size > _MOST_ENTRIES:
            raise _UnknownError("a large table")
        self.text(str(array.dtype), str(array.shape))
        self._hash.update(array.tobytes())

    def _tensor(self, tensor: Tensor) -> None:
        strided = tensor.layout == torch.strided
        where = f"{tensor.stride()} {tensor.storage_offset()}" if strided else ""
        self.text(f"{self._names[id(tensor)]} {tuple(tensor.shape)} {where} {tensor.dtype} {tensor.requires_grad}")
