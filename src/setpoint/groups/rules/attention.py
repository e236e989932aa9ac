"""Scaled dot product attention: heads are a batch dim of it, so a head is kept or dropped as one."""

from __future__ import annotations

from typing import Any

import torch

from setpoint.groups.rules.contract import contract_dim, num_gradients
from setpoint.groups.rules.elementwise import unite_broadcast
from setpoint.groups.walk import DimLabels, Value, Walk, rule

aten = torch.ops.aten


def _heads(walk: Walk, query: Value, key: Value, value: Value, mask: Any, grouped: bool) -> list[DimLabels]:
    """Unite batch dims of queries, keys and values; with grouped queries several query heads share a key head."""
    if not grouped or query.shape[-3] == key.shape[-3]:
        values = [Value(v.shape[:-2], v.labels[:-2]) for v in (query, key, value)]
    else:
        repeat = query.shape[-3] // key.shape[-3]
        # Each key head's atoms are repeated for its query heads: that ties these, so they are dropped together.
        values = [Value(query.shape[:-2], query.labels[:-2])]
        for v in (key, value):
            labels = v.labels[-3]
            repeated = None if labels is None else labels.repeat(repeat)
            heads = 1 if v.shape[-3] == 1 else query.shape[-3]
            values.append(Value((*v.shape[:-3], heads), (*v.labels[:-3], repeated)))
    if isinstance(mask, Value) and mask.ndim > 2:
        values.append(Value(mask.shape[:-2], mask.labels[:-2]))
    return list(unite_broadcast(walk, values, query.ndim - 2))


@rule(aten.scaled_dot_product_attention.default)
def _sdpa(
    walk: Walk, out: Value, query: Value, key: Value, value: Value, attn_mask: Any = None, *args: Any, **kwargs: Any
) -> Value:
    """`softmax(q k^T * scale) v`; the default scale depends on the head size, which is then frozen."""
    batch = _heads(walk, query, key, value, attn_mask, bool(kwargs.get("enable_gqa", False)))
    for labels in batch:
        walk.atoms.mark("batch", labels)
    inner = contract_dim(walk, query, -1, key, -1)
    if kwargs.get("scale") is None:
        walk.freeze(inner, "the attention scale depends on the head size")
    for operand, dim in ((query, -2), (key, -2), (value, -2)):
        walk.freeze(operand.labels[dim], "attention runs over this dim")
    batch_dims = list(zip(query.shape[:-2], batch, strict=True))
    positions = query.shape[-2] * key.shape[-2]
    scores = Value(out.shape, (None,) * out.ndim, grad=query.grad or key.grad)
    walk.contract(positions, [*batch_dims, (query.shape[-1], inner)], num_gradients(query, key))
    walk.contract(positions, [*batch_dims, (value.shape[-1], value.labels[-1])], num_gradients(scores, value))
    return Value(out.shape, (*batch, None, value.labels[-1]), zero=value.zero)
