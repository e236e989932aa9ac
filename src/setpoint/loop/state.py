"""The state of a run: where it is, as one value that a checkpoint can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from setpoint.checkpoint.plain import plain, restored
from setpoint.controller.plan import Plan
from setpoint.groups.follow import ByUnit, Change, follow, fresh
from setpoint.sensor.reading import Reading


@dataclass(frozen=True, eq=False)
class RunState:
    """Where a run is; every step and every decision makes a new one.

    Args:
        step: optimizer steps done.
        skipped: steps that the sensor had left out by the last reading.
        again: a step at which to decide besides those of the controller; 0 for none.
        overdue: a decision is due and could not be made.
        waits: it was due while ranks had run out of batches.
        budget_met: the last decision has been made.
        plan: the last one, without what it says of single units.
        saliency: in that reading, of the units that are active now.
        worth: at the last decision, likewise.
        gave_way: which goal lost when budget and loss could not both be met; "" if none did.
    """

    step: int = 0
    skipped: int = 0
    again: int = 0
    overdue: bool = False
    waits: bool = False
    budget_met: bool = False
    plan: Plan | None = None
    saliency: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    worth: Mapping[str, ByUnit[np.ndarray]] = field(default_factory=dict, metadata=fresh(math.nan))
    gave_way: str = ""

    def decided(self, plan: Plan, reading: Reading, change: Change) -> RunState:
        """After a decision: what is known of the units that are active now; NaN for those that have just come back."""
        seen = self if change.counted else replace(self, saliency=reading.saliency, worth=plan.worth)
        return replace(
            follow(seen, change),
            plan=replace(plan, keep={}, worth={}, grow={}, grow_worth={}),
            budget_met=plan.budget_met,
            overdue=False,
            gave_way=plan.gave_way or self.gave_way,
        )

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = plain(self, "the run's progress")
        return state

    @classmethod
    def of(cls, state: Mapping[str, Any], widths: Mapping[str, int]) -> RunState:
        """What `state_dict` was taken of, at these widths."""
        by_unit = {name: np.zeros(width) for name, width in widths.items()}
        like = cls(plan=None if state["plan"] is None else Plan(0, {}), saliency=by_unit, worth=by_unit)
        found: RunState = restored(state, like, "the run's progress", torch.device("cpu"))
        return found
