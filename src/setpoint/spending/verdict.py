"""The verdict on a finished run: what it came to, and whether it met its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from setpoint.controller.plan import Plan
from setpoint.cost.budget import METERED, amount
from setpoint.spending.break_even import break_even_step
from setpoint.spending.spending import Spending
from setpoint.words import counted


def totals(spending: Spending, step: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """What the run came to after so many steps, with these widths, by name of the summary's fields."""
    account, meter = spending.account, spending.meter
    if "inference" not in meter.read():  # the last decision has cut
        with account.deciding:
            account.sensed(meter.time_inference(widths))
    if step < spending.length:
        spending.read_joules(widths)
    spent = {name: spending.expected(name, widths) for name in spending.costs}
    dense_flops = spending.target.dense_cost("flops")
    readings = meter.read()
    read = spending.target.metered | readings.keys()  # a meter that has vanished reads nothing
    measured = {name: source for name, source in meter.sources.items() if name in read}
    return {
        **asdict(account),
        "steps": step,
        "total_steps": spending.length,
        "dense_flops": dense_flops,
        "final_flops": spent["flops"],
        "final_flops_ratio": spent["flops"] / dense_flops if dense_flops else 1.0,
        "overhead_flops_ratio": account.overhead_flops / account.train_flops if account.train_flops else 0.0,
        "seconds": account.seconds,
        "overhead_seconds": account.overhead_seconds,
        "attach_seconds": account.attach.seconds,
        "sensing_seconds": account.sensing.seconds,
        "deciding_seconds": account.deciding.seconds,
        "resizing_seconds": account.resizing.seconds,
        "probing_seconds": account.probing_seconds,
        "limit": spending.target.limit,
        "spent": spent,
        "metered": readings,
        "sources": {**spending.modelled, **measured},
        "resident_bytes": meter.resident_bytes(),
        "break_even_step": break_even_step(account.segments()),
        "limit_run": spending.limit_run,
        "spent_run": spending.runs.spent(),
    }


def verdict(spending: Spending, step: int, widths: Mapping[str, int], last: Plan | None) -> tuple[bool, str]:
    """Whether the budget is met after so many steps, with these widths and this last plan, and why or why not."""
    total_steps, target = spending.length, spending.target
    steps, limits = min(step, total_steps), target.limit
    early = f"ended after {steps:,} of {counted(total_steps, 'step')}" if steps < total_steps else "ended"
    for name, limit in spending.limit_run.items():
        spent, rest = spending.runs.spent()[name], spending.expected(name, widths) * (total_steps - steps)
        if spent + rest > limit * (1 + 1e-12):
            heading = f", and {amount(rest, name)} to go" if rest else ""
            return False, f"{early} at {amount(spent, name)} for the run{heading}, over {amount(limit, name)}"
    for name, limit in limits.items():
        settled = spending.meter.settled() if name in target.metered else {}
        seen, dense = settled.get(name, spending.expected(name, widths)), target.dense_cost(name)
        margin = max(1e-12, spending.meter.margin(name))
        if name not in target.runs and seen > limit * (1 + margin):
            over = f"over {limit / dense:.1%}" if name not in METERED else f"over {amount(limit, name)}"
            slower = f"budget met at step {last.step}, but since then " if last is not None and last.budget_met else ""
            return False, f"{slower}{early} at {seen / dense:.1%} of the dense {name}, {over}"
    if last is not None and last.budget_met:
        gone = "; the energy meter has vanished since: joules are modelled" if spending.meter.vanished else ""
        words = last.reason.removeprefix("budget met: ").removeprefix("done: ")
        return True, f"{'budget met' if spending.budgets else 'done'} at step {last.step}: {words}{gone}"
    if limits and all(limit >= spending.expected(name, spending.dense_widths) for name, limit in limits.items()):
        return True, f"the {'model as it was attached' if target.original else 'dense model'} is within budget"
    within = "within budget" if limits else early
    return False, f"{within} after {steps:,} of {counted(total_steps, 'step')}, but the last decision was not made"
