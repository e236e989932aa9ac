"""By hand: shrink a model that no loop is at work on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.actuator.attached import check_free
from setpoint.actuator.carried import carry
from setpoint.actuator.optimizer_state import Optimizers
from setpoint.actuator.shrink import shrink as shrink_held
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.messages import a_type

AnyKeep = Bool[np.ndarray, " _units"] | Bool[Tensor, " _units"] | Sequence[bool]


def shrink(
    model: nn.Module,
    optimizer: Optimizers,
    groups: Sequence[Group],
    keep: Mapping[str, AnyKeep],
    copies: Sequence[nn.Module] = (),
) -> tuple[Group, ...]:
    """Remove the units that `keep` drops from a model in training, and return the groups that remain.

    Parameters and buffers keep their identity, so optimizers, schedulers, clip lists and hooks that hold
    them go on working. Tied parameters stay tied, frozen ones stay frozen, and memory formats stay.
    Optimizer state is cut along with its parameter. Gradients of the changed parameters become None: they
    belong to a step that is done. Cut between `optimizer.step()` and the next `backward()`.

    Everything new is built before anything is changed, so old and new are in memory together. On any
    exception model, optimizers and copies are as they were.

    Args:
        groups: as `find_groups`, or the last cut, returned them.
        keep: by group name, one boolean per active unit, True = stays: an array, a tensor or a list. Groups that lose
            nothing may be absent.
        copies: further modules with the same tensors to cut alike, such as an EMA copy; names may have
            the prefix `"module."` that `torch.optim.swa_utils.AveragedModel` gives them.

    Raises:
        GroupError: when `keep` does not fit the groups, the groups do not fit the model or a copy, or a
            tensor is of a kind that cannot be cut.
        LoopError: when a loop is at work on the model.
        OptimizerError: when an optimizer's state cannot follow.

    >>> import numpy as np
    >>> from setpoint.groups.group import SizeBinding, Slice
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> unit = np.arange(3)
    >>> places = [("0.weight", 0, "produce"), ("0.bias", 0, "carry"), ("2.weight", 1, "consume")]
    >>> slices = tuple(Slice(tensor, dim, role, unit) for tensor, dim, role in places)
    >>> sizes = (SizeBinding("0", "out_features", unit), SizeBinding("2", "in_features", unit))
    >>> hidden = Group("hidden", "unit", 3, slices, sizes)
    >>> (hidden,) = shrink(model, None, (hidden,), {"hidden": np.array([True, False, True])})
    >>> model
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=1, bias=True)
    )
    """
    check_free(model)
    if not isinstance(keep, Mapping):
        raise GroupError(f"keep holds booleans by name of the group, got {a_type(keep)}")
    arrays = {name: _array(each) for name, each in keep.items()}
    remaining = shrink_held(model, optimizer, tuple(groups), arrays, copies)
    for each in (model, *copies):
        carry(each)
    return remaining


def _array(kept: Any) -> Any:
    """Booleans as an array; anything else as it is, to be refused by name."""
    if isinstance(kept, Tensor) and kept.dtype == torch.bool:
        return kept.detach().cpu().numpy()
    if isinstance(kept, (list, tuple)) and all(isinstance(each, (bool, np.bool_)) for each in kept):
        return np.array(kept, dtype=bool)
    return kept
