"""A closing: what a run came to, and whether and why it landed."""

from __future__ import annotations

from dataclasses import replace

from setpoint.controller.plan import Plan
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Ledger
from setpoint.loop.parts import Parts
from setpoint.loop.record import drop_counts, return_counts
from setpoint.loop.summary import Summary
from setpoint.loop.watch import LossWatch
from setpoint.loop.weights import Weights
from setpoint.spending.spending import Spending


def summarise(
    parts: Parts,
    spending: Spending,
    ledger: Ledger,
    groups: tuple[Group, ...],
    step: int,
    last: Plan | None,
    watch: LossWatch,
    weights: Weights | None = None,
) -> Summary:
    """The summary of a run.

    Args:
        parts: what the loop is made of.
        spending: what it was held to and has spent.
        ledger: what was decided.
        groups: at their present widths.
        step: optimizer steps done.
        last: the last plan, or None before the first.
        watch: what was observed of the loss, and what was taken back for its sake.
        weights: the masks, where units are single weights.
    """
    gave_way, widths = watch.gave_way, widths_of(groups)
    totals = spending.totals(step, widths)
    landed, reason = _landing(parts, spending, widths_of(groups), step, last, weights)
    drops = drop_counts(ledger)
    summary = Summary(
        **totals,
        landed=landed,
        reason=reason,
        widths=widths,
        dense_widths=widths_of(parts.groups),
        final_params=_num_params(parts, weights),
        dropped_units=len(drops),
        regrown_units=len(return_counts(ledger)),
        dropped_again=sum(count > 1 for count in drops.values()),
        gave_way=f"{gave_way}; {'the budget was met' if landed else 'the budget was missed'}" if gave_way else "",
        final_loss=watch.loss,
    )
    return summary if weights is None else replace(summary, **weights.numbers(groups))


def _num_params(parts: Parts, weights: Weights | None) -> int:
    masked = 0 if weights is None else weights.num_masked
    return sum(parameter.numel() for parameter in parts.model.parameters()) - masked


def _landing(
    parts: Parts,
    spending: Spending,
    widths: dict[str, int],
    step: int,
    last: Plan | None,
    weights: Weights | None,
) -> tuple[bool, str]:
    """Whether the run landed, and why or why not."""
    broken = "" if weights is None else weights.broken()
    if broken:
        return False, f"masked weights of {broken!r} are not zero: something other than this loop changed them"
    num_params, accounted = _num_params(parts, weights), spending.costs["params"].total(widths)
    if num_params != accounted:
        return False, (
            f"the model has {num_params:,} parameters, but its widths account for {accounted:,.0f}: "
            "it was changed by something other than this loop"
        )
    return spending.verdict(step, widths, last)
