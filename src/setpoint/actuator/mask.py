"""A mask: the entries of dropped units set to zero in place, in weights, gradients and moments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.actuator.cut import Cut, Keep, check_lengths, plan_cut
from setpoint.actuator.optimizer_state import Optimizers, as_sequence, moments_of
from setpoint.actuator.tensors import named_tensors
from setpoint.groups.group import Group


def mask(model: nn.Module, optimizer: Optimizers, groups: tuple[Group, ...], keep: Keep) -> None:
    """Zero every entry of the dropped units: parameters, buffers, gradients, optimizer state.

    It saves nothing; cuts are tested against it. A model masked before and after every optimizer step is
    the *masked twin* of the shrunk one.

    Raises:
        GroupError: when `keep` does not fit the groups, or the groups do not fit the model.
    """
    zeroed = tuple(replace(group, slices=tuple(part for part in group.slices if part.masked)) for group in groups)
    cut = plan_cut(zeroed, keep)
    tensors = named_tensors(model)
    check_lengths(cut, tensors, type(model).__name__)
    for name, zero in _zeroers(cut).items():
        tensor = tensors[name]
        with torch.no_grad():
            zero(tensor)
            if tensor.is_leaf and tensor.grad is not None:
                zero(tensor.grad)
            if isinstance(tensor, nn.Parameter):
                # A moment of a dropped entry would move its weight away from zero in the next step.
                for holder in as_sequence(optimizer):
                    for _, moment in moments_of(holder, tensor):
                        zero(moment)


def _zeroers(cut: Cut) -> dict[str, Callable[[Tensor], None]]:
    found: dict[str, Callable[[Tensor], None]] = {}
    by_name: dict[str, dict[int, Bool[np.ndarray, " _entries"]]] = {}
    for (name, dim), kept in cut.entries.items():
        if not kept.all():
            by_name.setdefault(name, {})[dim] = kept
    for name in by_name.keys() | cut.elements.keys():
        found[name] = _zeroer(by_name.get(name, {}), cut.elements.get(name))
    return found


def _zeroer(
    dims: dict[int, Bool[np.ndarray, " _entries"]], elements: Bool[np.ndarray, " elements"] | None
) -> Callable[[Tensor], None]:
    def zero(tensor: Tensor) -> None:
        for dim, kept in dims.items():
            tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(~kept)).to(tensor.device), 0)
        if elements is not None and not elements.all():
            tensor.masked_fill_(torch.from_numpy(~elements).to(tensor.device).view(tensor.shape), 0)

    return zero
