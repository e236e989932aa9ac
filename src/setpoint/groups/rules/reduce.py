"""Ops that sum or take the extreme along dims: mean, sum, max."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

aten = torch.ops.aten


def _dims(value: Value, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and len(dim) == 0):
        return list(range(value.ndim))
    chosen = dim if isinstance(dim, (list, tuple)) else [dim]
    return [d % max(value.ndim, 1) for d in chosen]


def _without(value: Value, dims: list[int], keepdim: bool) -> tuple[DimLabels, ...]:
    if keepdim:
        return tuple(None if d in dims else labels for d, labels in enumerate(value.labels))
    return tuple(labels for d, labels in enumerate(value.labels) if d not in dims)


@rule(aten.mean.default, aten.mean.dim, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction)
@rule(aten.var_mean.dim, aten.var_mean.correction)
def _mean(walk: Walk, out: Any, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A mean divides by the number of entries, so a zero entry is not an absent one."""
    keepdim = bool(kwargs.get("keepdim", args[-1] if args and isinstance(args[-1], bool) else False))
    dims = _dims(x, dim)
    for d in dims:
        walk.lossy(x.labels[d], "a mean or variance runs over this dim")
    labels = _without(x, dims, keepdim)
    return tuple(labels for _ in out) if isinstance(out, tuple) else labels


@rule(aten.sum.default, aten.sum.dim_IntList)
@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def _sum(walk: Walk, out: Value, x: Value, *args: Any, **kwargs: Any) -> tuple[DimLabels, ...]:
    """A sum of zeros is the sum without them."""
    if op_name(walk.node.target) != "sum":  # type: ignore[union-attr]
        order = kwargs.get("ord", args[0] if args else None)
        args = args[1:]
        if order is not None and order < 0:
            x = replace(x, zero=False)  # a negative power of zero
    dims = _dims(x, kwargs.get("dim", args[0] if args else None))
    for d in dims:
        if not x.weight:
            walk.atoms.mark("summed", x.labels[d])
        if not x.zero or walk.copies(x.labels[d]):
            walk.lossy(x.labels[d], "a sum runs over this dim, where dropped units are not zero")
    return _without(x, dims, bool(kwargs.get("keepdim", args[1] if len(args) > 1 else False)))


@rule(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)
@rule(aten.max.default, aten.min.default, aten.any.dim, aten.all.dim, aten.any.default, aten.all.default)
@rule(aten.logsumexp.default, aten.prod.dim_int, aten.prod.default, aten.median.dim)
def _extreme(walk: Walk, out: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The extreme of a set changes when a zero leaves it: the dim freezes."""
    dims = _dims(x, dim)
    for d in dims:
        walk.freeze(x.labels[d], "an extreme or a product runs over this dim")
    labels = _without(x, dims, keepdim)
    return tuple(labels for _ in out) if isinstance(out, tuple) else labels


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)
@rule(aten.cumsum.default, aten.cumprod.default, aten.sort.default, aten.argsort.default)
def _along(walk: Walk, out: Any, x: Value, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """A softmax, running sum or sort ties the entries of its dim together."""
    walk.freeze(x.labels[dim], "a softmax, a running sum or a sort runs over this dim")
    return (x.labels, x.labels) if isinstance(out, tuple) else Value(out.shape, x.labels, zero=False)
