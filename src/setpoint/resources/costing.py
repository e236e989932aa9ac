"""Costing: costs and meter of a run that is held to bytes, seconds or joules, learnt on copies of the model.

Seconds of a training step, or of a forward in a runtime, are

    seconds(widths) = a + b * FLOPs(widths) + c * depthwise FLOPs(widths) + d * bytes(widths),    a, b, c, d >= 0,

with the FLOPs of grouped convolutions apart from all others, and the bytes of all storages that PyTorch makes on the
way (`Tape.storages`). The coefficients are fitted to copies of several widths, timed where the model is trained or
served, by least squares of relative errors. Joules are watts times seconds, with the power that a meter reads of these
steps or that the user states. What the fit does not tell meters correct.
"""

import math
import socket
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from setpoint.cost.budget import METERED, Budget, Price, Tolerance
from setpoint.cost.cost import Cost, ProductCost, flops_cost
from setpoint.errors import CostError
from setpoint.groups.example import Example, check_example, inputs_of, one_sample, without_cache
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Trace
from setpoint.host.host import Host
from setpoint.loop.candidates import restricted
from setpoint.messages import progress, warn
from setpoint.resources.fit import by_kind, combined, fit_seconds
from setpoint.resources.joules import EnergyMeter, find_energy_meter
from setpoint.resources.metering import Metering
from setpoint.resources.replica import Replica, held_tensors, replica
from setpoint.resources.serving import Served, serving
from setpoint.resources.tape import Make, MemoryCost, falling_widths, record
from setpoint.runtimes.runtime import Eager
from setpoint.spending.meter import Stopwatch

_MOST_STEPS, _ENOUGH_S = 50, 0.4
_FIT = "constant, FLOPs, depthwise FLOPs and bytes"
_SAY_WATTS = "give the budget the power that a training step draws, as in Budget.fraction(0.5, of='energy', watts=W)"


@dataclass(frozen=True, eq=False)
class Costing:
    """What is known of resources that are measured."""

    costs: Mapping[str, Cost]
    groups: tuple[Group, ...]  # on the grid that the runtime shows
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
    device = host.device
    energy = _energy_meter(host, watts) if "energy" in measured else None
    example, own = without_cache(host.model, example), restricted(found, groups)
    flops, costs, sources = flops_cost(own), dict[str, Cost](), dict[str, str]()
    steps = list[dict[str, int]]()
    inference: Served | None = None
    served_in = ""

    if measured & {"memory", "latency", "energy"}:
        make = partial(replica, host.model, host.optimizers, example, groups, steps)
        tape = record(make, groups)
        if "memory" in measured:
            costs["memory"], sources["memory"] = MemoryCost(tape), "modelled: storages of a recorded step"
        if measured & {"latency", "energy"}:
            parts = (*by_kind(host.model, own), ProductCost("bytes", tape.storages))
            latency, power_w = _fitted(host, make, groups, parts, device, energy, watts)
            costs["latency"] = latency
            if "energy" in measured:
                power = "stated watts" if energy is None else f"power read by {energy.source}"
                if power_w is None:
                    raise CostError(f"the energy meter read nothing while copies were trained: {_SAY_WATTS}")
                costs["energy"] = combined("energy", ((power_w, latency),))
                sources["energy"] = f"modelled: {power} x seconds"
    if "inference" in measured:
        goal = next(goal for goal in goals if goal.resource == "inference")
        runtime = goal.runtime
        asked = goal.example if goal.example is not None else example if runtime is None else one_sample(example)
        check_example(asked)
        runtime = runtime or Eager()
        inference, costs["inference"], groups = serving(host, without_cache(host.model, asked), groups, runtime)
        served_in = runtime.name
        sources["inference"] = f"modelled: {_FIT}, fitted to copies in {runtime.name}"
    if "latency" in costs:
        sources["latency"] = f"modelled: {_FIT}, fitted to steps timed on this device"

    # FLOPs are of a step with `calls` calls, and a copy makes one. Forwards of a clock are no training.
    spent = sum(flops.total(widths) / calls for widths in steps)
    meter = Metering(
        measured,
        partial(held_tensors, host.model, host.optimizers, inputs_of(example)),
        device,
        model=host.model,
        compiled=host.compiled,
        energy=energy,
        inference=inference,
        served_in=served_in,
        each=host.each if host.ranks.count > 1 else None,
        whole=host.unsharded,
        watts=watts if watts is not None and energy is None else 0.0,
        dense_widths=widths_of(groups),
    )
    dense_flops = flops.total(widths_of(groups))
    # Ranks may have timed more or fewer steps, and count alike.
    passes = host.each(np.array([spent / dense_flops if dense_flops else 0.0])).max(0)
    return Costing(costs, groups, sources, meter, float(passes[0]))


def _energy_meter(host: Host, watts: float | None) -> EnergyMeter | None:
    meter, why = find_energy_meter([host.device])
    # What the processors of a machine spend counts once, however many ranks it has.
    machines = host.ranks.all_gather_text(socket.gethostname())
    if meter is not None and machines.index(machines[host.ranks.own]) < host.ranks.own:
        meter = meter.without_processors()
    if meter is None and watts is None:
        raise CostError(
            f"there is no meter of energy here ({why}): {_SAY_WATTS}, and energy is modelled as watts x seconds; or "
            "use of='latency'"
        )
    if meter is not None and watts is not None:
        warn(f"joules are measured by {meter.source}: the {watts:g} stated watts are left aside")
    return meter


def _fitted(
    host: Host,
    make: Make,
    groups: tuple[Group, ...],
    parts: Sequence[ProductCost],
    device: torch.device,
    meter: EnergyMeter | None,
    watts: float | None,
) -> tuple[ProductCost, float | None]:
    """Seconds of a training step, fitted to a few whole ones, and the mean power that these drew, if it was read.

    Of several ranks the slowest counts at each width, and their powers add up, to what they draw in its seconds.
    """
    vectors = falling_widths(groups)
    with progress("timing whole steps (latency)"):
        steps = list(timed(make, vectors, device, meter))
    own_s = [next((taken_s for at, taken_s, _ in steps if at is widths), -math.inf) for widths in vectors]
    slowest_s = host.each(np.array(own_s)).max(0).tolist()
    seconds = [(widths, taken_s) for widths, taken_s in zip(vectors, slowest_s, strict=True) if taken_s > 0]
    if not seconds:
        raise CostError("no step of a copy of the model fits into memory here: use of='flops' or of='params'")
    powers = [spent_j / taken_s for _, taken_s, spent_j in steps if spent_j is not None]
    if not powers and watts is not None:
        powers = [watts * own / slowest for own, slowest in zip(own_s, slowest_s, strict=True) if own > 0]
    if meter is not None and not meter.source:
        powers = [0.0]
    power_w = float(host.each(np.array([statistics.mean(powers) if powers else -math.inf])).sum())
    return fit_seconds("latency", parts, seconds), power_w if power_w > 0 else None


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
