"""Granularity: whether whole units are cut or single weights masked, and what a run on single weights may ask for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.muon import steps_by_matrix
from setpoint.actuator.shrink import named_tensors
from setpoint.controller.plan import Controller, regrows
from setpoint.controller.tolerant import TolerantController
from setpoint.cost.budget import Budget
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.cost.weights import active_params, weight_flops
from setpoint.errors import BudgetError, GroupError, LoopError
from setpoint.groups.export import Example
from setpoint.groups.group import Group
from setpoint.groups.trace import trace
from setpoint.groups.weights import Pattern, find_weights, maskable
from setpoint.loop.material import Material, check_copies, check_some, in_hand
from setpoint.loop.parts import Sparsity
from setpoint.sensor.reading import Sensor
from setpoint.sensor.weight_taylor import Weighing

_SOURCES = {  # what can be saved, and what is said of it
    "flops": "modelled: theoretical FLOPs, as if masked weights cost nothing; dense hardware does not get faster",
    "params": "modelled: weights that are not masked; zeros are stored too, and dense hardware does not get faster",
}


def pattern_for(granularity: str, pattern: str | None) -> Pattern | None:
    """The pattern that masks keep to, or None where whole units are cut.

    Args:
        granularity: "unit" or "weight".
        pattern: "unstructured" or "N:M"; None for the former.

    Raises:
        GroupError: for an unknown granularity or pattern, or a pattern for whole units.
    """
    if granularity == "weight":
        return Pattern.named("unstructured" if pattern is None else pattern)
    if granularity != "unit":
        raise GroupError(f"unknown granularity {granularity!r}: use 'unit' (channels, heads, neurons) or 'weight'")
    if pattern is not None:
        raise GroupError(f"pattern={pattern!r} is for single weights: add granularity='weight', or leave it out")
    return None


def check_resources(budgets: Collection[Budget]) -> None:
    """Check that masks on single weights can meet these budgets.

    Raises:
        BudgetError: for what zeros do not save, or a budget of the whole run.
    """
    for each in budgets:
        if each.resource not in _SOURCES:
            raise BudgetError(
                f"masks on single weights save no {each.resource}: zeros are stored and multiplied like other numbers. "
                "Hold them to of='params' or to of='flops' (in theory), or cut whole units with granularity='unit'"
            )
        if each.per == "run":
            raise BudgetError(
                "masks on single weights save FLOPs in theory only, so a budget for what the whole run spends cannot "
                "be met by them: use per='step', or granularity='unit'"
            )


def check_run(
    goal: Price | Tolerance | None, budgets: Sequence[Budget], controller: Controller[Any], sensor: Sensor[Any]
) -> None:
    """Check what a run on single weights is asked for.

    Raises:
        BudgetError: for a resource that masks do not save, or a tolerance.
        LoopError: for a controller or a sensor of whole units.
    """
    if isinstance(goal, Tolerance) or isinstance(controller, TolerantController):
        raise BudgetError(
            "a Tolerance takes cuts back through the reserve, which holds no single weights: give a Budget or a Price"
        )
    check_resources((Budget.fraction(1.0, of=goal.resource), *budgets) if isinstance(goal, Price) else budgets)
    if regrows(controller) or regrows(getattr(controller, "inner", None)):
        raise LoopError(
            "single weights come back by exchange, not from a reserve: use regrow=False, and "
            "ExchangingController(controller) around it"
        )
    if not isinstance(sensor, Weighing):
        raise LoopError(
            f"{type(sensor).__name__} reads whole units: leave the sensor to attach, or give WeightTaylorSensor(...)"
        )


def weight_material(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    pattern: Pattern,
    wanted: Sequence[Group] | None,
    copies: Sequence[nn.Module],
    sensor: Sensor[Any],
) -> Material:
    """What may be masked: nothing is tried out, since a mask is exact on any model.

    Args:
        model: the model.
        optimizers: that train it.
        example: inputs of one step.
        pattern: that masks keep to.
        wanted: out of `find_weights(model, pattern)`; None for every linear and convolutional weight.
        copies: to mask alike.
        sensor: takes the readings.

    Raises:
        GroupError: when a weight does not divide into the pattern's blocks, `wanted` are not the model's, or
            nothing is left.
    """
    groups = _chosen(model, pattern, wanted)
    groups, frozen = in_hand(model, optimizers, groups)
    mixed = {
        id(p) for each in optimizers if steps_by_matrix(type(each)) for g in each.param_groups for p in g["params"]
    }
    tensors = named_tensors(model)
    frozen |= {
        group.name: "Muon steps by the whole matrix, in which a single weight that is masked has no twin"
        for group in groups
        if any(id(tensors[piece.tensor]) in mixed for piece in group.slices)
    }
    groups = tuple(group for group in groups if group.name not in frozen)
    readable = sensor.readable(groups, model)
    frozen |= {g.name: f"{type(sensor).__name__} cannot read it" for g in groups if g not in readable}
    check_copies(model, readable, copies)
    check_some(readable, frozen or {"weights": "no linear layer or convolution is trained"})
    flops = weight_flops(model, trace(model, example), readable)
    return Material(
        readable,
        frozen,
        {"flops": flops.cost(), "params": active_params(model, readable)},
        sources=_SOURCES,
        sparsity=Sparsity(pattern, flops),
    )


def _chosen(model: nn.Module, pattern: Pattern, wanted: Sequence[Group] | None) -> tuple[Group, ...]:
    fitting = find_weights(model, str(pattern))
    if wanted is not None:
        known = {_what(group) for group in fitting}
        for group in wanted:
            if _what(group) not in known:
                raise GroupError(
                    f"group {group.name!r} is none of find_weights(model, {str(pattern)!r}): with "
                    "granularity='weight', give groups out of that list"
                )
        names = {group.name for group in wanted}
        return tuple(group for group in fitting if group.name in names)
    misfits = {n: tuple(w.shape) for n, w in maskable(model).items() if not pattern.fits(tuple(w.shape))}
    if misfits:
        told = ", ".join(f"{name} {shape}" for name, shape in list(misfits.items())[:5])
        more = f" and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise GroupError(
            f"the pattern {pattern} needs a number of inputs (dim 1) that {pattern.block} divides, which these "
            f"weights do not have: {told}{more}. Leave them dense with "
            f"groups=setpoint.find_weights(model, {str(pattern)!r}), which lists those that fit"
        )
    return fitting


def _what(group: Group) -> tuple[str, str, int, int, int]:
    """What tells a group of one pattern from one of another, or of another model."""
    return group.name, group.kind, group.num_units, group.min_units, group.multiple_of
