"""Windows over positions: pooling, resizing, unfolding. Units along the positions freeze, channels pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from setpoint.groups.walk import DimLabels, Value, Walk, op_name, rule

aten = torch.ops.aten


@rule(aten.unfold.default)
def _unfold(walk: Walk, out: Value, x: Value, dim: int, size: int, step: int) -> tuple[DimLabels, ...]:
    """Windows along a dim, which freezes; the entries of a window become a last dim."""
    labels = list(x.labels)
    walk.freeze(labels[dim], "windows are cut out of this dim")
    labels[dim] = None
    return (*labels, None)


@rule(aten.im2col.default)
def _im2col(walk: Walk, out: Value, x: Value, kernel: Sequence[int], *args: Any) -> tuple[DimLabels, ...]:
    """`(batch, channels, height, width)` becomes `(batch, channels * kernel, positions)`, each channel side by side."""
    for labels in x.labels[-2:]:
        walk.freeze(labels, "a window slides over this dim")
    own = x.labels[-3]
    return (*x.labels[:-3], None if own is None else own.repeat(math.prod(kernel)), None)


@rule(aten.col2im.default)
def _col2im(
    walk: Walk, out: Value, x: Value, size: Sequence[int], kernel: Sequence[int], *args: Any
) -> tuple[DimLabels, ...]:
    """The reverse: the entries of a channel's window are dropped together."""
    walk.freeze(x.labels[-1], "windows are put together from this dim")
    own = x.labels[-2]
    if own is not None:
        channels = own.reshape(-1, math.prod(kernel))
        walk.atoms.unite(channels, channels[:, :1])
        own = channels[:, 0]
    return (*x.labels[:-2], own, None, None)


def _windows(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Windows over the last dims: units along those freeze, the others pass."""
    # "max_pool2d" slides over two dims.
    num_spatial = next(int(letter) for letter in op_name(walk.node.target) if letter.isdigit())  # type: ignore[union-attr]
    for spatial in x.labels[x.ndim - num_spatial :]:
        walk.freeze(spatial, "a window slides over this dim")
    labels = (*x.labels[: x.ndim - num_spatial], *(None,) * num_spatial)
    return tuple(labels for _ in out) if isinstance(out, tuple) else labels


_POOLINGS = (
    "avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices lp_pool1d "
    "avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices "
    "avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices"
)
_RESIZINGS = (
    "upsample_nearest1d upsample_linear1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
    "_upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d upsample_trilinear3d "
    "reflection_pad2d replication_pad2d"
)
for _name in (*_POOLINGS.split(), *_RESIZINGS.split()):
    if hasattr(aten, _name):  # a release of torch may lack one
        _packet = getattr(aten, _name)
        for _overload in _packet.overloads():
            if "out" not in _overload:
                rule(getattr(_packet, _overload))(_windows)
