"""The state of a run: where it is, as one value that a checkpoint can hold, and whether a state is of this run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from setpoint.checkpoint.plain import plain, restored
from setpoint.controller.plan import Plan
from setpoint.errors import CheckpointError
from setpoint.groups.follow import ByUnit, Change, follow, fresh
from setpoint.sensor.reading import Reading

FORMAT = 2
"""Version of the state's form, its entry "format"."""

AGAIN = "build the model anew, dense, and attach with the arguments of the run that is to go on"


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
        """Everything in plain tensors, numbers and strings."""
        state: dict[str, Any] = plain(self, "the run's progress")
        return state

    @classmethod
    def of(cls, state: Mapping[str, Any], widths: Mapping[str, int]) -> RunState:
        """The progress that `state_dict` was taken of, at these widths."""
        by_unit = {name: np.zeros(width) for name, width in widths.items()}
        like = cls(plan=None if state["plan"] is None else Plan(0, {}), saliency=by_unit, worth=by_unit)
        found: RunState = restored(state, like, "the run's progress", torch.device("cpu"))
        return replace(
            found,
            step=int(found.step),
            skipped=int(found.skipped),
            again=int(found.again),
            overdue=bool(found.overdue),
            waits=bool(found.waits),
            budget_met=bool(found.budget_met),
        )


@runtime_checkable
class Part(Protocol):
    """What a loop is made of and remembers by itself."""

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors, numbers and strings."""
        ...

    def check(self, state: Mapping[str, Any]) -> Any:
        """Check that a state fits, before anything is changed."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; it was checked."""
        ...


def check_format(state: Mapping[str, Any]) -> None:
    """Check that a state is of this version.

    Raises:
        CheckpointError: for any other.
    """
    if state["format"] != FORMAT:
        # Version 0.1 wrote format 1; models that it saved still load.
        then = "finish that run with setpoint==0.1.0" if state["format"] == 1 else "upgrade Setpoint"
        raise CheckpointError(f"the state has format {state['format']!r}, and this reads {FORMAT}: {then}")


def check_same_run(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Check that a run can go on with another one's state.

    Raises:
        CheckpointError: naming the first fact that differs.
    """
    for name, value in own.items():
        if (found := saved.get(name)) != value:
            advice = AGAIN
            if name == "total_steps":
                billed = any(per == "run" for _, _, per, _ in own["budgets"])
                change = "" if billed else f", and set loop.total_steps = {value} once it has begun"
                advice = f"attach with {found}{change}"
            theirs, ours = (_short(own_value, other) for own_value, other in ((found, value), (value, found)))
            raise CheckpointError(
                f"the state is of another run: its {name} are {theirs}, here they are {ours}: {advice}"
            )


def _short(value: Any, other: Any) -> str:
    """What differs, of two dicts; else the value."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: item for key, item in value.items() if other.get(key) != item}
    if isinstance(value, list) and all(isinstance(item, (list, tuple)) and len(item) == 4 for item in value):
        value = [  # budgets
            f"{f'{100 * limit:g} %' if share else f'{limit:g}'} {resource} per {per}"
            for resource, limit, per, share in value
        ]
    text = ", ".join(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
