"""Attach: check what is given, choose the parts, and put a loop on the optimizers' hooks. It alone knows the leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from setpoint.actuator.actuator import Actuator
from setpoint.controller.even import EvenController
from setpoint.controller.plan import Controller, Learning, RegrowingController, regrows
from setpoint.controller.selection import cheapest
from setpoint.cost.budget import METERED, Budget
from setpoint.cost.parse import parse_budget
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import LoopError
from setpoint.groups.export import Example
from setpoint.groups.group import Group, widths_of
from setpoint.groups.one_at_a_time import one_at_a_time
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.trace import repeated, trace
from setpoint.host.host import Host, host_of
from setpoint.host.optimizers import Steps
from setpoint.loop.candidates import Candidates, unit_candidates
from setpoint.loop.cutting import Coordinates, Cutting, same_coordinates
from setpoint.loop.header import header_of
from setpoint.loop.loop import Loop
from setpoint.loop.starting import Inputs, Starting
from setpoint.run_spec import (
    RunSpec,
    as_groups,
    asks_for_steps,
    check_parts,
    check_reads,
    check_spec,
    usual_sensor,
    whole_steps,
)
from setpoint.sensor.reading import Sensor
from setpoint.spending.account import Account
from setpoint.spending.checks import check_reachable, original_costs
from setpoint.spending.limits import Limits
from setpoint.spending.meter import Meter, Unmetered
from setpoint.spending.seconds import Stopwatch
from setpoint.spending.spending import Spending

if TYPE_CHECKING:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking


@asks_for_steps
@one_at_a_time
def attach(
    model: nn.Module,
    optimizer: Steps | Sequence[Steps],
    budget: Any,
    *,
    total_steps: int,
    example: Example | None = None,
    controller: Controller[Any] | None = None,
    sensor: Sensor[Any] | None = None,
    actuator: Masking | Regrowing | None = None,
    groups: Sequence[Group] | None = None,
    copies: Sequence[Any] | None = (),
    allow_lossy: bool = False,
    verify: bool = True,
    resume: bool = False,
    even: bool = False,
    method: str = "forward",
) -> Loop:
    """Hold a model in training to a budget: watch its optimizers, and shrink it in the middle of the run.

    The user's training loop stays as it is. Setpoint senses before each optimizer step and acts after it. Until it
    drops a unit, training is bit-identical to training without it. An exception leaves everything as it was.

    Args:
        model: as the training loop calls it; it may be compiled, in `DistributedDataParallel` or under `fully_shard`.
        optimizer: the model's optimizer or its wrapper; or several optimizers, each of which steps once in a step.
        budget: a fraction of the dense model's FLOPs, a text such as "50% flops", a mapping such as
            `{"latency": "8 ms", "memory": "4 GiB"}`, a `Budget` or several; with a `Price` or a `Tolerance` the size
            follows from the loss.
        total_steps: optimizer steps of the whole run; for a share `per="run"`, those of the dense run it is a share of.
        example: inputs as in training, at the batch shape of one optimizer step on one rank: a tuple or a dict. By
            default the first forward in training is recorded, and the loop begins at the first optimizer step.
        controller: decides what is dropped and when; by default what the budget, price or tolerance asks for.
        sensor: reads saliencies; by default Taylor's, and others for states; of the samples in the ranks' examples.
        actuator: by default units are cut for good; `Regrowing()` brings some back, `Masking("2:4")` masks weights.
        groups: those of `find_groups(model, example)` that may be pruned; by default all.
        copies: cut like the model: modules with the same tensors, lists of `shadow_params`; known averages are found.
        allow_lossy: also prune groups in which a zeroed unit is not the same as an absent one.
        verify: leave alone groups whose cut fails on copies of the model.
        resume: let the states of model and optimizer, as any framework saves them, carry sizes and the loop's state,
            and go on from such states if they have been loaded, or are loaded before the first step.
        even: keep all layers of a kind at one width, and write it into a transformers model's config.
        method: name of the model's method that training calls, where it is not the forward; `example` is its inputs.

    Raises:
        SetpointError: of the kind that names what is wrong, such as `BudgetError` for a budget out of reach,
            `ExampleError`, `ExportError`, `GroupError`, `LoopError`, `OptimizerError` and `RankError`.
        ValueError: for a setting out of range.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
    >>> optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(8, 4)
    >>> with attach(model, optimizer, Budget.fraction(0.5, of="params"), example=(x,), total_steps=50) as loop:
    ...     for _ in range(50):
    ...         model(x).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    >>> loop.summary.budget_met, loop.summary.spent["params"] <= loop.summary.limit["params"]
    (True, True)
    """
    check_parts(controller, sensor, budget, allow_lossy=allow_lossy, verify=verify, resume=resume, even=even)
    total_steps, groups = whole_steps(total_steps), as_groups(groups)
    host, loop, budget = host_of(model, optimizer, copies), Loop(), parse_budget(budget)
    check = partial(check_spec, host, budget, controller, actuator, even)
    choice = _Choice(sensor, groups, allow_lossy, bool(verify))
    build = partial(_build, host, check, choice, total_steps)
    starting = Starting(loop, host, model, build, resume=resume, method=method)
    if example is not None:
        starting.at_once(example)
    else:
        check()
        starting.at_first_step()
    return loop


@dataclass(frozen=True, eq=False)
class _Choice:
    """What the user chose to be read and pruned: arguments of `attach`."""

    sensor: Sensor[Any] | None
    groups: Sequence[Group] | None
    allow_lossy: bool
    verify: bool


def _build(
    host: Host, check: Callable[[], RunSpec], choice: _Choice, total_steps: int, inputs: Inputs
) -> dict[str, Any]:
    """The parts of a loop, by the names that `Loop.begin` gives them."""
    clock = Stopwatch(synchronize=True)
    with clock, host.unsharded(), preserved_rng_state(host.model), host.together("attach") as facts:
        want = check()
        parts = (_weights if want.masking else _units)(host, want, inputs, choice)
        spending, found = _spending(host, want, parts, total_steps, clock), parts.found
        run = {
            **({"pattern": want.masking.pattern} if want.masking else {}),
            "groups": widths_of(found.groups),
            "optimizers": [type(each).__name__ for each in host.optimizers],
            "copies": len(host.averages.named),
            "sensor": parts.name,
            "controller": type(parts.controller).__name__,
        }
        facts.update({**run, **spending.facts()})
    header = {**header_of(found.groups, found.frozen, spending.header, host.model), **found.header}
    return {
        "host": host,
        "sensor": parts.sensor,
        "controller": want.guarded(parts.controller),
        "actuator": parts.actuator(spending),
        "spending": spending,
        "header": header,
        "run": run,
        "revocable": partial(parts.revocable, spending),
    }


def _spending(host: Host, spec: RunSpec, parts: _Parts, total_steps: int, clock: Stopwatch) -> Spending:
    """What the run may spend; a budget that cannot be met is refused."""
    found, controller = parts.found, parts.controller
    limits = Limits(spec.budgets, found.costs, found.groups, spec.resource, parts.original)
    for budget in spec.budgets:
        dense, cost = limits.dense_cost(budget.resource), found.costs[budget.resource]
        check_reachable(budget, dense, cheapest(cost, found.groups))
    step_flops = found.costs["flops"].total(widths_of(found.groups))
    account = Account(
        clock,
        parts.meter.steps,
        step_flops=step_flops,
        verification_flops=found.passes * step_flops,
        sensing_flops=parts.sensor.flops(found.groups, host.model),
    )
    spending = Spending(
        limits,
        total_steps=total_steps,
        schedule=spec.schedule,
        account=account,
        meter=parts.meter,
        single_process=host.ranks.count == 1,
        regrows=regrows(controller),
        learning=controller if isinstance(controller, Learning) else None,
        modelled=found.sources,
        check_kind=parts.check,
        bill=spec.bill,
    )
    spending.check_run(0, total_steps, found.groups)
    return spending


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a run is made of, as far as it depends on what a unit is.

    Args:
        controller: decides; it knows the kinds where widths are even.
        sensor: reads saliencies; `name` is what the user knows it by.
        found: what may be pruned.
        actuator: carries plans out.
        revocable: makes it one that can take its first cut back.
        meter: reads what steps take.
        original: cost before the model was ever cut, by resource.
    """

    controller: Controller[Any]
    sensor: Sensor[Any]
    name: str
    found: Candidates
    actuator: Callable[[Spending], Actuator]
    meter: Meter
    original: Mapping[str, float]
    revocable: Callable[[Spending, Actuator], Actuator] = lambda spending, actuator: actuator
    check: Callable[[Sequence[Budget]], None] = lambda budgets: None


def _weights(host: Host, spec: RunSpec, inputs: Inputs, choice: _Choice) -> _Parts:
    """Single weights are masked; nothing is tried out, since a mask is exact on any model."""
    from setpoint.weights.candidates import check_resources, check_run, weight_candidates
    from setpoint.weights.find import Pattern
    from setpoint.weights.patterned import Patterned
    from setpoint.weights.taylor import WeightTaylorSensor

    assert spec.masking is not None
    pattern = spec.masking.pattern
    if host.wrapper:
        raise LoopError(
            "single weights are not masked inside DistributedDataParallel or fully_shard in this version: "
            "train in one process, or leave the actuator to attach, which cuts whole units"
        )
    inner = WeightTaylorSensor(inputs.samples) if choice.sensor is None else choice.sensor
    check_run(spec.goal, (*spec.budgets, *([spec.bill] if spec.bill else [])), spec.controller, inner)
    found, masks = weight_candidates(host, inputs.example, pattern, choice.groups, inner, inputs.passes)
    widths = widths_of(found.groups)
    original = original_costs(host.model, inputs.example, spec.budgets, found.costs, widths, inputs.passes)
    return _Parts(
        spec.controller,
        Patterned(inner, Pattern.named(pattern)),
        type(inner).__name__,
        found,
        lambda spending: masks,
        Unmetered(),
        original,
        check=check_resources,
    )


def _units(host: Host, spec: RunSpec, inputs: Inputs, choice: _Choice) -> _Parts:
    """Units are cut."""
    example, verify = inputs.example, choice.verify
    traced, controller, some = repeated(trace(host.model, example), inputs.passes), spec.controller, choice.groups
    even = None
    if isinstance(controller, EvenController):
        from setpoint.configs.even import evened

        even = evened(host.model, traced, some, allow_lossy=choice.allow_lossy)
        traced, some, controller = even.traced, even.groups, replace(controller, kinds=even.kinds)
    sensor = usual_sensor(host, traced.groups, inputs) if choice.sensor is None else choice.sensor
    if host.mesh is not None:
        check_reads(sensor)
    sensor = sensor if host.alone else sensor.over(host.ranks)
    found = unit_candidates(host, traced, example, sensor, some, allow_lossy=choice.allow_lossy, verify=verify)
    found = even.complete(found, host.model) if even else found
    if regrows(controller):
        from setpoint.regrowth.verify_probe import check_regrowth

        found = replace(found, passes=found.passes + check_regrowth(host, example, found.groups, sensor, verify=verify))
    meter: Meter = Unmetered()
    widths = widths_of(found.groups)
    original = original_costs(host.model, example, spec.budgets, found.costs, widths, inputs.passes)
    if {each.resource for each in spec.goals} & set(METERED):
        from setpoint.resources.learn import learn

        learnt = learn(host, example, traced, found.groups, spec.goals, inputs.passes)
        meter, costs, passes = learnt.meter, {**found.costs, **learnt.costs}, found.passes + learnt.passes
        found = replace(found, costs=costs, sources=learnt.sources, header=learnt.header, passes=passes)
    else:
        found = replace(found, header={"calibration": {}, "step_seconds": {}})
    coordinates: Coordinates = same_coordinates
    if any(group.kind == "state" for group in found.groups):
        from setpoint.states.turn import balanced as coordinates
    cutting, at_once = Cutting(host, found.groups, coordinates), regrows(controller)

    def regrowth(spending: Spending, actuator: Actuator) -> Actuator:
        if actuator is not cutting or not isinstance(controller, RegrowingController) or not sensor.traits.returns:
            return actuator
        from setpoint.regrowth.regrowing import Regrowing, Regrowth

        reserve_bytes = (spec.regrowing or Regrowing()).reserve_bytes
        lasting = at_once and not isinstance(spec.goal, Tolerance)
        return Regrowth(cutting, controller, spending, reserve_bytes, lasting=lasting)

    return _Parts(
        controller,
        sensor,
        type(sensor).__name__,
        found,
        (lambda spending: regrowth(spending, cutting)) if at_once else (lambda spending: cutting),
        meter,
        original,
        revocable=regrowth,
    )
