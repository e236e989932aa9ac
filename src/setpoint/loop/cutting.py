"""Cutting: the actuator that removes units from a live model for good."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int

from setpoint.actuator.actuator import Actuator, Origins
from setpoint.actuator.cut import cut_groups, plan_cut
from setpoint.actuator.refit import refit
from setpoint.actuator.shrink import shrink_live
from setpoint.actuator.tensors import named_tensors, shapes_by_name
from setpoint.controller.plan import Plan
from setpoint.errors import CheckpointError, LoopError
from setpoint.groups.follow import Change
from setpoint.groups.group import Group
from setpoint.host.host import Host
from setpoint.sensor.reading import Reading

# Where units lie when they are cut; states, say, in the balanced coordinates that the reading is about. Called with
# host, groups, plan and reading, it is entered for the cut; with `rest=True`, units that go hold what is lost.
Coordinates = Callable[..., AbstractContextManager[None]]


def same_coordinates(*cut: object, rest: bool) -> AbstractContextManager[None]:
    """Channels, heads and neurons stay where they are."""
    return nullcontext()


def changing(plan: Plan, groups: Iterable[Group]) -> list[Group]:
    """The groups that lose units or get some back."""
    lose = {name for name, kept in plan.keep.items() if not kept.all()}
    gain = {name for name, units in plan.grow.items() if len(units)}
    return [group for group in groups if group.name in lose | gain]


class Cutting(Actuator):
    """Removes units for good: weights, buffers, sizes and optimizer state. It begins with groups at dense widths."""

    kind = "cutting"
    groups: tuple[Group, ...] = ()
    origin: dict[str, Int[np.ndarray, " _units"]] = {}

    def __init__(self, host: Host, groups: tuple[Group, ...], coordinates: Coordinates = same_coordinates) -> None:
        self.host, self.coordinates = host, coordinates
        self.dense = self.groups = groups
        self.origin = {group.name: np.arange(group.num_units) for group in groups}

    def act(self, plan: Plan, reading: Reading) -> Change:
        host, resized = self.host, changing(plan, self.groups)
        with (
            host.resizable(f"the cut after step {plan.step}", resized) as agreed,
            self.coordinates(host, self.groups, plan, reading, rest=False),
            ExitStack() as undo,
        ):
            models, moments = (host.model, *host.copies), reading.moments or {}
            fitted = refit(models, self.groups, plan.keep, moments, undo.callback, optimizers=host.optimizers)
            groups = shrink_live(host.model, host.optimizers, self.groups, plan.keep, host.copies, agreed=agreed)
            undo.pop_all()
        note = f"{len(fitted):,} layer{'s' * (len(fitted) != 1)} refitted" if reading.moments is not None else ""
        widest = [max(map(len, moment.blocks)) - 1 for moment in moments.values() if len(moment.blocks) > 1]
        note += f", in blocks of at most {max(widest)} inputs" if widest else ""
        return replace(self._cut_to(groups, plan), note=note)  # only now: at its end another rank may have failed

    def drop(self, plan: Plan, agreed: Callable[[], None]) -> Change:
        """Cut what the plan drops, where the host lets tensors change their shape; `agreed` makes it last."""
        host = self.host
        groups = shrink_live(host.model, host.optimizers, self.groups, plan.keep, host.copies, agreed=agreed)
        return self._cut_to(groups, plan)

    def _cut_to(self, groups: tuple[Group, ...], plan: Plan) -> Change:
        kept = {name: units[plan.keep[name]] for name, units in self.origin.items() if name in plan.keep}
        self.take_over(groups, {**self.origin, **kept})
        return Change(keep=plan.keep)

    def take_over(self, groups: tuple[Group, ...], origin: Origins) -> None:
        self.groups, self.origin = groups, dict(origin)

    def state_dict(self) -> dict[str, Any]:
        """Which units are active, and the sizes of all tensors; LoopError if these are not what the groups say."""
        tensors = named_tensors(self.host.model)
        for group in self.groups:
            wide = all(
                place.dim is None or place.index.size == tensors[place.tensor].shape[place.dim]
                for place in group.slices
                if place.tensor in tensors
            )
            if not wide or len(self.origin[group.name]) != group.num_units:
                raise LoopError(
                    f"group {group.name!r} has {group.num_units} units by this loop, but the model is of another size: "
                    "a change was broken off, or something else changed the model. Continue from the last checkpoint"
                )
        return {
            "kind": self.kind,
            "origin": {name: torch.from_numpy(origin.copy()) for name, origin in self.origin.items()},
            "shapes": shapes_by_name(self.host.model),
        }

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        keep = self.kept(state)
        entries, tensors = plan_cut(self.dense, keep).entries, named_tensors(self.host.model)
        # By identity: a tensor may have several names, of which a cut has one.
        left = {(id(tensors[name]), dim): int(kept.sum()) for (name, dim), kept in entries.items()}
        own = {}  # shapes that this model would have, cut to the widths of the state
        for name, tensor in tensors.items():
            own[name] = tuple(left.get((id(tensor), dim), length) for dim, length in enumerate(tensor.shape))
        theirs = {name: tuple(shape) for name, shape in state["shapes"].items()}
        for name in sorted({*own, *theirs}):
            if own.get(name) != theirs.get(name):
                raise CheckpointError(
                    f"the state is of another model: its {name!r} has shape {theirs.get(name)}, in this model, cut to "
                    f"the same widths, it would have {own.get(name)}"
                )
        return cut_groups(self.dense, keep)

    def kept(self, state: Mapping[str, Any]) -> dict[str, Bool[np.ndarray, " _units"]]:
        """By group, which units of the dense model a state has active."""
        keep = {}
        for group in self.dense:
            origin = state["origin"][group.name].cpu().numpy()
            keep[group.name] = np.isin(np.arange(group.num_units), origin)
        return keep

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        keep, host = self.kept(state), self.host
        with host.resizable("loading the state of the loop", self.dense) as agreed:
            groups = shrink_live(host.model, host.optimizers, self.dense, keep, host.copies, agreed=agreed)
        self.take_over(groups, {name: np.flatnonzero(kept) for name, kept in keep.items()})
