"""Ops that look entries up or make new tensors: embedding, indexing, constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def _feature_dim(walk: Walk, weight: Value) -> DimLabels:
    walk.freeze(weight.labels[0], "rows are looked up by token (an embedding)")
    for remark in ("produce", "embedding"):
        walk.atoms.mark(remark, weight.labels[1])
    return weight.labels[1]


@rule(aten.embedding.default)
def _embedding(walk: Walk, out: Value, weight: Value, indices: Value, *args: Any, **kwargs: Any) -> Value:
    """Rows are chosen by data; columns are features."""
    return Value(out.shape, (*(None,) * indices.ndim, _feature_dim(walk, weight)), zero=weight.zero)


@rule(aten.embedding_bag.padding_idx, aten.embedding_bag.default)
@rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding_bag(walk: Walk, out: tuple[Value, ...], weight: Value, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Sums, means or maxima of rows that data chooses; columns are features."""
    bags = Value(out[0].shape, (None, _feature_dim(walk, weight)), zero=weight.zero)
    return bags, *(None for _ in out[1:])


@rule(aten.index.Tensor)
def _index(walk: Walk, out: Value, x: Value, indices: Sequence[Value | None]) -> Value:
    """Indexed dims are chosen by data; other dims pass. Weights that data chooses (an expert's) still are weights."""
    indexed = [d for d, index in enumerate(indices) if index is not None]
    walk.freeze_dims(x, indexed, "this dim is indexed by data")
    passed = [labels for d, labels in enumerate(x.labels) if d not in indexed]
    # As in NumPy: the new dims replace adjacent indexed dims, and come first otherwise.
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    labels = (*passed[:at], *(None,) * (out.ndim - len(passed)), *passed[at:])
    return Value(out.shape, labels, weight=x.weight, zero=x.zero)


@rule(aten.index_select.default, aten.gather.default, aten.roll.default)
@rule(aten.index_copy.default, aten.index_copy_.default, aten.index_add.default, aten.index_add_.default)
@rule(aten.scatter.src, aten.scatter.value, aten.scatter_.src, aten.scatter_.value, aten.scatter_reduce.two)
@rule(aten.scatter_add.default, aten.scatter_add_.default, aten.scatter_reduce_.two)
def _along_dim(walk: Walk, out: Value, x: Value, dim: Any, *args: Any, **kwargs: Any) -> Value:
    """Data moves entries along the dims, which are frozen."""
    why = "entries of this dim are moved by data"
    if walk.op == "roll":
        dim = args[0] if args else ()
    dims = [d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    passed = walk.freeze_dims(x, dims, why)
    tensors = [arg for arg in args if isinstance(arg, Value)]
    for other in tensors:
        for d, labels in enumerate(other.labels if other.ndim == x.ndim else ()):
            if d in dims:
                walk.freeze(labels, why)
            elif labels is not None or walk.op != "index_select":
                walk.unite(x.labels[d], labels, why)
    written = any(isinstance(arg, (int, float)) and arg != 0 for arg in args) and walk.op.startswith("scatter")
    return Value(out.shape, passed, zero=x.zero and not written and all(value.zero for value in tensors))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step, aten.histc.default)
@rule(aten.linspace.default, aten.scalar_tensor.default, aten.one_hot.default)
@rule(aten.rand.default, aten.randn.default, aten.eye.default, aten.item.default, aten.bincount.default)
def _data(walk: Walk, out: Any, *args: Any, **kwargs: Any) -> None:
    """Positions, masks and noise are data. Units that are read for them are frozen."""
    for arg in args:
        if isinstance(arg, Value):
            walk.freeze_all(arg, "the values are turned into data")


@rule(aten.zeros.default, aten.ones.default, aten.empty.memory_format, aten.full.default)
@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default)
def _constant(walk: Walk, out: Value, *args: Any, **kwargs: Any) -> Value:
    """A constant of a written size; every dim follows any dim that it is united with."""
    sizes = next(arg for arg in args if isinstance(arg, (list, tuple)))
    labels = tuple(map(walk.alike, sizes))
    for dim, size in enumerate(sizes):
        walk.literal(dim, size, labels[dim])
    return Value(out.shape, labels, zero="zeros" in walk.op)


@rule(aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default)
def _triangle(walk: Walk, out: Value, x: Value, *args: Any) -> tuple[DimLabels, ...]:
    """A triangle of the last two dims, which freeze; the others pass."""
    return walk.freeze_dims(x, (-2, -1), "a triangle is cut out of this dim")
