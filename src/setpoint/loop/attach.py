"""Attach: check everything, find what may be pruned, and put a loop on the optimizers' hooks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from setpoint.actuator.optimizer_state import check_optimizer, check_trains
from setpoint.actuator.verify import few_rows, verify_probe
from setpoint.controller.exchanging import ExchangingController
from setpoint.controller.plan import Controller, regrows
from setpoint.controller.reference import Reference
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import Budget
from setpoint.cost.flops import forward_flops
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import BudgetError, CostError, GroupError, LoopError
from setpoint.groups.chance import untouched_chance
from setpoint.groups.export import Example, inputs_of
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Trace, trace
from setpoint.host.host import Host, host_of
from setpoint.host.optimizers import Steps
from setpoint.loop.accounting import Account
from setpoint.loop.change import check_runs, reference_of
from setpoint.loop.costing import Costing, cost_out
from setpoint.loop.goal import check_goal, controller_for
from setpoint.loop.granularity import check_run, pattern_for, weight_material
from setpoint.loop.header import header_of
from setpoint.loop.inference import Inference
from setpoint.loop.loop import ATTACHED, Loop
from setpoint.loop.material import restricted, unit_material
from setpoint.loop.metering import METERED, Metering
from setpoint.loop.parts import Parts
from setpoint.loop.replica import Replica
from setpoint.loop.sensing import averages_hooks, default_sensor, over_ranks
from setpoint.loop.state import run_of
from setpoint.loop.target import Target, check_budgets, check_reachable
from setpoint.meter import StepMeter, Stopwatch
from setpoint.sensor.chain import takes_back
from setpoint.sensor.reading import Hooking, Sensor
from setpoint.sensor.tap import tappable
from setpoint.sensor.weight_taylor import WeightTaylorSensor


def attach(
    model: nn.Module,
    optimizer: Steps | Sequence[Steps],
    budget: Budget | Sequence[Budget] | Price | Tolerance,
    *,
    example: Example,
    total_steps: int,
    controller: Controller[Any] | None = None,
    reference: Reference | str | None = None,
    sensor: Sensor[Any] | None = None,
    groups: Sequence[Group] | None = None,
    copies: Sequence[nn.Module] = (),
    num_samples: int | None = None,
    allow_lossy: bool = False,
    verify: bool = True,
    watts: float | None = None,
    inference_example: Example | None = None,
    reserve_bytes: int | None = 8 * 2**30,
    granularity: str = "unit",
    pattern: str | None = None,
) -> Loop:
    """Hold a model in training to a budget: watch its optimizers, and shrink it in the middle of the run.

    The user's training loop stays as it is. Setpoint senses before each optimizer step and acts after
    it. Until it drops a unit, training is bit-identical to training without it. Whatever this
    function raises, model and optimizers are as they were.

    Args:
        model: the model; a `torch.compile`d one is fine, and so is one in `DistributedDataParallel`: give the
            wrapper, on every rank; and one that `fully_shard` has spread over ranks.
        optimizer: the optimizer that trains it, or several that each step once per training step
            (Setpoint senses before the first of them and acts after the last). One that Accelerate, Lightning or Fabric
            has wrapped is taken out of its wrapper.
        budget: what spending per optimizer step, or of the whole run, is held to; several budgets, each of another
            resource, are all met. With a `Price` or a `Tolerance` the size follows from the loss. "memory", "latency",
            "inference" and "energy" are learnt on copies of the model, which takes up to a minute the first time;
            under autocast, call this inside the context that training uses.
        example: inputs as in training, at the batch shape of one optimizer step on one rank: a tuple of positional
            or a dict of keyword inputs. FLOPs are counted at this shape.
        total_steps: optimizer steps of the whole run.
        controller: decides what goes and when; by default `PricedController()` for a budget,
            `PenaltyController(price)` for a price, `TolerantController(tolerance)` for a tolerance.
        reference: when the default controller comes down and decides; "adaptive" leaves dense when readings settle.
        sensor: reads saliencies; by default `TaylorSensor(num_samples)`, and `HankelSensor(num_samples)` for the
            states of state-space layers.
        groups: which groups may be pruned, out of `find_groups(model, example)`; by default all.
        copies: modules with the same tensors to cut alike, such as an EMA copy.
        num_samples: independent samples per optimizer step over ranks and micro-batches; by default
            the leading dim of the example's first tensor times the ranks. Where the loss is a mean over tokens, their
            number.
        allow_lossy: also prune groups in which a zeroed unit is not the same as an absent one.
        verify: try every group's cut on copies of the model first, and leave alone those that fail.
        watts: power that a training step draws, for an energy budget where no meter reads it.
        inference_example: inputs, at the batch size that counts, of the inference that a budget of "inference" is on;
            by default the example.
        reserve_bytes: the most host memory, on each rank, for dropped units that may come back
            (`PricedController(regrow=True)`); beyond it those dropped first are let go, which is said. None: no limit.
        granularity: "unit" cuts channels, heads, neurons and states out of the model; "weight" masks single weights of
            linear layers and convolutions, which saves FLOPs and parameters in theory only: dense hardware does not
            get faster. Then `groups` are out of `find_weights(model, pattern)`, and the controller is by default
            an `ExchangingController` around the one named above, the sensor a `WeightTaylorSensor(num_samples)`.
        pattern: of single weights: "unstructured" (the default) or "N:M", such as "2:4", by whole tensors.

    Raises:
        BudgetError: for a budget that cannot be reached, or is not available in this version.
        CostError: for a resource that cannot be predicted or measured here.
        ExampleError: for an example that the model does not accept.
        ExportError: for a model that cannot be exported.
        GroupError: if nothing can be pruned, or `groups` are not the model's.
        LoopError: if the model is attached already, or sharded or wrapped in a way that cannot follow a cut; if units
            are to come back, but the model is compiled or the sensor cannot take them in.
        RankError: when ranks do not agree on the arguments, or another one has failed.
        OptimizerError: for an optimizer that trains none of the model, or cannot follow a cut.
        ValueError: for `total_steps` or `num_samples` that are not positive integers.

    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> x = torch.randn(8, 4)
    >>> with attach(model, optimizer, Budget.fraction(0.5, of="params"), example=(x,), total_steps=50) as loop:
    ...     for _ in range(50):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.landed, loop.summary.spent["params"] <= loop.summary.limit["params"]
    (True, True)
    """
    watch, host = Stopwatch(synchronize=True), host_of(model, optimizer, copies)
    inner, optimizers = host.model, host.optimizers
    with watch, host.whole(), untouched_chance(inner), host.together("attach") as facts:
        _check_free(inner)
        goal = budget if isinstance(budget, (Price, Tolerance)) else None
        budgets = () if isinstance(budget, (Price, Tolerance)) else check_budgets(budget)
        form = pattern_for(granularity, pattern)
        if controller is None:
            controller = controller_for(goal or budgets, reference)
            controller = controller if form is None else ExchangingController(controller)
        else:
            if reference is not None:
                raise ValueError("give the reference to the controller, or leave the controller to attach: not both")
            check_goal(goal, controller)
        if reserve_bytes is not None and (type(reserve_bytes) is not int or reserve_bytes < 0):
            raise ValueError(f"reserve_bytes is a whole number of bytes, at least 0, or None; got {reserve_bytes!r}")
        _check_arguments(inner, optimizers, total_steps)
        resources = {each.resource for each in (*budgets, goal) if each}
        _check_shared(host, resources)
        if inference_example is not None and "inference" not in resources:
            raise BudgetError("inference_example is for a budget of 'inference': add one, or leave the example out")
        _check_watts(watts, resources)
        answered = example if inference_example is None else inference_example
        samples = _num_samples(example) * host.ranks.count if num_samples is None else num_samples
        if form is not None:
            if host.wrapper:
                raise LoopError(
                    "single weights are not masked inside DistributedDataParallel or fully_shard in this version: "
                    "train in one process, or leave granularity at whole units"
                )
            sensor = WeightTaylorSensor(samples) if sensor is None else sensor
            check_run(goal, budgets, controller, sensor)
            material = weight_material(inner, optimizers, example, form, groups, copies, sensor)
        else:
            found = trace(inner, example)
            if sensor is None:
                sensor = default_sensor(host, found.groups, example, samples)
            _check_reads(host, sensor)
            sensor = over_ranks(sensor, host)
            active, frozen = _select(host, found, groups, sensor, allow_lossy)
            if host.mesh is not None:  # FSDP takes no parameter without entries, so no group may vanish
                active = tuple(replace(each, min_units=max(each.min_units, each.multiple_of)) for each in active)
            material = unit_material(inner, optimizers, example, found, active, frozen, copies, verify)
            _warn_of_unreached(inner, found, material.groups)
            if regrows(controller):
                passes = _check_regrowth(host, example, material.groups, sensor, verify)
                material = replace(material, passes=material.passes + passes)
            costing = cost_out(inner, optimizers, example, material.groups, resources, watts, answered)
            material = replace(material, costs={**material.costs, **costing.costs}, costing=costing)
            if "inference" in resources:
                share = _num_samples(answered) / _num_samples(example)
                material = replace(material, pass_flops=forward_flops(restricted(found, material.groups), share))
        active, costs, costing = material.groups, material.costs, material.costing
        dense = {name: cost.total(widths_of(active)) for name, cost in costs.items()}
        for each in budgets:
            check_reachable(each, dense[each.resource], cheapest(costs[each.resource], active))
        account = Account(watch, dense["flops"], material.passes * dense["flops"])
        metering = _metering(host, optimizers, example, answered, resources, account, costing)
        parts = Parts(
            host=host,
            groups=active,
            target=Target(
                budgets,
                costs,
                widths_of(active),
                reference=reference_of(controller),
                resource=goal.resource if goal else "flops",
            ),
            metering=metering,
            costs=costs,
            controller=controller,
            sensor=sensor,
            total_steps=total_steps,
            header=header_of(active, material.frozen, dense, budgets, total_steps, inner)
            | {
                "modelled": dict(costing.sources),
                "measured": metering.sources,
                "calibration": dict(costing.errors),
                "step_seconds": dict(costing.step_seconds),
            }
            | ({} if costing.idle_watts is None else {"idle_watts": costing.idle_watts})
            | ({} if form is None else {"pattern": str(form)}),
            reserve_bytes=reserve_bytes,
            sparsity=material.sparsity,
            pass_flops=material.pass_flops,
        )
        check_runs(parts, account, active, 0)
        facts.update(run_of(parts))
    return Loop(parts, account)


def _check_watts(watts: float | None, resources: set[str]) -> None:
    """Check that stated watts are a power, and that somebody asks for joules."""
    if watts is None:
        return
    if isinstance(watts, bool) or not isinstance(watts, (int, float)) or not 0 < watts < math.inf:
        raise BudgetError(f"watts is the power that a training step draws, a finite number above 0, got {watts!r}")
    if "energy" not in resources:
        raise BudgetError("watts is for a budget or a price of 'energy': add one, or leave watts out")


def _check_free(model: nn.Module) -> None:
    """Check that no loop is at work on the model or any part of it."""
    parts = set(model.modules())
    if any(other in parts or model in set(other.modules()) for other in ATTACHED):
        raise LoopError("this model has a loop already: call finish() or detach() on that loop first")


def _metering(
    host: Host,
    optimizers: Sequence[Optimizer],
    example: Example,
    answered: Example,
    resources: set[str],
    account: Account,
    costing: Costing,
) -> Metering:
    """Meters for the resources that budgets, a price or a tolerance are on."""
    if resources & {"latency", "energy"}:
        account.steps = StepMeter(synchronize=True)
    args, kwargs = inputs_of(example)
    live = Replica(host.model, tuple(optimizers), args, kwargs)
    device = next((parameter.device for parameter in host.model.parameters()), torch.device("cpu"))
    inference = Inference.of(host.model, answered) if "inference" in resources else None
    return Metering(
        resources,
        account.steps,
        live.held,
        device,
        model=host.model,
        compiled=host.compiled,
        energy=costing.energy,
        inference=inference,
    )


def _check_arguments(model: nn.Module, optimizers: Sequence[Optimizer], total_steps: int) -> None:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive integer, got {total_steps!r}")
    check_trains(optimizers, model)
    for each in optimizers:
        check_optimizer(each)


def _check_shared(host: Host, resources: set[str]) -> None:
    """Check that costs are the same on all ranks, so that they can follow one plan."""
    measured = sorted(resources & set(METERED))
    if measured and not host.alone:
        raise CostError(
            f"a budget of {measured[0]!r} is not available on several ranks in this version, since each would measure "
            "another cost: use a budget of 'flops' or 'params'"
        )


def _check_reads(host: Host, sensor: Sensor[Any]) -> None:
    """Check that a sensor says that it reads weights of which each rank has a part, where that is so."""
    if host.mesh is not None and not getattr(sensor, "reads_shards", False):
        raise LoopError(
            f"{type(sensor).__name__} does not say that it can read a model that fully_shard has spread over ranks: "
            "use TaylorSensor, or set reads_shards = True on a sensor that adds up what each rank has"
        )


def _num_samples(example: Example) -> int:
    """Leading dim of the example's first tensor; 1 if it has none."""
    values = example.values() if isinstance(example, Mapping) else example
    first = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
    return max(1, first.shape[0]) if first is not None else 1


def _select(
    host: Host, found: Trace, wanted: Sequence[Group] | None, sensor: Sensor[Any], allow_lossy: bool
) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups to prune, and why the others are left alone, by name."""
    model, alone = host.model, host.alone
    frozen = {each.place: each.reason for each in found.frozen}
    chosen = found.groups if wanted is None else tuple(wanted)
    widths = widths_of(found.groups)
    for group in chosen:
        if group.kind == "weight":
            raise GroupError(f"group {group.name!r} holds single weights: add granularity='weight'")
        if widths.get(group.name) != group.num_units:
            raise GroupError(
                f"group {group.name!r} with {group.num_units} units is not one of this model's: "
                "use find_groups(model, example) on the model as it is now"
            )
    for group in chosen:
        if group.kind == "state" and not alone:
            frozen[group.name] = (
                "states are not cut on several ranks in this version: each would balance them by itself"
            )
        elif not group.lossless and not allow_lossy:
            frozen[group.name] = "; ".join(group.notes) or "a zeroed unit is not the same as an absent one"
            frozen[group.name] += " (allow_lossy=True prunes it all the same)"
    open_groups = tuple(group for group in chosen if group.name not in frozen)
    hooked = {group.name for group in open_groups if isinstance(sensor, Hooking) and tappable(group, model)}
    if host.compiled or not (alone or averages_hooks(sensor)):
        where = "in compiled code" if host.compiled else f"on several ranks by {type(sensor).__name__}"
        frozen |= dict.fromkeys(hooked, f"frozen outgoing weights are not read {where}")
        open_groups = tuple(group for group in open_groups if group.name not in hooked)
    readable = sensor.readable(open_groups, model)
    names = {group.name for group in readable}
    parameters = list(model.named_parameters(remove_duplicate=False))
    for group in open_groups:
        if group.name not in names:
            outgoing = {place.tensor for place in group.slices if place.role == "consume"}
            trained = any(p.requires_grad for name, p in parameters if name in outgoing)
            why = (
                f"it ranks no {group.kind}s like these"
                if trained or group.kind == "state"
                else "its weights get no gradient"
            )
            frozen[group.name] = f"{type(sensor).__name__} cannot read it ({why})"
    return readable, frozen


def _check_regrowth(
    host: Host, example: Example, groups: tuple[Group, ...], sensor: Sensor[Any], verify: bool
) -> float:
    """Check that units can be probed and come back in this model; the passes that took.

    Raises:
        LoopError: when they cannot.
        VerificationError: when a probed step on a copy is not the shrunk model's step.
    """
    instead = "attach with PricedController(regrow=False)"
    if not takes_back(sensor):
        raise LoopError(f"{type(sensor).__name__} has no grow(), so units cannot come back: add it, or {instead}")
    if host.compiled:
        raise LoopError(
            f"resting units cannot be present in compiled code: attach to the model uncompiled, or {instead}"
        )
    if not verify:
        return 0.0
    few, share = few_rows(example)
    verify_probe(host.model, few, groups)
    return 6 * share


def _warn_of_unreached(model: nn.Module, found: Trace, groups: tuple[Group, ...]) -> None:
    """Tell of weights that the example leaves out and that may read units, which would go while they stay."""
    lengths = {len(part.index) for group in groups for part in group.slices}
    # A tied weight has several names, and is reached by any of them.
    reached = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name not in found.unreached}
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached}
    stray = [name for name in found.unreached if len(shapes.get(name, ())) > 1 and lengths & set(shapes[name][1:])]
    if stray:
        warnings.warn(
            f"the example does not reach {', '.join(stray[:5])}{' and more' if len(stray) > 5 else ''}: if training "
            "does, give an example that goes there, since what they read may be cut and they would not follow",
            stacklevel=3,
        )
