"""What a model cost before it was ever cut, where an earlier run has cut it: fractions are of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from setpoint.actuator.lift import lifted, was_cut
from setpoint.cost.budget import METERED, Budget
from setpoint.cost.cost import Cost
from setpoint.cost.flops import flops_cost
from setpoint.errors import BudgetError
from setpoint.groups.export import Example
from setpoint.groups.group import widths_of
from setpoint.groups.trace import repeated, trace
from setpoint.messages import warn


def original_costs(
    model: nn.Module,
    example: Example,
    budgets: Sequence[Budget],
    costs: Mapping[str, Cost],
    widths: Mapping[str, int],
    passes: int = 1,
) -> dict[str, float]:
    """FLOPs and parameters before the first cut, by resource; nothing for a model that was never cut.

    A warning says so of a model that is within its budgets already.

    Args:
        budgets: that the model is to be held to.
        costs: by resource, over the present widths.
        passes: calls of the model in one optimizer step.

    Raises:
        BudgetError: for a fraction of what only a measurement of the dense model would tell.
    """
    if not was_cut(model):
        return {}
    for each in budgets:
        if each.relative and each.resource in METERED:
            raise BudgetError(
                f"the model was cut before, so the {each.resource} of the dense model are not known, and a fraction "
                f"of {each.limit:g} has no meaning: give Budget.total(..., of={each.resource!r})"
            )
    with lifted(model):
        found = repeated(trace(model, example), passes)
        flops = flops_cost(found).total(widths_of(found.groups))
        original = {"flops": flops, "params": float(sum(parameter.numel() for parameter in model.parameters()))}
    per_step = [each for each in budgets if each.per == "step" and each.resource in original]
    present = {each.resource: costs[each.resource].total(widths) for each in per_step}
    if present and all(each.absolute(original[each.resource]) >= present[each.resource] for each in per_step):
        shares = [f"{value / original[name]:.1%} of the dense {name}" for name, value in present.items()]
        warn(
            f"the model was cut before and takes {' and '.join(shares)}, which is within the budget: nothing more is "
            "cut for it"
        )
    return original
