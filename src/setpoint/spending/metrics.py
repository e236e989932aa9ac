"""Metrics: where a run is, as numbers by name and as one line; and what it came to."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from setpoint.controller.plan import Plan
from setpoint.cost.budget import METERED, amount, of_dense
from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.spending.account import Segment
from setpoint.spending.spending import Spending

LOG = logging.getLogger("setpoint")
_DOUBT = 0.15  # a reading this far from the fit is said to be


def metrics(
    spending: Spending, step: int, last: Plan | None, widths: Mapping[str, int], num_decisions: int
) -> dict[str, float]:
    """Where a run is, by this last plan; no device is waited for."""
    limits, account = spending.limits, spending.account
    cost = {name: limits.expected(name, widths) for name in spending.costs}
    dense = {name: limits.dense_cost(name) for name in cost}
    limit = limits.asked
    reference = {name: dense[name] for name in limit} | (limits.references(last.reference) if last else {})
    priced = list(limit) or [limits.cost.resource]
    price = dict.fromkeys(priced, 0.0) | (limits.prices(last.price, widths) if last else {})
    named = {
        "cost": cost,
        "cost_ratio": {name: value / dense[name] for name, value in cost.items() if dense[name]},
        "limit": limit,
        "limit_run": spending.limit_run,
        "spent_run": spending.spent_run,
        "reference": {name: reference[name] for name in limit},
        "price": {name: price[name] for name in priced},
        "width": widths,
    }
    found = {
        "step": step,
        "total_steps": spending.run_steps,
        "budget_met": last is not None and last.budget_met,
        "decisions": num_decisions,
        "units": sum(widths.values()),
        "dense_units": sum(spending.dense_widths.values()),
        "resizes": account.resizes,
        "seconds": account.seconds,
        "overhead_seconds": account.overhead_seconds,
        "train_flops": account.train_flops,
        "overhead_flops": account.overhead_flops,
        "overhead_flops_ratio": account.overhead_flops / account.train_flops if account.train_flops else 0.0,
        **{f"{kind}/{name}": value for kind, values in named.items() for name, value in values.items()},
    }
    return {name: float(value) for name, value in found.items()}


def line(known: Mapping[str, float], *, finished: bool) -> str:
    if not known:
        return "<Loop: not begun, it begins at the first optimizer step>"
    resource = leading(known)
    cost, dense_units = known[f"cost/{resource}"], known["dense_units"]
    limit, ratio = known.get(f"limit/{resource}"), known.get(f"cost_ratio/{resource}", 1.0)
    parts = [
        f"step {known['step']:,.0f} of {known['total_steps']:,.0f}",
        f"{ratio:.1%} of dense {resource}" + (f", budget {ratio * limit / cost:.1%}" if limit and cost else ""),
        counted(known["resizes"], "cut"),
        f"{known['units']:,.0f} of {dense_units:,.0f} units",
        *(["last decision made"] if known["budget_met"] else []),
        *(["finished"] if finished else []),
    ]
    return f"<Loop: {', '.join(parts)}>"


def log_decision(entry: Entry, known: Mapping[str, float]) -> None:
    """Log a decision that changed the model or was the last one; `known` are the loop's metrics."""
    resource = leading(known)
    ratio = 100 * known.get(f"cost_ratio/{resource}", 1.0)
    if entry.changed:
        dropped = sum(map(len, entry.dropped.values())) + sum(entry.num_dropped.values())
        grown = sum(map(len, entry.grown.values())) + sum(entry.num_grown.values())
        parts = [f"{counted(dropped, 'unit')} dropped"] if dropped or not grown else []
        moved = ", ".join(parts + ([f"{counted(grown, 'unit')} brought back"] if grown else []))
        price = known.get(f"price/{resource}", 0.0)
        LOG.info("step %d: %s, %.1f %% of dense %s, price %.3g", entry.step, moved, ratio, resource, price)
    if known["budget_met"]:
        what = "budget met" if f"limit/{resource}" in known else "done"
        units = f"{known['units']:,.0f} of {known['dense_units']:,.0f}"
        LOG.info("step %d: %s at %.1f %% of dense %s, %s units are left", entry.step, what, ratio, resource, units)


def leading(known: Mapping[str, float]) -> str:
    """The resource to speak of: of the budget that is nearest to its limit, or the one that is priced."""
    limits = {name.removeprefix("limit/"): value for name, value in known.items() if name.startswith("limit/")}
    if not limits:
        return next(name.removeprefix("price/") for name in known if name.startswith("price/"))
    return max(limits, key=lambda name: known[f"cost/{name}"] / limits[name] if limits[name] else 0.0)


def totals(spending: Spending, step: int, widths: Mapping[str, int]) -> dict[str, Any]:
    """What the run came to, by name of the summary's fields."""
    account, meter, limits = spending.account, spending.meter, spending.limits
    if meter.incomplete:
        with account.watch.deciding:
            meter.read_clocks(widths)
    if step < spending.run_steps:
        spending.read_joules(widths)
    spent = {name: limits.expected(name, widths) for name in spending.costs}
    readings = meter.read()
    read = limits.corrections.keys() | readings.values.keys()  # a meter that has vanished reads nothing
    return {
        "steps": step,
        "total_steps": spending.run_steps,
        "dense_flops": limits.dense_cost("flops"),
        "final_flops": spent["flops"],
        "train_flops": account.train_flops,
        "overhead_flops": account.overhead_flops,
        "seconds": account.seconds,
        "overhead": account.watch.seconds(),
        "resizes": account.resizes,
        "limit": limits.asked,
        "spent": spent,
        "metered": dict(readings.values),
        "sources": {**spending.modelled, **{name: source for name, source in meter.sources.items() if name in read}},
        "break_even_step": break_even_step(account.segments()),
        "limit_run": spending.limit_run,
        "spent_run": spending.spent_run,
    }


def break_even_step(segments: Iterable[Segment]) -> int | None:
    """First step at which the accumulated seconds saved exceed the overhead so far.

    With s_0 the seconds per step before the first cut and s_k those of segment k, each step of segment k saves
    `s_0 - s_k`. A segment without a timed step saves nothing. Segments come in order, the dense one first.

    >>> dense, small = Segment(10, 1.0, 2.0), Segment(10, 0.5, 2.0)
    >>> break_even_step([dense, small])  # each step saves half a second: 5 steps exceed 2 s
    15
    """
    dense, *cut = segments
    steps, saved = dense.num_steps, 0.0
    for segment in cut:
        if dense.seconds_per_step is not None and segment.seconds_per_step is not None:
            per_step = dense.seconds_per_step - segment.seconds_per_step
            reached = saved + per_step * segment.num_steps
            if saved > segment.overhead_seconds:
                return steps + 1
            if per_step > 0 and reached > segment.overhead_seconds:
                return steps + int((segment.overhead_seconds - saved) / per_step) + 1
            saved = reached
        steps += segment.num_steps
    return None


def verdict(spending: Spending, step: int, widths: Mapping[str, int], last: Plan | None) -> tuple[bool, str]:
    """Whether the budget is met after so many steps, with these widths and this last plan, and why or why not."""
    run_steps, limits, readings = spending.run_steps, spending.limits, spending.meter.read()
    to_come = 0 if spending.bill else max(0, run_steps - step)  # a bill pays for no fixed number
    after = f"after {step:,} of {counted(run_steps, 'step')}"
    met_at = f" met at step {last.step:,}" if last is not None and last.budget_met else ""
    spent_words = list[str]()
    for name, limit in spending.limit_run.items():
        spent, rest = spending.spent_run[name], limits.expected(name, widths) * to_come
        if spent + rest > limit * (1 + 1e-12):
            to_go = f", and {amount(rest, name)} to go" if rest else ""
            return False, f"{amount(spent, name)} spent {after}{to_go}, {amount(limit, name)} asked for the run"
        spent_words.append(f"{amount(spent, name)} of {amount(limit, name)} spent over {counted(step, 'step')}")
    for name, limit in limits.asked.items():
        if limits.is_per_run(name):
            continue
        read = readings.values if name in limits.corrections else {}
        seen, dense = read.get(name, limits.expected(name, widths)), limits.dense_cost(name)
        fitted = limits.costs[name].total(widths)
        far = name in read and abs(seen / fitted - 1) > _DOUBT
        doubt = f" (read; the fit says {of_dense(fitted / dense, name)})" if far else ""
        doubt = " (not read: by the fit)" if name == "inference" and name not in read else doubt
        if seen > limit * (1 + max(1e-12, readings.margins.get(name, 0.0))):
            share, asked, was = of_dense(seen / dense, name), f"{100 * limit / dense:.1f} %", "; it was"
            if name in METERED:
                share, asked, was = f"{amount(seen, name)} ({share})", amount(limit, name), "; by its decisions it was"
            return False, f"{share}{doubt} {after}, {asked} asked for{was + met_at if met_at else ''}"
        uncut = name in METERED and widths == spending.dense_widths  # it is the dense model, whatever a clock says
        spent_words.append(of_dense(1.0 if uncut else seen / dense, name) + doubt)
    if last is not None and last.budget_met:
        vanished = "energy" in limits.corrections.keys() - spending.meter.sources.keys() and not spending.meter.watts
        gone = "; the energy meter has vanished since: joules are modelled" if vanished else ""
        met = f"{'budget met' if spending.budgets else 'done'} at step {last.step:,} of {run_steps:,}"
        return True, f"{met}: {', '.join(spent_words) or last.reason.removeprefix('done: ')}{gone}"
    if spending.limit_run and step >= run_steps:  # nothing is left to spend, whatever the last decision said
        return True, f"budget met at step {step:,} of {run_steps:,}: {', '.join(spent_words)}"
    asked_all = limits.asked
    if asked_all and all(limit >= limits.expected(n, spending.dense_widths) for n, limit in asked_all.items()):
        return True, f"the {'model as it was attached' if limits.original else 'dense model'} is within budget"
    return False, f"{'within budget' if asked_all else 'ended'} {after}, but the last decision was not made"
