"""Custom autograd Functions: nothing is known of their backward, so what they touch freezes."""

from __future__ import annotations

from setpoint.groups.custom import MARK
from setpoint.groups.walk import Value, Walk, rule


@rule(MARK)
def _custom_function(walk: Walk, out: Value, x: Value, name: str) -> Value:
    """Units stay, under the name of the Function's class."""
    walk.freeze_all(x, f"the custom autograd Function {name} has a backward of its own, which no graph shows")
    return Value(out.shape, x.labels, zero=x.zero)
