"""Custom autograd Functions: no graph shows their backward, so their inputs and outputs are marked in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from setpoint.groups.walk import Value, Walk, rule

MARK = "setpoint::custom_function"
"""The op that marks an input or output of a custom Function in a graph."""


@cache
def _mark() -> Any:
    @torch.library.custom_op(MARK, mutates_args=(), schema="(Tensor x, str name) -> Tensor")
    def mark(x: Tensor, name: str) -> Tensor:
        return x.clone()  # a custom op must not return its input

    mark.register_fake(lambda x, name: torch.empty_like(x))
    return mark


@contextmanager
def marked_functions() -> Iterator[None]:
    """Inside, inputs and outputs of custom Functions are marked; those of torch's own Functions are not."""
    # One class above `Function`, so that an `apply` that user code stored earlier is caught too.
    above = torch.autograd.function._SingleLevelFunction

    def apply(kind: type, *args: Any) -> Any:
        results = super(above, kind).apply(*args)  # type: ignore[misc]
        if kind.__module__.partition(".")[0] == "torch":
            return results

        def marked(x: Tensor) -> Any:
            return _mark()(x, kind.__qualname__) if x.is_floating_point() or x.is_complex() else x

        # The results of the first are not used: its marks are there to freeze what the Function reads.
        pytree.tree_map_only(Tensor, marked, args)
        return pytree.tree_map_only(Tensor, marked, results)

    above.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del above.apply  # type: ignore[attr-defined]


@rule(MARK)
def _custom_function(walk: Walk, out: Value, x: Value, name: str) -> Value:
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return Value(out.shape, x.labels, zero=x.zero)
