"""The spending of a run: what it has spent so far of each resource that a budget of the whole run is on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

from setpoint.controller.horizon import next_decision
from setpoint.controller.ladder import lowest_width
from setpoint.controller.plan import Learning, regrows
from setpoint.cost.budget import amount
from setpoint.cost.energy import EnergyCost
from setpoint.loop.accounting import Account
from setpoint.loop.parts import Parts
from setpoint.loop.stride import sensed_every

_LEARNING_SHARE = 0.01
"""A controller that learns never takes more than this share of the FLOPs of the steps so far."""


def stated_watts(parts: Parts) -> float | None:
    """The power that the user has stated, where joules are this times seconds; else None."""
    energy = parts.costs.get("energy")
    return energy.watts if isinstance(energy, EnergyCost) and energy.stated else None


def spent_so_far(parts: Parts, account: Account) -> dict[str, float]:
    """By resource of a run budget, what has been spent from the call of `attach` to the last optimizer step.

    Overhead is included: FLOPs as they are counted, seconds by the clock, joules by the meter at its last reading and
    as predicted from there on. Joules by the user's watts are those times the seconds of the run.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
    """
    watts = stated_watts(parts)
    run_j = account.run_j if watts is None else watts * account.run_seconds
    found = {"flops": account.train_flops, "latency": account.run_seconds, "energy": run_j}
    return {name: found[name] for name in parts.target.runs}


def committed(parts: Parts, account: Account, step: int, widths: Mapping[str, int]) -> dict[str, float]:
    """By resource of a run budget, what has been spent, and what will be besides optimizer steps.

    Of FLOPs that is what a controller that learns spends on the decision at hand. Of seconds it is what the user's own
    code has taken between steps so far, step for step; of joules, where they are watts times seconds, likewise.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: that the decision is made at.
    """
    seconds = max(0, parts.total_steps - step) * account.extra_seconds_per_step
    learning = learning_flops(parts, account, widths)
    besides = {"flops": learning, "latency": seconds, "energy": seconds * (stated_watts(parts) or 0.0)}
    return {name: value + besides.get(name, 0.0) for name, value in spent_so_far(parts, account).items()}


def narrowest(parts: Parts) -> dict[str, int]:
    """Widths of the narrowest model."""
    return {group.name: lowest_width(group) for group in parts.groups}


def learning_allowance(account: Account, num_steps: int = 0) -> float:
    """FLOPs that may go into learning by now, or so many steps from now: a share of those of the steps, less what went.

    Args:
        account: what has been spent.
        num_steps: more steps at the present cost.
    """
    steps = account.train_flops - account.overhead_flops + num_steps * account.step_flops
    return max(0.0, _LEARNING_SHARE * steps - account.learning_flops)


def learning_flops(parts: Parts, account: Account, widths: Mapping[str, int], num_steps: int = 0) -> float:
    """FLOPs that a decision at these widths spends on learning at the most, now or so many steps from now.

    0 where the controller does not learn.
    """
    if not isinstance(parts.controller, Learning):
        return 0.0
    groups = tuple(replace(group, num_units=widths[group.name]) for group in parts.groups)
    return parts.controller.flops(groups, learning_allowance(account, num_steps))


def overhead_to_come(
    parts: Parts, account: Account, step: int, widths: Mapping[str, int], sensing_flops: float, *, deciding: bool
) -> float:
    """FLOPs that go besides steps from here to the landing at the latest: on sensing, and on one more decision.

    After one that spends more than is left the narrowest model is all that a budget of the run allows, and for that
    nothing is learned. At a decision that can land, nothing goes any more.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: present widths.
        sensing_flops: of one sensing.
        deciding: whether a decision is being made at this step; else the next is still to come.
    """
    if "flops" not in parts.target.runs:
        return 0.0
    reference, total_steps = parts.target.runs["flops"].reference, parts.total_steps

    def lands(at: int) -> bool:
        open_still = regrows(parts.controller) and not reference.final(at, total_steps)
        return reference.settled(at, total_steps) and not open_still

    if deciding and lands(step):
        return 0.0
    due = (at for at in range(step + 1, total_steps) if reference.due(at, total_steps))
    landing = next((at for at in due if lands(at)), total_steps)
    num_sensed = -(-(landing - step) // sensed_every(total_steps))
    return num_sensed * sensing_flops + learning_flops(parts, account, widths, landing - step)


def most_per_step(
    parts: Parts,
    account: Account,
    step: int,
    widths: Mapping[str, int],
    sensing_flops: float,
    *,
    deciding: bool = True,
) -> dict[str, float]:
    """By resource of a run budget, the most that a step may cost from this decision to the next.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: present widths.
        sensing_flops: of one sensing.
        deciding: whether a decision is being made at this step.
    """
    return parts.target.most(
        step,
        parts.total_steps,
        spent=committed(parts, account, step, widths),
        narrowest=narrowest(parts),
        besides=overhead_to_come(parts, account, step, widths, sensing_flops, deciding=deciding),
    )


def spare_flops(parts: Parts, account: Account, step: int, widths: Mapping[str, int], sensing_flops: float) -> float:
    """FLOPs that a budget of the run has left for other things than steps at present widths, until the next decision.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: present widths.
        sensing_flops: of one sensing.
    """
    if "flops" not in parts.target.runs or step >= parts.total_steps:
        return math.inf
    most = most_per_step(parts, account, step, widths, sensing_flops, deciding=False)["flops"]
    coming = next_decision(parts.target.runs["flops"].reference, step, parts.total_steps)
    return (most - parts.target.expected("flops", widths)) * (coming - step)


def read_joules(parts: Parts, account: Account, widths: Mapping[str, int]) -> None:
    """Set the account's joules to what the meter reads now, and those of a step to come to what is expected.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        widths: present widths.
    """
    if "energy" in parts.target.runs:
        run_j = parts.metering.run_j()
        account.run_j = account.run_j if run_j is None else run_j
        account.step_j = parts.target.expected("energy", widths)


def replan(parts: Parts, account: Account, step: int, widths: Mapping[str, int]) -> None:
    """Find afresh what budgets of the whole run leave for each step to come; one that cannot be met is warned of once.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: present widths.
    """
    read_joules(parts, account, widths)
    parts.target.replan(step, parts.total_steps, spent=committed(parts, account, step, widths), widths=widths)
    least = forecast(parts, account, step, narrowest(parts))
    for name, run in parts.target.runs.items():
        limit = run.limit(parts.total_steps)
        if 0 < step < parts.total_steps and least[name] > limit and name not in account.said:
            account.said.add(name)
            spent = spent_so_far(parts, account)[name]
            warnings.warn(
                f"the budget of {amount(limit, name)} for the run cannot be met any more: {amount(spent, name)} went "
                f"by step {step}, and with the narrowest model it would come to {amount(least[name], name)}",
                stacklevel=2,
            )


def forecast(parts: Parts, account: Account, step: int, widths: Mapping[str, int]) -> dict[str, float]:
    """By resource of a run budget, what the run will have spent at its end if the model has these widths from now on.

    Args:
        parts: what the loop is made of.
        account: what has been spent.
        step: optimizer steps done.
        widths: by group.
    """
    left = max(0, parts.total_steps - step)
    spent = committed(parts, account, step, widths)
    return {name: value + left * parts.target.expected(name, widths) for name, value in spent.items()}
