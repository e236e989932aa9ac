"""Easing: outgoing weights of regrown units rise from zero over a few steps, so that the loss does not jump."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from setpoint.actuator.shrink import unwrapped
from setpoint.actuator.tensors import named_tensors
from setpoint.distributed import is_sharded_tensor, local, rows
from setpoint.errors import GroupError
from setpoint.groups.group import Group


@dataclass(frozen=True, eq=False)
class _Share:
    """What one step adds to one tensor."""

    module: int  # 0 for the model, else the number of the copy, from 1
    holder: nn.Module  # that module
    name: str  # of the tensor in it
    dim: int  # the dim along which units lie
    entries: Tensor  # of the regrown units
    share: Tensor  # added to them in each step

    def add(self, count: int) -> None:
        """Add so many shares; of a sharded tensor, to this rank's shard."""
        owner, _, key = self.name.rpartition(".")
        tensor: Tensor = getattr(self.holder.get_submodule(owner), key)
        mine, entries, share = rows(tensor), self.entries, self.share
        if is_sharded_tensor(tensor) and self.dim == 0:
            here = (entries >= mine.start) & (entries < mine.stop)
            entries, share = entries[here] - mine.start, share[here]
        elif is_sharded_tensor(tensor):
            share = share[mine]
        local(tensor).index_add_(self.dim, entries, share, alpha=count)


class Easing:
    """Sets the outgoing weights of just regrown units to zero, and adds them again in equal shares.

    With weights w and n steps, each `step` adds w / n. In between the optimizer moves these weights like all
    others; the shares add up to w on top of what it learns meanwhile. Incoming weights, norms
    and moments are back at once: with outgoing weights at zero they have no effect yet.

    Args:
        model: after `regrow`, as are groups and copies.
        regrown: by group, one boolean per active unit, True = just regrown.
        num_steps: number of shares.

    >>> from setpoint.groups.group import Slice
    >>> model = nn.Linear(2, 1, bias=False)
    >>> weight, unit = model.weight.detach().clone(), np.arange(2)
    >>> groups = (Group("inputs", "unit", 2, (Slice("weight", 1, "consume", unit),)),)
    >>> easing = Easing(model, groups, {"inputs": np.array([False, True])}, num_steps=2)
    >>> model.weight[0, 1].item()
    0.0
    >>> easing.step(), easing.step(), bool(torch.isclose(model.weight, weight).all())
    (False, True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        groups: tuple[Group, ...],
        regrown: Mapping[str, Bool[np.ndarray, " _units"]],
        num_steps: int,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        assert num_steps >= 1
        self._left = num_steps
        places = [
            (part.tensor, part.dim, np.flatnonzero(np.isin(part.index, np.flatnonzero(regrown[group.name]))))
            for group in groups
            if group.name in regrown
            for part in group.slices
            if part.role == "consume" and part.dim is not None
        ]
        self._shares: list[_Share] = []
        for number, module in enumerate((model, *unwrapped([name for name, *_ in places], model, copies))):
            tensors = named_tensors(module)
            for name, dim, positions in places:
                tensor, entries = tensors[name], torch.from_numpy(positions).to(tensors[name].device)
                with torch.no_grad():
                    share = tensor.index_select(dim, entries) / num_steps
                    tensor.index_fill_(dim, entries, 0)
                self._shares.append(_Share(number, module, name, dim, entries, share))

    def state_dict(self) -> dict[str, Any]:
        """The shares still to be added, in plain tensors and numbers."""
        shares = [
            {"module": each.module, "tensor": each.name, "dim": each.dim, "entries": each.entries, "share": each.share}
            for each in self._shares
        ]
        return {"left": self._left, "shares": shares}

    @classmethod
    def resumed(cls, model: nn.Module, copies: Sequence[nn.Module], state: Mapping[str, Any]) -> Easing:
        """An easing that goes on where `state_dict` was taken; model and copies are as wide as they were then."""
        easing = cls(model, (), {}, num_steps=state["left"])
        modules = (model, *unwrapped([each["tensor"] for each in state["shares"]], model, copies))
        for each in state["shares"]:
            module = modules[each["module"]]
            device = named_tensors(module)[each["tensor"]].device
            entries, share = each["entries"].to(device), each["share"].to(device)
            easing._shares.append(_Share(each["module"], module, each["tensor"], each["dim"], entries, share))
        return easing

    @staticmethod
    def check(state: Mapping[str, Any] | None, shapes: Mapping[str, Sequence[int]], num_copies: int) -> None:
        """Check that a state from `state_dict`, or None, fits a model of these shapes, or raise GroupError."""
        if state is None:
            return
        fits = isinstance(state["left"], int) and state["left"] >= 1
        for each in state["shares"]:
            shape, entries = list(shapes[each["tensor"]]), each["entries"]
            inside = not len(entries) or 0 <= int(entries.min()) <= int(entries.max()) < shape[each["dim"]]
            shape[each["dim"]] = len(entries)
            fits &= inside and list(each["share"].shape) == shape and 0 <= each["module"] <= num_copies
        if not fits:
            raise GroupError("what is still to be added to units that came back does not fit the model")

    def step(self) -> bool:
        """Add one share; True when it was the last. Call it after the optimizer's step."""
        return self._add(1)

    def finish(self) -> None:
        """Add all remaining shares, before the tensors change their shape."""
        if self._left:
            self._add(self._left)

    def _add(self, count: int) -> bool:
        with torch.no_grad():
            for each in self._shares:
                each.add(count)
        self._left -= count
        return self._left == 0
