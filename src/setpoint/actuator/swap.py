"""A swap: new contents for a tensor that keeps its identity, with a way back."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor


def swap(tensor: Tensor, new: Tensor, undo: ExitStack) -> None:
    """Let `tensor` hold the memory, shape and strides of `new`; its gradient becomes None.

    The object stays the same, so optimizers, schedulers, clip lists and hooks that hold it go on
    working, and an old loss may still be alive (`tensor.data = new` fails then).

    Args:
        tensor: a parameter or buffer.
        new: what it is to hold; same device.
        undo: where to note how to put everything back; `undo.close()` does it.
    """
    old = tensor.detach()
    grad = tensor.grad if tensor.is_leaf else None

    def put_back() -> None:
        if tensor.is_leaf:
            tensor.grad = None
        _assign(tensor, old)
        if grad is not None:
            tensor.grad = grad

    undo.callback(put_back)
    if tensor.is_leaf:
        tensor.grad = None
    _assign(tensor, new)


def _assign(tensor: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        if tensor.dtype == new.dtype:
            tensor.set_(new)  # type: ignore[call-overload]
        else:  # `set_` cannot change the dtype
            tensor.data = new
