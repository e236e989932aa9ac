"""Plants: groups, costs and meters in closed form, and the loop that runs a controller on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from setpoint.controller.plan import Controller, Observation, Plan
from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group, Size, widths_of
from setpoint.sensor.reading import Reading

Meter = Callable[[int, float], float]
"""Metered cost, given the step and the predicted cost."""


def unit_group(name: str, width: int, *, min_units: int = 1, multiple_of: int = 1) -> Group:
    """A group without tensors: all that a controller looks at."""
    return Group(name, "unit", width, slices=(), min_units=min_units, multiple_of=multiple_of)


def size(name: str, per_unit: int = 1, constant: int = 0) -> Size:
    """A length that follows one group."""
    return Size(constant, ((name, per_unit),))


def chain(
    *widths: int, multiple_of: int = 1, coefficients: tuple[float, ...] | None = None
) -> tuple[tuple[Group, ...], ProductCost]:
    """Layers one after the other: cost = sum of coefficient * width in * width out, 3 in and 10 out at the ends."""
    groups = tuple(unit_group(f"layer{i}", width, multiple_of=multiple_of) for i, width in enumerate(widths))
    sizes = [Size(3), *(size(group.name) for group in groups), Size(10)]
    factors = coefficients or (100.0,) * (len(sizes) - 1)
    terms = (Term(factors[i], (sizes[i], sizes[i + 1])) for i in range(len(sizes) - 1))
    return groups, ProductCost("flops", tuple(terms))


def residual(stem: int, inner: tuple[int, ...], *, multiple_of: int = 1) -> tuple[tuple[Group, ...], ProductCost]:
    """Blocks on one residual stream, which is squared where a projection maps it to itself."""
    stream = unit_group("stream", stem, multiple_of=multiple_of)
    blocks = tuple(unit_group(f"block{i}", width, multiple_of=multiple_of) for i, width in enumerate(inner))
    terms = [Term(64.0, (size("stream"), size(block.name))) for block in blocks]
    terms += [Term(64.0, (size(block.name), size("stream"))) for block in blocks]
    terms += [Term(16.0, (size("stream"), size("stream"))), Term(27.0, (Size(3), size("stream")))]
    return (stream, *blocks), ProductCost("flops", tuple(terms))


def lognormal(groups: tuple[Group, ...], *, spread: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Saliencies whose logarithm is normal, as is typical of trained nets."""
    rng = np.random.default_rng(seed)
    return {group.name: np.exp(spread * rng.standard_normal(group.num_units)) for group in groups}


@dataclass(frozen=True)
class Decision:
    """One decision of a run: what it saw, what it planned and what came of it."""

    step: int
    plan: Plan
    state: Any
    before: Mapping[str, int]
    groups: tuple[Group, ...]
    predicted: float
    metered: float

    @property
    def reference(self) -> float:
        """Schedule of the FLOPs."""
        return self.plan.reference["flops"]


def observe(
    groups: tuple[Group, ...],
    cost: Cost,
    *,
    limit: float,
    dense: float,
    reading: Reading | None,
    step: int = 1,
    total_steps: int = 1,
    metered: float | None = None,
    dense_widths: Mapping[str, int] | None = None,
) -> Observation:
    """An observation of these groups."""
    widths = widths_of(groups)
    return Observation(
        step=step,
        planned_steps=total_steps,
        widths=widths,
        dense_widths=widths if dense_widths is None else dense_widths,
        reading=reading,
        dense={cost.resource: dense},
        limit={cost.resource: limit},
        spent={cost.resource: cost.total(widths)},
        metered={} if metered is None else {cost.resource: metered},
    )


def after(groups: tuple[Group, ...], plan: Plan) -> tuple[Group, ...]:
    """The groups once the plan has been carried out."""
    return tuple(replace(group, num_units=int(plan.keep[group.name].sum())) for group in groups)


def run(
    controller: Controller[Any],
    groups: tuple[Group, ...],
    cost: Cost,
    saliency: Mapping[str, np.ndarray],
    *,
    fraction: float,
    total_steps: int = 1000,
    meter: Meter | None = None,
    stop_at_landing: bool = True,
    calibrated: bool = True,
    steer: Callable[[int, Any, float], tuple[Any, float]] = lambda step, state, limit: (state, limit),
) -> list[Decision]:
    """Run a controller in closed loop; `steer` may change its state and the limit before a decision."""
    dense = cost.total(widths_of(groups))
    limit, state, decisions, whole = fraction * dense, controller.init(groups), [], widths_of(groups)
    for step in filter(lambda step: controller.due(step, total_steps), range(1, total_steps + 1)):
        state, limit = steer(step, state, limit)
        predicted = cost.total(widths_of(groups))
        metered = None if meter is None else meter(step, predicted)
        reading = Reading(step, dict(saliency), 1, calibrated)
        settings = {"step": step, "total_steps": total_steps, "metered": metered, "dense_widths": whole}
        seen = observe(groups, cost, limit=limit, dense=dense, reading=reading, **settings)
        state, plan = controller.decide(state, seen, cost, groups)
        state = follow(state, Change(keep=plan.keep))
        saliency = {name: values[plan.keep[name]] for name, values in saliency.items()}
        before, groups = widths_of(groups), after(groups, plan)
        predicted = cost.total(widths_of(groups))
        spent = predicted if meter is None else meter(step, predicted)
        decisions.append(Decision(step, plan, state, before, groups, predicted, spent))
        if plan.budget_met and stop_at_landing:
            break
    return decisions


def decide_once(
    controller: Controller[Any],
    groups: tuple[Group, ...],
    cost: Cost,
    saliency: Mapping[str, np.ndarray],
    *,
    limit: float,
    calibrated: bool = True,
) -> Plan:
    """The plan of a run of one step: it must come down to the limit at once."""
    reading = Reading(1, dict(saliency), 1, calibrated)
    seen = observe(groups, cost, limit=limit, dense=cost.total(widths_of(groups)), reading=reading)
    return controller.decide(controller.init(groups), seen, cost, groups)[1]


def fitting_blocks(groups: tuple[Group, ...], cost: Cost, plan: Plan, limit: float) -> list[str]:
    """Groups of which the plan dropped a block that could come back within the limit, by brute force."""
    widths = widths_of(after(groups, plan))
    fitting = []
    for group in groups:
        dropped = group.num_units - widths[group.name]
        if not dropped:
            continue
        block = min(group.multiple_of, dropped)
        wider = {**widths, group.name: widths[group.name] + block}
        if cost.total(wider) <= limit and not math.isclose(cost.total(wider), limit, rel_tol=1e-12):
            fitting.append(group.name)
    return fitting
