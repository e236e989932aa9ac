"""A record: a ledger as a report reads it, and what it says of its resources."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from setpoint.errors import CheckpointError, ReportError
from setpoint.ledger import Entry, Ledger
from setpoint.messages import counted
from setpoint.report.numbers import human, percent

NAMES = {
    "flops": "FLOPs",
    "params": "parameters",
    "memory": "peak memory",
    "latency": "seconds",
    "inference": "seconds of inference",
    "energy": "energy",
}
UNITS = {"flops": "FLOPs", "params": "parameters", "memory": "B", "latency": "s", "inference": "s", "energy": "J"}
PER = {"inference": "forward pass", "params": "model"}  # denominator of spending, where it is not a training step


@dataclass(frozen=True)
class Record:
    """A ledger as it was written: what was known before the first decision, the decisions, and the end."""

    units: Mapping[str, int]  # of the dense model, by group
    what: Mapping[str, str]  # kind of unit, by group: "channel", "head"
    dense: Mapping[str, float]
    limit: Mapping[str, float]
    limit_run: Mapping[str, float]  # budgets of the whole run
    total_steps: int | None  # as planned last; a run budget replans it
    entries: tuple[Entry, ...]
    sources: Mapping[str, Sequence[str]]  # by resource, what models and what measures its cost
    pattern: str  # of the masks, where units are single weights; "" where units were cut
    ended: Mapping[str, Any]  # how the run ended, as its summary has it (`Ledger.ended`); empty while it goes on

    @property
    def step(self) -> int:
        """Steps done at the end, or at the last decision."""
        return integer(self.ended.get("step")) or max((entry.step for entry in self.entries), default=0)

    @property
    def last_step(self) -> int:
        """Last step of the run: where it ended, or is to end."""
        return (self.step if self.ended else self.total_steps) or self.step or 1

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
    """The record in a file that `loop.ledger.save(file)` wrote; a ReportError for any other."""
    try:
        if file.exists() and not file.is_file():
            raise CheckpointError("it is no plain file")  # and a named pipe would wait for ever
        return record_of(Ledger.load(file))
    except FileNotFoundError as error:
        raise ReportError(
            f"the ledger {file} cannot be read: there is no such file; a run writes it by log_to(loop, {str(file)!r})"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError) as error:  # somebody edited the file
        then = "" if isinstance(error, CheckpointError) else ": loop.ledger.save(file) writes one"
        raise ReportError(f"the ledger {file} cannot be read: {error}{then}") from error


def record_of(ledger: Ledger) -> Record:
    """A ledger as a report reads it, whatever its header lacks."""
    header, ended, groups = ledger.header, ledger.ended or {}, mapping(ledger.header.get("groups"))
    units = {name: integer(mapping(group).get("num_units")) for name, group in groups.items()}
    sources: dict[str, list[str]] = {}
    for kind in ("modelled", "measured"):
        for resource, text in mapping(header.get(kind)).items():
            sources.setdefault(resource, []).append(str(text))
    return Record(
        units={name: count for name, count in units.items() if count is not None},
        what={name: str(mapping(group).get("what", "unit")) for name, group in groups.items()},
        total_steps=integer(ended.get("total_steps", header.get("total_steps"))),
        entries=tuple(_finite(entry) for entry in ledger),
        sources=sources,
        pattern=str(header.get("pattern", "")),
        **{name: quantities(header.get(name)) for name in ("dense", "limit", "limit_run")},
        ended=ended,
    )


def _finite(entry: Entry) -> Entry:
    """An entry without NaN and infinities, which no axis can hold."""
    by_resource = ("spent", "metered", "predicted", "reference", "price", "limit", "spent_run")
    kept: dict[str, Any] = {name: quantities(getattr(entry, name)) for name in by_resource}
    return replace(entry, **kept, loss=number(entry.loss), loss_after=number(entry.loss_after))


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


def cuts_of(record: Record) -> int:
    """Number of decisions that dropped units."""
    return sum(bool(num_dropped(entry)) for entry in record.entries)


def dense_of(record: Record, resource: str) -> float | None:
    """Dense cost per step: the meter's last reading of the dense model, else the prediction scaled by its first one."""
    dense = record.dense.get(resource)
    pairs = ((entry.metered.get(resource), entry.predicted.get(resource)) for entry in record.entries)
    read = [(metered, predicted) for metered, predicted in pairs if metered is not None and predicted]
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


def facts(record: Record) -> dict[str, str]:
    """What is to be read first, by what it is about: verdict and note of the run's summary, and the last numbers."""
    found, ended = {}, record.ended
    if ended:
        found["verdict"] = f"{'' if ended.get('budget_met') else 'budget NOT met: '}{ended.get('reason', '')}"
    if ended.get("note"):
        found["note"] = str(ended["note"])
    found["steps"] = f"{record.step:,}" + (f" of {record.total_steps:,} planned" if record.total_steps else "")
    dropped = [sum(num_dropped(entry).values()) for entry in record.entries]
    grown = sum(sum(num_grown(entry).values()) for entry in record.entries)
    found["decisions"] = f"{len(dropped)}, {counted(cuts_of(record), 'cut')}, {counted(sum(dropped), 'unit')} dropped"
    found["decisions"] += f", {grown:,} brought back" if grown else ""
    if record.pattern:
        found["masks"] = f"on single weights ({record.pattern})"
    for resource in record.resources:
        found[NAMES.get(resource, resource)] = "; ".join(_clauses(record, resource))
    return found


def _clauses(record: Record, resource: str) -> Iterator[str]:
    """What one resource costs at the end, its budgets, and where its numbers come from."""
    dense, limit, run = dense_of(record, resource), limit_of(record, resource), record.limit_run.get(resource)
    last = {
        name: (entry.step, values[resource])
        for entry in record.entries
        for name in ("spent", "metered", "spent_run")
        if resource in (values := getattr(entry, name))
    }
    unit = UNITS.get(resource, resource)
    if "spent" in last:
        share = f" ({percent(last['spent'][1] / dense)} of dense)" if dense else ""
        yield f"{human(last['spent'][1], unit)} per {PER.get(resource, 'step')} at the end{share}"
    if limit:
        yield f"budget {human(limit, unit)}"
    if "metered" in last:
        yield f"{human(last['metered'][1], unit)} by the meter's last reading"
    if run:
        step, spent = last.get("spent_run", (0, None))
        by = "" if spent is None else f", of which {human(spent, unit)} was spent by step {step:,}"
        yield f"budget of the whole run {human(run, unit)}{by}"
    yield from record.sources.get(resource, ())


def state(record: Record) -> dict[str, Any]:
    """Where a run is, or how it ended, by the names that docs/cli.md explains."""
    last, widths, ended = record.entries[-1] if record.entries else None, record.final_widths, record.ended
    limits = {name: limit_of(record, name) for name in record.resources}
    return {
        "step": record.step,
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
        "cuts": cuts_of(record),
        "ended": ended.get("reason"),
        "budget_met": ended.get("budget_met"),
    }
