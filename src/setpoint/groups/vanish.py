"""Vanishing: a residual branch whose inner width is 0, and layers that have no channels left.

Where a group's units lie only on a branch that another path bypasses, all of them may be dropped: what remains
of the branch is a constant (its last bias), and the sum passes. Matrix products and attention run with empty tensors
as they are. A convolution or norm without channels gets a forward that needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from setpoint.groups.build import Units
from setpoint.groups.walk import Value, Walk


def bypassed(walk: Walk, units: Units, inputs: Sequence[Value], outputs: Sequence[Value]) -> set[str]:
    """Names of the groups without all of which every output still depends on every input that it depends on.

    One pass over the graph for each input finds to each value a path with few groups; those on the way to an output
    stay. Sets of groups are integers with a bit for each. Every input counts by itself: a second one that reaches the
    output past a layer is no way round that layer for the first. Nor is a mask that a comparison has made of it, unless
    no input reaches the output but through comparisons, as where neurons spike.
    """
    touched: dict[int, int] = {}

    def touches(value: Value) -> int:
        result = 0
        for labels in value.labels:
            if labels is not None:
                if id(labels) not in touched:
                    touched[id(labels)] = sum(1 << group for group in units.among(labels))
                result |= touched[id(labels)]
        return result

    staying, left = 0, {id(output) for output in outputs}
    for closed in {id(value) for value in walk.no_data}, set[int]():
        reached = set[int]()
        for start in inputs if left else ():
            crossed = {id(start): 0}
            for _, sources, results in walk.flow:
                ways = [crossed[id(source)] for source in sources if id(source) in crossed]
                if ways:
                    fewest = min(ways, key=lambda way: (way & ~staying).bit_count())
                    crossed |= {id(result): fewest | touches(result) for result in results if id(result) not in closed}
            for output in left & crossed.keys():
                staying |= crossed[output]
                reached.add(output)
        left -= reached
    return {group.name for position, group in enumerate(units.groups) if not staying >> position & 1}


class EmptyForward:
    """The forward of a convolution or norm that reads or writes no channels: nothing, or the bias alone."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, *args: Any) -> Tensor:
        """The bias in every channel, at the positions that the layer would give."""
        module = self.module
        if not isinstance(module, nn.modules.conv._ConvNd):
            return x.clone()
        num_spatial = len(module.kernel_size)
        shape = (*x.shape[: -num_spatial - 1], module.out_channels, *positions(module, x.shape[-num_spatial:]))
        # Both results depend on x, so that earlier layers get the zero gradient that the masked twin gives them; and
        # neither is a view of it, since an activation may write into them.
        if module.out_channels == 0:
            nothing = x.narrow(-num_spatial - 1, 0, 0)
            for dim in range(-num_spatial, 0):
                nothing = nothing.narrow(dim, 0, 1)
            return nothing.expand(shape).clone()
        y = x.new_zeros(shape) + x.sum()
        return y if module.bias is None else y + module.bias.view(-1, *(1,) * num_spatial)


def positions(module: nn.modules.conv._ConvNd, space: Sequence[int]) -> tuple[int, ...]:
    """Spatial shape of the output, by the formulas of PyTorch's documentation: no op runs, so none is counted."""
    if module.padding == "same":  # then the stride is 1
        return tuple(space)
    padding = (0,) * len(space) if isinstance(module.padding, str) else module.padding
    sizes = zip(space, module.kernel_size, module.stride, padding, module.dilation, module.output_padding, strict=True)
    if module.transposed:
        return tuple((n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in sizes)
    return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d, _ in sizes)


def fit_forward(module: nn.Module) -> None:
    """Give a layer without channels the empty forward, and one that has some its own."""
    if isinstance(module, nn.modules.conv._ConvNd):
        size = min(module.in_channels, module.out_channels)
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        size = module.num_features
    elif isinstance(module, nn.GroupNorm):
        size = module.num_channels
    else:
        return
    if size == 0:
        module.__dict__["forward"] = EmptyForward(module)
    elif isinstance(module.__dict__.get("forward"), EmptyForward):
        del module.__dict__["forward"]


def empty(names: Sequence[str], units: Units) -> dict[str, np.ndarray]:
    """The choice that keeps nothing of these groups, and everything of the others."""
    return {group.name: np.full(group.num_units, group.name not in names) for group in units.groups}
