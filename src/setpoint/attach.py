"""Attach: check what is asked, find what can be pruned, choose the parts, begin a loop. It alone knows the leaves."""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from setpoint.actuator.actuator import Actuator
from setpoint.actuator.in_state_dict import PENDING, RESUMING, carry_sizes, check_not_attached
from setpoint.actuator.model_shapes import was_cut
from setpoint.actuator.optimizer_check import check_optimizer, check_trains
from setpoint.actuator.tensors import check_data
from setpoint.controller.even import EvenController
from setpoint.controller.plan import Controller
from setpoint.controller.priced import Gains, PricedController
from setpoint.controller.schedule import Schedule
from setpoint.cost.budget import METERED, Budget, Price, Tolerance, parse_budget
from setpoint.errors import BudgetError, CostError, GroupError, LoopError
from setpoint.groups.example import Example, called_by, check_example, check_method, num_samples
from setpoint.groups.group import Group, check_blocks, on_grid, widths_of
from setpoint.groups.trace import Trace, trace_step
from setpoint.groups.untouched import one_at_a_time, preserved_rng_state
from setpoint.host.find import Steps, host_of
from setpoint.host.host import Host
from setpoint.interrupts import uninterrupted
from setpoint.loop.calls import Record
from setpoint.loop.candidates import Candidates, Inputs, unit_candidates
from setpoint.loop.control import Parts
from setpoint.loop.cutting import Coordinates, Cutting, same_coordinates
from setpoint.loop.first_batch import FirstBatch, RecordedMethod
from setpoint.loop.loop import Loop
from setpoint.messages import a_type, counts, plain_number, progress, warn
from setpoint.sensor.calibrating import Calibrating
from setpoint.sensor.reading import Sensor
from setpoint.sensor.taylor import TaylorSensor
from setpoint.spending.account import Account
from setpoint.spending.checks import check_budgets, check_reachable, check_run, run_facts, split_bill
from setpoint.spending.limits import Limits
from setpoint.spending.meter import Meter, Stopwatch
from setpoint.spending.metrics import LOG
from setpoint.spending.spending import Spending

if TYPE_CHECKING:
    from setpoint.distillation.teacher import Teacher
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking


_PATIENCE = 3  # steps on bad batches that are passed over at the beginning, or 5 % of the run
_READING = 0.01  # how far readings of a clock differ, relatively: a cut for them aims this much lower
_CALIBRATION = 1024  # samples that are seen before the first cut, at most


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
    grid: int | None = None,
    method: str = "forward",
    teacher: Teacher | nn.Module | bool | None = None,
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
        copies: averages of the model, which are cut with it: modules with the same tensors, lists of `shadow_params`.
        allow_lossy: also prune groups in which a zeroed unit is not the same as an absent one.
        verify: leave alone groups whose cut fails on copies of the model.
        resume: let the states of model and optimizer, as any framework saves them, carry sizes and the loop's state,
            and continue from such states if they were loaded, or are loaded before the first step.
        even: keep all layers of a kind at one width, and write it into a transformers model's config.
        grid: widths of channels and neurons keep to multiples of this number, where there are two or more; by default
            what is fast on the model's device, or in the runtime of a budget.
        method: name of the model's method that training calls, where it is not the forward; `example` is its inputs.
        teacher: of whose logits the model learns as well, with the user's loss unchanged: a module, a `Teacher` with
            settings, or True for a frozen copy of the model as it is now, if that was trained for its task.

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
    host = host_of(model, optimizer, copies)
    # Everything that can be refused without a look inside the model is refused here, before a hook is set.
    flags = {"allow_lossy": allow_lossy, "verify": verify, "resume": resume}
    with uninterrupted():
        spec = _run_spec(host, budget, total_steps, controller, sensor, actuator, groups, even, grid, method, **flags)
        taught_by = None
        if teacher is not None and teacher is not False:
            from setpoint.distillation.teaching import Teaching, as_teacher

            taught_by = as_teacher(host.model, teacher, host.copies)
    if example is None:
        _check_runtimes(host, spec.budgets)
    else:
        check_example(example)
        if PENDING in host.model.__dict__:  # a state without sizes was loaded, and the example tells them
            from setpoint.checkpoint.resumable import complete

            complete(host.model, example)
    with ExitStack() as undo:
        with uninterrupted():  # nobody could detach a loop that is not returned
            loop = Loop(host)
            undo.callback(loop.detach)
            if example is None:
                patience = min(max(_PATIENCE, spec.total_steps // 20), spec.total_steps - 1)
                loop.wait(FirstBatch(host, model, method, patience, partial(_begin, loop, spec, model, taught_by)))
                RESUMING.add(host.model)  # until the loop begins, a state may give the model other shapes
                if resume:
                    from setpoint.loop.carrying import FollowLoads

                    loop.at_detach(FollowLoads(host, model).stop)
            else:
                inputs = Inputs(example, samples=num_samples(example))
                _begin(loop, spec, model, taught_by, inputs)
            if taught_by is not None:
                called = model if host.compiled else host.model
                loop.at_detach(Teaching(loop, called, taught_by, method).stop)
        with uninterrupted():
            _carry_sizes(host, spec)  # last, since it leaves hooks on the model
        undo.pop_all()
    return loop


@dataclass(frozen=True, eq=False)
class RunSpec:
    """What is asked of a run, checked."""

    goal: Price | Tolerance | None  # None where there are budgets
    budgets: tuple[Budget, ...]
    bill: Budget | None  # what the run may spend in addition to budgets per step
    total_steps: int  # with a bill, those of the dense run that it is a share of
    controller: Controller[Any]
    sensor: Sensor[Any] | None  # None for the usual one
    masking: Masking | None  # None where whole units are cut
    regrowing: Regrowing | None  # how units rest that may come back; None for the usual way
    groups: tuple[Group, ...] | None  # that may be pruned; None for all
    grid: int | None  # what widths are multiples of; None for the usual blocks
    method: str
    by_default: bool  # whether the controller is the usual one
    allow_lossy: bool
    verify: bool
    resume: bool


def _run_spec(
    host: Host,
    budget: Any,
    total_steps: Any,
    controller: Controller[Any] | None,
    sensor: Sensor[Any] | None,
    actuator: Masking | Regrowing | None,
    groups: Sequence[Group] | None,
    even: bool,
    grid: int | None,
    method: str,
    **flags: bool,
) -> RunSpec:
    _check_part("controller", controller, Controller, "PricedController")
    _check_part("sensor", sensor, Sensor, "TaylorSensor")
    for name, flag in {"even": even, **flags}.items():
        if not isinstance(flag, bool):
            raise ValueError(f"{name} is True or False, got {flag!r}")
    if grid is not None:
        (grid,) = counts(grid=grid)
    steps = plain_number(total_steps)
    if type(steps) is not int or steps < 1:
        raise ValueError(
            f"total_steps must be a positive integer, got {total_steps!r:.60}: give the optimizer steps of the whole "
            "run, such as epochs * len(loader)"
        )
    check_method(host.model, method)
    wanted = parse_budget(budget)
    if isinstance(wanted, Price) and sensor is not None and not sensor.traits.in_loss:
        raise LoopError(
            f"{type(sensor).__name__} reads in no unit of the loss, so that no Price can be set against it: give a "
            'budget, such as "50% flops", or leave the sensor to attach'
        )
    check_not_attached(host.model)
    check_data(host.model)
    goal = wanted if isinstance(wanted, (Price, Tolerance)) else None
    budgets, bill = ((), None) if isinstance(wanted, (Price, Tolerance)) else split_bill(check_budgets(wanted))
    masking, regrowing = _kinds(actuator)
    by_default = controller is None
    if controller is None:
        # A regrowing controller is chosen by the actuator: nobody should have to say it twice.
        controller = _controller_for(goal or budgets, regrow=regrowing is not None)
        if masking:
            from setpoint.weights.controller import DropAndGrowController

            controller = DropAndGrowController(controller)
    else:
        _check_goal(goal, controller)
    if even and masking:
        raise LoopError("even=True is for units that are cut: Masking(...) keeps every layer as wide as it is")
    if even and not isinstance(controller, EvenController):
        controller = EvenController(controller)
    if regrowing and not (controller.conduct.regrow or controller.conduct.yields):
        raise LoopError(
            f"actuator=Regrowing(...) has no use here: {type(controller).__name__} brings nothing back. Leave the "
            "actuator to attach, or use a Budget with PricedController(regrow=True), or a Tolerance"
        )
    check_trains(host.optimizers, host.model)
    for optimizer in host.optimizers:
        check_optimizer(optimizer)  # by trying it on throwaway tensors, whatever its class is called
    _check_metered(host, [goal] if goal else budgets)
    chosen = _as_groups(groups)
    return RunSpec(
        goal, budgets, bill, steps, controller, sensor, masking, regrowing, chosen, grid, method, by_default, **flags
    )


def _check_metered(host: Host, goals: Sequence[Budget | Price | Tolerance]) -> None:
    """Check that ranks can read what goals are on, which single processes can, or raise CostError."""
    for goal in () if host.single_process else goals:
        of_run = getattr(goal, "per", "step") == "run"
        # Shards are freed in a way that only the allocator of a GPU sees.
        hidden = goal.resource == "memory" and host.mesh is not None and host.device.type == "cpu"
        if goal.resource in METERED and (of_run or hidden):
            where = "of a sharded model on the CPU" if hidden else "on several ranks"
            raise CostError(
                f"a budget of {goal.resource!r}{' for the whole run' * of_run} is not available {where} in this "
                "version: use 'flops' or 'params', or 'latency', 'inference' or 'energy' of a step"
            )


def _check_runtimes(host: Host, budgets: Sequence[Budget]) -> None:
    """Refuse a runtime that does not work here now, where the model is timed at the first step only."""
    for budget in budgets if host.single_process else ():
        if budget.runtime is not None:
            from setpoint.resources.serving import check_runtime

            check_runtime(budget.runtime)


def _check_part(name: str, part: object, kind: type, example: str) -> None:
    if isinstance(part, type):
        raise LoopError(f"{name}={part.__name__} is a class: give an object, {part.__name__}(...)")
    # By hasattr: from Python 3.12 on isinstance does not see what a wrapper passes on by __getattr__.
    lacking = sorted(method for method in vars(kind) if not method.startswith("_") and not hasattr(part, method))
    if part is not None and lacking:
        raise LoopError(
            f"{name} must be a {kind.__name__}, such as {example}(...), or None; got {part!r}, which has no "
            f"{' and no '.join(lacking)}: derive it from {kind.__module__}.{kind.__name__}"
        )


def _kinds(actuator: object) -> tuple[Masking | None, Regrowing | None]:
    """The actuator as what it is; neither where units are cut for good."""
    if actuator is None:
        return None, None
    from setpoint.regrowth.regrowing import Regrowing
    from setpoint.weights.masking import Masking

    if not isinstance(actuator, (Masking, Regrowing)):
        raise LoopError(f"actuator is Masking(...) or Regrowing(...), or None to cut units for good; got {actuator!r}")
    return (actuator, None) if isinstance(actuator, Masking) else (None, actuator)


def _controller_for(goal: Price | Tolerance | Sequence[Budget], *, regrow: bool) -> Controller[Any]:
    if isinstance(goal, Price):
        from setpoint.controller.penalty import PenaltyController

        return PenaltyController(goal)
    if isinstance(goal, Tolerance):
        from setpoint.controller.tolerant import TolerantController

        return TolerantController(goal)
    return PricedController(deadband=min(budget.deadband for budget in goal), regrow=regrow)


def _check_goal(goal: Price | Tolerance | None, controller: Controller[Any]) -> None:
    """Check that a controller that pursues one goal was made for this one; None stands for budgets."""
    own, name = controller.conduct.goal, type(controller).__name__
    if own == "budget" and goal is not None:
        raise BudgetError(
            f"{name} holds a budget, not {a_type(goal)}: give attach a Budget, or leave the controller to it"
        )
    if own not in ("budget", goal):
        raise BudgetError(f"this {name} pursues {own!r}: give the same to attach, got {goal or 'budgets'}")


def _as_groups(groups: object) -> tuple[Group, ...] | None:
    if groups is None:
        return None
    chosen = tuple(groups) if isinstance(groups, Iterable) else (None,)
    if not all(isinstance(group, Group) for group in chosen):
        raise GroupError(
            "groups must be a sequence of groups out of find_groups(model, example), or None for all; got "
            f"{repr(groups):.200}"
        )
    check_blocks(chosen)
    return chosen


def _carry_sizes(host: Host, spec: RunSpec) -> None:
    """Let states of model and copies carry sizes; with `resume` also take them."""
    carry: Callable[[nn.Module], object] = carry_sizes
    if spec.resume:
        from setpoint.checkpoint.resumable import resumable as carry
    for module in (host.model, *host.copies):
        carry(module)
    if not host.named_copies:
        LOG.info("averages and target networks must be named in copies=")
    save = getattr(type(host.model), "save_pretrained", None)
    if getattr(save, "__module__", "").startswith(("transformers.", "diffusers.")) and not hasattr(save, "by_setpoint"):
        LOG.warning("save_pretrained() writes no sizes of a cut model: call setpoint.enable_checkpointing() before it")


@one_at_a_time  # tracing shares PyTorch's global state; the first steps of two threads may coincide
def _begin(loop: Loop, spec: RunSpec, called: nn.Module, taught_by: Teacher | None, inputs: Inputs) -> None:
    """Begin the loop with the parts of the run, and with the state that its optimizer has brought, if there is one."""
    parts = partial(_parts, loop.host, spec)
    with uninterrupted():  # tries of the model take any exception for its own, that of a time limit too
        if spec.resume:
            from setpoint.loop.carrying import begin_resumable

            RESUMING.add(loop.host.model)
            begin_resumable(loop, inputs, parts)
        else:
            loop.begin(parts(inputs))
            RESUMING.discard(loop.host.model)
    compiled, method = loop.host.compiled, spec.method
    listen: Callable[..., object] = partial(Record.listen, module=called if compiled else loop.host.model)
    if method != "forward":
        listen = partial(RecordedMethod, model=loop.host.model, method=method)
    outside = compiled and called._compiled_call_impl is None
    if spec.total_steps > 1 + inputs.recorded:  # the second step is looked at
        loop.watch(inputs, listen, outside=outside, method=method)
    if taught_by is not None:
        taught_by.count()  # the first step's passes, so that a run that goes on counts as one that was not interrupted


def _parts(host: Host, spec: RunSpec, inputs: Inputs) -> Parts:
    """The parts, the same on all ranks, once the model has been looked at."""
    clock = Stopwatch(synchronize=True)
    check_data(host.model)  # again, since it may wait for its first step
    with (
        progress("attach"),
        called_by(host.model, spec.method),
        clock,
        host.unsharded(),
        preserved_rng_state(host.model),
        host.together("attach") as facts,
    ):
        parts = _weights(host, spec, inputs, clock) if spec.masking else _units(host, spec, inputs, clock)
        facts.update({**parts.facts, **run_facts(parts.spending), "weights": host.fingerprint()})
    return parts


def _weights(host: Host, spec: RunSpec, inputs: Inputs, clock: Stopwatch) -> Parts:
    """Parts that mask single weights; nothing is tried out, since a mask is exact on any model."""
    from setpoint.weights.find import Pattern
    from setpoint.weights.masking import check_resources, check_run, weight_candidates
    from setpoint.weights.taylor import WeightTaylorSensor

    assert spec.masking is not None
    pattern = Pattern.named(spec.masking.pattern)
    if host.wrapped:
        raise LoopError(
            "single weights are not masked inside DistributedDataParallel or fully_shard in this version: "
            "train in one process, or leave the actuator to attach, which cuts whole units"
        )
    inner = WeightTaylorSensor(inputs.samples) if spec.sensor is None else spec.sensor
    budgets = (*spec.budgets, *([spec.bill] if spec.bill else []))
    sensor = check_run(spec.goal, budgets, spec.controller, inner).in_pattern(pattern)
    found, masking = weight_candidates(host, inputs.example, pattern, spec.groups, inputs.passes)
    spending = _spending(host, spec, found, sensor, inputs, Meter(), clock, check_resources)
    parts = _assembled(host, spec, found, sensor, masking, spending)
    return replace(parts, facts={"pattern": str(pattern), **parts.facts})


def _units(host: Host, spec: RunSpec, inputs: Inputs, clock: Stopwatch) -> Parts:
    some, even = spec.groups, None
    traced = trace_step(host.model, inputs.example, inputs.passes)
    host.no_backward = traced.no_backward
    if isinstance(spec.controller, EvenController):
        from setpoint.configs.even import evened

        even = evened(host.model, traced, some, allow_lossy=spec.allow_lossy)
        traced, some = even.traced, even.groups
        spec = replace(spec, controller=replace(spec.controller, kinds=even.kinds))
    spec, calibration = _beginning(host, spec, traced.groups, inputs)
    sensor = spec.sensor or _usual_sensor(host, traced.groups, inputs)
    if host.mesh is not None and not sensor.traits.shards:
        raise LoopError(
            f"{type(sensor).__name__} does not say that it can read a model that is sharded over ranks: "
            "use TaylorSensor, or set traits = Traits(shards=True) on a sensor that adds up what each rank has"
        )
    sensor = sensor if host.single_process else sensor.over(host.ranks)
    found = unit_candidates(
        host, traced, inputs.example, sensor, some, allow_lossy=spec.allow_lossy, verify=spec.verify
    )
    found = even.complete(found, host.model) if even else found
    if spec.grid:
        if (widest := max((group.num_units for group in found.groups), default=0)) < 2 * spec.grid:
            warn(f"grid={spec.grid} changes nothing: no layer has two blocks of it, the widest has {widest} units")
        found = replace(found, groups=on_grid(found.groups, spec.grid))
    found = replace(found, groups=host.even(found.groups))
    if calibration and not host.compiled:
        widths, forward = widths_of(found.groups), defaultdict[str, float](float)
        for product in traced.contractions:
            forward[product.module] += product.at(widths_of(traced.groups))
        scores, calls = spec.sensor is None, inputs.passes
        sensor = Calibrating(sensor, calibration * calls, calls, widths, forward, scores=scores)
    conduct = spec.controller.conduct
    if conduct.regrow:
        from setpoint.regrowth.regrowing import check_regrowth

        check_regrowth(sensor)
    meter = Meter()
    goals = spec.budgets if spec.goal is None else (spec.goal,)
    if {goal.resource for goal in goals} & set(METERED):
        from setpoint.resources.costing import cost_out

        costing = cost_out(host, inputs.example, traced, found.groups, goals, inputs.passes)
        meter, costs, passes = costing.meter, {**found.costs, **costing.costs}, found.passes + costing.passes
        found = replace(found, costs=costs, groups=costing.groups, sources=costing.sources, passes=passes)
    coordinates: Coordinates = same_coordinates
    if any(group.kind == "state" for group in found.groups):
        from setpoint.states.turn import balanced as coordinates
    check_kind = partial(_check_metered, host)
    spending = _spending(host, spec, found, sensor, inputs, meter, clock, check_kind, traced)

    def revocable() -> Actuator:
        from setpoint.regrowth.regrowing import Regrowing, Regrowth

        reserve_bytes = (spec.regrowing or Regrowing()).reserve_bytes
        lasting = conduct.regrow and not isinstance(spec.goal, Tolerance)
        return Regrowth(host, found.groups, coordinates, spec.controller, spending, reserve_bytes, lasting=lasting)

    able = (conduct.regrow or conduct.yields) and sensor.traits.returns
    actuator = revocable() if able and conduct.regrow else Cutting(host, found.groups, coordinates)
    parts = _assembled(host, spec, found, sensor, actuator, spending)
    return replace(parts, revocable=revocable) if able and not conduct.regrow else parts


def _beginning(host: Host, spec: RunSpec, groups: Sequence[Group], inputs: Inputs) -> tuple[RunSpec, int]:
    """The run with a controller that begins with the cut, where it is the usual one, and the steps of calibration."""
    controller, resources = spec.controller, {budget.resource for budget in spec.budgets}
    known = spec.goal is None and resources <= {"flops", "params", "inference"}
    if spec.by_default and known and not spec.regrowing and all(group.kind == "unit" for group in groups):
        samples = num_samples(inputs.example) * inputs.passes * host.ranks.shares
        clock = "inference" in resources
        first, gains = (Schedule.measured(), Gains(0.0, 1.0)) if clock else (Schedule.at_once(), Gains())
        # The second step shows whether training calls what the example does; the first is over where it was recorded.
        steps = max(2, min(round(first.warmup * spec.total_steps), -(-_CALIBRATION // samples)))
        first = replace(first, warmup=min(steps / spec.total_steps, 0.99 * first.settle))
        deadband, margin = min(budget.deadband for budget in spec.budgets), _READING if clock else 0.0
        usual = PricedController(first, gains, deadband=deadband, margin=margin)
        controller = replace(controller, inner=usual) if isinstance(controller, EvenController) else usual
    schedule = controller.conduct.schedule
    calibration = schedule.decisions(spec.total_steps)[0] if schedule.first else 0
    return replace(spec, controller=controller), calibration


def _usual_sensor(host: Host, groups: tuple[Group, ...], inputs: Inputs) -> Sensor[Any]:
    """Taylor for units; states have sensors of their own."""
    samples = inputs.samples * host.ranks.shares
    if host.single_process and any(group.kind == "state" for group in groups):
        from setpoint.sensor.chain import SensorChain
        from setpoint.states.hankel import HankelSensor
        from setpoint.states.selective import SelectiveSensor

        for_states: tuple[Sensor[Any], ...] = (HankelSensor(samples), SelectiveSensor(inputs.example))
        readable = (sensor for sensor in for_states if sensor.readable(groups, host.model))
        return SensorChain(*readable, TaylorSensor(samples))
    return TaylorSensor(samples)


def _spending(
    host: Host,
    spec: RunSpec,
    found: Candidates,
    sensor: Sensor[Any],
    inputs: Inputs,
    meter: Meter,
    clock: Stopwatch,
    check_kind: Callable[[Sequence[Budget]], None],
    traced: Trace | None = None,
) -> Spending:
    """What the run may spend; a budget that cannot be met is refused, and a fraction is one of the uncut model."""
    dense, original = widths_of(found.groups), dict[str, float]()
    if was_cut(host.model):
        from setpoint.spending.changes import original_costs

        original = original_costs(host.model, inputs.example, spec.budgets, found.costs, dense, inputs.passes)
    limits = Limits(spec.budgets, found.costs, found.groups, spec.goal.resource if spec.goal else "flops", original)

    def unpruned() -> str:
        from setpoint.groups.unpruned import unpruned

        return unpruned(host.model, traced, narrowest, found.frozen) if traced else ""

    narrowest = limits.narrowest
    tenth = {name: max(narrowest[name], -(-width // 10)) for name, width in dense.items()}
    narrow = [name for name, width in tenth.items() if narrowest[name] < width]
    for budget in spec.budgets:
        cost, whole = found.costs[budget.resource], limits.dense_cost(budget.resource)
        check_reachable(budget, whole, cost.total(narrowest), unpruned)
        if traced and budget.per == "step" and budget.absolute(whole) < (needed := cost.total(tenth)):
            from setpoint.groups.unpruned import warn_of_narrow

            why = "" if traced.unfollowed else unpruned()  # else it is warned of already
            warn_of_narrow(budget.absolute(whole) / whole, needed / whole, narrow, why)
    step_flops = found.costs["flops"].total(dense)
    account = Account(
        clock,
        meter.steps,
        step_flops=step_flops,
        verification_flops=found.passes * step_flops,
        sensing_flops=sensor.flops(found.groups, host.model),
    )
    spending = Spending(
        limits,
        total_steps=spec.total_steps,
        account=account,
        meter=meter,
        controller=spec.controller,
        single_process=host.ranks.count == 1,
        modelled=found.sources,
        check_kind=check_kind,
        bill=spec.bill,
    )
    check_run(spending, 0, spec.total_steps, found.groups)
    return spending


def _assembled(
    host: Host, spec: RunSpec, found: Candidates, sensor: Sensor[Any], actuator: Actuator, spending: Spending
) -> Parts:
    """The parts, with the head of the ledger, and what all ranks and a run that goes on with this one must share."""
    dense = {name: spending.limits.dense_cost(name) for name in spending.costs}
    header = {
        "groups": {group.name: {"num_units": group.num_units, "what": group.what} for group in found.groups},
        "frozen": dict(found.frozen),
        "dense": dense,
        "limit": {b.resource: b.absolute(dense[b.resource]) for b in spending.budgets if b.per == "step"},
        "limit_run": spending.limit_run,
        "total_steps": spending.planned_steps,
        "modelled": dict(found.sources),
        "measured": dict(spending.meter.sources),
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            "devices": sorted({str(parameter.device) for parameter in host.model.parameters()}),
        },
        **found.header,
    }
    facts = {
        "groups": widths_of(found.groups),
        "optimizers": [type(optimizer).__name__ for optimizer in host.optimizers],
        "copies": len(host.named_copies),
        "sensor": type(sensor).__name__,
        "controller": type(spec.controller).__name__,
    }
    controller = spec.controller
    # Others take no cut back, and have no budget of the whole run to use up.
    if controller.conduct.yields or spec.bill or any(budget.resource in METERED for budget in spec.budgets):
        from setpoint.controller.guarded import Guarded

        controller = Guarded(controller)
    return Parts(sensor, controller, actuator, spending, header, facts)
