"""The state of a loop: all that it remembers, as plain data, and how a freshly attached loop takes it over."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.optim import Optimizer

from setpoint.actuator.cut import cut_groups, plan_cut
from setpoint.actuator.optimizer_state import check_state
from setpoint.actuator.shrink import named_tensors, shrink
from setpoint.controller.plan import Plan
from setpoint.errors import CheckpointError, LoopError, OptimizerError
from setpoint.groups.chance import chance_state, check_chance_state, set_chance_state
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Entry
from setpoint.loop.acting import in_full
from setpoint.loop.parts import Parts
from setpoint.loop.plain import plain, restored
from setpoint.loop.regrowth import Regrowth
from setpoint.loop.watch import LossWatch
from setpoint.loop.wrapper import rewrap
from setpoint.sensor.reading import Reading

if TYPE_CHECKING:
    from setpoint.loop.loop import Loop

FORMAT = 1
"""Version of the state's form, its entry "format"."""

_GONE = {"rank_correlation"}
"""Numbers that ledgers in older states hold, and no entry any more."""

_AGAIN = "build the model anew, dense, and attach with the arguments of the run that is to go on"


def state_of(loop: Loop) -> dict[str, Any]:
    """All that a loop remembers, in dicts, lists and tuples of tensors, numbers and strings.

    Args:
        loop: between two optimizer steps.

    Raises:
        LoopError: in the middle of a step, or when model and loop do not agree on its sizes.
        CheckpointError: when sensor or controller keep something that cannot be stored.
    """
    if loop._hooks.within_step or (loop._regrowth is not None and loop._regrowth.within_step):
        raise LoopError("a checkpoint in the middle of a step cannot be resumed: take it after optimizer.step()")
    _check_whole(loop)
    plan, reading = loop._plan, loop._reading
    return {
        "format": FORMAT,
        "run": run_of(loop._parts),
        "origin": {name: torch.from_numpy(origin.copy()) for name, origin in loop._origin.items()},
        "shapes": {name: tuple(tensor.shape) for name, tensor in named_tensors(loop._parts.model).items()},
        "step": loop._step,
        "skipped": loop._skipped,
        "overdue": loop._overdue,
        "waits": loop._waits,
        "landed": loop._landed,
        "again": loop._again,
        "watch": loop._watch.state_dict(),
        "sensor": plain(loop._sensor_state, "the sensor's state"),
        "controller": plain(loop._controller_state, "the controller's state"),
        "plan": None if plan is None else plain(replace(plan, keep={}, worth={}, grow={}, grow_worth={}), "the plan"),
        "reading": None if reading is None else plain(replace(reading, basis={}), "the reading"),
        "worth": plain(loop._worth, "worth"),
        "ledger": [plain(asdict(entry), "the ledger") for entry in loop._ledger],
        "account": loop._account.state_dict(),
        "metered": dict(loop._metered),
        "metering": loop._parts.metering.state_dict(),
        "target": loop._parts.target.state_dict(),
        "regrowth": None if loop._regrowth is None else loop._regrowth.state_dict(),
        "chance": {"rank": loop._parts.ranks.own, **chance_state()},
    } | ({} if loop._weights is None else {"weights": loop._weights.state_dict()})


def _check_whole(loop: Loop) -> None:
    """Check that the model is as wide as the loop has it: a checkpoint of anything else could not be resumed."""
    tensors: Mapping[str, Tensor] = named_tensors(loop._parts.model)
    for group in loop._groups if loop._weights is None else ():  # masks leave sizes alone
        wide = all(
            place.dim is None or place.index.size == tensors[place.tensor].shape[place.dim]
            for place in group.slices
            if place.tensor in tensors
        )
        if not wide or len(loop._origin[group.name]) != group.num_units:
            raise LoopError(
                f"group {group.name!r} has {group.num_units} units by this loop, but the model is of another size: a "
                "change was broken off, or something else changed the model. Go on from the last checkpoint"
            )


def resume(loop: Loop, state: Mapping[str, Any]) -> None:
    """Shrink the dense model of a fresh loop to the widths of a state, and let the loop go on from there.

    Everything is checked before anything is changed.

    Args:
        loop: freshly attached to a freshly built dense model.
        state: from `state_of`.

    Raises:
        LoopError: for a loop that has made a step.
        CheckpointError: for anything that is not the state of such a loop.
    """
    if loop._step or len(loop._ledger) or loop._finished:
        raise LoopError(
            f"only a freshly attached loop can take over a state, this one is at step {loop._step}: {_AGAIN}"
        )
    try:
        fresh = _Resumed(loop, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"this is not a state that loop.state_dict() returned, or a damaged one: {error!r}"
        ) from error
    fresh.take_over()


class _Resumed:
    """A state that has been checked against a fresh loop.

    Args:
        loop: the loop.
        state: what it is to take over.

    Raises:
        CheckpointError: when they do not belong together.
    """

    def __init__(self, loop: Loop, state: Mapping[str, Any]) -> None:
        parts = loop._parts
        if state["format"] != FORMAT:
            raise CheckpointError(f"the state has format {state['format']!r}, this Setpoint reads {FORMAT}")
        _check_same_run(state["run"], run_of(parts))
        self._loop, self._state = loop, state
        weights = loop._weights
        self._keep = _keep(parts.groups, state["origin"]) if weights is None else {}
        groups = cut_groups(parts.groups, self._keep) if weights is None else weights.check(state["weights"])
        _check_shapes(parts, self._keep, state["shapes"])
        for optimizer in parts.optimizers:
            _check_own_state(parts, optimizer)
        device = device_of(parts)
        restored(state["sensor"], parts.sensor.init(groups, parts.model), "the sensor's state", device)
        controller = parts.controller.init(groups)
        self._controller_state = restored(state["controller"], controller, "the controller's state", device)
        plan, reading = state["plan"], state["reading"]
        self._plan = None if plan is None else restored(plan, Plan(0, {}), "the plan", device)
        self._reading = None if reading is None else restored(reading, Reading(0, {}, 1), "the reading", device)
        self._worth = restored(state["worth"], {}, "worth", device)
        self._entries = [Entry(**{k: v for k, v in entry.items() if k not in _GONE}) for entry in state["ledger"]]
        self._numbers = {f"_{name}": int(state[name]) for name in ("step", "skipped", "again")}
        self._numbers |= {f"_{name}": bool(state[name]) for name in ("overdue", "waits", "landed")}
        LossWatch().load_state_dict(state["watch"])  # a trial
        self._regrowth, self._reserve = loop._regrowth, None
        if state["regrowth"] is None and self._regrowth is not None:
            raise CheckpointError(f"units come back in one of the two runs only: {_AGAIN}")
        if state["regrowth"] is not None:
            # Where only the loss may ask for units back, the reserve begins with the first cut.
            self._regrowth = self._regrowth or Regrowth(parts, loop._account)
            self._reserve = self._regrowth.reserve.resumed(state["regrowth"]["reserve"])
            if any((self._reserve.active[name] != kept).any() for name, kept in self._keep.items()):
                raise CheckpointError("the reserve and the loop disagree about which units are active")
            self._regrowth.check(state["regrowth"], state["shapes"])
        copy.deepcopy(loop._account).load_state_dict(state["account"])  # a trial
        copy.copy(parts.target).load_state_dict(state["target"])
        copy.copy(parts.metering).load_state_dict(state["metering"])
        check_chance_state(state["chance"])
        self._metered = {str(name): float(value) for name, value in state["metered"].items()}

    def take_over(self) -> None:
        """Shrink the model and set everything."""
        loop, parts, state = self._loop, self._loop._parts, self._state
        if loop._weights is not None:
            loop._groups = loop._weights.load_state_dict(state["weights"])
        else:
            cut = {part.tensor for group in parts.groups for part in group.slices}
            with in_full(parts, cut, lambda: None) as done:
                groups, keep = parts.groups, self._keep
                loop._groups = shrink(parts.model, parts.optimizers, groups, keep, parts.copies, agreed=done)
        if parts.averaging is not None:
            rewrap(parts.averaging)
        loop._origin = {name: np.flatnonzero(kept) for name, kept in self._keep.items()}
        # What points at the model is found again in the smaller one.
        live, device = parts.sensor.init(loop._groups, parts.model), device_of(parts)
        loop._sensor_state = restored(state["sensor"], live, "the sensor's state", device)
        loop._controller_state = self._controller_state
        loop._sensing_flops = parts.sensor.flops(loop._groups, parts.model)
        loop._plan, loop._reading, loop._worth = self._plan, self._reading, self._worth
        loop._watch.load_state_dict(state["watch"])
        for name, value in self._numbers.items():
            setattr(loop, name, value)
        for entry in self._entries:
            loop._ledger.append(entry)
        loop._account.load_state_dict(state["account"])
        parts.target.load_state_dict(state["target"])
        parts.metering.load_state_dict(state["metering"])
        loop._metered = self._metered
        loop._regrowth = self._regrowth
        if loop._regrowth is not None and self._reserve is not None:
            loop._regrowth.load_state_dict(state["regrowth"], self._reserve)
        if loop._weights is not None:
            loop._weights.look(not loop._landed and parts.controller.due(loop._step + 1, parts.total_steps))
        loop._account.steps.begin()
        if int(state["chance"]["rank"]) == parts.ranks.own:  # ranks that all drew the same would be no several draws
            set_chance_state(state["chance"])


def device_of(parts: Parts) -> torch.device:
    """Where the model is."""
    return next((parameter.device for parameter in parts.model.parameters()), torch.device("cpu"))


def run_of(parts: Parts) -> dict[str, Any]:
    """What must be the same in two runs of which one goes on with the other, and on all ranks of one run."""
    dense = parts.target.dense
    return ({} if parts.sparsity is None else {"pattern": str(parts.sparsity.pattern)}) | {
        "groups": widths_of(parts.groups),
        "dense": {name: dense[name] for name in ("flops", "params")},  # others are fitted to this machine
        "budgets": [(each.resource, float(each.limit), each.per, each.relative) for each in parts.target.budgets],
        "total_steps": parts.total_steps,
        "optimizers": [type(each).__name__ for each in parts.optimizers],
        "copies": len(parts.copies),
        "sensor": type(parts.sensor).__name__,
        "controller": type(parts.controller).__name__,
    }


def _check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, value in own.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"the state is of another run: its {name} are {_short(saved.get(name), value)}, here they are "
                f"{_short(value, saved.get(name))}: {_AGAIN}"
            )


def _short(value: Any, other: Any) -> str:
    """What differs, of two dicts; else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: each for key, each in value.items() if other.get(key) != each}
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _keep(groups: tuple[Group, ...], origins: Mapping[str, Tensor]) -> dict[str, Bool[np.ndarray, " _units"]]:
    """By group, which units of the dense model are active."""
    keep = {}
    for group in groups:
        origin = origins[group.name].cpu().numpy()
        kept = np.zeros(group.num_units, dtype=bool)
        if len(origin) and not (origin[0] >= 0 and (np.diff(origin) > 0).all() and origin[-1] < group.num_units):
            raise CheckpointError(f"the origins of group {group.name!r} are not {group.num_units} units in order")
        kept[origin] = True
        keep[group.name] = kept
    return keep


def _check_shapes(parts: Parts, keep: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the dense model, cut, has the shapes that the saved model had."""
    left = plan_cut(parts.groups, keep).entries
    own = {}
    for name, tensor in named_tensors(parts.model).items():
        cut = {dim: int(left[name, dim].sum()) for dim in range(tensor.dim()) if (name, dim) in left}
        own[name] = tuple(cut.get(dim, length) for dim, length in enumerate(tensor.shape))
    if {name: tuple(shape) for name, shape in saved.items()} != own:
        theirs = {name: tuple(shape) for name, shape in saved.items()}
        raise CheckpointError(
            f"the state is of another model: its tensors are {_short(theirs, own)}, the ones of this model, cut to the "
            f"same widths, would be {_short(own, theirs)}"
        )


def _check_own_state(parts: Parts, optimizer: Optimizer) -> None:
    """Check that the optimizer has not been loaded yet with the state of a smaller model."""
    names = {id(parameter): name for name, parameter in parts.model.named_parameters()}
    try:
        check_state(optimizer, [(names[id(p)], p, state) for p, state in optimizer.state.items() if id(p) in names])
    except OptimizerError as error:
        raise CheckpointError(str(error)) from error


def check_loading(parts: Parts, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Called by an optimizer that is about to load a state: check that it is as large as the parameters.

    Args:
        parts: what the loop is made of.
        optimizer: one of its optimizers.
        saved: the optimizer's state dict.

    Raises:
        OptimizerError: when it is not.
    """
    cut = {part.tensor for group in parts.groups for part in group.slices}
    every = {id(p): name for name, p in parts.model.named_parameters(remove_duplicate=False)}
    names = {number: name for number, name in every.items() if name in cut}
    parameters = [parameter for settings in optimizer.param_groups for parameter in settings["params"]]
    numbers = [each for settings in saved["param_groups"] for each in settings["params"]]
    check_state(
        optimizer,
        [
            (names[id(parameter)], parameter, saved["state"].get(each, {}))
            for parameter, each in zip(parameters, numbers, strict=False)  # PyTorch itself checks how many there are
            if id(parameter) in names
        ],
    )
    check_state(
        optimizer,
        [
            (every[id(parameter)], parameter, _alike(saved["state"].get(each, {}), parameter))
            for parameter, each in zip(parameters, numbers, strict=False)
            if id(parameter) in every.keys() - names.keys()
        ],
    )


def _alike(state: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Of the state of a parameter that is never cut, what has as many dims: rows and columns may be kept apart."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim() == parameter.dim()}
