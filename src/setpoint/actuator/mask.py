"""A mask: the entries of dropped units set to zero in place, in weights, gradients and moments."""

from dataclasses import replace

import torch
from torch import nn

from setpoint.actuator.cut import Keep, check_lengths, plan_cut
from setpoint.actuator.tensors import Optimizers, as_sequence, moments_of, named_tensors
from setpoint.groups.group import Group


@torch.no_grad()
def mask(model: nn.Module, optimizer: Optimizers, groups: tuple[Group, ...], keep: Keep) -> None:
    """Zero every entry of the dropped units: parameters, buffers, gradients, optimizer state.

    It saves nothing; cuts are tested against it. A model masked before and after every optimizer step is
    the *masked twin* of the shrunk one. A GroupError says what of `keep`, groups and model does not fit.
    """
    cut = plan_cut(tuple(replace(g, slices=tuple(part for part in g.slices if part.masked)) for g in groups), keep)
    tensors = named_tensors(model)
    check_lengths(cut, tensors, type(model).__name__)
    for name, dim, kept in cut.places():
        if kept.all():
            continue
        tensor = tensors[name]
        zeroed = [tensor] if not tensor.is_leaf or tensor.grad is None else [tensor, tensor.grad]
        if isinstance(tensor, nn.Parameter):
            # A moment of a dropped entry would move its weight away from zero in the next step.
            zeroed += [moment for holder in as_sequence(optimizer) for _, moment in moments_of(holder, tensor)]
        for values in zeroed:
            here = torch.from_numpy(~kept).to(values.device)
            if dim is None:
                values.masked_fill_(here.view(values.shape), 0)
            else:
                values.index_fill_(dim, here.nonzero().squeeze(1), 0)
