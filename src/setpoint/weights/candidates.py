"""Candidates: the single weights that may be masked, and what a run on single weights may ask for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn

from setpoint.actuator.optimizer_check import steps_by_matrix
from setpoint.controller.plan import Controller
from setpoint.cost.budget import Budget, Price, Tolerance
from setpoint.errors import BudgetError, GroupError, LoopError
from setpoint.groups.example import Example
from setpoint.groups.group import Group
from setpoint.groups.trace import repeated, trace
from setpoint.host.host import Host
from setpoint.loop.candidates import Candidates, check_copies, check_some, in_hand
from setpoint.sensor.reading import Sensor
from setpoint.weights.find import Pattern, active_params, find_weights, maskable, weight_flops
from setpoint.weights.masking import Masks
from setpoint.weights.taylor import WeightTaylorSensor

_SOURCES = {  # what can be saved, and what is said of it
    "flops": "modelled: theoretical FLOPs, as if masked weights cost nothing; dense hardware does not get faster",
    "params": "modelled: weights that are not masked; zeros are stored too, and dense hardware does not get faster",
}


def check_resources(budgets: Collection[Budget]) -> None:
    """Refuse what zeros do not save, and a budget of the whole run."""
    for budget in budgets:
        if budget.resource not in _SOURCES:
            raise BudgetError(
                f"masks on single weights save no {budget.resource}: zeros are stored and multiplied like others. "
                "Hold them to of='params' or to of='flops' (in theory), or leave the actuator to attach"
            )
        if budget.per == "run":
            raise BudgetError(
                "masks on single weights save FLOPs in theory only, so what the whole run spends cannot be cut by "
                "them: use per='step', or leave the actuator to attach"
            )


def check_run(
    goal: Price | Tolerance | None, budgets: Sequence[Budget], controller: Controller[Any], sensor: Sensor[Any]
) -> WeightTaylorSensor:
    """Refuse what masks do not save, a tolerance, and a controller or a sensor of whole units."""
    if isinstance(goal, Tolerance):
        raise BudgetError(
            "a Tolerance takes cuts back through the reserve, which holds no single weights: give a Budget or a Price"
        )
    check_resources((Budget.fraction(1.0, of=goal.resource), *budgets) if isinstance(goal, Price) else budgets)
    if controller.conduct.regrow:
        raise LoopError(
            "single weights come back by drop and grow, not from a reserve: use regrow=False, and "
            "DropAndGrowController(controller) around it"
        )
    if not isinstance(sensor, WeightTaylorSensor):
        raise LoopError(
            f"{type(sensor).__name__} reads whole units: leave the sensor to attach, or give WeightTaylorSensor(...)"
        )
    return sensor


def weight_candidates(
    host: Host, example: Example, pattern: Pattern, wanted: Sequence[Group] | None, passes: int
) -> tuple[Candidates, Masks]:
    """What may be masked in a pattern, and the masks; nothing is tried out: a mask is exact on any model.

    `wanted` is out of `find_weights(model, pattern)`, or None for all.
    """
    model = host.model
    groups, frozen = in_hand(host, _chosen(model, pattern, wanted))
    by_matrix = [optimizer for optimizer in host.optimizers if steps_by_matrix(type(optimizer))]
    mixed = {id(p) for optimizer in by_matrix for settings in optimizer.param_groups for p in settings["params"]}
    frozen |= {
        group.name: "Muon steps by the whole matrix, in which a single weight that is masked has no twin"
        for group in groups
        if id(model.get_parameter(group.name)) in mixed
    }
    groups = tuple(group for group in groups if group.name not in frozen)
    check_copies(host, groups)
    check_some(groups, frozen or {"weights": "no linear layer or convolution is trained"})
    flops = weight_flops(model, repeated(trace(model, example), passes), groups)
    costs = {"flops": flops.cost(), "params": active_params(model, groups)}
    found = Candidates(groups, frozen, costs, sources=_SOURCES, header={"pattern": str(pattern)})
    return found, Masks(host, groups, pattern, flops)


def _chosen(model: nn.Module, pattern: Pattern, wanted: Sequence[Group] | None) -> tuple[Group, ...]:
    fitting = find_weights(model, str(pattern))
    if wanted is not None:
        # The sizes tell a group of one pattern from one of another.
        known = {(group.name, group.min_units, group.multiple_of) for group in fitting}
        for group in wanted:
            if (group.name, group.min_units, group.multiple_of) not in known:
                raise GroupError(
                    f"group {group.name!r} is none of find_weights(model, {str(pattern)!r}): with "
                    "actuator=Masking(...), give groups out of that list"
                )
        names = {group.name for group in wanted}
        return tuple(group for group in fitting if group.name in names)
    misfits = [f"{n} {tuple(w.shape)}" for n, w in maskable(model).items() if not pattern.fits(tuple(w.shape))]
    if misfits:
        raise GroupError(
            f"the pattern {pattern} needs a number of inputs (dim 1) that {pattern.block} divides, which "
            f"{len(misfits)} weights do not have: {', '.join(misfits[:5])}. Leave them dense with "
            f"groups=setpoint.find_weights(model, {str(pattern)!r})"
        )
    return fitting
