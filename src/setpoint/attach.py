"""Attach: check what is given, choose the parts, and put a loop on the optimizers' hooks. It alone knows the leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from setpoint.actuator.try_optimizer import check_optimizer, check_trains
from setpoint.controller.goal import check_goal, controller_for
from setpoint.controller.landing import cheapest
from setpoint.controller.plan import Controller, Learning, regrows
from setpoint.controller.plan import Regrowing as Returning
from setpoint.controller.rolling_back import RollingBack
from setpoint.controller.schedule import Schedule
from setpoint.controller.using_up import UsingUp
from setpoint.cost.budget import METERED, Budget
from setpoint.cost.price import Price
from setpoint.cost.tolerance import Tolerance
from setpoint.errors import LoopError
from setpoint.groups.export import Example, num_samples
from setpoint.groups.follow import check_states
from setpoint.groups.group import Group, widths_of
from setpoint.groups.rng import preserved_rng_state
from setpoint.groups.trace import trace
from setpoint.host.host import Host, host_of
from setpoint.host.optimizers import Steps
from setpoint.host.refuse import check_reads, check_shared_costs
from setpoint.loop.candidates import Candidates, unit_candidates
from setpoint.loop.cutting import Actuator, Coordinates, Cutting, same_coordinates
from setpoint.loop.header import header_of
from setpoint.loop.loop import ATTACHED, Loop
from setpoint.sensor.reading import Sensor, Shared, takes_back
from setpoint.sensor.taylor import TaylorSensor
from setpoint.spending.account import Account
from setpoint.spending.checks import check_budgets, check_reachable
from setpoint.spending.meter import Meter
from setpoint.spending.seconds import Stopwatch
from setpoint.spending.spending import Spending
from setpoint.spending.target import Target

if TYPE_CHECKING:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking


def attach(
    model: nn.Module,
    optimizer: Steps | Sequence[Steps],
    budget: Budget | Sequence[Budget] | Price | Tolerance,
    *,
    example: Example,
    total_steps: int,
    controller: Controller[Any] | None = None,
    sensor: Sensor[Any] | None = None,
    actuator: Masking | Regrowing | None = None,
    groups: Sequence[Group] | None = None,
    copies: Sequence[nn.Module] = (),
    allow_lossy: bool = False,
    verify: bool = True,
) -> Loop:
    """Hold a model in training to a budget: watch its optimizers, and shrink it in the middle of the run.

    The user's training loop stays as it is. Setpoint senses before each optimizer step and acts after it. Until it
    drops a unit, training is bit-identical to training without it. Whatever this raises, everything is as it was.

    Args:
        model: as the training loop calls it: compiled, in `DistributedDataParallel` or with `fully_shard`, too.
        optimizer: the one that trains it, in its wrapper if it has one, or several that each step once per step.
        budget: of one resource or several; with a `Price` or a `Tolerance` the size follows from the loss.
        example: inputs as in training, at the batch shape of one optimizer step on one rank: a tuple or a dict.
        total_steps: optimizer steps of the whole run.
        controller: decides what is dropped and when; by default what the budget, price or tolerance asks for.
        sensor: reads saliencies; by default Taylor's, for as many samples as the example has rows on all ranks.
        actuator: by default units are cut for good; `Regrowing()` brings some back, `Masking("2:4")` masks weights.
        groups: which may be pruned, out of `find_groups(model, example)`; by default all.
        copies: modules with the same tensors to cut alike, such as an EMA copy.
        allow_lossy: also prune groups in which a zeroed unit is not the same as an absent one.
        verify: try every group's cut on copies of the model first, and leave alone those that fail.

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
    clock, host = Stopwatch(synchronize=True), host_of(model, optimizer, copies)
    with clock, host.unsharded(), preserved_rng_state(host.model), host.together("attach") as facts:
        wish = _wish(host, budget, controller, sensor, actuator, total_steps)
        if wish.masking:
            parts = _weights(host, wish, example, sensor, groups)
        else:
            parts = _units(host, wish, example, sensor, groups, allow_lossy, verify)
        spending, found = _spending(host, wish, parts, total_steps, clock), parts.found
        run = {
            **({"pattern": wish.masking} if wish.masking else {}),
            "groups": widths_of(found.groups),
            "optimizers": [type(each).__name__ for each in host.optimizers],
            "copies": len(host.copies),
            "sensor": parts.name,
            "controller": type(wish.controller).__name__,
        }
        facts.update({**run, **spending.facts()})
    header = {**header_of(found.groups, found.frozen, spending.header, host.model), **found.header}
    acting, revocable = parts.actuator(spending), partial(parts.revocable, spending)
    return Loop(host, parts.sensor, wish.guarded(), acting, spending, header, run, revocable)


@dataclass(frozen=True, eq=False)
class _Wish:
    """What the user wants, checked.

    Args:
        goal: a price or a tolerance, None where there are budgets.
        budgets: each of another resource.
        controller: pursues it.
        masking: the pattern of masks on single weights, "" where whole units are cut.
        reserve_bytes: host memory for units that may come back; None: no limit.
    """

    goal: Price | Tolerance | None
    budgets: tuple[Budget, ...]
    controller: Controller[Any]
    masking: str = ""
    reserve_bytes: int | None = 8 * 2**30

    @property
    def goals(self) -> tuple[Budget | Price | Tolerance, ...]:
        """Budgets, or the price or tolerance."""
        return self.budgets if self.goal is None else (self.goal,)

    @property
    def resource(self) -> str:
        """What is saved where there is no budget."""
        return self.goal.resource if self.goal else "flops"

    @property
    def schedule(self) -> Schedule:
        """When decisions are made."""
        schedule = getattr(self.controller, "schedule", None)
        return schedule if isinstance(schedule, Schedule) else Schedule()

    @property
    def revocable(self) -> bool:
        """Whether a cut that the loss does not stand is taken back, or at least followed by a pause."""
        able = isinstance(self.controller, Returning) or getattr(self.controller, "pauses", False)
        return able and not isinstance(self.goal, Tolerance)  # a tolerance judges by itself

    def guarded(self) -> Controller[Any]:
        """The controller, which uses up a run's budget and gives way to the loss once."""
        using_up = UsingUp(self.controller)
        return RollingBack(using_up) if self.revocable else using_up


def _spending(host: Host, wish: _Wish, parts: _Parts, total_steps: int, clock: Stopwatch) -> Spending:
    """What the run may spend; a budget that cannot be met is refused."""
    found, controller = parts.found, wish.controller
    dense = {name: cost.total(widths_of(found.groups)) for name, cost in found.costs.items()}
    for each in wish.budgets:
        check_reachable(each, dense[each.resource], cheapest(found.costs[each.resource], found.groups))
    spending = Spending(
        parts.target,
        found.costs,
        found.groups,
        total_steps=total_steps,
        schedule=wish.schedule,
        sensing_flops=parts.sensor.flops(found.groups, host.model),
        account=Account(clock, parts.meter.steps, dense["flops"], found.passes * dense["flops"]),
        meter=parts.meter,
        alone=host.ranks.count == 1,
        regrows=regrows(controller),
        learning=controller if isinstance(controller, Learning) else None,
        modelled=found.sources,
        check=parts.check,
    )
    spending.runs.check(0, total_steps, found.groups)
    return spending


def _wish(
    host: Host,
    budget: Budget | Sequence[Budget] | Price | Tolerance,
    controller: Controller[Any] | None,
    sensor: Sensor[Any] | None,
    actuator: Masking | Regrowing | None,
    total_steps: int,
) -> _Wish:
    """Check what is wanted, and whether host and optimizers can give it."""
    parts = set(host.model.modules())
    if any(other in parts or host.model in set(other.modules()) for other in ATTACHED):
        raise LoopError("this model has a loop already: call finish() or detach() on that loop first")
    goal = budget if isinstance(budget, (Price, Tolerance)) else None
    budgets = () if isinstance(budget, (Price, Tolerance)) else check_budgets(budget)
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a positive integer, got {total_steps!r}")
    for name, part in (("controller", controller), ("sensor", sensor)):
        if isinstance(part, type):
            raise LoopError(f"{name}={part.__name__} is a class: give an object, {part.__name__}(...)")
    settings = {} if actuator is None else _settings(actuator)
    if controller is None:
        controller = controller_for(goal or budgets, regrow="reserve_bytes" in settings)
        if "pattern" in settings:
            from setpoint.weights.controller import DropAndGrowController

            controller = DropAndGrowController(controller)
    else:
        check_goal(goal, controller)
    if "reserve_bytes" in settings and (isinstance(goal, Price) or not isinstance(controller, Returning)):
        raise LoopError(
            f"actuator=Regrowing(...) has no use here: {type(controller).__name__} brings nothing back. Leave the "
            "actuator to attach, or use a Budget with PricedController(regrow=True), or a Tolerance"
        )
    check_states(controller, sensor)
    check_trains(host.optimizers, host.model)
    for each in host.optimizers:
        check_optimizer(each)
    wish = _Wish(goal, budgets, controller, settings.get("pattern", ""), settings.get("reserve_bytes", 8 * 2**30))
    if not host.alone:
        check_shared_costs({each.resource for each in wish.goals})
    return wish


def _settings(actuator: object) -> dict[str, Any]:
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking

    if isinstance(actuator, Masking):
        return {"pattern": actuator.pattern}
    if isinstance(actuator, Regrowing):
        return {"reserve_bytes": actuator.reserve_bytes}
    raise LoopError(f"actuator is Masking(...) or Regrowing(...), or None to cut units for good; got {actuator!r}")


@dataclass(frozen=True, eq=False)
class _Parts:
    """What a run is made of, as far as it depends on what a unit is.

    Args:
        sensor: reads saliencies; `name` is what the user knows it by.
        found: what may be pruned.
        actuator: carries plans out.
        revocable: makes it one that can take its first cut back.
        meter: reads what steps take.
        target: what spending is held to.
    """

    sensor: Sensor[Any]
    name: str
    found: Candidates
    actuator: Callable[[Spending], Actuator]
    meter: Meter
    target: Target
    revocable: Callable[[Spending, Actuator], Actuator] = lambda spending, actuator: actuator
    check: Callable[[Sequence[Budget]], None] = lambda budgets: None


def _weights(
    host: Host, wish: _Wish, example: Example, sensor: Sensor[Any] | None, groups: Sequence[Group] | None
) -> _Parts:
    """Single weights are masked; nothing is tried out, since a mask is exact on any model."""
    from setpoint.weights.candidates import check_resources, check_run, weight_candidates
    from setpoint.weights.find import Pattern
    from setpoint.weights.patterned import Patterned
    from setpoint.weights.taylor import WeightTaylorSensor

    if host.wrapper:
        raise LoopError(
            "single weights are not masked inside DistributedDataParallel or fully_shard in this version: "
            "train in one process, or leave the actuator to attach, which cuts whole units"
        )
    inner = WeightTaylorSensor(num_samples(example)) if sensor is None else sensor
    check_run(wish.goal, wish.budgets, wish.controller, inner)
    found, masks = weight_candidates(host, example, wish.masking, groups, inner)
    return _Parts(
        Patterned(inner, Pattern.named(wish.masking)),
        type(inner).__name__,
        found,
        lambda spending: masks,
        Meter(),
        Target(wish.budgets, found.costs, widths_of(found.groups), wish.schedule, wish.resource),
        check=check_resources,
    )


def _units(
    host: Host,
    wish: _Wish,
    example: Example,
    sensor: Sensor[Any] | None,
    groups: Sequence[Group] | None,
    allow_lossy: bool,
    verify: bool,
) -> _Parts:
    """Units are cut."""
    traced = trace(host.model, example)
    sensor = _sensor(host, traced.groups, example) if sensor is None else sensor
    if host.mesh is not None:
        check_reads(sensor)
    sensor = sensor.over(host.ranks) if isinstance(sensor, Shared) and not host.alone else sensor
    found = unit_candidates(host, traced, example, sensor, groups, allow_lossy=allow_lossy, verify=verify)
    if regrows(wish.controller):
        from setpoint.regrowth.verify_probe import check_regrowth

        passes = check_regrowth(host, example, found.groups, sensor, verify=verify)
        found = replace(found, passes=found.passes + passes)
    meter = Meter()
    if {each.resource for each in wish.goals} & set(METERED):
        from setpoint.resources.learn import learn

        learnt = learn(host, example, traced, found.groups, wish.goals)
        meter, costs = learnt.meter, {**found.costs, **learnt.costs}
        found = replace(found, costs=costs, sources=learnt.sources, header=learnt.header)
        target = learnt.target(wish.budgets, costs, wish.schedule, wish.resource)
    else:
        found = replace(found, header={"calibration": {}, "step_seconds": {}})
        target = Target(wish.budgets, found.costs, widths_of(found.groups), wish.schedule, wish.resource)
    coordinates: Coordinates = same_coordinates
    if any(group.kind == "state" for group in found.groups):
        from setpoint.states.turn import balanced as coordinates
    cutting = Cutting(host, found.groups, coordinates)

    controller, at_once = wish.controller, regrows(wish.controller)

    def regrowth(spending: Spending, actuator: Actuator) -> Actuator:
        if actuator is not cutting or not isinstance(controller, Returning) or not takes_back(sensor):
            return actuator
        from setpoint.regrowth.regrowing import Regrowth

        lasting = at_once and not isinstance(wish.goal, Tolerance)
        return Regrowth(cutting, controller, spending, wish.reserve_bytes, lasting=lasting)

    return _Parts(
        sensor,
        type(sensor).__name__,
        found,
        (lambda spending: regrowth(spending, cutting)) if at_once else (lambda spending: cutting),
        meter,
        target,
        revocable=regrowth,
    )


def _sensor(host: Host, groups: tuple[Group, ...], example: Example) -> Sensor[Any]:
    """Taylor for units; states have sensors of their own."""
    samples = num_samples(example) * host.ranks.count
    if host.alone and any(group.kind == "state" for group in groups):
        from setpoint.sensor.chain import SensorChain
        from setpoint.states.hankel import HankelSensor
        from setpoint.states.selective import SelectiveSensor

        for_states: tuple[Sensor[Any], ...] = (HankelSensor(samples), SelectiveSensor(example))
        return SensorChain(*(each for each in for_states if each.readable(groups, host.model)), TaylorSensor(samples))
    return TaylorSensor(samples)
