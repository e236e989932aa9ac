"""Ops that look entries up or make new tensors: embedding, indexing, constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

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
    return bags, *((None,) * part.ndim for part in out[1:])


@rule(aten.index.Tensor)
def _index(walk: Walk, out: Value, x: Value, indices: Sequence[Value | None]) -> Value:
    """Indexed dims are chosen by data; other dims pass. Weights that data chooses (an expert's) still are weights."""
    given = [d for d, index in enumerate(indices) if index is not None]
    for d in given:
        walk.freeze(x.labels[d], "this dim is indexed by data")
    rest = [labels for d, labels in enumerate(x.labels) if d not in given]
    num_new = out.ndim - len(rest)
    # As in NumPy: the new dims replace adjacent indexed dims, and come first otherwise.
    adjacent = given == list(range(given[0], given[-1] + 1))
    at = given[0] if adjacent else 0
    return Value(out.shape, (*rest[:at], *(None,) * num_new, *rest[at:]), weight=x.weight, zero=x.zero)


@rule(aten.index_select.default, aten.gather.default, aten.roll.default)
@rule(aten.index_copy.default, aten.index_copy_.default, aten.index_add.default, aten.index_add_.default)
@rule(aten.scatter.src, aten.scatter.value, aten.scatter_.src, aten.scatter_.value, aten.scatter_reduce.two)
@rule(aten.scatter_add.default, aten.scatter_add_.default, aten.scatter_reduce_.two)
def _along_dim(walk: Walk, out: Value, x: Value, dim: Any, *args: Any, **kwargs: Any) -> Value:
    """Data moves entries along the dims, which are frozen."""
    name = op_name(walk.node.target)  # type: ignore[union-attr]
    if name == "roll":
        dim = args[0] if args else ()
    dims = [d % x.ndim for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
    for d in dims:
        walk.freeze(x.labels[d], "entries of this dim are moved by data")
    for other in args:
        if isinstance(other, Value) and other.ndim == x.ndim:
            for d, labels in enumerate(other.labels):
                if d in dims or labels is None:
                    walk.freeze(labels, "entries of this dim are moved by data")
                    if labels is None and d not in dims and name != "index_select":
                        walk.freeze(x.labels[d], "entries of this dim are moved by data")
                else:
                    walk.unite(x.labels[d], labels)
    written = all(arg.zero for arg in args if isinstance(arg, Value)) and not (
        name.startswith("scatter") and any(isinstance(arg, (int, float)) and arg != 0 for arg in args)
    )
    return Value(
        out.shape, tuple(None if d in dims else own for d, own in enumerate(x.labels)), zero=x.zero and written
    )


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
    sizes = [arg for arg in args if isinstance(arg, (list, tuple))][0]
    labels = tuple(walk.alike(size) for size in sizes)
    name = str(walk.node.target.overloadpacket.__name__)  # type: ignore[union-attr]
    for dim, (size, dim_labels) in enumerate(zip(sizes, labels, strict=True)):
        walk.literal(name, dim, size, dim_labels)
    return Value(out.shape, labels, zero="zeros" in name)


@rule(aten.tril.default, aten.triu.default, aten.tril_.default, aten.triu_.default)
def _triangle(walk: Walk, out: Value, x: Value, *args: Any) -> Value:
    """A triangle of the last two dims, which freeze; the others pass."""
    for labels in x.labels[-2:]:
        walk.freeze(labels, "a triangle is cut out of this dim")
    return Value(out.shape, (*x.labels[:-2], None, None), zero=x.zero)
