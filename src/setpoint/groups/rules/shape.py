"""Ops that move entries about, look them up or fill new tensors: exact index maps, as array indexing."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def _blocks(source: Sequence[int], target: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of dims with equal products: how a reshape splits and merges. Dims of size 1 are skipped."""
    before, after = (
        {d: math.prod(sizes[: d + 1]) for d, size in enumerate(sizes) if size != 1} for sizes in (source, target)
    )
    return [
        ([d for d, end in before.items() if low < end <= high], [d for d, end in after.items() if low < end <= high])
        for low, high in pairwise([1, *sorted({*before.values()} & {*after.values()})])
    ]


def _merge(walk: Walk, value: Value, dims: list[int]) -> DimLabels:
    """Labels of a run of dims merged into one; two labelled dims make cells that are dropped with either."""
    factors = {d: labels for d in dims if (labels := value.labels[d]) is not None}
    if not factors:
        return None
    cells = walk.product(tuple(factors.values())) if len(factors) > 1 else next(iter(factors.values()))
    cells = cells.reshape([value.shape[d] if d in factors else 1 for d in dims])
    return np.broadcast_to(cells, [value.shape[d] for d in dims]).reshape(-1)


def _split(walk: Walk, flat: np.ndarray, sizes: list[int]) -> list[DimLabels]:
    """Labels of one dim split into several; entries that depend on two of them become cells of both."""
    cells = flat.reshape(sizes)
    roots = walk.atoms.find(cells)
    depends = [axis for axis in range(len(sizes)) if (roots != np.take(roots, [0], axis=axis)).any()]
    used = cells[tuple(slice(None) if axis in depends else 0 for axis in range(len(sizes)))]
    factors = [used]
    if len(depends) > 1:
        factors = [walk.atoms.fresh(sizes[axis]) for axis in depends]
        walk.atoms.unite(used, walk.product(factors))
    found = dict(zip(depends, factors, strict=False))
    return [found.get(axis) for axis in range(len(sizes))]


def reshape(walk: Walk, value: Value, shape: Sequence[int]) -> tuple[DimLabels, ...]:
    """Labels after a reshape."""
    walk.freeze_dims(
        value, (d for d, size in enumerate(value.shape) if size == 1), "a dim of one entry is reshaped away"
    )
    result: list[DimLabels] = [None] * len(shape)
    for ins, outs in _blocks(value.shape, shape):
        if len(ins) == len(outs) == 1:
            result[outs[0]] = value.labels[ins[0]]
        elif (flat := _merge(walk, value, ins)) is not None:
            for dim, labels in zip(outs, _split(walk, flat, [shape[d] for d in outs]), strict=True):
                result[dim] = labels
    return tuple(result)


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_as.default, aten.reshape_as.default)
def _view(walk: Walk, out: Value, x: Value, sizes: Any) -> tuple[DimLabels, ...]:
    """A reshape; its sizes are recorded, since the forward may write them out."""
    labels = reshape(walk, x, out.shape)
    mixed: set[int] = set()  # dims whose size also counts data (a batch, positions)
    for ins, outs in _blocks(x.shape, out.shape):
        if len(ins) > 1 and any(x.labels[d] is None for d in ins):
            mixed.update(outs)
    for dim, size in enumerate(sizes if isinstance(sizes, (list, tuple)) else ()):
        if isinstance(size, int) and dim not in mixed:
            walk.literal(dim, size, labels[dim])
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
    for offset, size in enumerate(sizes):
        walk.literal(offset, size, labels[dim % x.ndim + offset])
    return labels


@rule(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
@rule(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, aten.adjoint.default)
@rule(aten.permute.default, aten.movedim.int, aten.movedim.intlist)
def _permute(walk: Walk, out: Value, x: Value, *dims: Any) -> tuple[DimLabels, ...]:
    """Dims in a new order, which the op shows on a tensor without data in which each dim is as long as its number."""
    numbered = torch.empty(tuple(range(x.ndim)), device="meta")
    return tuple(x.labels[d] for d in walk.node.target(numbered, *dims).shape)  # type: ignore[union-attr,operator]


def _padded(x: Value, out: Value) -> Value:
    """A tensor with as many dims as the output, of one entry where it has none."""
    new = out.ndim - x.ndim
    return Value((1,) * new + x.shape, (None,) * new + x.labels, zero=x.zero)


def _copied(x: Value, out: Value, labels: Sequence[DimLabels]) -> Value:
    """Copies of a tensor; a dropped copy is not zero, where nothing but copies can be dropped."""
    zero = x.zero and (x.shape == out.shape or any(own is not None for own in x.labels))
    return Value(out.shape, tuple(labels), zero=zero)


def _repeated(walk: Walk, own: DimLabels, size: int, repeats: int, how: Callable[..., np.ndarray]) -> DimLabels:
    """Copies of entries belong to the same units; copies of a dim of one follow any dim they are united with."""
    if size == 1:
        return walk.alike(repeats)
    return None if own is None else how(own, repeats)


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(walk: Walk, out: Value, x: Value, sizes: Any, *args: Any, **kwargs: Any) -> Value:
    x = _padded(x, out)
    entries = zip(x.labels, x.shape, out.shape, strict=True)
    labels = [own if before == after else walk.alike(after) for own, before, after in entries]
    for dim, size in enumerate(sizes if isinstance(sizes, (list, tuple)) else ()):
        walk.literal(dim, size, labels[dim])
    return _copied(x, out, labels)


@rule(aten.repeat.default, aten.tile.default)
def _repeat(walk: Walk, out: Value, x: Value, repeats: Sequence[int]) -> Value:
    x, repeats = _padded(x, out), [1] * (out.ndim - len(repeats)) + list(repeats)  # `tile` may leave leading dims out
    entries = zip(x.labels, x.shape, repeats, strict=True)
    labels = [_repeated(walk, own, size, times, np.tile) for own, size, times in entries]
    for dim, size in enumerate(x.shape):
        if size == 1:
            walk.literal(dim, repeats[dim], labels[dim])
    return _copied(x, out, labels)


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(walk: Walk, out: Value, x: Value, repeats: int, dim: int | None = None, **kwargs: Any) -> Value:
    assert dim is not None, "it repeats entries of all dims"
    labels = _repeated(walk, x.labels[dim], x.shape[dim], repeats, np.repeat)
    if x.shape[dim] == 1:
        walk.literal(0, repeats, labels)
    return _copied(x, out, x.relabelled(dim, labels))


def _met(walk: Walk, tensors: Sequence[Value], but: int | None = None) -> list[DimLabels]:
    """Labels of tensors whose dims unite, but for one."""
    labels = list(tensors[0].labels)
    for value in tensors[1:]:
        for dim, size in enumerate(value.shape):
            if dim != but and size > 1:
                labels[dim] = walk.unite(labels[dim], value.labels[dim])
    return labels


@rule(aten.cat.default, aten.concat.default, aten.hstack.default)
def _cat(walk: Walk, out: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[DimLabels, ...]:
    """Units side by side; the other dims unite."""
    tensors = [value for value in tensors if value.shape != (0,)]
    dim = (1 if walk.op == "hstack" and out.ndim > 1 else dim) % out.ndim
    labels = _met(walk, tensors, but=dim)
    along = [(value.shape[dim], value.labels[dim]) for value in tensors]
    if any(own is not None for _, own in along):
        labels[dim] = np.concatenate([np.zeros(size, np.int64) if own is None else own for size, own in along])
    return tuple(labels)


@rule(aten.stack.default)
def _stack(walk: Walk, out: Value, tensors: Sequence[Value], dim: int = 0) -> tuple[DimLabels, ...]:
    """All dims unite, beside a new one."""
    labels = _met(walk, tensors)
    labels.insert(dim % out.ndim, None)
    return tuple(labels)


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes)
@rule(aten.chunk.default, aten.tensor_split.sections)
def _pieces(
    walk: Walk, out: tuple[Value, ...], x: Value, sizes: Any, dim: int = 0
) -> tuple[tuple[DimLabels, ...], ...]:
    """Pieces of a dim; their sizes are recorded, since the forward may write them out."""
    own, first, results = x.labels[dim], 0, []
    for number, piece in enumerate(out):
        size = piece.shape[dim]
        part = None if own is None else own[first : first + size]
        results.append(x.relabelled(dim, part))
        walk.literal(number, size, part)
        first += size
    return tuple(results)


@rule(aten.unbind.int, aten.select.int)
def _entries(walk: Walk, out: Any, x: Value, dim: int = 0, index: Any = None) -> Any:
    """Entries of a dim by themselves; the dim is frozen."""
    labels = list(walk.freeze_dims(x, [dim], "entries of this dim are taken out one by one"))
    del labels[dim]
    return (labels,) * len(out) if isinstance(out, tuple) else labels


@rule(aten.slice.Tensor, aten.narrow.default)
def _slice(
    walk: Walk, out: Value, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: Any = 1
) -> tuple[DimLabels, ...]:
    """A run of entries of a dim; trials find the forwards whose bounds do not follow the units."""
    own = x.labels[dim]
    if own is None or out.shape[dim] == x.shape[dim]:
        return x.labels
    if walk.op == "narrow":
        start, end = (start, start + end) if isinstance(start, int) else (0, 0)
    part = own[start:end:step]
    if len(part) != out.shape[dim] or len(part) == 1:
        return walk.freeze_dims(x, [dim], "this dim is sliced by a number that data gives, or to one entry")
    if walk.op == "slice" and step == 1:
        first = slice(start, end).indices(len(own))[0]  # also where nothing is left
        walk.literal(0, first, own[:first])
        walk.literal(1, len(part), part)
    return x.relabelled(dim, part)


@rule(aten.flip.default)
def _flip(walk: Walk, out: Value, x: Value, dims: Sequence[int]) -> tuple[DimLabels, ...]:
    turned = {d % x.ndim for d in dims}
    return tuple(own if own is None or d not in turned else own[::-1].copy() for d, own in enumerate(x.labels))


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(walk: Walk, out: Value, x: Value, padding: Sequence[int], *args: Any, **kwargs: Any) -> Value:
    """Padded dims must be data."""
    padded = [dim for dim in range(x.ndim) if x.shape[dim] != out.shape[dim]]
    numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, (int, float))]
    labels = walk.freeze_dims(x, padded, "this dim is padded")
    return Value(out.shape, labels, zero=x.zero and not any(numbers))


@rule(aten.pixel_shuffle.default)
def _pixel_shuffle(walk: Walk, out: Value, x: Value, factor: int) -> tuple[DimLabels, ...]:
    """Channels become `(channels, factor, factor)`, the factors move into space."""
    walk.freeze_dims(x, (-2, -1), "space is shuffled into this dim")
    *batch, channels, height, width = x.shape
    labels = reshape(walk, x, (*batch, channels // factor**2, factor, factor, height, width))
    for factor_labels in labels[-4:-2]:
        walk.freeze(factor_labels, "this dim is shuffled into space")
    return (*labels[:-4], None, None)


@rule(aten.pixel_unshuffle.default)
def _pixel_unshuffle(walk: Walk, out: Value, x: Value, factor: int) -> tuple[DimLabels, ...]:
    """Each channel becomes `factor x factor` channels."""
    *batch, own, _, _ = walk.freeze_dims(x, (-2, -1), "this dim is shuffled into channels")
    return (*batch, None if own is None else own.repeat(factor**2), None, None)


@rule(aten.glu.default)
def _glu(walk: Walk, out: Value, x: Value, dim: int = -1) -> tuple[DimLabels, ...]:
    """`first half * sigmoid(second half)`: the halves unite."""
    own = x.labels[dim]
    return x.labels if own is None else x.relabelled(dim, walk.unite(own[: len(own) // 2], own[len(own) // 2 :]))


@rule(aten.embedding.default, aten.embedding_bag.padding_idx, aten.embedding_bag.default)
@rule(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding(walk: Walk, out: Any, weight: Value, *args: Any, **kwargs: Any) -> Any:
    """Rows are chosen by data, and in a bag summed; columns are features."""
    walk.freeze(weight.labels[0], "rows are looked up by token (an embedding)")
    for remark in ("produce", "embedding"):
        walk.atoms.mark(remark, weight.labels[1])
    found, *others = out if isinstance(out, tuple) else (out,)
    found = Value(found.shape, (*(None,) * (found.ndim - 1), weight.labels[1]), zero=weight.zero)
    return (found, *(None for _ in others)) if isinstance(out, tuple) else found


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
