"""Bytes: the peak memory of a piece of code, by the allocator on a GPU and by its live tensors on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Noted = Callable[[str, int, Tensor | None], None]
"""Called with "made" or "gone", the number of a storage, and the tensor that it was made for."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes in the tensors that are alive while it is active, and their peak.

    Every storage that an operation makes counts until nothing holds it any more, those that autograd saves included.
    What kernels allocate inside themselves does not show. Of a storage that was there before, as behind a batch that is
    a slice of all data, only what the first view of it covers counts.

    Args:
        held: tensors that are there from the beginning; of a storage that they share only their entries count.
        noted: called when a storage is made or gone; storages are numbered in order.

    >>> with LiveBytes() as live:
    ...     x = torch.ones(1000)
    ...     y = (x * 2 + 1).sum()
    >>> live.peak_bytes, live.live_bytes
    (12000, 4004)
    """

    def __init__(self, held: Iterable[Tensor] = (), noted: Noted | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._noted = noted
        self._storages: dict[int, tuple[weakref.ref[Any], int, int]] = {}
        self._hidden: dict[int, int] = {}  # bytes of a storage that are not counted
        self._number = 0
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):  # also of an operation in place, which may have grown its storage
            if isinstance(leaf, Tensor):
                self.see(leaf, (args, kwargs))
        return result

    def __exit__(self, *ending: Any) -> None:
        # What is collected after the end is not noted: when that happens is up to the collector.
        self._noted = None
        super().__exit__(*ending)  # type: ignore[no-untyped-call]

    def see(self, tensor: Tensor, given: Any = ()) -> None:
        """Count the storage of a tensor that an operation returned; of one of its arguments, what the tensor covers."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known, size = self._storages.get(key), storage.nbytes()
        if known is not None:
            reference, number, before = known
            size = max(0, size - self._hidden.get(key, 0))
            self._storages[key] = (reference, number, size)
            self._count(size - before)
        elif any(_storage_of(each) == key for each in tree_leaves(given)):
            self._hold(tensor)
        else:
            self._new(tensor, key, size)

    def _hold(self, tensor: Tensor) -> None:
        """Count only what a tensor covers of its storage."""
        if tensor.layout != torch.strided:
            return
        key, size = tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes()
        if key not in self._storages:
            self._new(tensor, key, 0)
            self._hidden[key] = size
        reference, number, before = self._storages[key]
        counted = min(size, before + tensor.numel() * tensor.element_size())
        self._storages[key], self._hidden[key] = (reference, number, counted), size - counted
        self._count(counted - before)

    def _new(self, tensor: Tensor, key: int, size: int) -> None:
        self._number += 1
        reference = weakref.ref(tensor.untyped_storage(), partial(self._gone, key))
        self._storages[key] = (reference, self._number, size)
        self._count(size)
        if self._noted:
            self._noted("made", self._number, tensor)

    def _gone(self, key: int, _: Any) -> None:
        _, number, size = self._storages.pop(key)
        self._hidden.pop(key, None)
        self.live_bytes -= size
        if self._noted:
            self._noted("gone", number, None)

    def _count(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def _storage_of(value: Any) -> int | None:
    strided = isinstance(value, Tensor) and value.layout == torch.strided
    return value.untyped_storage()._cdata if strided else None
