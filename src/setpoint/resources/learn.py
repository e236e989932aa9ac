"""Learn: costs, meter and target of a run that is held to bytes, seconds or joules, from copies of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from setpoint.cost.budget import METERED, Budget
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost, forward_flops
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.groups.example import Example, inputs_of, num_samples
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Trace
from setpoint.host.host import Host
from setpoint.loop.candidates import restricted
from setpoint.resources.costing import cost_out
from setpoint.resources.counted import Share
from setpoint.resources.energy import EnergyCost
from setpoint.resources.inference import Inference
from setpoint.resources.metering import Metering
from setpoint.resources.replica import Replica


@dataclass(frozen=True, eq=False)
class Learnt:
    """What is known of resources that are measured."""

    costs: Mapping[str, Cost]
    sources: Mapping[str, str]
    header: Mapping[str, Any]
    meter: Metering
    passes: float  # steps on copies, in steps of the dense model


def learn(
    host: Host,
    example: Example,
    found: Trace,
    groups: tuple[Group, ...],
    goals: Sequence[Budget | Price | Tolerance],
    calls: int,
) -> Learnt:
    """Build costs and meter of the resources that goals are on.

    Args:
        found: of an optimizer step, in which the model is called `calls` times on examples; copies make one call.

    Raises:
        CostError: for a resource that cannot be predicted or measured here.
    """
    measured = {each.resource for each in goals} & set(METERED)
    watts = next((each.watts for each in goals if each.watts is not None), None)
    given = next((each.example for each in goals if each.example is not None), None)
    answered = example if given is None else given
    own, inference, pass_flops = restricted(found, groups), None, None
    if "inference" in measured:
        inference = Inference.of(host.model, answered)
        pass_flops = forward_flops(own, num_samples(answered) / num_samples(example) / calls)
    dense = flops_cost(own).total(widths_of(groups))

    def share(of: Cost | None, parts: int = 1) -> Share:
        return lambda widths: of.total(widths) / (parts * dense) if of is not None and dense else 0.0

    costing = cost_out(
        host.model, host.optimizers, example, groups, measured, watts, given,
        share=share(flops_cost(own), calls), pass_share=share(pass_flops),
    )  # fmt: skip
    energy = costing.costs.get("energy")
    meter = Metering(
        measured,
        Replica(host.model, tuple(host.optimizers), *inputs_of(example)).held,
        next((parameter.device for parameter in host.model.parameters()), torch.device("cpu")),
        model=host.model,
        compiled=host.compiled,
        energy=costing.energy,
        inference=inference,
        pass_flops=pass_flops,
        watts=energy.watts if isinstance(energy, EnergyCost) and energy.stated else 0.0,
    )
    return Learnt(costing.costs, costing.sources, costing.header, meter, costing.steps)
