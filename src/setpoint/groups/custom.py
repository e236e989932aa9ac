"""Custom autograd Functions: no graph shows their backward, so their inputs and outputs are marked in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
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
    kinds = type(torch.autograd.Function)

    # Every call looks up `forward`, even that of an `apply` which user code stored earlier, and which may be C code.
    def read(kind: type, name: str) -> Any:
        found = type.__getattribute__(kind, name)
        if name != "forward" or kind.__module__.partition(".")[0] == "torch":
            return found

        def marked(x: Tensor) -> None:
            if x.is_floating_point() or x.is_complex():
                _mark()(x, kind.__qualname__)

        @wraps(found)
        def forward(*args: Any, **kwargs: Any) -> Any:
            results = found(*args, **kwargs)
            # The results of the marks are not used: they are there to freeze what the Function reads and writes.
            pytree.tree_map_only(Tensor, marked, (args, kwargs, results))
            return results

        return forward

    kinds.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del kinds.__getattribute__


@rule(MARK)
def _custom_function(walk: Walk, out: Value, x: Value, name: str) -> Value:
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return Value(out.shape, x.labels, zero=x.zero)
