"""Finer: the last cut gives back parts of blocks, where whole ones leave a good part of the budget unused."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Float64

from setpoint.controller.selection import ROUNDING, Ladder, Selection, add_back
from setpoint.groups.group import Group


def refined(
    selection: Selection,
    groups: tuple[Group, ...],
    saliency: Mapping[str, Float64[np.ndarray, " _units"]],
    target: float,
) -> Selection:
    """The selection with parts of its blocks given back, until at most 5 % of the target is unused.

    Blocks are halved, and what fits is given back, the worthiest first; this is done again and again, down to single
    units. So widths stay as round as the budget lets them. A block stays whole where other widths fail, or where
    another size than `Group.usual_block` was asked for.

    >>> from setpoint.controller.selection import reach, start
    >>> from setpoint.cost.cost import ProductCost, Term
    >>> from setpoint.groups.group import Size
    >>> cost = ProductCost("flops", (Term(1.0, (Size(0, (("a", 1),)),)),))
    >>> groups, saliency = (Group("a", "unit", 16, (), multiple_of=8, usual_block=8),), {"a": np.arange(16.0)}
    >>> blocks = start(cost, groups, saliency, {"a": 16}, {"a": 16})
    >>> reach(blocks, 12.7), blocks.widths, refined(blocks, groups, saliency, 12.7).widths
    (True, {'a': 8}, {'a': 12})
    """
    sizes = {group.name: group.multiple_of for group in groups if finest(group) < group.multiple_of}
    while selection.total < (1 - ROUNDING) * target and max(sizes.values(), default=1) > 1:
        sizes = {name: max(1, size // 2) for name, size in sizes.items()}
        selection = _split(selection, sizes, saliency)
        add_back(selection, target)
    return selection


def finest(group: Group) -> int:
    """Number of units in the smallest block of a last cut."""
    return 1 if group.multiple_of == group.usual_block and not group.only_blocks else group.multiple_of


def _split(
    selection: Selection, sizes: Mapping[str, int], saliency: Mapping[str, Float64[np.ndarray, " _units"]]
) -> Selection:
    """The same place on ladders with rungs of these sizes, which end there; a part is worth what its block is."""
    ladders, rungs = dict(selection.ladders), dict(selection.rungs)
    worth, saving = dict(selection.worth), dict(selection.saving)
    for name, size in sizes.items():
        ladder, rung = ladders[name], rungs[name]
        if not rung:
            continue
        gone, lengths = int(ladder.edges[rung]), np.diff(ladder.edges)
        edges = np.append(0, np.arange(gone % size or size, gone + 1, size))
        order, last = ladder.order[:gone], edges[1:] - 1
        summed = np.append(0.0, np.cumsum(np.maximum(saliency[name][order], 0.0)))
        ladders[name] = Ladder(ladder.dense, edges, summed[edges], order, ladder.num_units)
        worth[name] = np.repeat(worth[name], lengths)[last]
        saving[name] = np.repeat(saving[name] / lengths, lengths)[last] * np.diff(edges)
        rungs[name] = len(edges) - 1
    return replace(selection, ladders=ladders, rungs=rungs, worth=worth, saving=saving, widths=dict(selection.widths))
