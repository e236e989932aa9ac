"""Costing: the costs that a run's budgets need, learnt on copies of the model before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.cut import cut_groups
from setpoint.controller.ladder import lowest_width
from setpoint.cost.budget import METERED
from setpoint.cost.cost import Cost
from setpoint.errors import CostError, SetpointError
from setpoint.groups.example import Example, without_cache
from setpoint.groups.group import Group, widths_of
from setpoint.messages import warn
from setpoint.progress import progress
from setpoint.resources.counted import Make, Narrowing, Share, Tally
from setpoint.resources.energy import EnergyCost, fit_energy
from setpoint.resources.inference import inference_replica
from setpoint.resources.joules import EnergyMeter, find_energy_meter, idle_watts
from setpoint.resources.latency import LatencyCost, fit_steps
from setpoint.resources.lengths import halfway, held_at_two, narrowing_widths, trial_widths
from setpoint.resources.live_bytes import peak_bytes
from setpoint.resources.memory import MemoryCost
from setpoint.resources.replica import first, replica
from setpoint.resources.table import Table
from setpoint.resources.tape import Tape, Trainee, record, record_each
from setpoint.spending.seconds import Stopwatch

_MOST_STEPS, _ENOUGH_S = 50, 0.4
_SLOW_S = 0.2
"""Recorded steps that take longer count as timed."""
Reading = tuple[Mapping[str, int], float]
"""Widths, and what a step took there."""


@dataclass(frozen=True, eq=False)
class Costing:
    """The costs of a run beyond FLOPs and parameters.

    Args:
        errors: by resource, relative error of the prediction on copies, the median of several; absent where not known.
        step_seconds: by group, seconds of a dense step that go when the group alone is cut to its fewest units.
        idle_watts: power drawn while this process rests, as measured; None where joules are not asked for or metered.
        steps: made on copies, in steps of the dense model by FLOPs.
    """

    costs: Mapping[str, Cost] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    step_seconds: Mapping[str, float] = field(default_factory=dict)
    energy: EnergyMeter | None = None
    idle_watts: float | None = None
    steps: float = 0.0

    @property
    def header(self) -> dict[str, Any]:
        """What a ledger says of it."""
        facts = {"calibration": dict(self.errors), "step_seconds": dict(self.step_seconds)}
        return facts if self.idle_watts is None else {**facts, "idle_watts": self.idle_watts}


def cost_out(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    example: Example,
    groups: tuple[Group, ...],
    resources: Collection[str],
    watts: float | None = None,
    inference_example: Example | None = None,
    share: Share = lambda widths: 1.0,
    pass_share: Share = lambda widths: 1.0,
) -> Costing:
    """Build the costs of these resources on copies of the model, which is left alone.

    `watts` is the power of a training step, as the user states it for a machine without an energy meter. `share` and
    `pass_share` say what a step of training and a pass take of the FLOPs of a dense step.

    Raises:
        CostError: if the step cannot be recorded, or joules are asked for and there is nothing to tell them from.
    """
    wanted = set(resources) & set(METERED)
    if not wanted:
        return Costing()
    example = without_cache(model, example)
    inference_example = None if inference_example is None else without_cache(model, inference_example)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    meter, why = find_energy_meter([device]) if "energy" in wanted else (None, "")
    if "energy" in wanted and meter is None and watts is None:
        raise CostError(
            f"there is no meter of energy here ({why}), so no joules can be measured: give the budget the power that a "
            "training step draws, as in Budget.fraction(0.5, of='energy', watts=W), and energy is modelled as watts x "
            "seconds; or use of='latency'"
        )
    if meter is not None and watts is not None:
        warn(f"joules are measured by {meter.source}: the {watts:g} stated watts are left aside")
    costs, sources = dict[str, Cost](), dict[str, str]()
    errors, step_seconds = dict[str, float](), dict[str, float]()
    table, tally = Table(device) if wanted & {"latency", "inference", "energy"} else None, Tally()
    if wanted & {"memory", "latency", "energy"}:
        make = tally.over(partial(replica, model, optimizers, example, groups), share, begun=1)
        seen = list[Reading]() if table is not None and meter is None else None
        # The allocator of a GPU counts the live model, too.
        peaks = list[Reading]() if "memory" in wanted and device.type == "cpu" else None
        tape = _tape(make, groups, seen, peaks)
        if "memory" in wanted:
            costs["memory"] = memory = MemoryCost(tape)
            if peaks is not None:
                ((widths, peak),) = peaks or [_peak(make, groups)]
                errors["memory"] = abs(memory.total(widths) / peak - 1.0)
            sources["memory"] = "modelled: storages of a recorded step"
        if table is not None and wanted & {"latency", "energy"}:
            latency, joules = _calibrated(LatencyCost(tape, groups, table), table, make, groups, meter, seen or ())
            dense = widths_of(groups)
            step_seconds = {g.name: latency.saving(dense, g.name, g.num_units - lowest_width(g)) for g in groups}
            costs["latency"] = latency
            if "energy" in wanted:
                costs["energy"] = energy = _energy(latency, watts, joules, meter)
                sources["energy"], errors["energy"] = energy.source, energy.error
    if table is not None and "inference" in wanted:
        asked = example if inference_example is None else inference_example
        answer = tally.over(partial(inference_replica, model, asked, groups), pass_share, begun=0)
        passed = list[Reading]()
        passing = LatencyCost(_tape(answer, groups, passed, None), groups, table, resource="inference")
        costs["inference"] = _calibrated(passing, table, answer, groups, None, passed)[0]
    for name, cost in costs.items():
        if isinstance(cost, LatencyCost) and table is not None:
            errors[name] = cost.fit.error
            sources[name] = "modelled: operations timed on this device"
    errors = {name: error for name, error in errors.items() if math.isfinite(error)}
    idle = idle_watts(meter) if meter is not None else None
    return Costing(costs, sources, errors, step_seconds, meter, idle, tally.steps)


def _peak(make: Make, groups: tuple[Group, ...]) -> Reading:
    """Bytes of a step of a copy of its own."""
    narrow = narrowing_widths(groups, dense=False, timed=False)[0][-1]
    with make(narrow, data=True) as copy:
        return _narrower(copy, cut_groups(groups, first(groups, narrow)), narrow)


def _narrower(copy: Narrowing, left: tuple[Group, ...], widths: Mapping[str, int]) -> Reading:
    """Bytes of a step at widths that are narrower than those of a copy, where blocks reach any."""
    least = {each.name: lowest_width(each) for each in left}
    between = halfway(left, widths, least)
    chosen = least if between == widths else between
    copy.narrow(left, chosen)
    return chosen, peak_bytes(copy.step, copy.held())


def _energy(latency: Cost, watts: float | None, joules: list[Reading], meter: EnergyMeter | None) -> EnergyCost:
    if meter is not None and joules:
        return fit_energy(latency, joules, meter.source)
    if watts is None:
        raise CostError(
            "the energy meter gave no reading while copies of the model were trained: give the budget the power that a "
            "training step draws, as in Budget.fraction(0.5, of='energy', watts=W)"
        )
    return EnergyCost(latency, watts, stated=True)


def _tape(make: Make, groups: tuple[Group, ...], seen: list[Reading] | None, peaks: list[Reading] | None) -> Tape:
    """The recorded step; seconds of slow steps are added to `seen`, and bytes to `peaks`, where these are asked for.

    One copy is recorded that becomes narrower, where few widths tell the groups apart and the copy runs, with enough
    memory beside the model; else copies without data. Some modules (`nn.MultiheadAttention`) take another way through
    PyTorch as soon as they are cut. Then the step is that of a model in which everything is. Others take another way
    with one unit of two, such as key/value heads. Then that group saves nothing by prediction, and meters see what it
    does save.
    Whatever goes wrong in foreign code becomes one error that says what to do.
    """
    narrow, apart = narrowing_widths(groups, dense=False, timed=seen is not None)
    try:
        with progress("recording a step") as show:
            if apart:
                with suppress(Exception):  # an error that is kept would keep the copy's memory
                    return _narrowed(make, groups, narrow, show, seen, peaks)
            try:
                return record(partial(make, data=False), trial_widths(groups))
            except CostError as error:
                for trials in (trial_widths(groups, dense=False), trial_widths(held_at_two(groups))):
                    with suppress(CostError):
                        return record(partial(make, data=False), trials)
                raise error from None
    except SetpointError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        raise CostError(
            f"a step cannot be recorded on copies of the model ({type(error).__name__}: {first}): "
            "hold the model to a budget of 'flops' or 'params'"
        ) from error


def _narrowed(
    make: Make,
    groups: tuple[Group, ...],
    vectors: Sequence[Mapping[str, int]],
    show: Callable[[float], None],
    seen: list[Reading] | None,
    peaks: list[Reading] | None,
) -> Tape:
    """The step of one copy, which becomes narrower from one vector to the next; `seen` and `peaks` as in `_tape`."""

    def copies() -> Generator[Narrowing, None, None]:
        with make(vectors[0], data=True) as copy:
            left = cut_groups(groups, first(groups, vectors[0]))
            taken = list[Reading]()
            for number, widths in enumerate(vectors):
                show(number / len(vectors))
                left = copy.narrow(left, widths) if number else left
                watch = Stopwatch()
                with watch:
                    yield copy  # whoever asks for the next one has recorded a step
                taken.append((widths, watch.seconds))
            if seen is not None and taken[-1][1] >= _SLOW_S and all(each.device.type == "cpu" for each in copy.held()):
                seen.extend(_plain(copy, left, taken, _narrowing(groups)[-1]))
            elif peaks is not None:  # not between two recorded steps: an optimizer that counts may change with them
                peaks.append(_narrower(copy, left, vectors[-1]))

    with closing(copies()) as narrowing:
        return record_each(narrowing, vectors)


def _plain(
    copy: Narrowing, left: tuple[Group, ...], recorded: Sequence[Reading], least: Mapping[str, int]
) -> list[Reading]:
    """Seconds of steps that were recorded, less what recording takes, and of one at the least widths.

    Recording takes as long at all widths, since the operations are the same. It is known where the copy is now, at the
    last widths, from a step that is not recorded.
    """
    *others, (widths, seconds) = recorded
    watch = Stopwatch()
    with watch:
        copy.step()
    recording = max(0.0, seconds - watch.seconds)
    copy.narrow(left, least)
    fewest = _step(copy, torch.device("cpu"), None)
    found = [(each, taken - recording) for each, taken in others] + [(widths, watch.seconds)]
    found += [] if fewest is None else [(least, fewest[0])]
    return [each for each in found if each[1] > 0]  # 0 where the clock ran backwards


def _calibrated(
    cost: LatencyCost,
    table: Table,
    make: Make,
    groups: tuple[Group, ...],
    meter: EnergyMeter | None,
    seen: Sequence[Reading],
) -> tuple[LatencyCost, list[Reading]]:
    """The cost with its scale, and joules; `seen` are steps that have been timed already."""
    seconds, joules = list[Reading](seen), list[Reading]()
    if not seconds:
        with progress(f"timing whole steps ({cost.resource})") as show:
            for widths, taken, spent in _timed(make, groups, table.device, meter, show):
                seconds.append((widths, taken))
                if spent is not None:
                    joules.append((widths, spent))
    if not seconds:
        raise CostError("no step of a copy of the model fits into memory here: use of='flops' or of='params'")
    fit = fit_steps(cost, seconds)
    return cost.fitted(fit), joules


def _narrowing(groups: tuple[Group, ...]) -> list[dict[str, int]]:
    """Widths to time whole steps at: dense, then each narrower than the one before, down to the least."""
    least = {group.name: lowest_width(group) for group in groups}
    return [*narrowing_widths(groups, dense=True)[0], least]


def _timed(
    make: Make,
    groups: tuple[Group, ...],
    device: torch.device,
    meter: EnergyMeter | None,
    show: Callable[[float], None],
) -> Iterator[tuple[Mapping[str, int], float, float | None]]:
    """Widths, seconds of a step there (of a few), and joules, on one copy that becomes narrower."""
    narrowing = _narrowing(groups)
    with ExitStack() as inside:
        copy, left = None, groups
        for number, widths in enumerate(narrowing):
            show(number / len(narrowing))
            try:
                if copy is None:
                    copy, left = (
                        inside.enter_context(make(widths, data=True)),
                        cut_groups(groups, first(groups, widths)),
                    )
                else:
                    left = copy.narrow(left, widths)
                found = _step(copy, device, meter)
            except torch.OutOfMemoryError:  # narrower ones may fit
                inside.close()
                copy = None
                continue
            if found is not None:
                yield widths, *found


def _step(copy: Trainee, device: torch.device, meter: EnergyMeter | None) -> tuple[float, float | None] | None:
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
