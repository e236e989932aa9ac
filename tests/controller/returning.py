"""A controller for tests in which units must come back in a short run, whatever they are worth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from setpoint.controller.plan import Observation, Plan, Wrapper
from setpoint.groups.group import Group


@dataclass(frozen=True)
class Returning(Wrapper):
    """Comes down to a share of the limit by the settle step; then brings back, at each decision, the block of highest
    probed gain that fits under the limit.
    """

    share: float = 1.0

    def decide(self, state: Any, observation: Observation, cost: Any, groups: tuple[Group, ...]) -> tuple[Any, Plan]:
        at, limit = (observation.step, observation.planned_steps), observation.limit[cost.resource]
        schedule = self.conduct.schedule
        if not schedule.settled(observation.step - 1, observation.planned_steps):
            low = replace(observation, limit={**observation.limit, cost.resource: self.share * limit})
            return self.inner.decide(state, low, cost, groups)
        state, plan = self.inner.decide(state, observation, cost, groups)
        if observation.probe is None or schedule.final(*at) or not plan.empty():
            return state, plan
        found = []
        for group in groups:
            gain = observation.probe.gain.get(group.name, np.zeros(0))
            wider = {**observation.widths, group.name: group.num_units + group.multiple_of}
            if len(gain) >= group.multiple_of and cost.total(wider) <= limit:
                best = np.argsort(-gain, kind="stable")[: group.multiple_of]
                found.append((-float(gain[best].sum()), group.name, observation.probe.origins[group.name][best]))
        if not found:
            return state, plan
        _, name, units = min(found, key=lambda each: each[:2])
        return state, replace(plan, grow={name: np.sort(units)}, reason="a block comes back")
