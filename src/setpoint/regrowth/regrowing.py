"""Regrowing: an actuator that cuts, and brings units back.

What it drops rests in the reserve. Shortly before a decision some of these units visit: they are regrown with outgoing
weights at zero, take part in a few steps of the user, and are shrunk away again. What that told goes to the controller,
and the units that its plan names come back, with outgoing weights at zero too, to learn them afresh.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from setpoint.actuator.cut import cut_groups
from setpoint.actuator.shrink import shrink_live
from setpoint.checkpoint.plain import plain, restored
from setpoint.controller.offer import Probe
from setpoint.controller.plan import Controller, Plan
from setpoint.distributed import Ranks
from setpoint.errors import CheckpointError, LoopError
from setpoint.groups.follow import Change
from setpoint.groups.group import Group, widths_of
from setpoint.host.host import Host
from setpoint.loop.cutting import Coordinates, Cutting, changing
from setpoint.messages import counted, plain_fields, warn
from setpoint.regrowth.reserve import Key, Reserve, Units, held, regrow
from setpoint.regrowth.visit import Arrived, Visit, silence
from setpoint.sensor.reading import Reading, Sensor
from setpoint.spending.spending import Spending

_PROBE_SHARE = 0.01  # probing never takes more than this share of the FLOPs of the steps so far
_PROBES = 4  # probed steps before a decision that what may be spent is to last for


@final
@dataclass(frozen=True)
class Regrowing:
    """`attach(actuator=Regrowing())`: dropped units rest in a reserve, and the most promising of them come back.

    Units come back with a controller that asks for it, `PricedController(regrow=True)`. With any other controller the
    reserve holds the units of the last cut only, in case the loss demands that this cut be taken back.

    Regrowth is experimental: it has not been measured to be better than cutting for good.

    Args:
        reserve_bytes: the most host memory, on each rank, for dropped units. Beyond it a warning is given, and the
            units of the first cuts are let go. None: no limit.

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
class Regrowth(Cutting):
    """Cuts; what goes rests in a reserve, visits and may come back. It changes at every step.

    Units rest until they are let go, or, if not `lasting`, those of the last cut only, should the loss ask for them.
    While units visit they are active units like others, for the sensor, for optimizers and for a checkpoint; the
    reserve keeps them as they were dropped.
    """

    kind = "regrowing"

    def __init__(
        self,
        host: Host,
        groups: tuple[Group, ...],
        coordinates: Coordinates,
        controller: Controller[Any],
        spending: Spending,
        reserve_bytes: int | None,
        *,
        lasting: bool,
    ) -> None:
        super().__init__(host, groups, coordinates)
        sharers = Ranks() if host.mesh is None else host.ranks
        self.reserve = Reserve.of(host.model, groups, reserve_bytes, sharers)
        self.lasting, self._controller, self._spending = lasting, controller, spending
        self._decisions = self._last_rest = self._turn = 0
        self._visit: Visit | None = None
        self._gains: list[dict[str, Float64[np.ndarray, " _units"]]] = []  # by visited step, NaN for all who were away
        self._snapshots: dict[str, dict[Key, Tensor]] = {}  # by group, a layer's tensors before the last cut turned it

    # Visits.

    def before_step(self, grad_scale: Tensor | None) -> None:
        """Note what the gradients tell of visitors."""
        if self._visit is None:
            return
        with self._spending.account.watch.probing:
            gains = self._visit.gains(self.host.model, grad_scale)
            if gains is not None:
                seen = {name: np.full(len(self.reserve.active[name]), np.nan) for name in gains}
                for name, values in gains.items():
                    seen[name][self._visit.origins[name]] = values
                self._gains.append(seen)
        self._spending.account.probed(self._extra_flops(self._visit.origins))

    def prepare(self, step: int, *, due: bool, open_still: bool) -> tuple[Change, bool]:
        """Let resting units visit from the coming step on, if the controller asks and what may be spent allows it."""
        spending, change = self._spending, Change()
        wanted = open_still and self._controller.probe_due(step, spending.planned_steps)
        if self._visit is not None and not wanted:
            change = self.before_decision()
        elif self._visit is None and wanted and not spending.meter.peak_wanted:
            change = self._begin_visit(step)
        if not self._controller.conduct.regrow:
            return change, due
        # The memory of a step with visitors is not the model's own: the last one before them is watched.
        later = step + 1 <= spending.planned_steps and self._controller.probe_due(step + 1, spending.planned_steps)
        return change, (due or later) and self._visit is None and not spending.meter.peak_known

    def before_decision(self) -> Change:
        """Shrink visitors away; they rest as they did before."""
        visit, host = self._visit, self.host
        if visit is None:
            return Change()
        keep = {name: ~np.isin(self.origin[name], units) for name, units in visit.origins.items()}
        some = [group for group in self.groups if group.name in keep]
        with self._spending.account.watch.probing:
            with host.resizable("the end of a probe", some) as agreed:
                groups = shrink_live(host.model, host.optimizers, self.groups, keep, host.copies, agreed=agreed)
            self._take_over(groups, self.reserve)
        self._visit = None  # only now: where the resize fails, they are still there
        return Change(keep=keep)

    def _begin_visit(self, step: int) -> Change:
        """Let units visit, if there are any and a share of the FLOPs pays for them."""
        origins, spending = self._affordable(), self._spending
        run = spending.runs(step, widths_of(self.groups)).get("flops")
        if not origins or (run is not None and _PROBES * self._extra_flops(origins) > run.spare()):
            return Change()
        visits = list[Visit]()

        def begin(larger: tuple[Group, ...], arrived: Arrived) -> None:
            # While visitors still have the outgoing weights that they rested with: gains are read along these.
            visits.append(Visit.of(self.host.model, larger, arrived, origins))
            self._silence(larger, arrived)

        some = [group for group in self.groups if group.name in origins]
        with spending.account.watch.probing, self.host.resizable("a probe", some) as agreed:
            # The reserve that comes of it lacks the visitors; it is not kept, since they leave again.
            arrived, _ = self._regrow(origins, begin, agreed)
        self._visit = visits[0]
        return Change(regrown=arrived)

    def _affordable(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """Units that can visit for a few steps for what may be spent on probing by now; groups take turns."""
        account, groups = self._spending.account, self.dense
        allowance = account.share_left(_PROBE_SHARE, account.probing_flops)
        found = dict[str, Int[np.ndarray, " _units"]]()
        for _ in groups:
            group = groups[self._turn % len(groups)]
            order = self._candidates(group)
            num_blocks = -(-len(order) // group.multiple_of)
            while num_blocks:
                count = num_blocks * group.multiple_of
                units = np.roll(order, -count * (self._decisions - self._last_rest))[:count]
                more = {**found, group.name: np.sort(units)}
                if _PROBES * self._extra_flops(more) <= allowance:
                    found = more
                    break
                num_blocks //= 2
            if len(order) and not num_blocks:
                break
            self._turn += 1
        return found

    def _candidates(self, group: Group) -> Int[np.ndarray, " _units"]:
        """Resting units of a group in the order in which they visit: those dropped last first.

        Units of the last cut are left out, or they would flutter. While nothing is dropped, each decision moves on.
        """
        dropped_at = self.reserve.dropped_at[group.name]
        resting = self.reserve.resting[group.name] & (dropped_at < self._decisions) & group.lossless
        return np.flatnonzero(resting)[np.argsort(-dropped_at[resting], kind="stable")]

    def _extra_flops(self, units: Units) -> float:
        wide = {name: int(active.sum()) for name, active in self.reserve.with_units(units).items()}
        flops = self._spending.costs["flops"]
        return flops.total(wide) - flops.total(widths_of(self.reserve.present()))

    # Decisions.

    def extras(self, step: int) -> Mapping[str, Any]:
        """What visits told of units that rest, and which units the last cut dropped. Called once for each decision."""
        self._decisions += 1
        return {"probe": self._probe(step), "last_dropped": self._last_dropped()}

    def _probe(self, step: int) -> Probe | None:
        reserve, origins, gain, error, deviation = self.reserve, {}, {}, {}, {}
        for name, units in reserve.origins().items():
            rows = np.array([seen[name][units] for seen in self._gains if name in seen]).reshape(-1, len(units))
            present = np.isfinite(rows)  # a unit may have been away in some of the steps
            visited, count = present.any(0), present.sum(0)[present.any(0)]
            if visited.any():
                rows, present = rows[:, visited], present[:, visited]
                origins[name], gain[name] = units[visited], np.where(present, rows, 0.0).sum(0) / count
                squares = (np.where(present, rows - gain[name], 0.0) ** 2).sum(0)
                deviation[name] = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1)), np.nan)
                error[name] = deviation[name] / np.sqrt(count)
        num_steps, self._gains = len(self._gains), []
        if not origins:
            return None
        rested = {name: self._decisions - reserve.dropped_at[name][units] for name, units in origins.items()}
        drops = {name: reserve.drops[name][units] for name, units in origins.items()}
        return Probe(step, origins, gain, error, rested, drops, num_steps=num_steps, deviation=deviation)

    def _last_dropped(self) -> dict[str, Int[np.ndarray, " _units"]]:
        """By group, origins of the units that the last cut dropped; none once some of them were let go."""
        reserve = self.reserve
        last = {
            name: ~active & (reserve.dropped_at[name] == self._last_rest) for name, active in reserve.active.items()
        }
        if any((units & ~reserve.resting[name]).any() for name, units in last.items()):
            return {}
        return {name: np.flatnonzero(units) for name, units in last.items() if units.any()}

    def act(self, plan: Plan, reading: Reading) -> Change:
        """Drop what is to go, then bring back what is to come back; each is undone if other ranks could not."""
        host, change = self.host, Change()
        # One resize for both: ranks gather and re-wrap once, and undo both if another rank failed.
        with host.resizable(f"the cut after step {plan.step}", changing(plan, self.groups)) as agreed:
            if plan.drops():
                turned = [g for g in self.groups if g.name in reading.basis and not plan.keep[g.name].all()]
                # Layers whose states are turned to be cut, as they are: nothing less takes such a cut back.
                snapshots = {g.name: {key: live.detach().clone() for key, live in self._held(g)} for g in turned}
                with self.coordinates(host, self.groups, plan, reading, rest=self.lasting):
                    reserve, note = self._rested(plan.keep)
                    change = replace(self.drop(plan, agreed), note=note)
                self.reserve, self._last_rest, self._snapshots = reserve, self._decisions, snapshots
            if plan.grows():
                arrived, self.reserve = self._regrow(plan.grow, self._undo if plan.undoes else self._silence, agreed)
                change = replace(change, regrown=arrived)
        return change

    def _held(self, group: Group) -> Iterator[tuple[Key, Tensor]]:
        names = frozenset(piece.tensor for piece in group.slices)
        return held(self.host.model, self.host.optimizers, self.host.copies, names)

    def _rested(self, keep: Mapping[str, Bool[np.ndarray, " _units"]]) -> tuple[Reserve, str]:
        """The reserve with the units that are dropped, and in words what is let go for them."""
        if not self.lasting:
            self.release()
        host = self.host
        reserve = self.reserve.rest(host.model, host.optimizers, keep, host.copies, when=self._decisions)
        if not reserve.let_go:
            return reserve, ""
        gone = counted(sum(len(origins) for origins in reserve.let_go.values()), "unit")
        words = f"the reserve of {reserve.limit_bytes:,} bytes is full: let go of {gone} dropped earlier"
        warn(f"{words} for good; actuator=Regrowing(reserve_bytes=...) makes room")
        return reserve, words

    def _regrow(
        self, units: Units, then: Callable[[tuple[Group, ...], Arrived], None], agreed: Callable[[], None]
    ) -> tuple[Arrived, Reserve]:
        """Bring units back: which active units have just arrived, and the reserve without them.

        `then` is called with the larger groups and what has arrived, while tensors of a sharded model are unsharded.
        """
        active = self.reserve.with_units(units)
        arrived = {n: np.isin(np.flatnonzero(active[n]), origins) for n, origins in units.items() if len(origins)}
        larger = cut_groups(self.reserve.groups, active)

        def before_ranks_agree() -> None:
            then(larger, arrived)
            agreed()

        host = self.host
        groups, after = regrow(
            host.model, host.optimizers, self.groups, self.reserve, units, host.copies, agreed=before_ranks_agree
        )
        self._take_over(groups, after)
        return arrived, after

    def _take_over(self, groups: tuple[Group, ...], reserve: Reserve) -> None:
        self.take_over(groups, {name: np.flatnonzero(units) for name, units in reserve.active.items()})

    def _silence(self, larger: tuple[Group, ...], arrived: Arrived) -> None:
        """Units that come back change no output yet, so that the loss does not jump."""
        silence(self.host.model, larger, arrived, self.host.copies)

    def _undo(self, larger: tuple[Group, ...], arrived: Arrived) -> None:
        """A whole cut is taken back: units have their weights at once, layers that were turned are as before."""
        for group in larger:
            snapshot = self._snapshots.get(group.name, {})
            tensors = dict(self._held(group)) if snapshot else {}
            # Where anything else about the layer's shape has changed since, it stays as it is.
            if all(key in tensors and tensors[key].shape == value.shape for key, value in snapshot.items()):
                for key, value in snapshot.items():
                    tensors[key].detach().copy_(value)

    def release(self) -> None:
        """Nothing comes back any more: give the reserve's memory back."""
        self.reserve, self._snapshots = self.reserve.emptied(), {}

    # What is remembered.

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "reserve": self.reserve.state_dict(),
            "decisions": self._decisions,
            "last_rest": self._last_rest,
            "turn": self._turn,
            "gains": plain(self._gains, "gains of visitors"),
            "visit": None if self._visit is None else self._visit.state_dict(),
            "snapshots": {
                name: [(*key, value) for key, value in tensors.items()] for name, tensors in self._snapshots.items()
            },
        }

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        if state["kind"] == "cutting":
            raise CheckpointError(
                "units come back in one of the two runs only: build the model again, dense, and attach with "
                "the arguments of that run"
            )
        groups = super().check(state)
        self.reserve.resumed(state["reserve"], lasting=self.lasting)  # its errors belong here, before anything changes
        return groups

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        reserve = self.reserve.resumed(state["reserve"], lasting=self.lasting)
        super().load_state_dict(state)
        self.reserve, self._decisions = reserve, int(state["decisions"])
        self._last_rest, self._turn = int(state["last_rest"]), int(state["turn"])
        cpu = torch.device("cpu")
        self._gains = [restored(gains, {}, "gains of visitors", cpu) for gains in state["gains"]]
        self._visit = None if state["visit"] is None else Visit.resumed(state["visit"])
        self._snapshots = {
            name: {Key(holder, tensor, part): value.clone() for holder, tensor, part, value in tensors}
            for name, tensors in state["snapshots"].items()
        }


def check_regrowth(sensor: Sensor[Any]) -> None:
    """Check that a sensor can read units that have come back, or raise LoopError."""
    if not sensor.traits.returns:
        raise LoopError(
            f"{type(sensor).__name__} reads no units that have come back, so none can: attach with "
            "PricedController(regrow=False)"
        )
