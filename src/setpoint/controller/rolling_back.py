"""Rolling back: another controller decides, and a cut that the loss did not stand is taken back, once in a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

from setpoint.controller.plan import Controller, Observation, Plan, Transferring
from setpoint.controller.trend import Excess
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group, keep_all

_SIGNIFICANT = 4.0
"""Standard errors by which the loss must lie above its trend to have left it."""
_NOTABLE = 0.10
"""Share by which it must at least have risen over the cut: every cut costs a little."""
_DECISIONS_LEFT = 2
"""Decisions that must be to come, so that the budget can still be met."""


@dataclass(frozen=True, eq=False)
class RollBackState:
    """The inner controller's state, and whether a cut has been taken back, or the reference has paused, already."""

    inner: Any
    gave_way: bool = False


@final
@dataclass(frozen=True)
class RollingBack:
    """When the loss has left its trend, the last cut comes back and nothing is dropped until the next decision.

    This happens once in a run, and only while decisions are still to come: the budget has the last word. Where the last
    cut's units are not all in the reserve, the reference pauses, and nothing comes back.

    Args:
        inner: decides otherwise.
    """

    inner: Controller[Any]

    def init(self, groups: tuple[Group, ...]) -> RollBackState:
        return RollBackState(self.inner.init(groups))

    def due(self, step: int, total_steps: int) -> bool:
        return self.inner.due(step, total_steps)

    def transferred(
        self, state: RollBackState, *, step: int, total_steps: int, present: float, limit: float
    ) -> RollBackState:
        if not isinstance(self.inner, Transferring):
            return state
        inner = self.inner.transferred(state.inner, step=step, total_steps=total_steps, present=present, limit=limit)
        return replace(state, inner=inner)

    def decide(
        self, state: RollBackState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[RollBackState, Plan]:
        """The inner controller's plan, or the one that takes the last cut back."""
        back = None if state.gave_way else self._back(observation, cost, groups)
        if back is not None:
            return replace(state, gave_way=True), back
        inner, plan = self.inner.decide(state.inner, observation, cost, groups)
        return replace(state, inner=inner), plan

    def _back(self, observation: Observation, cost: Cost, groups: tuple[Group, ...]) -> Plan | None:
        excess, step, total_steps = observation.excess, observation.step, observation.planned_steps
        if excess is None or not left_trend(excess):
            return None
        if sum(self.due(later, total_steps) for later in range(step + 1, total_steps)) < _DECISIONS_LEFT:
            return None
        back, widths = observation.last_dropped, observation.widths
        wider = {name: width + len(back.get(name, ())) for name, width in widths.items()}
        expected = {name: left.factor * cost.total(wider) for name, left in observation.remaining.items()}
        if any(expected[name] > ceiling for name, ceiling in observation.ceiling.items()):
            return None
        done = (
            f"so the cut was taken back at step {step}"
            if back
            else "and what was dropped does not rest in full in a reserve"
        )
        why = (
            f"after the cut of step {excess.cut} the loss lay {excess.value:.3g} over its trend of "
            f"{excess.foretold:.3g} (standard error {excess.error:.2g}), {done}"
        )
        reason = f"{'rolled back' if back else 'paused'}: {why}"
        return Plan(step, keep_all(groups), reason=reason, grow=back, undoes=bool(back), gave_way=why)


def left_trend(excess: Excess) -> bool:
    """Whether the loss has left its trend: significantly above it, and well above where it was at the cut.

    The second matters early, where a loss that falls fast and then flattens lies above any line drawn through its fall.

    >>> left_trend(Excess(0.5, error=0.1, foretold=2.0, before=2.0))
    True
    >>> left_trend(Excess(0.1, error=0.01, foretold=2.0, before=2.0))
    False
    >>> left_trend(Excess(0.5, error=0.1, foretold=1.5, before=2.0))
    False
    """
    return excess.value > _SIGNIFICANT * excess.error and excess.rise > _NOTABLE * abs(excess.before)
