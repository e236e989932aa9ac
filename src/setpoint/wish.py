"""A wish: what the user wants of a run, checked; beside attach it alone knows the leaves that it names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from setpoint.actuator.attached import check_free
from setpoint.actuator.try_optimizer import check_optimizer, check_trains
from setpoint.arguments import check_data, check_shared_costs
from setpoint.controller.even import EvenController
from setpoint.controller.goal import check_goal, controller_for
from setpoint.controller.plan import Controller, RegrowingController
from setpoint.controller.rolling_back import RollingBack
from setpoint.controller.schedule import Schedule
from setpoint.controller.using_up import UsingUp
from setpoint.cost.budget import Budget
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import LoopError
from setpoint.groups.group import Group
from setpoint.host.host import Host
from setpoint.loop.starting import Inputs
from setpoint.sensor.reading import Sensor
from setpoint.sensor.taylor import TaylorSensor
from setpoint.spending.checks import check_budgets, with_bill

if TYPE_CHECKING:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking


@dataclass(frozen=True, eq=False)
class Wish:
    """What the user wants, checked.

    Args:
        goal: a price or a tolerance, None where there are budgets.
        budgets: each of another resource.
        controller: pursues it.
        masking: how single weights are masked, None where whole units are cut.
        regrowing: how units rest that may come back; None where nothing is wished.
        bill: what the run may spend beside budgets per step.
    """

    goal: Price | Tolerance | None
    budgets: tuple[Budget, ...]
    controller: Controller[Any]
    masking: Masking | None = None
    regrowing: Regrowing | None = None
    bill: Budget | None = None

    @property
    def goals(self) -> tuple[Budget | Price | Tolerance, ...]:
        """Budgets, or the price or tolerance."""
        return self.budgets if self.goal is None else (self.goal,)

    @property
    def resource(self) -> str:
        """What is saved where there is no budget."""
        return self.goal.resource if self.goal else "flops"

    @property
    def schedule(self) -> Schedule:
        """When decisions are made."""
        schedule = getattr(self.controller, "schedule", None)
        return schedule if isinstance(schedule, Schedule) else Schedule()

    @property
    def revocable(self) -> bool:
        """Whether a cut that the loss does not stand is taken back, or at least followed by a pause."""
        able = isinstance(self.controller, RegrowingController) or getattr(self.controller, "pauses", False)
        return able and not isinstance(self.goal, Tolerance)  # a tolerance judges by itself

    def guarded(self, controller: Controller[Any]) -> Controller[Any]:
        """The controller, which uses up a run's budget and gives way to the loss once."""
        using_up = UsingUp(controller)
        return RollingBack(using_up) if self.revocable else using_up


def wish(
    host: Host,
    budget: Budget | Sequence[Budget] | Price | Tolerance,
    controller: Controller[Any] | None,
    actuator: Masking | Regrowing | None,
    even: bool,
) -> Wish:
    """Check what is wanted, and whether host and optimizers can give it."""
    check_free(host.model)
    check_data(host.model)
    goal = budget if isinstance(budget, (Price, Tolerance)) else None
    budgets, bill = ((), None) if isinstance(budget, (Price, Tolerance)) else with_bill(check_budgets(budget))
    masking, regrowing = _kinds(actuator)
    if controller is None:
        controller = controller_for(goal or budgets, regrow=regrowing is not None)
        if masking:
            from setpoint.weights.controller import DropAndGrowController

            controller = DropAndGrowController(controller)
    else:
        check_goal(goal, controller)
    if even and masking:
        raise LoopError("even=True is for units that are cut: Masking(...) keeps every layer as wide as it is")
    if even and not isinstance(controller, EvenController):
        controller = EvenController(controller)
    if regrowing and (isinstance(goal, Price) or not isinstance(controller, RegrowingController)):
        raise LoopError(
            f"actuator=Regrowing(...) has no use here: {type(controller).__name__} brings nothing back. Leave the "
            "actuator to attach, or use a Budget with PricedController(regrow=True), or a Tolerance"
        )
    check_trains(host.optimizers, host.model)
    for each in host.optimizers:
        check_optimizer(each)
    found = Wish(goal, budgets, controller, masking, regrowing, bill)
    if not host.alone:
        check_shared_costs({each.resource for each in found.goals})
    return found


def _kinds(actuator: object) -> tuple[Masking | None, Regrowing | None]:
    """The actuator as what it is; neither where units are cut for good."""
    if actuator is None:
        return None, None
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking

    if not isinstance(actuator, (Masking, Regrowing)):
        raise LoopError(f"actuator is Masking(...) or Regrowing(...), or None to cut units for good; got {actuator!r}")
    return (actuator, None) if isinstance(actuator, Masking) else (None, actuator)


def usual_sensor(host: Host, groups: tuple[Group, ...], inputs: Inputs) -> Sensor[Any]:
    """Taylor for units; states have sensors of their own."""
    samples = inputs.samples * host.ranks.count
    if host.alone and any(group.kind == "state" for group in groups):
        from setpoint.sensor.chain import SensorChain
        from setpoint.states.hankel import HankelSensor
        from setpoint.states.selective import SelectiveSensor

        for_states: tuple[Sensor[Any], ...] = (HankelSensor(samples), SelectiveSensor(inputs.example))
        return SensorChain(*(each for each in for_states if each.readable(groups, host.model)), TaylorSensor(samples))
    return TaylorSensor(samples)
