"""Regrowth: what a loop does so that dropped units can come back: they rest, are probed, return and are eased in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from setpoint.actuator.cut import cut_groups
from setpoint.actuator.easing import Easing
from setpoint.actuator.probing import Probing
from setpoint.actuator.regrow import Grow, regrow, with_units
from setpoint.actuator.reserve import Key, Reserve, held
from setpoint.controller.plan import Plan, Regrowing, regrows
from setpoint.controller.tolerant import TolerantController
from setpoint.errors import GroupError
from setpoint.groups.group import Group, widths_of
from setpoint.host.piece import brackets
from setpoint.loop.accounting import Account
from setpoint.loop.parts import Parts
from setpoint.loop.plain import plain, restored
from setpoint.sensor.probe import Probe

Whole = dict[str, dict[Key, Tensor]]
"""By group, the tensors of a layer as it was before the last cut."""

_PROBE_SHARE = 0.01
"""Probing never takes more than this share of the FLOPs of the steps so far."""

_PROBES = 4
"""Probed steps before a decision that what may be spent is to last for."""

_EASE_STEPS = 8
"""Optimizer steps over which outgoing weights of a unit that came back rise from zero."""


class Regrowth:
    """The reserve of a run, and what is known about the units in it.

    Args:
        parts: what the loop is made of; its controller brings units back.
        account: where probing is counted.
    """

    def __init__(self, parts: Parts, account: Account) -> None:
        self.reserve = Reserve.of(parts.model, parts.groups, parts.reserve_bytes, parts.host.mesh)
        self._parts, self._account = parts, account
        self._model, self._optimizers, self._copies = parts.model, parts.optimizers, parts.copies
        self._flops = parts.costs["flops"]
        self._lossless = {group.name for group in parts.groups if group.lossless}
        self._decisions = 0
        self._probing: Probing | None = None
        self._chosen: dict[str, Int[np.ndarray, " _units"]] = {}
        self._recent: list[dict[str, Float64[np.ndarray, " _units"]]] = []
        self._easing: Easing | None = None
        self._last_rest = self._turn = 0
        self._whole: Whole = {}
        # A controller that brings nothing back of itself needs the last cut only, should the loss ask for it.
        self.lasting = regrows(parts.controller) and not isinstance(parts.controller, TolerantController)

    @property
    def last_dropped(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """By group, origins of the units that the last cut dropped; none once some of them were let go."""
        reserve = self.reserve
        gone = {
            name: ~active & (reserve.dropped_at[name] == self._last_rest) for name, active in reserve.active.items()
        }
        if any((gone[name] & ~resting).any() for name, resting in reserve.resting.items()):
            return {}
        units = {name: np.flatnonzero(each) for name, each in gone.items()}
        return {name: origins for name, origins in units.items() if len(origins)}

    @property
    def origin(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """By group, the index that each active unit has in the dense model."""
        return {name: np.flatnonzero(units) for name, units in self.reserve.active.items()}

    # What is remembered.

    @property
    def within_step(self) -> bool:
        """Whether a probed step has begun and not ended."""
        return self._probing is not None and self._probing.num_forwards > 0

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors and numbers."""
        return {
            "reserve": self.reserve.state_dict(),
            "decisions": self._decisions,
            "last_rest": self._last_rest,
            "whole": {name: [(*key, value) for key, value in each.items()] for name, each in self._whole.items()},
            "probing": self._probing is not None,
            "recent": plain(self._recent, "recent gains"),
            "chosen": plain(self._chosen, "units to probe"),
            "turn": self._turn,
            "easing": None if self._easing is None else self._easing.state_dict(),
        }

    def check(self, state: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that a state fits, all but its reserve, before anything is changed.

        Args:
            state: from `state_dict`.
            shapes: of the model's tensors then.

        Raises:
            GroupError: when it does not.
        """
        units = {name: len(active) for name, active in self.reserve.active.items()}
        for gains in self._gains_of(state):
            for name, values in gains.items():
                if values.shape != (units.get(name),):
                    raise GroupError(f"recent gains of {name!r} are not one per unit")
        for name, origins in _chosen(state).items():
            if (
                origins.ndim != 1
                or origins.dtype.kind != "i"
                or not np.isin(origins, np.arange(units.get(name, 0))).all()
            ):
                raise GroupError(f"units to probe of {name!r} are not units of that group")
        Easing.check(state["easing"], shapes, len(self._copies))
        int(state["decisions"]), int(state["last_rest"]), int(state["turn"]), bool(state["probing"])
        _whole(state["whole"])

    @staticmethod
    def _gains_of(state: Mapping[str, Any]) -> list[dict[str, Float64[np.ndarray, " _units"]]]:
        return [restored(each, {}, "recent gains", torch.device("cpu")) for each in state["recent"]]

    def load_state_dict(self, state: Mapping[str, Any], reserve: Reserve) -> None:
        """Go on where `state_dict` was taken; the model has been cut to the same widths.

        Args:
            state: from `state_dict`.
            reserve: the one in it.
        """
        self.reserve, self._decisions = reserve, int(state["decisions"])
        self._last_rest, self._turn = int(state["last_rest"]), int(state["turn"])
        self._whole = _whole(state["whole"])
        self._recent.extend(self._gains_of(state))
        self._chosen = {name: origins[reserve.resting[name][origins]] for name, origins in _chosen(state).items()}
        if state["easing"] is not None:
            self._easing = Easing.resumed(self._model, self._copies, state["easing"])
        if state["probing"]:
            self._start_probe()

    # Probing.

    @property
    def probing(self) -> bool:
        """Whether resting units are present in the step under way."""
        return self._probing is not None

    def begin_probe(self, step: int, total_steps: int, spare_flops: Callable[[], float]) -> None:
        """Have resting units present in the step after this one, if the controller asks and the share allows it.

        Args:
            step: optimizer steps done.
            total_steps: of the run.
            spare_flops: tells how many FLOPs a budget of the run leaves for it; asked only where there is a probe.
        """
        controller = self._parts.controller
        if not isinstance(controller, Regrowing) or not controller.probe_due(step, total_steps):
            return
        self._chosen = self._chosen or self._affordable()
        extra = self._extra(self._chosen)
        if self._chosen and extra <= self._allowance() and extra <= spare_flops():
            self._start_probe()

    def _allowance(self) -> float:
        """FLOPs that may go into probing by now: a share of those of the steps, less what it has taken."""
        account = self._account
        return _PROBE_SHARE * (account.train_flops - account.overhead_flops) - account.probing_flops

    def _affordable(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """Units that can be present in a few steps for what may be spent on probing by now.

        Groups have their turns in order, each with as many blocks as are paid for; one that is too dear yet is saved
        up for.
        """
        allowance, groups = self._allowance(), self._parts.groups
        found = dict[str, Int[np.ndarray, " _units"]]()
        for _ in groups:
            group = groups[self._turn % len(groups)]
            order = self._candidates(group) if group.name in self._lossless else np.array([], dtype=np.int64)
            num_blocks = -(-len(order) // group.multiple_of)
            while num_blocks:
                most = num_blocks * group.multiple_of
                units = np.roll(order, -most * (self._decisions - self._last_rest))[:most]
                more = {**found, group.name: np.sort(units)}
                if _PROBES * self._extra(more) <= allowance:
                    found = more
                    break
                num_blocks //= 2
            if len(order) and not num_blocks:
                break
            self._turn += 1
        return found

    def _candidates(self, group: Group) -> Int[np.ndarray, " _units"]:
        """Resting units of a group in the order in which they are probed: those dropped last first.

        Units of the last cut are left out: brought back at the next decision they would flutter. While nothing is
        dropped, each decision moves on to units that were dropped before, and begins again at the end.
        """
        dropped_at = self.reserve.dropped_at[group.name]
        resting = np.flatnonzero(self.reserve.resting[group.name] & (dropped_at < self._decisions))
        return resting[np.argsort(-dropped_at[resting], kind="stable")]

    def _start_probe(self) -> None:
        with self._account.probing:
            self._probing = Probing(self._model, self.reserve, self._chosen, brackets=brackets(self._model))
            self._probing.start()

    def end_probe(self, grad_scale: Tensor | None) -> None:
        """Take the units out and note their gains; the gradients of the step are ready."""
        probing, self._probing = self._probing, None
        if probing is None:
            return
        with self._account.probing:
            probing.stop()
            if self._parts.ranks.count > 1:
                probing.share(self._parts.ranks.mean)
            gains = probing.gains(grad_scale)
            if gains is not None:
                self._recent.append({name: self._by_origin(name, values) for name, values in gains.items()})
        if probing.num_forwards:
            self._account.probed(self._extra(self._chosen))

    def _by_origin(self, name: str, gains: Float64[np.ndarray, " _present"]) -> Float64[np.ndarray, " _units"]:
        """Gains of the units that were present, NaN for all others of the group."""
        of_group = np.full(len(self.reserve.active[name]), np.nan)
        of_group[self._chosen[name]] = gains
        return of_group

    def _extra(self, units: Grow) -> float:
        """FLOPs that a step takes more with these units present."""
        wide = {name: int(active.sum()) for name, active in with_units(self.reserve, units).items()}
        return self._flops.total(wide) - self._flops.total(widths_of(self.reserve.present()))

    def probe(self, step: int) -> Probe | None:
        """What steps probed since the last decision tell of units that rest, or None. Called once for each decision."""
        self._decisions += 1
        reserve, origins, gain, error, deviation = self.reserve, {}, {}, {}, {}
        for name, units in reserve.origins().items():
            rows = [each[name][units] for each in self._recent if name in each]
            seen = np.isfinite(rows).any(0) if rows else np.zeros(len(units), dtype=bool)
            if seen.any():
                origins[name] = units[seen]
                gain[name], deviation[name], count = _mean_and_deviation(np.array(rows)[:, seen])
                error[name] = deviation[name] / np.sqrt(count)
        num_steps = len(self._recent)
        self._recent, self._chosen = [], {}
        if not origins:
            return None
        rested = {name: self._decisions - reserve.dropped_at[name][units] for name, units in origins.items()}
        drops = {name: reserve.drops[name][units] for name, units in origins.items()}
        return Probe(step, origins, gain, error, rested, drops, num_steps=num_steps, deviation=deviation)

    # Drops and returns.

    def as_it_is(self, groups: tuple[Group, ...], plan: Plan, turned: Iterable[str]) -> Whole:
        """Layers whose states are about to be turned and cut, as they are: nothing less takes such a cut back.

        Args:
            groups: as they are now.
            plan: what goes.
            turned: names of the groups that have coordinates to be turned into.
        """
        self.settle()
        cut = [group for group in groups if group.name in turned and not plan.keep[group.name].all()]
        return {
            group.name: {
                key: tensor.detach().clone()
                for key, tensor in held(
                    self._model, self._optimizers, self._copies, frozenset(piece.tensor for piece in group.slices)
                )
            }
            for group in cut
        }

    def last_cut(self, whole: Whole) -> None:
        """A cut was made; `whole` is what `as_it_is` returned before it."""
        self._whole = whole

    @contextmanager
    def resting(self, keep: Mapping[str, Bool[np.ndarray, " _units"]]) -> Iterator[str]:
        """Take in the units that are dropped inside; what is let go for them, in words. If dropping fails, nothing."""
        self.settle()
        if not self.lasting:
            self.release()
        self._chosen = {}
        before, last_rest = self.reserve, self._last_rest
        self._last_rest = self._decisions
        self.reserve = before.rest(self._model, self._optimizers, keep, self._copies, when=self._decisions)
        let_go, words = self.reserve.let_go, ""
        if let_go:
            gone = sum(len(origins) for origins in let_go.values())
            words = f"the reserve of {before.limit_bytes:,} bytes is full: {gone} units dropped earlier were let go"
        try:
            if words:
                warnings.warn(f"{words} for good; reserve_bytes makes room", stacklevel=3)
            yield words
        except BaseException:
            self.reserve, self._last_rest = before, last_rest
            raise

    def grow(
        self, groups: tuple[Group, ...], plan: Plan, agreed: Callable[[], None] = lambda: None
    ) -> tuple[tuple[Group, ...], dict[str, Bool[np.ndarray, " _units"]]]:
        """Bring the plan's units back; the groups then, and by group which active units have just come back.

        A plan that undoes the last cut puts layers whose states were turned back as they were, to the bit; all
        other units are eased in. If `agreed` raises, they stay where they were.
        """
        self.settle()
        self._chosen = {}
        active = with_units(self.reserve, plan.grow)
        regrown = {n: np.isin(np.flatnonzero(active[n]), units) for n, units in plan.grow.items() if len(units)}
        larger = cut_groups(self.reserve.groups, active)

        def rise() -> None:  # while the tensors of a sharded model are whole
            back = {name for name in self._whole if self._put_back(name)} if plan.undoes else set()
            rising = {name: units for name, units in regrown.items() if name not in back}
            self._easing = Easing(self._model, larger, rising, _EASE_STEPS, self._copies) if rising else None
            agreed()

        try:
            groups, self.reserve = regrow(
                self._model, self._optimizers, groups, self.reserve, plan.grow, self._copies, agreed=rise
            )
        except BaseException:
            self._easing = None
            raise
        return groups, regrown

    def _put_back(self, name: str) -> bool:
        """Put a layer back as it was before the last cut, if nothing else about its shape has changed since."""
        whole = self._whole[name]
        names = frozenset(key.tensor for key in whole)
        live = {key: each for key, each in held(self._model, self._optimizers, self._copies, names) if key in whole}
        if any(key not in live or live[key].shape != value.shape for key, value in whole.items()):
            return False
        with torch.no_grad():
            for key, value in whole.items():
                live[key].copy_(value)
        return True

    def ease(self) -> None:
        """Let weights that are rising rise by one step."""
        if self._easing is None:
            return
        with self._account.probing:
            if self._easing.step():
                self._easing = None

    def settle(self) -> None:
        """Let weights that are rising arrive at once."""
        if self._easing is not None:
            self._easing.finish()
            self._easing = None

    def release(self) -> None:
        """Nothing comes back any more: give the reserve's memory back."""
        nothing = {name: np.zeros_like(units) for name, units in self.reserve.resting.items()}
        self.reserve, self._whole = replace(self.reserve, tensors={}, resting=nothing), {}

    def stop(self) -> None:
        """Leave the model alone: nothing present, nothing rising; may be called again."""
        if self._probing is not None:
            self._probing.stop()
            self._probing = None
        self.settle()


def _chosen(state: Mapping[str, Any]) -> dict[str, Int[np.ndarray, " _units"]]:
    """Units to probe, from a loop's state."""
    found = restored(state["chosen"], {}, "units to probe", torch.device("cpu"))
    return {str(name): np.asarray(origins) for name, origins in found.items()}


def _whole(state: Mapping[str, Sequence[Sequence[Any]]]) -> Whole:
    """Layers as they were, from a loop's state."""
    return {
        str(name): {Key(str(holder), str(tensor), str(part)): value.clone() for holder, tensor, part, value in each}
        for name, each in state.items()
    }


def _mean_and_deviation(
    rows: Float64[np.ndarray, "steps units"],
) -> tuple[Float64[np.ndarray, " units"], Float64[np.ndarray, " units"], Int[np.ndarray, " units"]]:
    """Mean over the steps in which a unit was present, their sample deviation (NaN for a single one) and number.

    >>> _mean_and_deviation(np.array([[1.0, np.nan], [3.0, 5.0]]))
    (array([2., 5.]), array([1.41421356,        nan]), array([2, 1]))
    """
    present = np.isfinite(rows)
    count = present.sum(0)
    mean = np.where(present, rows, 0.0).sum(0) / count
    squares = np.where(present, rows - mean, 0.0) ** 2
    return mean, np.where(count > 1, np.sqrt(squares.sum(0) / np.maximum(count - 1, 1)), np.nan), count
