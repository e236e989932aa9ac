"""Planning: what is decided at a step, once the loss and the length of the run have had their say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from setpoint.controller.ladder import lowest_width
from setpoint.controller.plan import Observation, Plan
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import amount
from setpoint.errors import LoopError
from setpoint.groups.group import Group, widths_of
from setpoint.loop.accounting import Account
from setpoint.loop.parts import Parts
from setpoint.loop.record import spending, waiting
from setpoint.loop.run_spending import (
    committed,
    learning_allowance,
    learning_flops,
    most_per_step,
    overhead_to_come,
    stated_watts,
)
from setpoint.loop.stride import sensed_every
from setpoint.loop.watch import LossWatch


def observation_of(
    parts: Parts, account: Account, watch: LossWatch, groups: tuple[Group, ...], step: int
) -> Observation:
    """What is known at a step, but for the readings.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        watch: what was observed of the loss.
        groups: at their present widths.
        step: optimizer steps done.
    """
    widths = widths_of(groups)
    alone = parts.ranks.count == 1  # each rank has a clock of its own, and all must decide alike
    return Observation(
        step=step,
        total_steps=parts.total_steps,
        widths=widths,
        reading=None,
        dense=parts.target.dense,
        limit=parts.target.limits,
        spent=spending(parts.costs, widths),
        loss=watch.loss,
        val=watch.val,
        seconds_per_step=account.steps.seconds_per_step if alone else None,
        seconds_per_resize=account.resizing.last_seconds if account.resizes and alone else None,
        excess=watch.excess(step),
        learning_flops=learning_allowance(account),
    )


def metered_at(parts: Parts, account: Account, widths: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """What meters read at these widths, and what the controller is told of it.

    A reading that is missing, of what was read before, is replaced by what it foretold, and that is said once. Where
    joules are the user's watts times seconds, the controller is told of those seconds.
    """
    time_inference(parts, account, widths)
    target, metered = parts.target, parts.metering.read()
    before, known = target.metered, dict(metered)
    watts, seconds = stated_watts(parts), account.steps.seconds_per_step
    if watts is not None and seconds is not None:
        known["energy"] = watts * seconds
    told = target.read(known, widths)
    narrowest = {group.name: lowest_width(group) for group in parts.groups}
    for name in sorted(target.metered - before):
        _warn_if_out_of_reach(parts, name, known[name], widths)
    sure = _at_best(parts, account, known, watts)
    for name in target.out_of_reach(sure, widths, narrowest):
        _warn_and_hold(parts, name, sure[name], widths, narrowest)
    missing = before - known.keys() - {"latency"}  # of which there is none before the first whole step after a cut
    parts.metering.miss(missing)
    return metered, told | {name: target.expected(name, widths) for name in missing}


def _at_best(parts: Parts, account: Account, known: Mapping[str, float], watts: float | None) -> dict[str, float]:
    """The readings, with the quickest step and pass in place of the usual ones.

    Others may have an evaluation in them, or something else on the machine beside them.
    """
    quickest = account.steps.quickest_seconds
    told = {"latency": quickest, "inference": parts.metering.quickest_inference}
    told |= {} if watts is None else {"energy": quickest and watts * quickest}
    return {name: value for name, value in {**known, **told}.items() if value is not None and name in known}


def _warn_if_out_of_reach(parts: Parts, name: str, seen: float, widths: Mapping[str, int]) -> None:
    """Say so if a budget that could be met by prediction cannot be by the first reading."""
    limit = parts.target.limit.get(name)
    least = parts.target.expected(name, {group.name: lowest_width(group) for group in parts.groups})
    if limit is not None and name not in parts.target.runs and limit < least:
        warnings.warn(
            f"the budget of {amount(limit, name)} cannot be met: the meter reads {amount(seen, name)} where "
            f"{amount(parts.costs[name].total(widths), name)} was predicted, and the narrowest model would still take "
            f"about {amount(least, name)}",
            stacklevel=2,
        )


def _warn_and_hold(
    parts: Parts, name: str, seen: float, widths: Mapping[str, int], narrowest: Mapping[str, int]
) -> None:
    """Say that a budget is out of reach by what cuts have saved, and hold what is there: more would save too little."""
    limit, least = parts.target.limit[name], parts.target.least(name, seen, widths, narrowest)
    parts.target.hold(name, seen)
    warnings.warn(
        f"the budget of {amount(limit, name)} cannot be met: of the {amount(seen, name)} that the meter reads too much "
        f"does not shrink with the model (loading data, say), and by what cuts have saved so far the narrowest "
        f"model would still take about {amount(least, name)}. Nothing more is cut for it",
        stacklevel=2,
    )


def time_inference(parts: Parts, account: Account, widths: Mapping[str, int]) -> None:
    """Time forward passes of the model now, if inference is metered; the account counts their FLOPs."""
    passes = parts.metering.time_inference()
    if passes and parts.pass_flops is not None:
        account.sensed(passes * parts.pass_flops.total(widths))


def planned(
    parts: Parts,
    account: Account,
    watch: LossWatch,
    groups: tuple[Group, ...],
    state: Any,
    observation: Observation,
    sensing_flops: float,
) -> tuple[Any, Plan, int | None]:
    """The controller's next state and plan, unless the loss has left its trend or the landing had better wait.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        watch: what was observed of the loss.
        groups: as they are now.
        state: the controller's.
        observation: what is known.
        sensing_flops: of one sensing.

    Returns:
        State, plan, and the step at which to decide again, if the last cut waits.

    Raises:
        LoopError: when a tolerance is to be held and no loss was observed.
    """
    controller = parts.controller
    if isinstance(controller, TolerantController) and not watch.watching:
        raise LoopError("a Tolerance needs the loss: call loop.observe(loss=...) before every optimizer.step()")
    step, widths = observation.step, observation.widths
    most = most_per_step(parts, account, step, widths, sensing_flops)
    wider = {name: width + len(observation.last_dropped.get(name, ())) for name, width in widths.items()}
    affordable = all(parts.target.expected(name, wider) <= value for name, value in most.items())
    back = watch.roll_back(observation, controller, groups) if affordable else None
    if back is not None:
        return state, back, None
    observation = replace(observation, most=most)
    after, plan = controller.decide(state, observation, parts.target.cost, groups)
    every, deciding = sensed_every(parts.total_steps), learning_flops(parts, account, widths)
    growth = learning_flops(parts, account, widths, num_steps=1) - deciding  # of what learning may take, per step
    sensing = sensing_flops / every + growth
    spent = committed(parts, account, step, widths)
    later = 0.0 if plan.landed else overhead_to_come(parts, account, step, widths, sensing_flops, deciding=False)
    later += sensing_flops if every > 1 else 0.0  # of the few steps that it waits more than their share may be sensed
    spent = {name: value + (later if name == "flops" else 0.0) for name, value in spent.items()}
    wait = parts.target.wait(plan, observation, spent=spent, sensing=sensing, deciding=deciding)
    if not wait:
        return after, plan, None
    again = step + wait
    return state, waiting(plan, again), again
