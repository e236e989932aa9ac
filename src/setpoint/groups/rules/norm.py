"""Normalisation: batch norm carries channels exactly; a norm *over* units makes zero differ from absent."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def _silences(weight: Value | None, bias: Value | None) -> bool:
    """Whether a dropped unit gives zero for any input: its scale and its shift are zero."""
    return weight is not None and weight.zero and (bias is None or bias.zero)


def _carry(walk: Walk, labels: DimLabels, parameters: Sequence[Value | None]) -> DimLabels:
    for parameter in parameters:
        if parameter is not None:
            labels = walk.unite(labels, parameter.labels[0])
    return labels


@rule(aten.batch_norm.default, aten.instance_norm.default)
def _batch_norm(
    walk: Walk,
    out: Value,
    x: Value,
    weight: Value | None = None,
    bias: Value | None = None,
    running_mean: Value | None = None,
    running_var: Value | None = None,
    *args: object,
    **kwargs: object,
) -> Value:
    """Each channel is normalised by itself; any other dim with units is averaged over."""
    for dim, labels in enumerate(x.labels):
        if dim != 1:
            walk.lossy(labels, "batch norm averages over this dim")
    channel = _carry(walk, x.labels[1], (weight, bias, running_mean, running_var))
    zero = _silences(weight, bias) or (x.zero and bias is None)
    return Value(out.shape, (x.labels[0], channel, *x.labels[2:]), zero=zero)


@rule(aten.layer_norm.default, aten.rms_norm.default)
def _layer_norm(
    walk: Walk,
    out: Value,
    x: Value,
    normalized_shape: Sequence[int],
    weight: Value | None = None,
    bias: Value | None = None,
    *args: object,
    **kwargs: object,
) -> Value:
    """The mean (or mean square) over the units changes when one leaves."""
    labels = list(x.labels)
    first = x.ndim - len(normalized_shape)
    kind = "a LayerNorm" if "layer" in walk.where else "an RMSNorm"
    for offset, size in enumerate(normalized_shape):
        dim = first + offset
        walk.lossy(labels[dim], f"{kind} runs over these channels")
        for parameter in (weight, bias):
            if isinstance(parameter, Value):
                labels[dim] = walk.unite(labels[dim], parameter.labels[offset])
        walk.literal("layer_norm" if "layer" in walk.where else "rms_norm", offset, size, labels[dim])
    leading = any(own is not None for own in labels[:first])
    zero = _silences(weight, bias) if not leading else x.zero and bias is None
    return Value(out.shape, tuple(labels), zero=zero)


@rule(aten.group_norm.default)
def _group_norm(
    walk: Walk,
    out: Value,
    x: Value,
    num_groups: int,
    weight: Value | None = None,
    bias: Value | None = None,
    *args: object,
    **kwargs: object,
) -> Value:
    """Channels are `(num_groups, channels / num_groups)`: only a complete group is lossless to drop."""
    channels = x.shape[1]
    labels = x.labels[1]
    for dim, own in enumerate(x.labels):
        if dim > 1:
            walk.lossy(own, "group norm averages over this dim")
    if labels is not None:
        groups, per_group = labels, channels // num_groups
        if num_groups == 1:
            walk.lossy(labels, "a GroupNorm runs over these channels")
        elif per_group > 1:
            groups, within = walk.atoms.fresh(num_groups), walk.atoms.fresh(per_group)
            walk.lossy(within, "a GroupNorm runs over these channels")
            walk.atoms.unite(labels, walk.product((groups, within)).ravel())
        if num_groups > 1:
            walk.attributes[walk.module, "num_groups"] = groups
            walk.literal("group_norm", 0, num_groups, groups)
    channel = _carry(walk, labels, (weight, bias))
    return Value(
        out.shape, (x.labels[0], channel, *x.labels[2:]), zero=_silences(weight, bias) or (x.zero and bias is None)
    )


@rule(aten._weight_norm.default)
def _weight_norm(walk: Walk, out: Value, direction: Value, size: Value, dim: int = 0) -> tuple[DimLabels, ...]:
    """`size * direction / |direction|`, with the norm over all dims but one, which zeros do not change."""
    labels = list(direction.labels)
    if size.ndim == 0:  # one norm over all dims
        return direction.labels
    labels[dim] = walk.unite(labels[dim], size.labels[dim])
    # A zero row of `direction` would give 0 / 0. A mask leaves it alone, since its size is zero already.
    walk.atoms.mark("unmasked", direction.labels[dim])
    return tuple(labels)
