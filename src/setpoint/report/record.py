"""A record: a ledger as a report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from setpoint.ledger import Entry, Ledger
from setpoint.report.values import integer, mapping, number, quantities


@dataclass(frozen=True)
class Record:
    """A ledger as it was written: what was known before the first decision, and the decisions.

    Args:
        what: kind of unit, by group: "channel", "head".
        step_seconds: by group, predicted seconds of a dense step that the group accounts for.
        calibration: by resource, relative error of the prediction on copies of the model.
        pattern: of the masks, where units are single weights; "" where units were cut.
        total_steps: of the run as planned last; a bill plans it anew.
        end_step: step at which the run ended; None where the ledger has no end.
        end: whether the budget is met at the end, and why not; "" where the ledger has no end.
        reason: how the run ended, as its summary says it; None where the ledger has no end.
        budget_met: likewise.
    """

    units: Mapping[str, int]
    what: Mapping[str, str]
    dense: Mapping[str, float]
    limit: Mapping[str, float]
    total_steps: int | None
    entries: tuple[Entry, ...]
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    pattern: str = ""
    calibration: Mapping[str, float] = field(default_factory=dict)
    limit_run: Mapping[str, float] = field(default_factory=dict)
    idle_watts: float | None = None
    end_step: int | None = None
    end: str = ""
    reason: str | None = None
    budget_met: bool | None = None


_BY_NAME = ("dense", "limit", "limit_run", "step_seconds", "calibration")
_OF_ENTRY = ("spent", "metered", "predicted", "reference", "price", "limit", "spent_run")


def record_of(ledger: Ledger) -> Record:
    """A ledger as a report reads it, whatever its header lacks."""
    header = ledger.header
    groups = {str(key): mapping(value) for key, value in mapping(header.get("groups")).items()}
    ended = mapping(ledger.ended)
    met = (
        "the budget is met" if ended.get("budget_met") is True else f"the budget is NOT met: {ended.get('reason', '')}"
    )
    return Record(
        units={key: units for key, value in groups.items() if (units := _count(value.get("num_units"))) is not None},
        what={key: str(value.get("what", "unit")) for key, value in groups.items()},
        total_steps=_count(ended.get("total_steps", header.get("total_steps"))),
        entries=tuple(_finite(entry) for entry in ledger),
        sources=sources(header),
        pattern=str(header.get("pattern", "")),
        **{name: quantities(header.get(name)) for name in _BY_NAME},
        idle_watts=quantities({"idle": header.get("idle_watts")}).get("idle"),
        end_step=_count(ended.get("step")),
        end=met if ended else "",
        reason=str(ended.get("reason", "")) if ended else None,
        budget_met=ended.get("budget_met") is True if ended else None,
    )


def sources(header: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """By resource, the model and the meter of its cost."""
    found: dict[str, tuple[str, ...]] = {}
    for kind in ("modelled", "measured"):
        named = header.get(kind)
        for resource, text in named.items() if isinstance(named, Mapping) else ():
            found[str(resource)] = (*found.get(str(resource), ()), str(text))
    return found


def _count(value: Any) -> int | None:
    found = integer(value)
    return None if found is None or found < 0 else found


def _finite(entry: Entry) -> Entry:
    kept: dict[str, Any] = {name: quantities(getattr(entry, name)) for name in _OF_ENTRY}
    kept |= {"loss": number(entry.loss), "seconds": number(entry.seconds) or 0.0, "reason": str(entry.reason)}
    return replace(entry, **kept)
