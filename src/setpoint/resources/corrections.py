"""Corrections: what a meter has read changes the limits of a step, and shows which of them is out of reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from setpoint.cost.budget import amount
from setpoint.messages import warn
from setpoint.spending.limits import Correction, Limits
from setpoint.spending.meter import Readings

# How far the factor of a joint cost follows a new reading, as far as the controller's PI part does.
_TRUST = 0.6
# How far a reading may rise above what is held in place of a limit out of reach, before anything is cut for it.
_SLACK = 0.03


def corrected(before: Limits, readings: Readings, widths: Mapping[str, int]) -> tuple[Limits, dict[str, float]]:
    """The limits by readings at these widths, and the costs that the controller learns of.

    What was read before and is missing now is as predicted and corrected.
    """
    limits, followed = before, before.followed
    seen = {name: value for name, value in readings.learnable.items() if name in followed and value > 0}
    for name, value in seen.items():
        limits = _with_reading(limits, name, value, widths)
    learnt = dict(seen)
    if len(before.budgets) > 1 and limits.corrections:  # what no meter reads now is as predicted and corrected
        spent = {name: seen.get(name, limits.expected(name, widths)) for name in limits.per_step}
        learnt["joint"] = max(spent[name] / limit for name, limit in limits.per_step.items())
    for name in sorted(limits.corrections.keys() - before.corrections.keys()):
        _warn_if_out_of_reach(limits, name, seen[name], widths)
    for name in limits.per_step:
        if name in readings.quickest and name in limits.corrections:
            limits = _doubted(limits, name, readings.quickest[name], widths)
    missing = before.corrections.keys() - readings.learnable.keys()
    return limits, learnt | {name: limits.expected(name, widths) for name in missing}


def _with_reading(limits: Limits, name: str, value: float, widths: Mapping[str, int]) -> Limits:
    predicted, at_dense = limits.costs[name].total(widths), widths == limits.dense_widths
    ratio, known = value / predicted, limits.corrections.get(name)
    if known is None:
        first = Correction(ratio, ratio * limits.predicted(name), predicted, value)
        return limits.anchored(name, first, at_dense=at_dense)
    # A run budget plans with the factor itself; per step the controller's PI part follows the rest.
    trust = 1.0 if limits.is_per_run(name) else _TRUST
    known = replace(known, factor=known.factor * math.exp(trust * math.log(ratio / known.factor)))
    if not at_dense:
        return replace(limits, corrections={**limits.corrections, name: known})
    # The first steps of a run are slow, so the last reading of the dense model counts. One that falls is followed
    # as slowly as the controller does: a limit ahead of it would be cut for.
    dense = max(ratio, known.factor) * limits.predicted(name)
    known = replace(known, dense=dense, first_predicted=predicted, first_read=value)
    return limits.anchored(name, known, at_dense=True)


def _warn_if_out_of_reach(limits: Limits, name: str, seen: float, widths: Mapping[str, int]) -> None:
    """Warn of a budget that could be met by prediction and cannot be by the first reading."""
    limit, lowest = limits.asked.get(name), limits.expected(name, limits.narrowest)
    if limit is not None and not limits.is_per_run(name) and limit < lowest:
        warn(
            f"the budget of {amount(limit, name)} cannot be met: the meter reads {amount(seen, name)} where "
            f"{amount(limits.costs[name].total(widths), name)} was predicted, and the narrowest model would still "
            f"take about {amount(lowest, name)}"
        )


def _doubted(limits: Limits, name: str, quickest: float, widths: Mapping[str, int]) -> Limits:
    """Hold the present cost where two readings in a row show that no cut can meet a budget.

    They do if cuts that should have saved a tenth or more have saved less than half of that, and what is left to save
    does not reach the limit. With the first reading `m0` at the predicted cost `p0` and the present `m` at `p`, cuts
    save `(m0 - m) / (p0 - p)` for each unit of predicted cost.
    """
    known, limit = limits.corrections[name], limits.per_step[name]
    if limits.is_per_run(name) or known.asked is not None:
        return limits
    cost, predicted, first = limits.costs[name], known.first_predicted, known.first_read
    now, doubts, lowest = cost.total(widths), 0, 0.0
    if quickest > limit and now <= 0.9 * predicted and 1 - quickest / first < 0.5 * (1 - now / predicted):
        slope = max(0.0, first - quickest) / (predicted - now)
        lowest = quickest - slope * (now - cost.total(limits.narrowest))
        doubts = known.doubts + 1 if lowest > limit else 0
    known, per_step = replace(known, doubts=doubts), dict(limits.per_step)
    if doubts >= 2:  # one may be another program's doing
        known, per_step[name] = replace(known, asked=limit), quickest * (1 + _SLACK)
        warn(
            f"the budget of {amount(limit, name)} looks out of reach: the meter reads {amount(quickest, name)}, "
            f"and by what cuts have saved so far the narrowest model would still take about {amount(lowest, name)}"
            ". The rest does not shrink with the model: loading data, say, or other work of this machine. Nothing "
            "more is cut for it"
        )
    return replace(limits, per_step=per_step, corrections={**limits.corrections, name: known})
