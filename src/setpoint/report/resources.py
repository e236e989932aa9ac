"""Resources of a ledger: names and units, dense cost and budget, and a sentence on spending."""

from __future__ import annotations

from typing import Any

from setpoint.ledger import Entry
from setpoint.messages import counted
from setpoint.report.figures import AXES, escape
from setpoint.report.numbers import digits, human, percent
from setpoint.report.record import Record

NAMES = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "peak memory",
    "latency": "seconds",
    "inference": "seconds of inference",
    "energy": "energy",
}
UNITS = {"flops": "FLOPs", "params": "parameters", "memory": "B", "latency": "s", "inference": "s", "energy": "J"}
PER = {"inference": "forward pass", "params": "model"}
"""Denominator of spending, where it is not a training step."""


def resources(record: Record) -> tuple[str, ...]:
    """The resources under a budget; without one, those with a reference or a price."""
    return tuple(dict.fromkeys((*record.limit, *record.limit_run))) or tuple(
        dict.fromkeys(name for entry in record.entries for name in (*entry.reference, *entry.price))
    )


def dense_of(record: Record, resource: str) -> float | None:
    """Dense cost per step: the meter's last reading of the dense model, else the prediction scaled by its first one."""
    dense = record.dense.get(resource)
    entries = [entry for entry in record.entries if resource in entry.metered and entry.predicted.get(resource)]
    read = [(entry.metered[resource], entry.predicted[resource]) for entry in entries]
    if dense is None or not read:
        return dense
    of_dense = [metered for metered, predicted in read if predicted >= dense * (1 - 1e-9)]
    return of_dense[-1] if of_dense else dense * read[0][0] / read[0][1]


def limit_of(record: Record, resource: str) -> float | None:
    """The budget per step at the last decision; None where there is none, or only one per run."""
    if resource in record.limit_run:  # what its rest leaves for each step is no budget
        return record.limit.get(resource)
    limits = [entry.limit[resource] for entry in record.entries if resource in entry.limit]
    return limits[-1] if limits else record.limit.get(resource)


def unit_of(resource: str | None) -> str:
    """The unit of a resource, escaped for a label; its name where the unit is unknown."""
    return UNITS.get(resource or "", escape(resource or ""))


def end_of(record: Record) -> int:
    """Last step of the run: where it ended, or is to end."""
    return record.end_step or record.total_steps or max((entry.step for entry in record.entries), default=1)


def dropped(entry: Entry) -> int:
    """Number of units the entry dropped."""
    return sum(num_dropped(entry).values())


def num_dropped(entry: Entry) -> dict[str, int]:
    """Number of units the entry dropped, by group; a ledger lists units, and only counts single weights."""
    return {name: len(origins) for name, origins in entry.dropped.items() if origins} | dict(entry.num_dropped)


def headline(entry: Entry) -> str:
    """The first clause of an entry's reason: what was decided, without the numbers behind it."""
    return entry.reason.partition("; ")[0]


def ledger_line(record: Record) -> str:
    """One sentence about a ledger."""
    made = [entry for entry in record.entries if dropped(entry)]
    units = counted(sum(map(dropped, made)), "unit")
    sentence = f"{counted(len(record.entries), 'decision')}, {counted(len(made), 'cut')}, {units} dropped"
    for resource in resources(record):
        last = next((entry.spent[resource] for entry in reversed(record.entries) if resource in entry.spent), None)
        dense, limit = dense_of(record, resource), limit_of(record, resource)
        unit = UNITS.get(resource, resource)
        if last is not None:
            sentence += f"; spends {human(last, unit)} per {PER.get(resource, 'step')} at the end"
            sentence += f" ({percent(last / dense)} of dense)" if dense else ""
            sentence += f", budget {human(limit, unit)}" if limit else ""
        read = next((e.metered[resource] for e in reversed(record.entries) if resource in e.metered), None)
        sentence += f", {human(read, unit)} by the meter's last reading" if read else ""
        run_limit = record.limit_run.get(resource)
        so_far = [(e.step, e.spent_run[resource]) for e in record.entries if resource in e.spent_run]
        if run_limit:
            sentence += f", budget of the whole run {human(run_limit, unit)}"
        if run_limit and so_far:
            sentence += f", of which {human(so_far[-1][1], unit)} was spent by step {so_far[-1][0]:,}"
        sentence += "".join(f"; {NAMES.get(resource, resource)} {text}" for text in record.sources.get(resource, ()))
        off = record.calibration.get(resource)
        sentence += f"; predictions within {percent(off)} of copies of the model" if off is not None else ""
    if record.idle_watts is not None:
        sentence += f"; power at rest {digits(record.idle_watts)} W, measured apart and part of the joules"
    if record.pattern:
        sentence += f"; masks on single weights ({record.pattern})"
    short = record.end_step is not None and record.total_steps and record.end_step < record.total_steps
    planned = f" of {record.total_steps:,} that were planned" if short else ""
    ended = f"; {record.end}" if record.end else ""
    return sentence + f", over {end_of(record):,} {AXES['step']}s{planned}{ended}."


def state(record: Record) -> dict[str, Any]:
    """Where a run is, or how it ended, by the names that docs/cli.md explains."""
    last = record.entries[-1] if record.entries else None
    widths = {**record.units, **(last.widths if last else {})}
    limits = {name: limit_of(record, name) for name in resources(record)}
    return {
        "step": record.end_step if record.end_step is not None else last.step if last else 0,
        "total_steps": record.total_steps,
        "cost": dict(last.spent if last else record.dense),
        "dense_cost": dict(record.dense),
        "limit": {name: limit for name, limit in limits.items() if limit is not None},
        "limit_run": dict(record.limit_run),
        "spent_run": dict(last.spent_run if last else {}),
        "units": sum(widths.values()),
        "dense_units": sum(record.units.values()),
        "widths": widths,
        "decisions": len(record.entries),
        "cuts": sum(dropped(entry) > 0 for entry in record.entries),
        "ended": record.reason,
        "budget_met": record.budget_met,
    }


def seconds_by_group(record: Record) -> list[tuple[str, float]]:
    """Groups by the seconds of a dense step saved by cutting the group alone to its fewest units, descending."""
    return sorted(record.step_seconds.items(), key=lambda item: -item[1])
