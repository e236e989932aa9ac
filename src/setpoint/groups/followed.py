"""Followed: a digest of the calls that a forward makes, on a copy of the model whose tensors have no data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from setpoint.groups.example import Example
from setpoint.groups.rehearsal import Rehearsal

_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None), type(...)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def followed(model: nn.Module, example: Example) -> str:
    """The digest, in hexadecimal; "" where no forward without data runs."""
    calls = _Calls()

    def prepare(twin: nn.Module) -> None:
        calls.begin()
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            calls.name(tensor, name)

    try:
        with calls:
            shapes = Rehearsal(model, example).run(prepare, with_data=False)
    except Exception:  # noqa: BLE001 - any failure of a foreign forward counts
        return ""
    calls.text("returned", *map(str, shapes))
    return calls.digest


class _Calls(TorchFunctionMode):
    """Takes down each call of PyTorch: its name, which tensors it reads and makes, and all plain arguments.

    A tensor of the model goes by its name, and any other by its number, in the order in which they occur.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        """Forget what was taken down."""
        self._hash = hashlib.sha256()
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []  # so that no two tensors have one id

    @property
    def digest(self) -> str:
        """In hexadecimal."""
        return self._hash.hexdigest()

    def name(self, tensor: Tensor, name: str) -> None:
        """Call a tensor by this name."""
        self._names[id(tensor)] = name
        self._alive.append(tensor)

    def text(self, *parts: str) -> None:
        """Texts, each with its length."""
        for part in parts:
            encoded = part.encode(errors="surrogatepass")
            self._hash.update(b"%d:" % len(encoded))
            self._hash.update(encoded)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        of = getattr(func, "__self__", None)  # an attribute of a tensor is asked of its descriptor
        self.text(getattr(func, "__module__", None) or "", getattr(of, "__name__", ""), getattr(func, "__name__", ""))
        self._values(args)
        self.text(*map(str, kwargs))
        self._values(kwargs.values())
        self._values((result,))
        return result

    def _values(self, values: Iterable[Any]) -> None:
        for each in pytree.tree_leaves(list(values)):
            if isinstance(each, Tensor):
                if id(each) not in self._names:
                    self.name(each, str(len(self._names)))
                strides = each.stride() if each.layout == torch.strided else ""
                self.text(f"{self._names[id(each)]} {tuple(each.shape)} {strides} {each.dtype} {each.requires_grad}")
            else:
                self.text(type(each).__qualname__, repr(each) if isinstance(each, _PLAIN) else "")
