"""Ops over positions: convolutions contract channels; pooling, windows and Fourier transforms pass them on."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from setpoint.groups.rules.contract import num_gradients, sum_over
from setpoint.groups.walk import DimLabels, Value, Walk, overloads, rule

aten = torch.ops.aten


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def _conv(walk: Walk, out: Value, x: Value, weight: Value, bias: Value | None = None, *args: Any, **kw: Any) -> Value:
    """Channels are contracted, kernel and space are data."""
    num_groups = kw.get("groups", args[3] if len(args) > 3 else 1)
    transposed = walk.op.startswith("conv_transpose")
    channel = x.ndim - weight.ndim + 1  # 0 where the input has no batch
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    walk.freeze_dims(x, range(channel + 1, x.ndim), "a kernel slides over this dim")
    inputs, outputs = x.labels[channel], weight.labels[out_dim]
    if transposed and num_groups > 1:
        outputs = walk.atoms.fresh(out.shape[channel])
    elif outputs is None:
        outputs = walk.atoms.fresh(weight.shape[out_dim])
        walk.freeze(outputs, "filters are data")
    if num_groups == 1:
        inputs = sum_over(walk, (x, inputs), (weight, weight.labels[in_dim]))
        walk.atoms.mark("produce", outputs)
        flop_dims = [(weight.shape[out_dim], outputs), (weight.shape[in_dim], inputs)]
    else:
        if transposed:
            # The weight is (in, out / groups, ...): its first dim follows the input, its second the outputs of a group.
            _tie_groups(walk, num_groups, weight.labels[0], None, outputs, weight.labels[1])
            inputs = walk.unite(inputs, weight.labels[0])
        else:
            _tie_groups(walk, num_groups, inputs, weight.labels[1], outputs, None)
        flop_dims = [(weight.shape[0], weight.labels[0]), (weight.shape[1], weight.labels[1])]
    walk.atoms.mark("conv", outputs)
    walk.attributes[walk.module, "out_channels"] = outputs
    if inputs is not None:
        walk.attributes[walk.module, "in_channels"] = inputs
    spatial = (x if transposed else out).shape[channel + 1 :]
    batch = math.prod(x.shape[:channel])
    walk.contract(math.prod(spatial) * math.prod(weight.shape[2:]) * batch, flop_dims, num_gradients(x, weight))
    outer = outputs if bias is None else walk.unite(outputs, bias.labels[-1])
    zero = weight.zero and (bias is None or bias.zero)
    return Value(out.shape, (*x.labels[:channel], outer, *(None,) * len(spatial)), zero=zero)


def _tie_groups(
    walk: Walk, num_groups: int, inputs: DimLabels, shared_in: DimLabels, outputs: np.ndarray, shared_out: DimLabels
) -> None:
    """Tie the channels of a grouped convolution, whose weight holds those of one group along its `shared` dims."""
    groups = walk.atoms.fresh(num_groups)
    for labels, shared in ((inputs, shared_in), (outputs, shared_out)):
        if labels is None:
            walk.freeze(groups, "the channels of a grouped convolution are data")
        elif len(labels) == num_groups:
            walk.atoms.unite(labels, groups)
        else:
            within = walk.atoms.fresh(len(labels) // num_groups)
            walk.atoms.unite(labels, walk.product((groups, within)).ravel())
            if shared is not None:
                walk.atoms.unite(shared, within)
    walk.attributes[walk.module, "groups"] = groups
    read, written = (shared_in, outputs) if shared_out is None else (inputs, shared_out)
    walk.grouped.append((groups, read, written))
    walk.literal(0, num_groups, groups)


@rule(aten.unfold.default)
def _unfold(walk: Walk, out: Value, x: Value, dim: int, size: int, step: int) -> tuple[DimLabels, ...]:
    """Windows along a dim, which freezes; the entries of a window become a last dim."""
    return (*walk.freeze_dims(x, [dim], "windows are cut out of this dim"), None)


@rule(aten.im2col.default)
def _im2col(walk: Walk, out: Value, x: Value, kernel: Sequence[int], *args: Any) -> tuple[DimLabels, ...]:
    """`(batch, channels, height, width)` becomes `(batch, channels * kernel, positions)`, each channel side by side."""
    *batch, channels, _, positions = walk.freeze_dims(x, (-2, -1), "a window slides over this dim")
    return (*batch, None if channels is None else channels.repeat(math.prod(kernel)), positions)


@rule(aten.col2im.default)
def _col2im(
    walk: Walk, out: Value, x: Value, size: Sequence[int], kernel: Sequence[int], *args: Any
) -> tuple[DimLabels, ...]:
    """The reverse: the entries of a channel's window are dropped together."""
    *batch, own, _ = walk.freeze_dims(x, [-1], "windows are put together from this dim")
    if own is not None:
        channels = own.reshape(-1, math.prod(kernel))
        walk.atoms.unite(channels, channels[:, :1])
        own = channels[:, 0]
    return (*batch, own, None, None)


_POOLINGS = """
    avg_pool1d max_pool1d adaptive_avg_pool1d adaptive_max_pool1d max_pool1d_with_indices lp_pool1d
    avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d max_pool2d_with_indices
    avg_pool3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d max_pool3d_with_indices
"""
_RESIZINGS = """
    upsample_nearest1d upsample_linear1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d
    _upsample_nearest_exact2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest3d upsample_trilinear3d
    reflection_pad2d replication_pad2d
"""


@rule(*overloads(_POOLINGS + _RESIZINGS))
def _windows(walk: Walk, out: Any, x: Value, *args: Any, **kwargs: Any) -> Any:
    """Windows over the last dims: units along those freeze, the others pass."""
    num_spatial = next(int(letter) for letter in walk.op if letter.isdigit())  # "max_pool2d" slides over two dims
    labels = walk.freeze_dims(x, range(-num_spatial, 0), "a window slides over this dim")
    return (labels,) * len(out) if isinstance(out, tuple) else labels


_TRANSFORMS = """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2
    fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn
"""


@rule(*overloads(_TRANSFORMS))
def _transform(walk: Walk, out: Value, x: Value, size: Any = None, dim: Any = None, *args: Any) -> Any:
    """Every entry of the result needs every entry along the dim."""
    if dim is None:
        num_dims = 2 if walk.op.endswith("2") else 1 if not walk.op.endswith("n") else len(size) if size else x.ndim
        dim = range(-num_dims, 0)
    return walk.freeze_dims(x, [dim] if isinstance(dim, int) else dim, "a Fourier transform runs over this dim")


@rule(aten.view_as_complex.default)
def _view_as_complex(walk: Walk, out: Value, x: Value) -> tuple[DimLabels, ...]:
    """Pairs along the last dim become numbers."""
    return walk.freeze_dims(x, [-1], "this dim holds the two parts of a complex number")[:-1]


@rule(aten.view_as_real.default)
def _view_as_real(walk: Walk, out: Value, x: Value) -> tuple[DimLabels, ...]:
    """Numbers become pairs along a new last dim."""
    return (*x.labels, None)
