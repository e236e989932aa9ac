"""Metrics: where a run is, as numbers by name and as one line."""

from __future__ import annotations

from collections.abc import Mapping

from setpoint.controller.plan import Plan
from setpoint.messages import counted
from setpoint.spending.spending import Spending


def metrics(
    spending: Spending, step: int, last: Plan | None, widths: Mapping[str, int], num_decisions: int
) -> dict[str, float]:
    """Where a run is after so many steps, with these widths and this last plan; no device is waited for."""
    target, account = spending.target, spending.account
    cost = {name: spending.expected(name, widths) for name in spending.costs}
    dense = {name: target.dense_cost(name) for name in cost}
    limit = target.limit if spending.budgets else {}
    reference = {name: dense[name] for name in limit} | (target.references(last.reference) if last else {})
    price = dict.fromkeys(limit or [target.cost.resource], 0.0) | (target.prices(last.price, widths) if last else {})
    named = {
        "cost": cost,
        "cost_ratio": {name: value / dense[name] for name, value in cost.items() if dense[name]},
        "limit": limit,
        "limit_run": spending.limit_run,
        "spent_run": spending.runs.spent(),
        "reference": {name: reference[name] for name in limit},
        "price": {name: price[name] for name in (limit or [target.cost.resource])},
        "width": widths,
    }
    found = {
        "step": step,
        "total_steps": spending.run_steps,
        "budget_met": last is not None and last.budget_met,
        "decisions": num_decisions,
        "resizes": account.resizes,
        "units": sum(widths.values()),
        "dense_units": sum(spending.dense_widths.values()),
        "seconds": account.seconds,
        "overhead_seconds": account.overhead_seconds,
        "train_flops": account.train_flops,
        "overhead_flops": account.overhead_flops,
        "overhead_flops_ratio": account.overhead_flops / account.train_flops if account.train_flops else 0.0,
        **{f"{kind}/{name}": value for kind, values in named.items() for name, value in values.items()},
    }
    return {name: float(value) for name, value in found.items()}


def line(known: Mapping[str, float], *, finished: bool) -> str:
    """One line about the loop of these metrics."""
    if not known:
        return "<Loop: not begun, it begins at the first optimizer step>"
    resource = leading(known)
    cost, dense_units = known[f"cost/{resource}"], known["dense_units"]
    limit = known.get(f"limit/{resource}")
    ratio = known.get(f"cost_ratio/{resource}", 1.0)
    parts = [
        f"step {known['step']:,.0f} of {known['total_steps']:,.0f}",
        f"{ratio:.1%} of dense {resource}" + (f", budget {ratio * limit / cost:.1%}" if limit and cost else ""),
        counted(known["resizes"], "cut"),
        f"{known['units']:,.0f} of {dense_units:,.0f} units",
        *(["last decision made"] if known["budget_met"] else []),
        *(["finished"] if finished else []),
    ]
    return f"<Loop: {', '.join(parts)}>"


def leading(known: Mapping[str, float]) -> str:
    """The resource to speak of: of the budget that is nearest to its limit, or the one that is priced."""
    limits = {name.removeprefix("limit/"): value for name, value in known.items() if name.startswith("limit/")}
    if not limits:
        return next(name.removeprefix("price/") for name in known if name.startswith("price/"))
    return max(limits, key=lambda name: known[f"cost/{name}"] / limits[name] if limits[name] else 0.0)
