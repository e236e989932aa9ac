"""Regrowing: an actuator that cuts, and brings units back: they rest, are probed, return and are eased in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from setpoint.actuator.actuator import Origins
from setpoint.actuator.cut import cut_groups
from setpoint.arguments import plain_fields
from setpoint.checkpoint.plain import plain, restored
from setpoint.controller.plan import Plan, RegrowingController
from setpoint.errors import CheckpointError, GroupError
from setpoint.groups.follow import Change
from setpoint.groups.group import Group, widths_of
from setpoint.host.fsdp import brackets
from setpoint.loop.cutting import Cutting, changing
from setpoint.messages import counted, warn
from setpoint.regrowth.easing import Easing
from setpoint.regrowth.probing import Probing
from setpoint.regrowth.regrow import Grow, regrow, with_units
from setpoint.regrowth.reserve import Key, Reserve, held
from setpoint.sensor.probe import Probe
from setpoint.sensor.reading import Reading
from setpoint.spending.spending import Spending

Snapshots = dict[str, dict[Key, Tensor]]
"""By group, the tensors of a layer as it was before the last cut."""

_PROBE_SHARE = 0.01
"""Probing never takes more than this share of the FLOPs of the steps so far."""

_PROBES = 4
"""Probed steps before a decision that what may be spent is to last for."""

_EASE_STEPS = 8
"""Optimizer steps over which outgoing weights of a unit that came back rise from zero."""


@final
@dataclass(frozen=True)
class Regrowing:
    """`attach(actuator=Regrowing())`: dropped units rest in a reserve, and the most promising of them come back.

    Units come back with a controller that asks for it, `PricedController(regrow=True)`. With any other controller the
    reserve holds the units of the last cut only, in case the loss demands that this cut be taken back.

    Regrowth is experimental: it has not been measured to be better than cutting for good.

    Args:
        reserve_bytes: the most host memory, on each rank, for dropped units. Beyond it a warning is given, and the
            units that were dropped first are let go. None: no limit.

    Raises:
        ValueError: for what is no number of bytes.

    >>> import setpoint
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> parts = {"controller": setpoint.PricedController(regrow=True), "actuator": Regrowing(reserve_bytes=2**20)}
    >>> with setpoint.attach(model, optimizer, 0.5, total_steps=60, example=(x,), **parts) as loop:
    ...     for _ in range(60):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.budget_met, loop.widths
    (True, {'0': 16})
    """

    reserve_bytes: int | None = 8 * 2**30

    def __post_init__(self) -> None:
        plain_fields(self)
        limit = self.reserve_bytes
        if limit is not None and (type(limit) is not int or limit < 0):
            raise ValueError(f"reserve_bytes is a whole number of bytes, at least 0, or None; got {limit!r}")


@final
class Regrowth:
    """Cuts like `Cutting`; what goes rests in a reserve, is probed and may come back. It changes at every step.

    Units rest until they are let go, or, if not `lasting`, those of the last cut only, should the loss ask for them.
    """

    def __init__(
        self,
        cutting: Cutting,
        controller: RegrowingController,
        spending: Spending,
        reserve_bytes: int | None,
        *,
        lasting: bool,
    ) -> None:
        host = cutting.host
        self.reserve = Reserve.of(host.model, cutting.dense, reserve_bytes, host.mesh)
        self.lasting, self.brings_back = lasting, controller.regrow
        self._cutting, self._controller, self._spending = cutting, controller, spending
        self._host, self._model, self._optimizers = host, host.model, host.optimizers
        self._lossless = {group.name for group in cutting.dense if group.lossless}
        self._decisions = 0
        self._probing: Probing | None = None
        self._chosen: dict[str, Int[np.ndarray, " _units"]] = {}
        self._recent: list[dict[str, Float64[np.ndarray, " _units"]]] = []
        self._easing: Easing | None = None
        self._last_rest = self._turn = 0
        self._snapshots: Snapshots = {}

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups at their present widths."""
        return self._cutting.groups

    @property
    def origin(self) -> Origins:
        """By group, the index that each active unit has in the dense model."""
        return self._cutting.origin

    kind, by_unit = "regrowing", True
    masks: Mapping[str, Tensor] = {}

    def broken(self) -> str:
        """Nothing is masked."""
        return ""

    def totals(self) -> Mapping[str, Any]:
        """Nothing is said besides."""
        return {}

    def before_step(self, grad_scale: Tensor | None) -> None:
        """Take probed units out and note their gains."""
        self._end_probe(grad_scale)

    def after_step(self) -> None:
        """Let weights that are rising rise by one step."""
        if self._easing is None:
            return
        with self._spending.account.watch.probing:
            if self._easing.step():
                self._easing = None

    def prepare(self, step: int, *, due: bool, open_still: bool) -> bool:
        """Have resting units present in the coming step, if the controller asks and what may be spent allows it."""
        total_steps, spending = self._spending.planned_steps, self._spending
        if open_still and not spending.meter.peak_wanted and self._controller.probe_due(step, total_steps):
            self._begin_probe(step)
        if not self._controller.regrow:
            return due
        # The memory of a step with resting units is not the model's own: the last one before them is watched.
        ahead = step + 1 <= total_steps and self._controller.probe_due(step + 1, total_steps)
        return (due or ahead) and self._probing is None and not spending.meter.peak_known

    def extras(self, step: int) -> Mapping[str, Any]:
        """What probes read of units that rest, and which units the last cut dropped."""
        return {"probe": self._probe(step), "last_dropped": self.last_dropped}

    def act(self, plan: Plan, reading: Reading) -> Change:
        """Drop what is to go, then bring back what is to come back; each is undone if other ranks could not."""
        with self._cutting.host.resizable(f"the cut after step {plan.step}", changing(plan, self.groups)) as agreed:
            change, cutting = Change(), self._cutting
            if plan.drops():
                snapshots = self._as_it_is(plan, reading.basis)
                with (
                    cutting.coordinates(cutting.host, self.groups, plan, reading, rest=self.lasting),
                    self._resting(plan.keep) as note,
                ):
                    change = replace(cutting.drop(plan, agreed), note=note)
                self._snapshots = snapshots
            if plan.grows():
                change = replace(change, regrown=self._grow(plan, agreed))
            return change

    @property
    def last_dropped(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """By group, origins of the units that the last cut dropped; none once some of them were let go."""
        reserve = self.reserve
        latest = {name: dropped_at == self._last_rest for name, dropped_at in reserve.dropped_at.items()}
        gone = {name: ~active & latest[name] for name, active in reserve.active.items()}
        if any((gone[name] & ~resting).any() for name, resting in reserve.resting.items()):
            return {}
        units = {name: np.flatnonzero(each) for name, each in gone.items()}
        return {name: origins for name, origins in units.items() if len(origins)}

    @property
    def within_step(self) -> bool:
        """Whether a probed step has begun and not ended."""
        return self._probing is not None and self._probing.num_forwards > 0

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors and numbers."""
        return {
            **self._cutting.state_dict(),
            "kind": self.kind,
            "reserve": self.reserve.state_dict(),
            "decisions": self._decisions,
            "last_rest": self._last_rest,
            "snapshots": {
                name: [(*key, value) for key, value in each.items()] for name, each in self._snapshots.items()
            },
            "probing": self._probing is not None,
            "recent": plain(self._recent, "recent gains"),
            "chosen": plain(self._chosen, "units to probe"),
            "turn": self._turn,
            "easing": None if self._easing is None else self._easing.state_dict(),
        }

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        """The groups at the widths of the state."""
        if state["kind"] == "cutting":
            raise CheckpointError(
                "units come back in one of the two runs only: build the model anew, dense, and attach with the "
                "arguments of the run that is to go on"
            )
        groups, keep = self._cutting.check(state), self._cutting.kept(state)
        reserve = self.reserve.resumed(state["reserve"])
        if any((reserve.active[name] != kept).any() for name, kept in keep.items()):
            raise CheckpointError("the reserve and the loop disagree about which units are active")
        units = {name: len(active) for name, active in reserve.active.items()}
        for name, values in (item for gains in _gains(state) for item in gains.items()):
            if values.shape != (units.get(name),):
                raise GroupError(f"recent gains of {name!r} are not one per unit")
        for name, origins in _chosen(state).items():
            inside = np.isin(origins, np.arange(units.get(name, 0))).all()
            if origins.ndim != 1 or origins.dtype.kind != "i" or not inside:
                raise GroupError(f"units to probe of {name!r} are not units of that group")
        Easing.check(state["easing"], state["shapes"], len(self._host.copies))
        int(state["decisions"]), int(state["last_rest"]), int(state["turn"]), bool(state["probing"])
        _snapshots(state["snapshots"])
        return groups

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the dense model to the units of the state, and go on with its reserve."""
        reserve = self.reserve.resumed(state["reserve"])  # asks the dense model
        self._cutting.load_state_dict(state)
        self.reserve, self._decisions = reserve, int(state["decisions"])
        self._last_rest, self._turn = int(state["last_rest"]), int(state["turn"])
        self._snapshots = _snapshots(state["snapshots"])
        self._recent.extend(_gains(state))
        self._chosen = {name: origins[reserve.resting[name][origins]] for name, origins in _chosen(state).items()}
        if state["easing"] is not None:
            self._easing = Easing.resumed(self._model, self._host.copies, state["easing"])
        if state["probing"]:
            self._start_probe()

    def _begin_probe(self, step: int) -> None:
        """Have resting units present in the step after this one, if there are any and a share of the FLOPs pays."""
        spending = self._spending
        self._chosen = self._chosen or self._affordable()
        allowance = spending.account.share_left(_PROBE_SHARE, spending.account.probing_flops)
        spare = min(allowance, spending.spare_flops(step, widths_of(self.groups)))
        if self._chosen and self._extra(self._chosen) <= spare:
            self._start_probe()

    def _affordable(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """Units that can be present in a few steps for what may be spent on probing by now; groups take turns."""
        account, groups = self._spending.account, self._cutting.dense
        allowance = account.share_left(_PROBE_SHARE, account.probing_flops)
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

        Units of the last cut are left out, or they would flutter. While nothing is dropped, each decision moves on.
        """
        dropped_at = self.reserve.dropped_at[group.name]
        resting = np.flatnonzero(self.reserve.resting[group.name] & (dropped_at < self._decisions))
        return resting[np.argsort(-dropped_at[resting], kind="stable")]

    def _start_probe(self) -> None:
        with self._spending.account.watch.probing:
            self._probing = Probing(self._model, self.reserve, self._chosen, brackets=brackets(self._model))
            self._probing.start()

    def _end_probe(self, grad_scale: Tensor | None) -> None:
        """Take the units out and note their gains; the gradients of the step are ready."""
        probing, self._probing = self._probing, None
        if probing is None:
            return
        with self._spending.account.watch.probing:
            probing.stop()
            ranks = self._cutting.host.ranks
            if ranks.count > 1:
                probing.share(ranks.mean)
            gains = probing.gains(grad_scale)
            if gains is not None:
                recent = {name: np.full(len(self.reserve.active[name]), np.nan) for name in gains}
                for name, values in gains.items():
                    recent[name][self._chosen[name]] = values  # NaN for all units that were not present
                self._recent.append(recent)
        if probing.num_forwards:
            self._spending.account.probed(self._extra(self._chosen))

    def _extra(self, units: Grow) -> float:
        wide = {name: int(active.sum()) for name, active in with_units(self.reserve, units).items()}
        flops = self._spending.costs["flops"]
        return flops.total(wide) - flops.total(widths_of(self.reserve.present()))

    def _probe(self, step: int) -> Probe | None:
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

    def _as_it_is(self, plan: Plan, turned: Iterable[str]) -> Snapshots:
        """Layers whose states are about to be turned and cut, as they are: nothing less takes such a cut back."""
        self._settle()
        snapshots: Snapshots = {}
        for group in self.groups:
            if group.name in turned and not plan.keep[group.name].all():
                names = frozenset(piece.tensor for piece in group.slices)
                tensors = held(self._model, self._optimizers, self._host.copies, names)
                snapshots[group.name] = {key: tensor.detach().clone() for key, tensor in tensors}
        return snapshots

    @contextmanager
    def _resting(self, keep: Mapping[str, Bool[np.ndarray, " _units"]]) -> Iterator[str]:
        """Take in the units that are dropped inside; what is let go for them, in words. If dropping fails, nothing."""
        self._settle()
        if not self.lasting:
            self.release()
        self._chosen = {}
        before, last_rest = self.reserve, self._last_rest
        self._last_rest = self._decisions
        self.reserve = before.rest(self._model, self._optimizers, keep, self._host.copies, when=self._decisions)
        let_go, words = self.reserve.let_go, ""
        if let_go:
            gone = counted(sum(len(origins) for origins in let_go.values()), "unit")
            words = f"the reserve of {before.limit_bytes:,} bytes is full: let go of {gone} dropped earlier"
        try:
            if words:
                warn(f"{words} for good; actuator=Regrowing(reserve_bytes=...) makes room")
            yield words
        except BaseException:
            self.reserve, self._last_rest = before, last_rest
            raise

    def _grow(self, plan: Plan, agreed: Callable[[], None]) -> dict[str, Bool[np.ndarray, " _units"]]:
        """Bring the plan's units back; by group which active units have just come back. None do if `agreed` raises.

        A plan that undoes the last cut puts layers whose states were turned back as they were; other units are eased
        in.
        """
        self._settle()
        self._chosen = {}
        active = with_units(self.reserve, plan.grow)
        regrown = {n: np.isin(np.flatnonzero(active[n]), units) for n, units in plan.grow.items() if len(units)}
        larger = cut_groups(self.reserve.groups, active)

        def rise() -> None:  # while the tensors of a sharded model are unsharded
            back = {name for name in self._snapshots if self._put_back(name)} if plan.undoes else set()
            rising = {name: units for name, units in regrown.items() if name not in back}
            self._easing = Easing(self._model, larger, rising, _EASE_STEPS, self._host.copies) if rising else None
            agreed()

        held_by = (self._model, self._optimizers, self.groups, self.reserve)
        try:
            groups, self.reserve = regrow(*held_by, plan.grow, self._host.copies, agreed=rise)
        except BaseException:
            self._easing = None
            raise
        self._cutting.take_over(groups, {name: np.flatnonzero(units) for name, units in self.reserve.active.items()})
        return regrown

    def _put_back(self, name: str) -> bool:
        """Put a layer back as it was before the last cut, if nothing else about its shape has changed since."""
        snapshot = self._snapshots[name]
        names = frozenset(key.tensor for key in snapshot)
        live = {
            key: each for key, each in held(self._model, self._optimizers, self._host.copies, names) if key in snapshot
        }
        if any(key not in live or live[key].shape != value.shape for key, value in snapshot.items()):
            return False
        with torch.no_grad():
            for key, value in snapshot.items():
                live[key].copy_(value)
        return True

    def _settle(self) -> None:
        if self._easing is not None:
            self._easing.finish()
            self._easing = None

    def release(self) -> None:
        """Nothing comes back any more: give the reserve's memory back."""
        nothing = {name: np.zeros_like(units) for name, units in self.reserve.resting.items()}
        self.reserve, self._snapshots = replace(self.reserve, tensors={}, resting=nothing), {}

    def stop(self) -> None:
        """Leave the model alone: nothing present, nothing rising; may be called again."""
        if self._probing is not None:
            self._probing.stop()
            self._probing = None
        self._settle()


def _gains(state: Mapping[str, Any]) -> list[dict[str, Float64[np.ndarray, " _units"]]]:
    return [restored(each, {}, "recent gains", torch.device("cpu")) for each in state["recent"]]


def _chosen(state: Mapping[str, Any]) -> dict[str, Int[np.ndarray, " _units"]]:
    found = restored(state["chosen"], {}, "units to probe", torch.device("cpu"))
    return {str(name): np.asarray(origins) for name, origins in found.items()}


def _snapshots(state: Mapping[str, Sequence[Sequence[Any]]]) -> Snapshots:
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
