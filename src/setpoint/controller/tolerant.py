"""The tolerant controller: prunes as far as the observed loss stays within a tolerance of its trend."""

from dataclasses import dataclass, field, replace
from typing import final

from setpoint.controller.plan import Conduct, Controller, Observation, Plan, problem_with
from setpoint.controller.schedule import Schedule
from setpoint.controller.selection import Allocation, descend, start
from setpoint.controller.trend import Excess
from setpoint.cost.budget import Tolerance
from setpoint.cost.cost import Cost
from setpoint.errors import LoopError
from setpoint.groups.group import Group, keep_all
from setpoint.messages import counted, plain_fields

_FINEST = 0.03  # stride below which the search ends
_SLEW = 0.5  # largest fraction of a group's units to go at one decision; one block always may


@dataclass(frozen=True)
class TolerantState:
    """What the controller remembers between decisions."""

    stride: float  # share of the present cost that the next cut takes
    used: float = 0.0  # rise over the trend by the cuts that stay, in the unit of the loss
    pending: bool = False  # whether the last cut has not been judged yet


@final
@dataclass(frozen=True)
class TolerantController(Controller[TolerantState]):
    """Cuts, watches the loss, and then cuts further, waits, or takes the cut back.

    With `excess` the distance of the loss from its trend before the cut, `error` its standard error (see
    `excess_after`), and `used` the sum over the cuts that stayed, a cut

        stays          if used + excess + error <= tolerance,
        is taken back  if used + excess - error >  tolerance, or, where it does not rest in full, stays as the last,
        is watched on  in between; when the run must settle the sign of used + excess - tolerance decides.

    A cut takes a share `stride` of the present cost, least worth first. After one that was taken back the stride
    is halved, so that the search closes in on the tolerance as a bisection would; once it is below 0.03, or at
    `schedule.land`, no further cut is made.

    It follows the loss of the run itself: with a batch loss of standard deviation s and n steps between two decisions,
    the error is about `2 s / sqrt(n / 2)`. With a tolerance below that, cuts are watched on.

    Args:
        tolerance: what rise is accepted.
        schedule: times of decisions; its ramp has no meaning here.
        stride: share of the cost that the first cut takes, in (0, 1).

    Raises:
        ValueError: for a setting out of range.
    """

    tolerance: Tolerance
    schedule: Schedule = field(default_factory=lambda: Schedule(settle=0.60, num_cuts=10))
    stride: float = 0.2

    def __post_init__(self) -> None:
        plain_fields(self)
        if not _FINEST <= self.stride < 1:
            raise ValueError(f"stride is a share in [{_FINEST}, 1), got {self.stride!r}")

    @property
    def conduct(self) -> Conduct:
        # What comes back is the last cut; it judges by itself whether a cut stays, so that nothing else takes it back.
        return Conduct(self.schedule, self.tolerance, regrow=True, yields=False)

    def init(self, groups: tuple[Group, ...]) -> TolerantState:
        return TolerantState(self.stride)

    def decide(
        self, state: TolerantState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[TolerantState, Plan]:
        if observation.loss is None:
            raise LoopError("a Tolerance needs the loss: call loop.observe(loss=...) before every optimizer.step()")
        stays = Plan(observation.step, keep_all(groups))
        if problem := problem_with(observation.reading, groups):
            return state, replace(stays, reason=problem)
        step, total_steps = observation.step, observation.planned_steps
        final = self.schedule.final(step, total_steps) or step == total_steps
        words = ""
        if state.pending:
            excess, back = observation.excess, observation.last_dropped
            verdict = self._verdict(state, excess, final)
            words = _judged(state, excess, self.tolerance.loss)
            if verdict == "wait":
                return state, replace(stays, reason=f"watching the last cut on: {words}")
            if verdict == "back" and not back:
                lost = "the last cut stays, since it does not rest in full in the reserve (reserve_bytes)"
                return replace(state, pending=False), replace(stays, budget_met=True, reason=f"done: {lost}: {words}")
            if verdict == "back":
                state = replace(state, pending=False, stride=state.stride / 2)
                last = final or state.stride < _FINEST
                reason = f"{'done: ' if last else ''}the last cut is taken back: {words}"
                return state, replace(stays, budget_met=last, reason=reason, grow=back, undoes=True)
            assert excess is not None
            state = replace(state, pending=False, used=max(0.0, state.used + excess.value))
        if final or state.stride < _FINEST:
            return state, replace(stays, budget_met=True, reason=f"done: {words or 'no cut is under way'}")
        plan = self._cut(state, observation, cost, groups)
        reason = f"{words}; {plan.reason}" if words else plan.reason
        return replace(state, pending=plan.drops()), replace(plan, reason=reason, budget_met=not plan.drops())

    def _verdict(self, state: TolerantState, excess: Excess | None, final: bool) -> str:
        """One of "stay", "back" and "wait"; a cut that nothing is known about when the landing is due goes back."""
        if excess is None:
            return "back" if final else "wait"
        over = state.used + excess.value - self.tolerance.loss
        if final:
            return "back" if over > 0 else "stay"
        if over - excess.error > 0:
            return "back"
        return "stay" if over + excess.error <= 0 else "wait"

    def _cut(self, state: TolerantState, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> Plan:
        reading = observation.reading
        assert reading is not None
        allocation: Allocation = "worth" if reading.calibrated else "uniform"
        widths = observation.widths, observation.dense_widths
        selection = start(cost, groups, reading.saliency, *widths, allocation, slew=_SLEW)
        before = selection.total
        descend(selection, before * (1 - state.stride))
        dropped = sum(selection.dropped().values())
        saved = 1 - selection.total / before
        return Plan(
            step=observation.step,
            keep=selection.keep(),
            worth=selection.unit_worth(),
            price={cost.resource: selection.highest},
            reason=f"dropped {counted(dropped, 'unit')}, {saved:.1%} of the {cost.resource}"
            if dropped
            else "done: nothing can go",
        )


def _judged(state: TolerantState, excess: Excess | None, tolerance: float) -> str:
    if excess is None:
        return "too few losses were observed around it"
    return (
        f"the loss lies {excess.value:+.3g} (standard error {excess.error:.2g}) from its trend before the last cut, "
        f"{state.used + excess.value:.3g} with those before it, of {tolerance:.3g}"
    )
