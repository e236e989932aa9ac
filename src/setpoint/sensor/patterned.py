"""A patterned reading: saliencies of single weights, so that the least salient go as an N:M pattern lets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from setpoint.groups.group import Group
from setpoint.groups.weights import Pattern, active_of
from setpoint.sensor.reading import Reading


def patterned(
    reading: Reading, groups: tuple[Group, ...], shapes: Mapping[str, tuple[int, ...]], pattern: Pattern
) -> Reading:
    """The reading with saliencies raised where the pattern holds a weight back.

    A tensor loses `pattern.stride` weights of each block at a time, the least salient of the block. So that the
    least salient weights of the tensor are just these, every weight that goes later counts as at least a hair more
    than all that go earlier; the summed saliency of what goes at the next stride is unchanged.

    Args:
        reading: saliency of active weights.
        shapes: by group name, of its tensor.
        pattern: N:M, or free, which changes nothing.
    """
    if pattern.free or not reading.finite():
        return reading
    return replace(
        reading,
        saliency={g.name: _raised(reading.saliency[g.name], g, shapes[g.name], pattern) for g in groups},
    )


def _raised(
    saliency: Float64[np.ndarray, " units"], group: Group, shape: tuple[int, ...], pattern: Pattern
) -> Float64[np.ndarray, " units"]:
    active = active_of(group)
    whole = np.full(active.size, -np.inf)
    whole[active] = saliency
    blocks = pattern.blocks(whole.reshape(shape))
    ranks = np.argsort(np.argsort(blocks, axis=-1, kind="stable"), axis=-1)
    ranks -= np.isneginf(blocks).sum(-1, keepdims=True)
    raised, floor = blocks.copy(), -np.inf
    for stride in range(-(-pattern.block // pattern.stride)):
        here = (ranks >= stride * pattern.stride) & (ranks < (stride + 1) * pattern.stride)
        raised[here] = np.maximum(raised[here], floor)
        if here.any():
            floor = np.nextafter(raised[here].max(), np.inf)
    result: Float64[np.ndarray, " units"] = np.moveaxis(raised, -1, 2).reshape(-1)[active]
    return result
