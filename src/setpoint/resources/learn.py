"""Learn: costs, meter and target of a run that is held to bytes, seconds or joules, from copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from setpoint.controller.reference import Reference
from setpoint.cost.budget import METERED, Budget
from setpoint.cost.cost import Cost
from setpoint.cost.flops import forward_flops
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.groups.export import Example, num_samples
from setpoint.groups.group import Group
from setpoint.groups.trace import Trace
from setpoint.host.host import Host
from setpoint.loop.candidates import restricted
from setpoint.resources.costing import cost_out
from setpoint.resources.metering import Metering, meter_for
from setpoint.resources.target import MeteredTarget
from setpoint.spending.target import Target


@dataclass(frozen=True, eq=False)
class Learnt:
    """What is known of resources that are measured."""

    costs: Mapping[str, Cost]
    sources: Mapping[str, str]
    header: Mapping[str, Any]
    meter: Metering
    target: Callable[[Sequence[Budget], Mapping[str, Cost], Reference, str], Target]


def learn(
    host: Host, example: Example, found: Trace, groups: tuple[Group, ...], goals: Sequence[Budget | Price | Tolerance]
) -> Learnt:
    """Build costs and meter of the resources that goals are on.

    Raises:
        CostError: for a resource that cannot be predicted or measured here.
    """
    measured = {each.resource for each in goals} & set(METERED)
    watts = next((each.watts for each in goals if each.watts is not None), None)
    answered = next((each.example for each in goals if each.example is not None), example)
    costing = cost_out(host.model, host.optimizers, example, groups, measured, watts, answered)
    pass_flops = None
    if "inference" in measured:
        pass_flops = forward_flops(restricted(found, groups), num_samples(answered) / num_samples(example))
    meter = meter_for(
        costing,
        host.model,
        host.optimizers,
        example,
        measured,
        compiled=host.compiled,
        answered=answered,
        pass_flops=pass_flops,
    )

    def target(budgets: Sequence[Budget], costs: Mapping[str, Cost], schedule: Reference, resource: str) -> Target:
        return MeteredTarget(budgets, costs, groups, meter, schedule, resource)

    return Learnt(costing.costs, costing.sources, costing.header, meter, target)
