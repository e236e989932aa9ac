"""A mask: the entries of dropped units set to zero in place, in weights, gradients and moments."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from setpoint.actuator.cut import Keep, check_lengths, plan_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, moments_of
from setpoint.actuator.tensors import named_tensors
from setpoint.groups.group import Group


@torch.no_grad()
def mask(model: nn.Module, optimizer: Optimizers, groups: tuple[Group, ...], keep: Keep) -> None:
    """Zero every entry of the dropped units: parameters, buffers, gradients, optimizer state.

    It saves nothing; cuts are tested against it. A model masked before and after every optimizer step is
    the *masked twin* of the shrunk one. A GroupError says what of `keep`, groups and model does not fit.
    """
    zeroed = tuple(replace(group, slices=tuple(part for part in group.slices if part.masked)) for group in groups)
    cut = plan_cut(zeroed, keep)
    tensors = named_tensors(model)
    check_lengths(cut, tensors, type(model).__name__)
    dropped = [(name, dim, ~kept) for (name, dim), kept in cut.entries.items()]
    single = [(name, None, ~kept) for name, kept in cut.elements.items()]
    for name, dim, units in (*dropped, *single):
        if not units.any():
            continue
        tensor = tensors[name]
        zeroed_tensors = [tensor]
        if tensor.is_leaf and tensor.grad is not None:
            zeroed_tensors.append(tensor.grad)
        if isinstance(tensor, nn.Parameter):
            # A moment of a dropped entry would move its weight away from zero in the next step.
            for holder in as_sequence(optimizer):
                zeroed_tensors += [moment for _, moment in moments_of(holder, tensor)]
        for values in zeroed_tensors:
            entries = torch.from_numpy(units).to(values.device)
            if dim is None:
                values.masked_fill_(entries.view(values.shape), 0)
            else:
                values.index_fill_(dim, entries.nonzero().squeeze(1), 0)
