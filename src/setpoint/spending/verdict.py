"""The verdict on a finished run: what it came to, and whether it met its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from setpoint.controller.plan import Plan
from setpoint.cost.budget import METERED, amount, of_dense
from setpoint.messages import counted
from setpoint.spending.break_even import break_even_step
from setpoint.spending.spending import Spending


def totals(spending: Spending, step: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """What the run came to after so many steps, with these widths, by name of the summary's fields."""
    account, meter = spending.account, spending.meter
    if "inference" not in meter.read():  # the last decision has cut
        with account.deciding:
            account.sensed(meter.time_inference(widths))
    if step < spending.run_steps:
        spending.runs.read_joules(widths)
    spent = {name: spending.expected(name, widths) for name in spending.costs}
    dense_flops = spending.target.dense_cost("flops")
    readings = meter.read()
    read = spending.target.metered | readings.keys()  # a meter that has vanished reads nothing
    measured = {name: source for name, source in meter.sources.items() if name in read}
    return {
        **asdict(account),
        "steps": step,
        "total_steps": spending.run_steps,
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
    total_steps, target = spending.run_steps, spending.target
    limits = target.limit
    to_come = 0 if spending.bill else max(0, total_steps - step)  # a bill pays for no fixed number
    after = f"after {step:,} of {counted(total_steps, 'step')}"
    met_at = f" met at step {last.step:,}" if last is not None and last.budget_met else ""
    left = list[str]()
    for name, limit in spending.limit_run.items():
        spent, rest = spending.runs.spent()[name], spending.expected(name, widths) * to_come
        if spent + rest > limit * (1 + 1e-12):
            to_go = f", and {amount(rest, name)} to go" if rest else ""
            return False, f"{amount(spent, name)} spent {after}{to_go}, {amount(limit, name)} asked for the run"
        left.append(f"{amount(spent, name)} of {amount(limit, name)} spent over {counted(step, 'step')}")
    for name, limit in limits.items():
        settled = spending.meter.settled() if name in target.metered else {}
        seen, dense = settled.get(name, spending.expected(name, widths)), target.dense_cost(name)
        margin = max(1e-12, spending.meter.margin(name))
        if name not in target.runs and seen > limit * (1 + margin):
            spent, asked, was = of_dense(seen / dense, name), f"{100 * limit / dense:.1f} %", "; it was"
            if name in METERED:
                spent, asked, was = f"{amount(seen, name)} ({spent})", amount(limit, name), "; by its decisions it was"
            return False, f"{spent} {after}, {asked} asked for{was + met_at if met_at else ''}"
        uncut = name in METERED and widths == spending.dense_widths  # it is the dense model, whatever a clock says
        left += [of_dense(1.0 if uncut else seen / dense, name)] * (name not in target.runs)
    if last is not None and last.budget_met:
        gone = "; the energy meter has vanished since: joules are modelled" if spending.meter.vanished else ""
        met = f"{'budget met' if spending.budgets else 'done'} at step {last.step:,} of {total_steps:,}"
        return True, f"{met}: {', '.join(left) or last.reason.removeprefix('done: ')}{gone}"
    if spending.limit_run and step >= total_steps:  # nothing is left to spend, whatever the last decision said
        return True, f"budget met at step {step:,} of {total_steps:,}: {', '.join(left)}"
    if limits and all(limit >= spending.expected(name, spending.dense_widths) for name, limit in limits.items()):
        return True, f"the {'model as it was attached' if target.original else 'dense model'} is within budget"
    return False, f"{'within budget' if limits else 'ended'} {after}, but the last decision was not made"
