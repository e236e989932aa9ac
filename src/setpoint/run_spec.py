"""A run spec: what the user asks of a run, checked, with the leaf folders that it names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parameter import is_lazy

from setpoint.actuator.in_state_dict import check_not_attached
from setpoint.actuator.optimizer_check import check_optimizer, check_trains
from setpoint.actuator.tensors import named_tensors
from setpoint.controller.even import EvenController
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.plan import Controller
from setpoint.controller.priced import PricedController
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import METERED, Budget, Price, Tolerance, parse_budget
from setpoint.errors import BudgetError, CostError, GroupError, LoopError
from setpoint.groups.example import check_method
from setpoint.groups.group import Group, check_blocks
from setpoint.host.host import Host
from setpoint.messages import a_type, plain_number
from setpoint.sensor.reading import Sensor
from setpoint.spending.checks import check_budgets, split_bill

if TYPE_CHECKING:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking


@dataclass(frozen=True, eq=False)
class RunSpec:
    """What is asked of a run, checked.

    Args:
        goal: a price or a tolerance, None where there are budgets.
        bill: what the run may spend in addition to budgets per step.
        total_steps: with a bill, those of the dense run that it is a share of.
        sensor: None for the usual one.
        masking: how single weights are masked, None where whole units are cut.
        regrowing: how units rest that may come back; None for the usual way.
        groups: that may be pruned; None for all.
    """

    goal: Price | Tolerance | None
    budgets: tuple[Budget, ...]
    bill: Budget | None
    total_steps: int
    controller: Controller[Any]
    sensor: Sensor[Any] | None
    masking: Masking | None
    regrowing: Regrowing | None
    groups: tuple[Group, ...] | None
    method: str
    allow_lossy: bool
    verify: bool
    resume: bool

    @property
    def goals(self) -> tuple[Budget | Price | Tolerance, ...]:
        """Budgets, or the price or tolerance."""
        return self.budgets if self.goal is None else (self.goal,)

    @property
    def resource(self) -> str:
        """What is saved where there is no budget."""
        return self.goal.resource if self.goal else "flops"


def run_spec(
    host: Host,
    budget: Any,
    *,
    total_steps: Any,
    controller: Controller[Any] | None,
    sensor: Sensor[Any] | None,
    actuator: Masking | Regrowing | None,
    groups: Sequence[Group] | None,
    even: bool,
    method: str,
    **flags: bool,
) -> RunSpec:
    """Check the arguments of `attach`, and whether host and optimizers can give what they ask for."""
    _check_part("controller", controller, Controller, "PricedController")
    _check_part("sensor", sensor, Sensor, "TaylorSensor")
    steps = plain_number(total_steps)
    if type(steps) is not int or steps < 1:
        raise ValueError(
            f"total_steps must be a positive integer, got {total_steps!r}: give the optimizer steps of the whole run, "
            "such as epochs * len(loader)"
        )
    chosen_groups = _as_groups(groups)
    check_method(host.model, method)
    wanted = parse_budget(budget)
    if isinstance(wanted, Price) and sensor is not None and not sensor.traits.in_loss:
        raise LoopError(
            f"{type(sensor).__name__} reads in no unit of the loss, so that no Price can be set against it: give a "
            'budget, such as "50% flops", or leave the sensor to attach'
        )
    check_not_attached(host.model)
    _check_data(host.model)
    goal = wanted if isinstance(wanted, (Price, Tolerance)) else None
    budgets, bill = ((), None) if isinstance(wanted, (Price, Tolerance)) else split_bill(check_budgets(wanted))
    masking, regrowing = _kinds(actuator)
    if controller is None:
        # A regrowing controller is chosen by the actuator: nobody should have to say it twice.
        controller = _controller_for(goal or budgets, regrow=regrowing is not None)
        if masking:
            from setpoint.weights.controller import DropAndGrowController

            controller = DropAndGrowController(controller)
    else:
        _check_goal(goal, controller)
    if even and masking:
        raise LoopError("even=True is for units that are cut: Masking(...) keeps every layer as wide as it is")
    if even and not isinstance(controller, EvenController):
        controller = EvenController(controller)
    if regrowing and not (controller.conduct.regrow or controller.conduct.yields):
        raise LoopError(
            f"actuator=Regrowing(...) has no use here: {type(controller).__name__} brings nothing back. Leave the "
            "actuator to attach, or use a Budget with PricedController(regrow=True), or a Tolerance"
        )
    check_trains(host.optimizers, host.model)
    for optimizer in host.optimizers:
        check_optimizer(optimizer)  # by trying it on throwaway tensors, whatever its class is called
    resources = {goal.resource} if goal else {budget.resource for budget in budgets}
    if not host.single_process and (measured := sorted(resources & set(METERED))):
        raise CostError(
            f"a budget of {measured[0]!r} is not available on several ranks in this version, since each would measure "
            "another cost: use a budget of 'flops' or 'params'"
        )
    return RunSpec(
        goal,
        budgets,
        bill,
        steps,
        controller,
        sensor,
        masking,
        regrowing,
        chosen_groups,
        method,
        **flags,
    )


def _check_part(name: str, part: object, kind: type, example: str) -> None:
    """Check that a controller or sensor is an object with the methods of one, or None."""
    if isinstance(part, type):
        raise LoopError(f"{name}={part.__name__} is a class: give an object, {part.__name__}(...)")
    # By hasattr: from Python 3.12 on isinstance does not see what a wrapper passes on by __getattr__.
    lacking = sorted(method for method in vars(kind) if not method.startswith("_") and not hasattr(part, method))
    if part is not None and lacking:
        raise LoopError(
            f"{name} must be a {kind.__name__}, such as {example}(...), or None; got {part!r}, which has no "
            f"{' and no '.join(lacking)}: derive it from {kind.__module__}.{kind.__name__}"
        )


def _kinds(actuator: object) -> tuple[Masking | None, Regrowing | None]:
    """The actuator as what it is; neither where units are cut for good."""
    if actuator is None:
        return None, None
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking

    if not isinstance(actuator, (Masking, Regrowing)):
        raise LoopError(f"actuator is Masking(...) or Regrowing(...), or None to cut units for good; got {actuator!r}")
    return (actuator, None) if isinstance(actuator, Masking) else (None, actuator)


def _controller_for(goal: Price | Tolerance | Sequence[Budget], *, regrow: bool) -> Controller[Any]:
    """The default controller of a goal; `regrow` says whether dropped units are to come back."""
    if isinstance(goal, Price):
        return PenaltyController(goal)
    if isinstance(goal, Tolerance):
        return TolerantController(goal)
    return PricedController(deadband=min(budget.deadband for budget in goal), regrow=regrow)


def _check_goal(goal: Price | Tolerance | None, controller: Controller[Any]) -> None:
    """Check that a controller that pursues one goal was made for this one; None stands for budgets."""
    own, name = controller.conduct.goal, type(controller).__name__
    if own != "budget" and own != goal:
        raise BudgetError(f"this {name} pursues {own!r}: give the same to attach, got {goal or 'budgets'}")
    if own == "budget" and goal is not None:
        raise BudgetError(
            f"{name} holds a budget, not {a_type(goal)}: give attach a Budget, or leave the controller to it"
        )


def _as_groups(groups: object) -> tuple[Group, ...] | None:
    """The groups as a tuple, or None; GroupError for what holds anything else, such as their names."""
    if groups is None:
        return None
    chosen = tuple(groups) if isinstance(groups, Iterable) else ()
    if not isinstance(groups, Iterable) or not all(isinstance(group, Group) for group in chosen):
        raise GroupError(
            "groups must be a sequence of groups out of find_groups(model, example), or None for all; got "
            f"{repr(groups):.200}"
        )
    check_blocks(chosen)
    return chosen


def _check_data(model: nn.Module) -> None:
    for name, tensor in named_tensors(model).items():
        if tensor.is_meta and not is_lazy(tensor):  # discovery says what to do about a lazy one
            raise LoopError(
                f"{name!r} is on the meta device and has no data: give the model data first, "
                "model.to_empty(device=...) and its values, and attach then"
            )
