"""A record: what the ledger says about a reading and a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float64, Int, Shaped

from setpoint.controller.plan import Plan
from setpoint.ledger import Entry, Ledger
from setpoint.sensor.probe import Probe
from setpoint.sensor.reading import Reading


def refusal(reading: Reading) -> str | None:
    """Why no decision can be made on this reading, or None if one can.

    Args:
        reading: a reading whose `skipped_steps` counts from the last reading.
    """
    if reading.skipped_steps:
        steps = "1 step" if reading.skipped_steps == 1 else f"{reading.skipped_steps} steps"
        return f"no decision: NaN or infinite gradients in {steps} since the last reading"
    if not reading.finite():
        return "no decision: the reading holds NaN or infinite values"
    return None


def waiting(plan: Plan, until: int) -> Plan:
    """The plan that drops nothing and says that a cut waits."""
    whole = {name: np.ones_like(keep) for name, keep in plan.keep.items()}
    reason = f"the last cut waits until step {until}, so that the budget of the run is used up"
    return replace(plan, keep=whole, grow={}, grow_worth={}, landed=False, reason=reason)


def with_drops(entry: Entry, plan: Plan, reading: Reading, origin: Mapping[str, Int[np.ndarray, " units"]]) -> Entry:
    """The entry with what the plan drops, by origin, and what is known about it.

    Args:
        entry: the entry so far.
        plan: the plan.
        reading: the reading it was made on.
        origin: by group, original index of each unit that was active before the plan.
    """
    dropped: dict[str, list[int]] = {}
    saliency: dict[str, list[float]] = {}
    worth: dict[str, list[float]] = {}
    for name, keep in plan.keep.items():
        if keep.all():
            continue
        dropped[name] = [int(unit) for unit in origin[name][~keep]]
        saliency[name] = [float(value) for value in reading.saliency[name][~keep]]
        if name in plan.worth:
            worth[name] = [float(value) for value in plan.worth[name][~keep]]
    return replace(entry, dropped=dropped, saliency=saliency, worth=worth)


def with_returns(entry: Entry, plan: Plan, probe: Probe | None) -> Entry:
    """The entry with what the plan brings back, and what its probe told.

    Args:
        entry: the entry so far.
        plan: the plan.
        probe: what the plan was made on.
    """
    grown = {name: [int(unit) for unit in units] for name, units in plan.grow.items() if len(units)}
    gain: dict[str, list[float]] = {}
    for name, units in grown.items():
        if probe is not None and name in probe.gain:
            known = dict(zip(probe.origins[name].tolist(), probe.gain[name].tolist(), strict=True))
            gain[name] = [known.get(unit, np.nan) for unit in units]
    worth = {name: [float(each) for each in values] for name, values in plan.grow_worth.items() if name in grown}
    return replace(entry, grown=grown, gain=gain, grown_worth=worth)


def drop_counts(ledger: Ledger) -> Counter[tuple[str, int]]:
    """How often each unit was dropped, by group and origin."""
    return Counter((name, unit) for entry in ledger for name, units in entry.dropped.items() for unit in units)


def return_counts(ledger: Ledger) -> Counter[tuple[str, int]]:
    """How often each unit came back, by group and origin."""
    return Counter((name, unit) for entry in ledger for name, units in entry.grown.items() for unit in units)


def spread(
    values: Mapping[str, Float64[np.ndarray, " _before"]], regrown: Mapping[str, Bool[np.ndarray, " _units"]]
) -> dict[str, Float64[np.ndarray, " _units"]]:
    """Values by group with NaN for the units that have come back.

    >>> spread({"a": np.array([1.0, 2.0])}, {"a": np.array([False, True, False])})["a"].tolist()
    [1.0, nan, 2.0]
    """
    result = dict(values)
    for name, came in regrown.items():
        if name in result:
            result[name] = np.full(len(came), np.nan)
            result[name][~came] = values[name]
    return result


def only_kept(
    values: Mapping[str, Shaped[np.ndarray, " units"]], plan: Plan
) -> dict[str, Shaped[np.ndarray, " kept_units"]]:
    """Values by group of the units that the plan keeps."""
    return {name: of_group[plan.keep[name]] if name in plan.keep else of_group for name, of_group in values.items()}
