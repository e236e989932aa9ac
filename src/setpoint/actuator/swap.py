"""A swap: new contents for a tensor that keeps its identity, with a way back."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor


@torch.no_grad()
def swap(tensor: Tensor, new: Tensor, undo: ExitStack) -> None:
    """Let `tensor` hold the memory, shape and strides of `new`; its gradient becomes None.

    The object stays the same, so optimizers, schedulers, clip lists and hooks that hold it go on working.

    Args:
        tensor: a parameter or buffer.
        new: its new contents, on the same device.
        undo: takes a callback that puts the old memory and gradient back.
    """
    old = tensor.detach()  # shares the old memory, so putting it back copies nothing
    grad = tensor.grad if tensor.is_leaf else None

    def put_back() -> None:
        swap(tensor, old, ExitStack())
        if grad is not None:
            tensor.grad = grad

    # A gradient must have its tensor's shape: it is removed before the shape changes, and set again only after the
    # old shape is back.
    undo.callback(put_back)
    if tensor.is_leaf:
        tensor.grad = None
    # Not `tensor.data = new`, which fails while an old loss keeps the graph of this tensor alive.
    if tensor.dtype == new.dtype:
        tensor.set_(new)  # type: ignore[call-overload]
    else:  # `set_` cannot change the dtype
        tensor.data = new
