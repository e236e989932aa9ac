"""A revised controller: the priced one, whose plans something else may change before they are carried out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

from setpoint.controller.plan import Observation, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.controller.reference import Reference
from setpoint.cost.cost import Cost
from setpoint.groups.group import Group

Revise = Callable[[PricedController, PricedState, Plan, Observation, Cost, tuple[Group, ...]], Plan]


@final
@dataclass(frozen=True)
class RevisedController:
    """Hands everything to the priced controller, and its plans to `revise`; a trial of what a controller might do more.

    Args:
        revise: makes a plan of a plan, with the state and the observation that it came of.
        priced: makes the plans.
        regrow: nothing comes back.
    """

    revise: Revise
    priced: PricedController = field(default_factory=PricedController)
    regrow: bool = False

    @property
    def reference(self) -> Reference:
        """Trajectory and times of decisions."""
        return self.priced.reference

    def init(self, groups: tuple[Group, ...]) -> PricedState:
        """State before the first decision."""
        return self.priced.init(groups)

    def due(self, step: int, total_steps: int) -> bool:
        """Whether a decision is to be made after this step."""
        return self.priced.due(step, total_steps)

    def probe_due(self, step: int, total_steps: int) -> bool:
        """Never: nothing rests."""
        return False

    def decide(
        self, state: PricedState, observation: Observation, cost: Cost, groups: tuple[Group, ...]
    ) -> tuple[PricedState, Plan]:
        """The priced controller's next state, and its plan, revised.

        Args:
            state: from `init` or the last decision, cut like the groups.
            observation: what is known at this step.
            cost: predicts spending; names the resource.
            groups: the groups that may be cut, as they are now.
        """
        after, plan = self.priced.decide(state, observation, cost, groups)
        return after, self.revise(self.priced, state, plan, observation, cost, groups)
