"""Norms, sums, extremes and losses: where one runs over units, a zero is not an absent entry; the other dims pass."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from setpoint.groups.rules.elementwise import united
from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def _silences(weight: Value | None, bias: Value | None) -> bool:
    """Whether a dropped unit gives zero for any input: its scale and its shift are zero."""
    return weight is not None and weight.zero and (bias is None or bias.zero)


def _by_channel(walk: Walk, x: Value, labels: DimLabels, weight: Value | None, bias: Value | None, *more: Any) -> Value:
    """What is normalised, with a scale and a shift for each channel."""
    for parameter in (weight, bias, *more):
        if parameter is not None:
            labels = walk.unite(labels, parameter.labels[0])
    return Value(x.shape, x.relabelled(1, labels), zero=_silences(weight, bias) or (x.zero and bias is None))


@rule(aten.batch_norm.default, aten.instance_norm.default)
def _batch_norm(walk: Walk, out: Value, x: Value, *args: Any, **kwargs: Any) -> Value:
    """Each channel is normalised by itself; any other dim with units is averaged over."""
    for dim, labels in enumerate(x.labels):
        if dim != 1:
            walk.lossy(labels, "batch norm averages over this dim")
    return _by_channel(walk, x, x.labels[1], *args[:4])  # scale, shift and running statistics


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(
    walk: Walk, out: Value, x: Value, shape: Sequence[int], weight: Any = None, bias: Any = None, *args: Any, **kw: Any
) -> Value:
    """The mean (or mean square) over the units changes when one leaves."""
    kind = "a LayerNorm" if walk.op == "layer_norm" else "an RMSNorm"
    bias = bias if isinstance(bias, Value) else None  # an RMSNorm has a number in its place
    labels = list(x.labels)
    first = x.ndim - len(shape)
    for offset, size in enumerate(shape):
        dim = first + offset
        walk.lossy(labels[dim], f"{kind} runs over these channels")
        for parameter in (weight, bias):
            if parameter is not None:
                labels[dim] = walk.unite(labels[dim], parameter.labels[offset])
        walk.literal(offset, size, labels[dim])
    leading = any(own is not None for own in labels[:first])
    return Value(out.shape, tuple(labels), zero=x.zero and bias is None if leading else _silences(weight, bias))


@rule(aten.group_norm.default)
def _group_norm(
    walk: Walk, out: Value, x: Value, num_groups: int, weight: Any = None, bias: Any = None, *args: Any, **kw: Any
) -> Value:
    """Channels are `(num_groups, channels / num_groups)`: only a complete group is lossless to drop."""
    labels = x.labels[1]
    for own in x.labels[2:]:
        walk.lossy(own, "group norm averages over this dim")
    if labels is not None and num_groups == 1:
        walk.lossy(labels, "a GroupNorm runs over these channels")
    elif labels is not None:
        groups, per_group = labels, x.shape[1] // num_groups
        if per_group > 1:
            groups, within = walk.atoms.fresh(num_groups), walk.atoms.fresh(per_group)
            walk.lossy(within, "a GroupNorm runs over these channels")
            walk.atoms.unite(labels, walk.product((groups, within)).ravel())
        walk.attributes[walk.module, "num_groups"] = groups
        walk.literal(0, num_groups, groups)
    return _by_channel(walk, x, labels, weight, bias)


@rule(aten._weight_norm.default)
def _weight_norm(walk: Walk, out: Value, direction: Value, size: Value, dim: int = 0) -> tuple[DimLabels, ...]:
    """`size * direction / |direction|`, with the norm over all dims but one, which zeros do not change."""
    if size.ndim == 0:  # one norm over all dims
        return direction.labels
    # A zero row of `direction` would give 0 / 0. A mask leaves it alone, since its size is zero already.
    walk.atoms.mark("unmasked", direction.labels[dim])
    return direction.relabelled(dim, walk.unite(direction.labels[dim], size.labels[dim]))


def _dims(value: Value, dim: Any) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and len(dim) == 0):
        return list(range(value.ndim))
    return [d % max(value.ndim, 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _reduced(out: Any, value: Value, dims: list[int], keepdim: bool) -> Any:
    """Labels of the dims that are left."""
    labels = tuple(None if d in dims else own for d, own in enumerate(value.labels) if keepdim or d not in dims)
    return (labels,) * len(out) if isinstance(out, tuple) else labels


@rule(aten.mean.default, aten.mean.dim, aten.var.dim, aten.var.correction, aten.std.dim, aten.std.correction)
@rule(aten.var_mean.dim, aten.var_mean.correction)
def _mean(walk: Walk, out: Any, x: Value, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    """A mean divides by the number of entries, so a zero entry is not an absent one."""
    dims = _dims(x, dim)
    for d in dims:
        walk.lossy(x.labels[d], "a mean or variance runs over this dim")
    return _reduced(out, x, dims, kwargs.get("keepdim", bool(args) and args[-1] is True))


@rule(aten.sum.default, aten.sum.dim_IntList)
@rule(aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar)
def _sum(walk: Walk, out: Value, x: Value, *args: Any, **kwargs: Any) -> Any:
    """A sum of zeros is the sum without them."""
    if walk.op != "sum":
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
    return _reduced(out, x, dims, kwargs.get("keepdim", args[1] if len(args) > 1 else False))


@rule(aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim, aten.argmax.default, aten.argmin.default)
@rule(aten.max.default, aten.min.default, aten.any.dim, aten.all.dim, aten.any.default, aten.all.default)
@rule(aten.logsumexp.default, aten.prod.dim_int, aten.prod.default, aten.median.dim)
def _extreme(walk: Walk, out: Any, x: Value, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """The extreme of a set changes when a zero leaves it: the dim freezes."""
    dims = _dims(x, dim)
    walk.freeze_dims(x, dims, "an extreme or a product runs over this dim")
    return _reduced(out, x, dims, keepdim)


@rule(aten.softmax.int, aten.log_softmax.int, aten._softmax.default, aten._log_softmax.default)
@rule(aten.cumsum.default, aten.cumprod.default, aten.sort.default, aten.argsort.default)
def _along(walk: Walk, out: Any, x: Value, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    """A softmax, running sum or sort ties the entries of its dim together."""
    walk.freeze_dims(x, [dim], "a softmax, a running sum or a sort runs over this dim")
    return (x.labels, x.labels) if isinstance(out, tuple) else Value(out.shape, x.labels, zero=False)


@rule(aten.mse_loss.default, aten.l1_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default)
def _distance(walk: Walk, out: Value, x: Value, y: Value, reduction: int = 1, *args: Any) -> Value:
    """Entry by entry, where zeros are no distance apart; then a mean (1) or a sum (2) over all of it."""
    distances = united(walk, Value(np.broadcast_shapes(x.shape, y.shape), ()), (x, y), True, "sub")
    for labels in distances.labels if reduction else ():
        if reduction == 1:
            walk.lossy(labels, "a mean runs over this dim")
        elif not distances.zero:
            walk.lossy(labels, "a sum runs over this dim, where dropped units are not zero")
        walk.atoms.mark("summed", labels)
    return replace(distances, labels=() if reduction else distances.labels)
