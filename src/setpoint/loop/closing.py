"""A closing: what a run came to, and whether and why it landed."""

from __future__ import annotations

from dataclasses import replace

from setpoint.controller.plan import Plan
from setpoint.cost.budget import amount
from setpoint.groups.group import Group, widths_of
from setpoint.ledger import Ledger
from setpoint.loop.accounting import Account
from setpoint.loop.metering import METERED
from setpoint.loop.parts import Parts
from setpoint.loop.planning import time_inference
from setpoint.loop.record import drop_counts, return_counts
from setpoint.loop.run_spending import read_joules, spent_so_far
from setpoint.loop.summary import Summary, break_even_step
from setpoint.loop.watch import LossWatch
from setpoint.meter.memory import resident_bytes
from setpoint.weights.masking import Weights


def summarise(
    parts: Parts,
    account: Account,
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
        account: what has been spent.
        ledger: what was decided.
        groups: at their present widths.
        step: optimizer steps done.
        last: the last plan, or None before the first.
        watch: what was observed of the loss, and what was taken back for its sake.
        weights: the masks, where units are single weights.
    """
    gave_way = watch.gave_way
    widths, dense_widths, total_steps = widths_of(groups), widths_of(parts.groups), parts.total_steps
    if "inference" not in parts.metering.read():  # the last decision has cut
        with account.deciding:
            time_inference(parts, account, widths)
    if step < total_steps:
        read_joules(parts, account, widths)
    spent = {name: parts.target.expected(name, widths) for name in parts.costs}
    dense_flops = parts.costs["flops"].total(dense_widths)
    landed, reason = _landing(parts, account, groups, step, last, weights)
    drops = drop_counts(ledger)
    summary = Summary(
        landed=landed,
        steps=step,
        total_steps=total_steps,
        widths=widths,
        dense_widths=dense_widths,
        dense_flops=dense_flops,
        final_flops=spent["flops"],
        final_flops_ratio=spent["flops"] / dense_flops if dense_flops else 1.0,
        final_params=_num_params(parts, weights),
        train_flops=account.train_flops,
        overhead_flops=account.overhead_flops,
        overhead_flops_ratio=account.overhead_flops / account.train_flops if account.train_flops else 0.0,
        seconds=account.seconds,
        overhead_seconds=account.overhead_seconds,
        attach_seconds=account.attach.seconds,
        sensing_seconds=account.sensing.seconds,
        deciding_seconds=account.deciding.seconds,
        resizing_seconds=account.resizing.seconds,
        resizes=account.resizes,
        limit=parts.target.limit,
        spent=spent,
        metered=parts.metering.read(),
        sources={**parts.header["modelled"], **_measured(parts)},
        resident_bytes=resident_bytes() if "memory" in parts.costs else None,
        break_even_step=break_even_step(account.segments()),
        reason=reason,
        probing_seconds=account.probing_seconds,
        probing_flops=account.probing_flops,
        probed_steps=account.probed_steps,
        dropped_units=len(drops),
        regrown_units=len(return_counts(ledger)),
        dropped_again=sum(count > 1 for count in drops.values()),
        recompiles=account.recompiles,
        recompiling_seconds=account.recompiling_seconds,
        limit_run={name: run.limit(total_steps) for name, run in parts.target.runs.items()},
        spent_run=spent_so_far(parts, account),
        gave_way=f"{gave_way}; {'the budget was met' if landed else 'the budget was missed'}" if gave_way else "",
        final_loss=watch.loss,
    )
    return summary if weights is None else replace(summary, **weights.numbers(groups))


def _measured(parts: Parts) -> dict[str, str]:
    """By resource that a meter has really read, what reads it; one that has vanished reads nothing."""
    known = parts.target.metered | parts.metering.read().keys()
    return {name: source for name, source in parts.metering.sources.items() if name in known}


def _num_params(parts: Parts, weights: Weights | None) -> int:
    masked = 0 if weights is None else weights.num_masked
    return sum(parameter.numel() for parameter in parts.model.parameters()) - masked


def _landing(
    parts: Parts, account: Account, groups: tuple[Group, ...], step: int, last: Plan | None, weights: Weights | None
) -> tuple[bool, str]:
    """Whether the run landed, and why or why not."""
    total_steps, target, widths = parts.total_steps, parts.target, widths_of(groups)
    steps, dense_widths = min(step, total_steps), widths_of(parts.groups)
    broken = "" if weights is None else weights.broken()
    if broken:
        return False, f"masked weights of {broken!r} are not zero: something other than this loop changed them"
    num_params, accounted = _num_params(parts, weights), parts.costs["params"].total(widths)
    if num_params != accounted:
        return False, (
            f"the model has {num_params:,} parameters, but its widths account for {accounted:,.0f}: "
            "it was changed by something other than this loop"
        )
    early = f"ended after {steps} of {total_steps} steps" if steps < total_steps else "ended"
    spent_run = spent_so_far(parts, account)
    for resource, run in target.runs.items():
        rest = target.expected(resource, widths) * (total_steps - steps)
        limit = run.limit(total_steps)
        if spent_run[resource] + rest > limit * (1 + 1e-12):
            spent = f"{amount(spent_run[resource], resource)} for the run"
            heading = f", and {amount(rest, resource)} to go" if rest else ""
            return False, f"{early} at {spent}{heading}, over {amount(limit, resource)}"
    for resource, limit in target.limit.items():
        seen, dense = target.expected(resource, widths), target.dense_cost(resource)
        if resource in target.metered:
            seen = parts.metering.settled().get(resource, seen)
        margin = max(1e-12, parts.metering.margin(resource))
        if resource not in target.runs and seen > limit * (1 + margin):
            over = f"over {limit / dense:.1%}" if resource not in METERED else f"over {amount(limit, resource)}"
            slower = f"landed at step {last.step}, but since then " if last is not None and last.landed else ""
            return False, f"{slower}{early} at {seen / dense:.1%} of the dense {resource}, {over}"
    if last is not None and last.landed:
        gone = "; the energy meter has vanished since: joules are modelled" if parts.metering.vanished() else ""
        return True, f"landed at step {last.step}: {last.reason}{gone}"
    if target.budgets and all(limit >= target.expected(name, dense_widths) for name, limit in target.limit.items()):
        return True, "the dense model is within budget"
    within = "within budget" if target.budgets else early
    return False, f"{within} after {steps} of {total_steps} steps, but the last decision was not made"
