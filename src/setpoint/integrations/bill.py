"""Bill: what a Trainer must know of it to end with it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from setpoint.cost.parse import parse_budget
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.host.carrying import brought
from setpoint.loop.loop import Loop
from setpoint.spending.checks import check_budgets, with_bill

SPENT = "the checkpoint is of a run that has spent its bill"


def has_bill(budget: Any) -> bool:
    """Whether a budget, as a user writes it, has a bill beside budgets per step.

    >>> has_bill({"flops": "50%", "flops/run": "100%"}), has_bill(0.5)
    (True, False)
    """
    found = parse_budget(budget)
    return not isinstance(found, (Price, Tolerance)) and with_bill(check_budgets(found))[1] is not None


def is_spent(loop: Loop) -> bool:
    """Whether a loop has made all steps that its bill pays for."""
    return loop.step > 0 and loop.spending.bill is not None and loop.step >= loop.total_steps


def came_spent(loop: Loop, optimizer: Optimizer) -> bool:
    """The same of a loop that was just attached, with the state that the first optimizer has loaded, if there is one.

    A loop without an example takes this state over only in its first step, which must not be made.
    """
    state = brought(optimizer)
    if state is None:
        return is_spent(loop)
    bill = state["spending"].get("bill")
    return bill is not None and state["now"]["step"] >= bill["length"]
