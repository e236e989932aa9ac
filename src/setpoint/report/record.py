"""A record: a ledger as a report reads it, and what it says of its resources."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from setpoint.errors import CheckpointError, ReportError
from setpoint.ledger import Entry, Ledger
from setpoint.messages import counted
from setpoint.report.numbers import digits, human, percent

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


@dataclass(frozen=True)
class Record:
    """A ledger as it was written: what was known before the first decision, the decisions, and the end.

    Args:
        what: kind of unit, by group: "channel", "head".
        total_steps: of the run as planned last; a bill plans it anew.
        sources: by resource, what models and what measures its cost.
        pattern: of the masks, where units are single weights; "" where units were cut.
        calibration: by resource, relative error of the prediction on copies of the model.
        limit_run: budgets of the whole run.
        end_step: step at which the run ended; None where the ledger has no end. So are the two that follow.
        reason: why the budget is met or not, as the run's summary has it.
    """

    units: Mapping[str, int]
    what: Mapping[str, str]
    dense: Mapping[str, float]
    limit: Mapping[str, float]
    total_steps: int | None
    entries: tuple[Entry, ...]
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pattern: str = ""
    calibration: Mapping[str, float] = field(default_factory=dict)
    limit_run: Mapping[str, float] = field(default_factory=dict)
    idle_watts: float | None = None
    end_step: int | None = None
    reason: str | None = None
    budget_met: bool | None = None

    @property
    def last_step(self) -> int:
        """Last step of the run: where it ended, or is to end."""
        return self.end_step or self.total_steps or max((entry.step for entry in self.entries), default=1)

    @property
    def resources(self) -> tuple[str, ...]:
        """The resources under a budget; without one, those with a reference or a price."""
        return tuple(dict.fromkeys((*self.limit, *self.limit_run))) or tuple(
            dict.fromkeys(name for entry in self.entries for name in (*entry.reference, *entry.price))
        )

    @property
    def final_widths(self) -> dict[str, int]:
        """Units of each group after the last decision."""
        return {**self.units, **(self.entries[-1].widths if self.entries else {})}


def read_ledger(file: Path) -> Record:
    """The record in a file that `loop.ledger.save(file)` wrote.

    Raises:
        ReportError: if it cannot be read, or is no ledger.
    """
    try:
        return record_of(Ledger.load(file))
    except FileNotFoundError as error:
        text = (
            f"the ledger {file} cannot be read: there is no such file; a run writes it by log_to(loop, {str(file)!r})"
        )
        raise ReportError(text) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:  # somebody edited the file
        then = "" if isinstance(error, CheckpointError) else ": loop.ledger.save(file) writes one"
        raise ReportError(f"the ledger {file} cannot be read: {error}{then}") from error


def record_of(ledger: Ledger) -> Record:
    """A ledger as a report reads it, whatever its header lacks."""
    header, ended = ledger.header, ledger.ended or {}
    groups = header.get("groups", {})
    sources: dict[str, tuple[str, ...]] = {}
    for kind in ("modelled", "measured"):
        for resource, text in header.get(kind, {}).items():
            sources[resource] = (*sources.get(resource, ()), text)
    return Record(
        units={name: group["num_units"] for name, group in groups.items() if "num_units" in group},
        what={name: group.get("what", "unit") for name, group in groups.items()},
        total_steps=integer(ended.get("total_steps", header.get("total_steps"))),
        entries=tuple(_finite(entry) for entry in ledger),
        sources=sources,
        pattern=header.get("pattern", ""),
        **{name: quantities(header.get(name)) for name in ("dense", "limit", "limit_run", "calibration")},
        idle_watts=number(header.get("idle_watts")),
        end_step=integer(ended.get("step")),
        reason=ended.get("reason"),
        budget_met=ended.get("budget_met"),
    )


def _finite(entry: Entry) -> Entry:
    """An entry without NaN and infinities, which no axis can hold."""
    by_resource = ("spent", "metered", "predicted", "reference", "price", "limit", "spent_run")
    kept: dict[str, Any] = {name: quantities(getattr(entry, name)) for name in by_resource}
    return replace(entry, **kept, loss=number(entry.loss), loss_after=number(entry.loss_after))


# Values of a JSON line, read leniently: a value of another kind counts as missing.


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    # True is an int to Python.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # NaN is not


def integer(value: Any) -> int | None:
    """An integer, or None for anything else."""
    return None if (found := number(value)) is None else int(found)


def mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object, empty for anything else."""
    return value if isinstance(value, dict) else {}


def quantities(value: Any) -> dict[str, float]:
    """Finite numbers by name; other values are dropped."""
    return {str(key): found for key, item in mapping(value).items() if (found := number(item)) is not None}


# What a record says.


def num_dropped(entry: Entry) -> dict[str, int]:
    """Number of units the entry dropped, by group; a ledger lists units, and only counts single weights."""
    return {name: len(origins) for name, origins in entry.dropped.items() if origins} | dict(entry.num_dropped)


def num_grown(entry: Entry) -> dict[str, int]:
    """Number of units the entry regrew, by group."""
    return {name: len(origins) for name, origins in entry.grown.items() if origins} | dict(entry.num_grown)


def dropped(entry: Entry) -> int:
    """Number of units the entry dropped."""
    return sum(num_dropped(entry).values())


def dense_of(record: Record, resource: str) -> float | None:
    """Dense cost per step: the meter's last reading of the dense model, else the prediction scaled by its first one."""
    dense = record.dense.get(resource)
    entries = [entry for entry in record.entries if resource in entry.metered and entry.predicted.get(resource)]
    read = [(entry.metered[resource], entry.predicted[resource]) for entry in entries]
    if dense is None or not read:
        return dense
    # A meter drifts with the machine: the last reading of the dense model is the one to compare with.
    of_dense = [metered for metered, predicted in read if predicted >= dense * (1 - 1e-9)]
    return of_dense[-1] if of_dense else dense * read[0][0] / read[0][1]


def limit_of(record: Record, resource: str) -> float | None:
    """The budget per step at the last decision; None where there is none, or only one per run."""
    if resource in record.limit_run:  # an entry's limit is then what the rest of the bill leaves for each step
        return record.limit.get(resource)
    limits = [entry.limit[resource] for entry in record.entries if resource in entry.limit]
    return limits[-1] if limits else record.limit.get(resource)


def ledger_line(record: Record) -> str:
    """One sentence about a ledger."""
    cuts = [entry for entry in record.entries if dropped(entry)]
    units = counted(sum(map(dropped, cuts)), "unit")
    clauses = [f"{counted(len(record.entries), 'decision')}, {counted(len(cuts), 'cut')}, {units} dropped"]
    for resource in record.resources:
        clauses += _clauses(record, resource)
    if record.idle_watts is not None:
        clauses.append(f"power at rest {digits(record.idle_watts)} W, measured apart and part of the joules")
    if record.pattern:
        clauses.append(f"masks on single weights ({record.pattern})")
    early = record.end_step is not None and record.total_steps and record.end_step < record.total_steps
    planned = f" of {record.total_steps:,} that were planned" if early else ""
    sentence = f"{'; '.join(clauses)}, over {record.last_step:,} optimizer steps{planned}"
    if record.budget_met is None:
        return f"{sentence}."
    end = "the budget is met" if record.budget_met else f"the budget is NOT met: {record.reason}"
    return f"{sentence}; {end}."


def _clauses(record: Record, resource: str) -> list[str]:
    """What one resource costs at the end, its budgets, and where its numbers come from."""
    last = next((entry.spent[resource] for entry in reversed(record.entries) if resource in entry.spent), None)
    read = next((entry.metered[resource] for entry in reversed(record.entries) if resource in entry.metered), None)
    dense, limit, run = dense_of(record, resource), limit_of(record, resource), record.limit_run.get(resource)
    so_far = [(entry.step, entry.spent_run[resource]) for entry in record.entries if resource in entry.spent_run]
    unit, parts = UNITS.get(resource, resource), []
    if last is not None:
        share = f" ({percent(last / dense)} of dense)" if dense else ""
        parts.append(f"spends {human(last, unit)} per {PER.get(resource, 'step')} at the end{share}")
        parts += [f"budget {human(limit, unit)}"] if limit else []
    if read:
        parts.append(f"{human(read, unit)} by the meter's last reading")
    if run:
        parts.append(f"budget of the whole run {human(run, unit)}")
        parts += [f"of which {human(so_far[-1][1], unit)} was spent by step {so_far[-1][0]:,}"] if so_far else []
    clauses = [", ".join(parts)] if parts else []
    clauses += [f"{NAMES.get(resource, resource)} {source}" for source in record.sources.get(resource, ())]
    if resource in record.calibration:
        clauses.append(f"predictions within {percent(record.calibration[resource])} of copies of the model")
    return clauses


def dynamics_line(record: Record) -> str:
    """One sentence about units that were dropped and came back."""
    drops = Counter((name, unit) for entry in record.entries for name, units in entry.dropped.items() for unit in units)
    returned = {(name, unit) for entry in record.entries for name, units in entry.grown.items() for unit in units}
    again = sum(count > 1 for count in drops.values())
    return f"{counted(len(drops), 'unit')} dropped, {len(returned):,} of them brought back, {again:,} dropped again."


def state(record: Record) -> dict[str, Any]:
    """Where a run is, or how it ended, by the names that docs/cli.md explains."""
    last, widths = record.entries[-1] if record.entries else None, record.final_widths
    limits = {name: limit_of(record, name) for name in record.resources}
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
