"""Ops that move entries about without touching them: exact index maps, as array indexing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

aten = torch.ops.aten


def _blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims with equal products: how a reshape splits and merges. Dims of size 1 are skipped."""
    left = [d for d, size in enumerate(source) if size != 1]
    right = [d for d, size in enumerate(target) if size != 1]
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        ins, outs = [left[i]], [right[j]]
        a, b = source[left[i]], target[right[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(left[i])
                a *= source[left[i]]
            else:
                j += 1
                outs.append(right[j])
                b *= target[right[j]]
        blocks.append((ins, outs))
        i, j = i + 1, j + 1
    return blocks


def _merge(walk: Walk, value: Value, dims: list[int]) -> DimLabels:
    """Labels of a run of dims merged into one; two labelled dims make cells that are dropped with either."""
    labelled = [d for d in dims if value.labels[d] is not None]
    if not labelled:
        return None
    factors = [np.asarray(value.labels[d]) for d in labelled]
    cells = factors[0] if len(factors) == 1 else walk.product(factors)
    shape = [value.shape[d] if d in labelled else 1 for d in dims]
    full = np.broadcast_to(cells.reshape(shape), [value.shape[d] for d in dims])
    return full.reshape(-1)


def _split(walk: Walk, flat: np.ndarray, sizes: list[int]) -> list[DimLabels]:
    """Labels of one dim split into several; entries that depend on two of them become cells of both."""
    cells = flat.reshape(sizes)
    roots = walk.atoms.find(cells)
    depends = [axis for axis in range(len(sizes)) if (roots != np.take(roots, [0], axis=axis)).any()]
    for axis in range(len(sizes)):
        if axis not in depends:
            cells = np.take(cells, [0], axis=axis)
    if not depends:
        return [None] * len(sizes)
    if len(depends) == 1:
        factors = [cells.reshape(-1)]
    else:
        factors = [walk.atoms.fresh(sizes[axis]) for axis in depends]
        used = cells.reshape([sizes[axis] for axis in depends])
        walk.atoms.unite(used, walk.product(factors))
    result: list[DimLabels] = [None] * len(sizes)
    for axis, factor in zip(depends, factors, strict=True):
        result[axis] = factor
    return result


def reshape(walk: Walk, value: Value, shape: Sequence[int]) -> tuple[DimLabels, ...]:
    """Labels after a reshape."""
    for size, labels in zip(value.shape, value.labels, strict=True):
        if size == 1:
            walk.freeze(labels, "a dim of one entry is reshaped away")
    result: list[DimLabels] = [None] * len(shape)
    for ins, outs in _blocks(value.shape, shape):
        if len(ins) == 1 and len(outs) == 1:
            result[outs[0]] = value.labels[ins[0]]
            continue
        flat = _merge(walk, value, ins)
        if flat is not None:
            for dim, labels in zip(outs, _split(walk, flat, [shape[d] for d in outs]), strict=True):
                result[dim] = labels
    return tuple(result)


def _merges_data(value: Value, shape: Sequence[int]) -> set[int]:
    """Output dims whose size also counts data (a batch, positions)."""
    mixed: set[int] = set()
    for ins, outs in _blocks(value.shape, shape):
        if len(ins) > 1 and any(value.labels[d] is None for d in ins):
            mixed.update(outs)
    return mixed


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default)
def _view(walk: Walk, out: Value, x: Value, size: Any) -> tuple[DimLabels, ...]:
    """A reshape; its sizes are recorded, since the forward may write them out."""
    labels = reshape(walk, x, out.shape)
    if isinstance(size, (list, tuple)):
        mixed = _merges_data(x, out.shape)
        for dim, given in enumerate(size):
            if isinstance(given, int) and dim not in mixed:
                walk.literal(op_name(walk.node.target), dim, given, labels[dim])  # type: ignore[union-attr]
    return labels


@rule(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(walk: Walk, out: Value, x: Value, dims: Any = None) -> tuple[DimLabels, ...]:
    """Dims of one entry vanish, so a dim of units that may be meant must keep at least two."""
    for dim in range(x.ndim) if dims is None else dims if isinstance(dims, (list, tuple)) else [dims]:
        walk.atoms.mark("squeezed", x.labels[dim])
    return reshape(walk, x, out.shape)


@rule(aten.flatten.using_ints, aten.unsqueeze.default)
@rule(aten.atleast_2d.default, aten.atleast_1d.default)
def _flatten(walk: Walk, out: Value, x: Value, *args: Any) -> tuple[DimLabels, ...]:
    """Reshapes whose sizes the op works out by itself."""
    return reshape(walk, x, out.shape)


@rule(aten.unflatten.int)
def _unflatten(walk: Walk, out: Value, x: Value, dim: int, sizes: Sequence[int]) -> tuple[DimLabels, ...]:
    """One dim becomes several of written sizes."""
    labels = reshape(walk, x, out.shape)
    for offset, given in enumerate(sizes):
        walk.literal("unflatten", offset, given, labels[dim % x.ndim + offset])
    return labels


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
@rule(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, aten.adjoint.default)
@rule(aten.permute.default, aten.movedim.int, aten.movedim.intlist)
def _permute(walk: Walk, out: Value, x: Value, *dims: Any) -> tuple[DimLabels, ...]:
    """Dims in a new order, which the op shows on a tensor without data in which each dim is as long as its number."""
    numbered = torch.empty(tuple(range(x.ndim)), device="meta")
    return tuple(x.labels[d] for d in walk.node.target(numbered, *dims).shape)  # type: ignore[union-attr,operator]


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(walk: Walk, out: Value, x: Value, sizes: Any, *args: Any, **kwargs: Any) -> Value:
    """Copies of a dim of one follow any dim they are united with; a dropped copy is not zero."""
    own = (None,) * (out.ndim - x.ndim) + x.labels
    labels = [own[dim] if size == out.shape[dim] else walk.alike(out.shape[dim]) for dim, size in _padded(x, out)]
    if isinstance(sizes, (list, tuple)):
        for dim, given in enumerate(sizes):
            walk.literal(op_name(walk.node.target), dim, given, labels[dim])  # type: ignore[union-attr]
    return Value(out.shape, tuple(labels), zero=x.zero and (_spans(x, out) or any(own is not None for own in x.labels)))


def _padded(x: Value, out: Value) -> list[tuple[int, int]]:
    """(dim, size) of a tensor with as many dims as the output, of one entry where it has none."""
    return list(enumerate((1,) * (out.ndim - x.ndim) + x.shape))


def _spans(x: Value, out: Value) -> bool:
    return all(size == out.shape[dim] for dim, size in _padded(x, out))


@rule(aten.repeat.default, aten.tile.default)
def _repeat(walk: Walk, out: Value, x: Value, repeats: Sequence[int]) -> Value:
    """Copies side by side belong to the same units; copies of a dim of one follow any dim they are united with."""
    own = (None,) * (out.ndim - x.ndim) + x.labels
    repeats = [1] * (out.ndim - len(repeats)) + list(repeats)  # `tile` may leave those of leading dims out
    labels: list[DimLabels] = []
    for dim, size in _padded(x, out):
        labels.append(_repeated(walk, own[dim], size, repeats[dim], np.tile))
        if size == 1:
            walk.literal(op_name(walk.node.target), dim, repeats[dim], labels[dim])  # type: ignore[union-attr]
    return Value(out.shape, tuple(labels), zero=x.zero and (_spans(x, out) or any(own is not None for own in x.labels)))


def _repeated(walk: Walk, own: DimLabels, size: int, repeats: int, how: Callable[..., np.ndarray]) -> DimLabels:
    if size == 1:
        return walk.alike(repeats)
    return None if own is None else how(own, repeats)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(walk: Walk, out: Value, x: Value, repeats: int, dim: int | None = None, **kwargs: Any) -> Value:
    """Adjacent copies belong to the same units; copies of a dim of one follow any dim they are united with."""
    if dim is None:
        walk.freeze_all(x, "repeat_interleave over all dims")
        return Value(out.shape, (None,) * out.ndim)
    labels = list(x.labels)
    labels[dim] = _repeated(walk, labels[dim], x.shape[dim], repeats, np.repeat)
    if x.shape[dim] == 1:
        walk.literal("repeat_interleave", 0, repeats, labels[dim])
    return Value(out.shape, tuple(labels), zero=x.zero and (_spans(x, out) or any(own is not None for own in x.labels)))


@rule(aten.cat.default, aten.concat.default, aten.hstack.default)
def _cat(walk: Walk, out: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[DimLabels, ...]:
    """Units side by side; the other dims unite."""
    tensors = [value for value in tensors if value.shape != (0,)]
    dim = (1 if walk.where.endswith("hstack") and out.ndim > 1 else dim) % out.ndim
    labels: list[DimLabels] = list(tensors[0].labels)
    for value in tensors[1:]:
        for d in range(out.ndim):
            if d != dim and out.shape[d] > 1:
                labels[d] = walk.unite(labels[d], value.labels[d])
    along = [value.labels[dim] for value in tensors]
    if any(part is not None for part in along):
        sizes = [value.shape[dim] for value in tensors]
        parts = zip(sizes, along, strict=True)
        labels[dim] = np.concatenate([np.zeros(size, np.int64) if part is None else part for size, part in parts])
    return tuple(labels)


@rule(aten.stack.default)
def _stack(walk: Walk, out: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[DimLabels, ...]:
    labels: list[DimLabels] = list(tensors[0].labels)
    for value in tensors[1:]:
        for d, size in enumerate(value.shape):
            if size > 1:
                labels[d] = walk.unite(labels[d], value.labels[d])
    labels.insert(dim % out.ndim, None)
    return tuple(labels)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
@rule(aten.chunk.default, aten.tensor_split.sections)
def _pieces(walk: Walk, out: tuple[Value, ...], x: Value, sizes: Any, dim: int = 0) -> tuple[Value, ...]:
    """Pieces of a dim; their sizes are recorded, since the forward may write them out."""
    name = op_name(walk.node.target).removesuffix("_with_sizes")  # type: ignore[union-attr]
    dim = dim % x.ndim
    own = x.labels[dim]
    results, first = [], 0
    for number, piece in enumerate(out):
        size = piece.shape[dim]
        part = None if own is None else own[first : first + size]
        results.append(Value(piece.shape, (*x.labels[:dim], part, *x.labels[dim + 1 :]), zero=x.zero))
        walk.literal(name, number, size, part)
        first += size
    return tuple(results)


@rule(aten.unbind.int)
def _unbind(walk: Walk, out: tuple[Value, ...], x: Value, dim: int = 0) -> tuple[Value, ...]:
    """Each entry of a dim by itself; the dim is frozen."""
    walk.freeze(x.labels[dim], "entries of this dim are taken apart")
    labels = tuple(own for d, own in enumerate(x.labels) if d != dim % x.ndim)
    return tuple(Value(piece.shape, labels, zero=x.zero) for piece in out)


@rule(aten.select.int)
def _select(walk: Walk, out: Value, x: Value, dim: int, index: int) -> tuple[DimLabels, ...]:
    """One entry of a dim by its number; that dim freezes."""
    walk.freeze(x.labels[dim], "an entry of this dim is chosen by number")
    return tuple(own for d, own in enumerate(x.labels) if d != dim % x.ndim)


@rule(aten.slice.Tensor)
def _slice(
    walk: Walk, out: Value, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> tuple[DimLabels, ...]:
    """A run of entries of a dim; trials find the forwards whose bounds do not follow the units."""
    return _cut_out(walk, out, x, dim, slice(start, end, step))


@rule(aten.narrow.default)
def _narrow(walk: Walk, out: Value, x: Value, dim: int, start: Any, length: Any) -> tuple[DimLabels, ...]:
    return _cut_out(walk, out, x, dim, slice(start, start + length) if isinstance(start, int) else None)


def _cut_out(walk: Walk, out: Value, x: Value, dim: int, run: slice | None) -> tuple[DimLabels, ...]:
    dim = dim % x.ndim
    labels = list(x.labels)
    own = labels[dim]
    if own is not None and out.shape[dim] != x.shape[dim]:
        part = own[run] if run is not None else own[:0]
        if len(part) != out.shape[dim] or len(part) == 1:
            walk.freeze(own, "this dim is sliced by a number that data gives, or to one entry")
            labels[dim] = None
        else:
            labels[dim] = part
            first = 0 if run is None else run.indices(len(own))[0]
            if walk.node is not None and op_name(walk.node.target) == "slice" and run.step in (None, 1):  # type: ignore[union-attr]
                walk.literal("slice", 0, first, own[:first])
                walk.literal("slice", 1, len(part), part)
    return tuple(labels)


@rule(aten.flip.default)
def _flip(walk: Walk, out: Value, x: Value, dims: Sequence[int]) -> tuple[DimLabels, ...]:
    turned = {d % x.ndim for d in dims}
    return tuple(own if own is None or d not in turned else own[::-1].copy() for d, own in enumerate(x.labels))


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(walk: Walk, out: Value, x: Value, padding: Sequence[int], *args: Any, **kwargs: Any) -> Value:
    """Padded dims must be data."""
    labels = list(x.labels)
    for dim in range(x.ndim):
        if x.shape[dim] != out.shape[dim]:
            walk.freeze(labels[dim], "this dim is padded")
            labels[dim] = None
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, (int, float))]
    return Value(out.shape, tuple(labels), zero=x.zero and not any(numbers))


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(walk: Walk, out: Value, x: Value, factor: int) -> tuple[DimLabels, ...]:
    """Channels become `(channels, factor, factor)`, the factors move into space."""
    for spatial in x.labels[-2:]:
        walk.freeze(spatial, "space is shuffled into this dim")
    *batch, channels, height, width = x.shape
    labels = reshape(walk, x, (*batch, channels // factor**2, factor, factor, height, width))
    at = len(batch)
    for factor_labels in labels[at + 1 : at + 3]:
        walk.freeze(factor_labels, "this dim is shuffled into space")
    return (*labels[: at + 1], None, None)


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(walk: Walk, out: Value, x: Value, factor: int) -> tuple[DimLabels, ...]:
    """Each channel becomes `factor x factor` channels."""
    for spatial in x.labels[-2:]:
        walk.freeze(spatial, "this dim is shuffled into channels")
    own = x.labels[-3]
    return (*x.labels[:-3], None if own is None else own.repeat(factor**2), None, None)


@rule(aten.channel_shuffle.default)
def _channel_shuffle(walk: Walk, out: Value, x: Value, num_groups: int) -> tuple[DimLabels, ...]:
    """Channels read as `(groups, within)` and transposed."""
    own = x.labels[1]
    if own is None:
        return x.labels
    shuffled = own.reshape(num_groups, -1).T.reshape(-1)
    walk.freeze(own, "channels are shuffled by fixed numbers")
    return (x.labels[0], shuffled, *x.labels[2:])


@rule(aten.glu.default)
def _glu(walk: Walk, out: Value, x: Value, dim: int = -1) -> Value:
    """`first half * sigmoid(second half)`: the halves unite."""
    own = x.labels[dim]
    labels = list(x.labels)
    if own is not None:
        half = math.ceil(len(own) / 2)
        labels[dim] = walk.unite(own[:half], own[half:])
    return Value(out.shape, tuple(labels), zero=x.zero)
