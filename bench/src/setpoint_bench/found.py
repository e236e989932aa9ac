"""Found widths: the dimensions of a task at which a fresh model is as wide as a pruned one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from setpoint.groups.group import Group, Place
from setpoint.groups.trace import find_groups
from setpoint_bench.task import BenchError, Task, dense_widths


def found_widths(task: Task, widths: Mapping[str, int]) -> dict[str, int]:
    """The task's widths at which its model is as wide as the groups.

    A group belongs to the dimension with which its tensors change their lengths: each dimension is tried one
    step narrower on a model without data.

    Args:
        task: whose model to build.
        widths: active units by group.

    Raises:
        BenchError: for a group whose width the task's dimensions do not set; it cannot be built from scratch.
    """
    groups = {group.name: group for group in find_groups(task.build(dense_widths(task)), task.example())}
    lengths = _lengths(task, dense_widths(task))
    built = dense_widths(task)
    unset = {name for name, width in widths.items() if name not in groups or width != groups[name].num_units}
    for name, dimension in task.dimensions.items():
        dense, step = dimension.dense, dimension.multiple_of
        if dense <= step:
            continue
        narrower = _lengths(task, {**dense_widths(task), name: dense - step})
        changed = {place for place, length in lengths.items() if narrower.get(place) != length}
        for each in sorted(unset & groups.keys()):
            if _places(groups[each]) <= changed and groups[each].num_units == dense:
                built[name] = widths[each]
                unset.discard(each)
    if unset:
        raise BenchError(
            f"{task.name} has no dimension for the width of {', '.join(sorted(unset))}: a model of these widths cannot "
            "be built from scratch, so small-found has nothing to train; leave it out of --methods, or give the task a "
            "family with a dimension for each width (a task of your own: ByWidths in place of ByFactor)"
        )
    return built


def _lengths(task: Task, widths: Mapping[str, int]) -> dict[Place, int]:
    """Length of every dim of every parameter and buffer of a model of these widths."""
    model: nn.Module = task.build(widths, torch.device("meta"))
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {(name, dim): length for name, tensor in tensors for dim, length in enumerate(tensor.shape)}


def _places(group: Group) -> set[Place]:
    """Where the group's units are written or read by weights, trained or fixed."""
    return {(piece.tensor, piece.dim) for piece in group.slices if piece.role != "carry" and piece.dim is not None}
