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
"""Called with "made" or "gone", a storage's number, and the tensor that it was made for."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes in the tensors that are alive while it is active, and their peak.

    Every storage that an operation makes counts from there until nothing holds it any more, those that
    autograd saves included. What kernels allocate inside themselves does not show.

    Args:
        noted: called whenever a storage is made or gone, in order; storages are numbered as they come.

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
        self._number = 0
        for tensor in held:
            self.see(tensor)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return result

    def __exit__(self, *ending: Any) -> None:
        """Note nothing any more: what goes after the end, whenever it is collected, is not the code's doing."""
        self._noted = None
        super().__exit__(*ending)  # type: ignore[no-untyped-call]

    def see(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it has been seen."""
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known, size = self._storages.get(key), storage.nbytes()
        if known is not None:
            reference, number, before = known
            self._storages[key] = (reference, number, size)
            self._count(size - before)
            return
        self._number += 1
        reference = weakref.ref(storage, partial(self._gone, key))
        self._storages[key] = (reference, self._number, size)
        self._count(size)
        if self._noted:
            self._noted("made", self._number, tensor)

    def _gone(self, key: int, _: Any) -> None:
        _, number, size = self._storages.pop(key)
        self.live_bytes -= size
        if self._noted:
            self._noted("gone", number, None)

    def _count(self, size: int) -> None:
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def peak_bytes(run: Callable[[], object], held: Iterable[Tensor] = (), device: torch.device | None = None) -> int:
    """Peak memory in bytes while `run` runs: the allocator's on a GPU, live tensors' elsewhere."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device))
    live = LiveBytes(held)
    with live:
        run()
    return live.peak_bytes


def resident_bytes() -> int | None:
    """Largest resident set of this process so far, for information only; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not a POSIX system
        return None
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)
