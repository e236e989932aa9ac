"""Custom autograd Functions: their backward is in no graph, so what goes in and comes out is marked there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

MARK = "setpoint::custom_function"
"""The op that stands in a graph where a tensor goes into or comes out of a custom Function."""


@cache
def _mark() -> Any:
    @torch.library.custom_op(MARK, mutates_args=(), schema="(Tensor x, str name) -> Tensor")
    def mark(x: Tensor, name: str) -> Tensor:
        return x.clone()

    mark.register_fake(lambda x, name: torch.empty_like(x))
    return mark


@contextmanager
def marked_functions() -> Iterator[None]:
    """While this is open, tensors that custom Functions read or give are marked; those of torch itself are not."""
    # One class above `Function`, so that an `apply` which somebody took off a Function earlier comes by here too.
    above = torch.autograd.function._SingleLevelFunction

    def apply(kind: type, *args: Any) -> Any:
        results = super(above, kind).apply(*args)  # type: ignore[misc]
        if kind.__module__.partition(".")[0] == "torch":
            return results

        def marked(x: Tensor) -> Any:
            return _mark()(x, kind.__qualname__) if x.is_floating_point() or x.is_complex() else x

        pytree.tree_map_only(Tensor, marked, args)
        return pytree.tree_map_only(Tensor, marked, results)

    above.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del above.apply  # type: ignore[attr-defined]
