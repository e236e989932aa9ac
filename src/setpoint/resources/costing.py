"""Costing: costs and meter of a run that is held to bytes, seconds or joules, learnt on copies of the model.

Seconds of a training step, or of a forward pass, are

    seconds(widths) = a + b * FLOPs(widths) + c * bytes(widths),        a, b, c >= 0,

with the bytes of all storages of the step (`Tape.storages`). The coefficients are fitted to a few whole steps of
copies on this device by least squares of relative errors. Joules are watts times seconds, with the power that a meter
reads of these steps or that the user states. What both do not tell, such as the stairs of a kernel, meters correct.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Float64

from setpoint.cost.budget import METERED, Budget, Price, Tolerance
from setpoint.cost.cost import Cost, ProductCost, Term, flops_cost, forward_flops
from setpoint.errors import CostError, SetpointError
from setpoint.groups.example import Example, inputs_of, num_samples, without_cache
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Trace
from setpoint.host.host import Host
from setpoint.loop.candidates import restricted
from setpoint.messages import progress, warn
from setpoint.resources.joules import EnergyMeter, find_energy_meter
from setpoint.resources.metering import Metering
from setpoint.resources.replica import Inference, Replica, held_tensors, replica
from setpoint.resources.tape import MemoryCost, Tape, falling_widths, solved, taken, trial_widths
from setpoint.spending.meter import Stopwatch

Make = Callable[..., AbstractContextManager[Replica]]  # a copy at widths; by data=False its tensors have no memory

_MOST_STEPS, _ENOUGH_S = 50, 0.4
_SAY_WATTS = "give the budget the power that a training step draws, as in Budget.fraction(0.5, of='energy', watts=W)"


@dataclass(frozen=True, eq=False)
class Costing:
    """What is known of resources that are measured."""

    costs: Mapping[str, Cost]
    sources: Mapping[str, str]  # by resource, what it was modelled by
    meter: Metering
    passes: float  # steps on copies, in steps of the dense model by FLOPs


def cost_out(
    host: Host,
    example: Example,
    found: Trace,
    groups: tuple[Group, ...],
    goals: Sequence[Budget | Price | Tolerance],
    calls: int = 1,
) -> Costing:
    """Costs and meter of the resources that goals are on; the model itself is left alone.

    `found` is of an optimizer step, in which the model is called `calls` times on examples; copies make one call.
    """
    measured = {goal.resource for goal in goals} & set(METERED)
    watts = next((goal.watts for goal in goals if goal.watts is not None), None)
    device = next((parameter.device for parameter in host.model.parameters()), torch.device("cpu"))
    energy = _energy_meter(device, watts) if "energy" in measured else None
    example, own = without_cache(host.model, example), restricted(found, groups)
    flops, costs, sources = flops_cost(own), dict[str, Cost](), dict[str, str]()
    steps, passes, inference = list[dict[str, int]](), list[dict[str, int]](), None

    if measured & {"memory", "latency", "energy"}:
        make = partial(replica, host.model, host.optimizers, example, groups, steps)
        tape = record(make, groups)
        if "memory" in measured:
            costs["memory"], sources["memory"] = MemoryCost(tape), "modelled: storages of a recorded step"
        if measured & {"latency", "energy"}:
            latency, power_w = _fitted("latency", make, groups, flops, tape, device, energy)
            costs["latency"] = latency
            if "energy" in measured:
                power = "stated watts" if energy is None or power_w is None else f"power read by {energy.source}"
                power_w = watts if power_w is None else power_w
                if power_w is None:
                    raise CostError(f"the energy meter read nothing while copies were trained: {_SAY_WATTS}")
                costs["energy"] = combined("energy", ((power_w, latency),))
                sources["energy"] = f"modelled: {power} x seconds"
    if "inference" in measured:
        asked = without_cache(host.model, next((goal.example for goal in goals if goal.example is not None), example))
        pass_flops = forward_flops(own, num_samples(asked) / num_samples(example) / calls)
        inference = Inference(host.model, asked, pass_flops)
        answer = partial(replica, host.model, (), asked, groups, passes, trains=False)
        tape = record(answer, groups)
        costs["inference"], _ = _fitted("inference", answer, groups, pass_flops, tape, device, None)
    for name in costs.keys() & {"latency", "inference"}:
        sources[name] = "modelled: constant, FLOPs and bytes, fitted to steps timed on this device"

    # FLOPs are of a step with `calls` calls, and a copy makes one.
    spent = sum(flops.total(widths) / calls for widths in steps)
    spent += sum(inference.flops.total(widths) for widths in passes if inference is not None)
    meter = Metering(
        measured,
        partial(held_tensors, host.model, host.optimizers, inputs_of(example)),
        device,
        model=host.model,
        compiled=host.compiled,
        energy=energy,
        inference=inference,
        watts=watts if watts is not None and energy is None else 0.0,
    )
    dense_flops = flops.total(widths_of(groups))
    return Costing(costs, sources, meter, spent / dense_flops if dense_flops else 0.0)


def _energy_meter(device: torch.device, watts: float | None) -> EnergyMeter | None:
    meter, why = find_energy_meter([device])
    if meter is None and watts is None:
        raise CostError(
            f"there is no meter of energy here ({why}): {_SAY_WATTS}, and energy is modelled as watts x seconds; or "
            "use of='latency'"
        )
    if meter is not None and watts is not None:
        warn(f"joules are measured by {meter.source}: the {watts:g} stated watts are left aside")
    return meter


def record(make: Make, groups: tuple[Group, ...]) -> Tape:
    """The step as a function of widths, of copies with data, or without where memory has no room for those."""
    vectors = trial_widths(groups)
    try:
        with progress("recording a step"):
            with suppress(Exception):  # an error that is kept would keep the copy's memory
                return _recorded(make, vectors, data=True)
            return _recorded(make, vectors, data=False)
    except SetpointError:
        raise
    except Exception as error:
        raise CostError(
            f"a step cannot be recorded on copies of the model ({type(error).__name__}: {error}): "
            "hold the model to a budget of 'flops' or 'params'"
        ) from error


def _recorded(make: Make, vectors: Sequence[Mapping[str, int]], *, data: bool) -> Tape:
    takes = []
    for widths in vectors:
        with make(widths, data=data) as copy:
            takes.append(taken(copy.step, copy.held()))
    return solved(takes, vectors)


def _fitted(
    resource: str,
    make: Make,
    groups: tuple[Group, ...],
    flops: ProductCost,
    tape: Tape,
    device: torch.device,
    meter: EnergyMeter | None,
) -> tuple[ProductCost, float | None]:
    """Seconds of a step, fitted to a few whole ones, and the mean power that these drew, if it was read."""
    with progress(f"timing whole steps ({resource})"):
        steps = list(timed(make, falling_widths(groups), device, meter))
    if not steps:
        raise CostError("no step of a copy of the model fits into memory here: use of='flops' or of='params'")
    powers = [spent_j / taken_s for _, taken_s, spent_j in steps if spent_j is not None]
    seconds = [(widths, taken_s) for widths, taken_s, _ in steps]
    cost = fit_seconds(resource, flops, ProductCost("bytes", tape.storages), seconds)
    return cost, statistics.mean(powers) if powers else None


def timed(
    make: Make, vectors: Sequence[Mapping[str, int]], device: torch.device, meter: EnergyMeter | None
) -> Iterator[tuple[Mapping[str, int], float, float | None]]:
    """Widths, seconds of a step there (of a few), and joules, on one copy that becomes narrower."""
    with ExitStack() as inside:
        copy: Replica | None = None
        for widths in vectors:
            try:
                if copy is None:
                    copy = inside.enter_context(make(widths, data=True))
                else:
                    copy.narrow(widths)
                found = _timed_step(copy, device, meter)
            except torch.OutOfMemoryError:  # narrower ones may fit
                inside.close()
                copy = None
                continue
            if found is not None:
                yield widths, *found


def _timed_step(copy: Replica, device: torch.device, meter: EnergyMeter | None) -> tuple[float, float | None] | None:
    """Seconds of a step of this copy, and joules; None where the clock stood still."""
    warm, watch = (Stopwatch(synchronize=device.type == "cuda") for _ in range(2))
    with warm:
        copy.step()
    if warm.seconds >= _ENOUGH_S and device.type == "cpu" and meter is None:
        return warm.seconds, None  # the first at a shape takes longer, but by little where steps are that slow
    times: list[float] = []
    before_j = meter.read_j() if meter else None
    while not times or (watch.seconds < _ENOUGH_S and len(times) < _MOST_STEPS):
        with watch:
            copy.step()
        times.append(watch.last_seconds)
    after_j = meter.read_j() if meter else None
    spent_j = None if before_j is None or after_j is None or after_j <= before_j else (after_j - before_j) / len(times)
    read = sorted(seconds for seconds in times if seconds > 0)  # 0 where the clock ran backwards
    # The lower quartile: what else the machine does only ever makes a step longer.
    return (read[len(read) // 4], spent_j) if read else None


def fit_seconds(
    resource: str, flops: ProductCost, moved: ProductCost, steps: Sequence[tuple[Mapping[str, int], float]]
) -> ProductCost:
    """Seconds of a step from those at several widths, its FLOPs and the bytes that it moves."""
    # One row for each step: what a, b and c are multiplied by.
    rows = np.array([[1.0, flops.total(widths), moved.total(widths)] for widths, _ in steps])
    seconds = np.array([taken_s for _, taken_s in steps])
    constant_s, per_flop, per_byte = (float(value) for value in _non_negative(rows, seconds))
    return combined(resource, ((per_flop, flops), (per_byte, moved)), constant_s)


def combined(resource: str, parts: Sequence[tuple[float, ProductCost]], constant: float = 0.0) -> ProductCost:
    terms = [Term(factor * term.coefficient, term.sizes) for factor, part in parts for term in part.terms]
    return ProductCost(resource, (*terms, Term(constant, ())))


def _non_negative(rows: Float64[np.ndarray, "n k"], values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " k"]:
    """Least squares of relative errors with no negative coefficient, by trying which ones are zero."""
    scaled, ones = rows / values[:, None], np.ones(len(values))
    best, lowest = np.zeros(rows.shape[1]), np.inf
    for size in range(1, rows.shape[1] + 1):
        for used in combinations(range(rows.shape[1]), size):
            # Columns are scaled, since FLOPs and bytes are many powers of ten away from a constant.
            part = scaled[:, used]
            scale = np.abs(part).max(axis=0)
            if not (scale > 0).all():  # nothing of it in any step, such as FLOPs of a model without products
                continue
            found = np.linalg.lstsq(part / scale, ones, rcond=None)[0] / scale
            error = float(((part @ found - 1.0) ** 2).sum())
            if (found >= 0).all() and error < lowest:
                best, lowest = np.zeros(rows.shape[1]), error
                best[list(used)] = found
    return best
