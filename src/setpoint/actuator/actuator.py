"""Actuator: the protocol of all that carry a plan out on a live model."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from setpoint.controller.plan import Plan
from setpoint.groups.follow import Change
from setpoint.groups.group import Group
from setpoint.sensor.reading import Reading

Origins = Mapping[str, Int[np.ndarray, " _units"]]  # by group, the index of each active unit in the dense model


class Actuator(Protocol):
    """Carries plans out on everything that is indexed by unit. It changes: its groups follow every plan.

    What has a body here is what an actuator does that leaves the model alone between two cuts.
    """

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that may be pruned, at their present widths."""

    @property
    def origin(self) -> Origins: ...

    kind: str  # what a state says of who wrote it
    by_unit: bool = True  # whether units are cut and listed one by one; False where single weights are masked

    @property
    def masks(self) -> Mapping[str, Bool[Tensor, "..."]]:
        """By name of each masked weight tensor, True = active; empty where whole units are cut."""
        return {}

    def before_step(self, grad_scale: Tensor | None) -> None:
        """The gradients of a step are ready; `grad_scale` is what they are still multiplied by, or None."""
        return

    def after_step(self) -> None:
        """The optimizers have moved the weights."""
        return

    def prepare(self, step: int, *, due: bool, open_still: bool) -> tuple[Change, bool]:
        """The step after `step` begins; `due` if a decision may come after it, `open_still` before the last one.

        Returns what it has done to the units, and whether this is the ordinary step whose memory a meter should watch.
        """
        return Change(), due

    def before_decision(self) -> Change:
        """A decision comes, or the end of the run: units that were there for a probe only leave."""
        return Change()

    def extras(self, step: int) -> Mapping[str, Any]:
        """Further fields of the controller's observation; called once per decision."""
        return {}

    def act(self, plan: Plan, reading: Reading) -> Change:
        """Carry a plan out on all ranks, or on none; whatever it raises, everything is as it was."""

    def broken(self) -> str:
        """The first tensor in which something that was masked is not zero; "" if none."""
        return ""

    def totals(self) -> Mapping[str, Any]:
        """Further fields of the summary, by name."""
        return {}

    def release(self) -> None:
        """The last decision is made: give back what was kept for further ones."""
        return

    def stop(self) -> None:
        """Leave the model alone from here on; may be called again."""
        return

    def check(self, state: Mapping[str, Any]) -> tuple[Group, ...]:
        """The groups that a state would lead to; a `CheckpointError` if it does not fit. Nothing is changed."""

    def state_dict(self) -> dict[str, Any]:
        """Everything in plain tensors, numbers and strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Bring the dense model to a state that was checked."""
