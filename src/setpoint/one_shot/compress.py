"""Compress: a trained model is cut to a budget at once, without training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from setpoint.actuator.in_state_dict import carry_sizes, check_not_attached
from setpoint.actuator.mask import mask
from setpoint.actuator.optimizer_check import check_optimizer, check_trains
from setpoint.actuator.refit import Keep, refit
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import check_data
from setpoint.actuator.verify import failing_on_few_rows
from setpoint.checkpoint.run_file import snapshot
from setpoint.controller.finer import refined
from setpoint.controller.selection import Selection, even_density, lowest_width, reach, start
from setpoint.cost.budget import Budget, amount, parse_budget
from setpoint.cost.cost import Cost, flops_cost, params_cost
from setpoint.distributed import unwrapped
from setpoint.errors import BudgetError, ExportError, GroupError
from setpoint.groups.example import Example, check_python, holds_nan, one_sample, without_cache
from setpoint.groups.example import num_samples as samples_in
from setpoint.groups.group import Group, check_blocks, widths_of
from setpoint.groups.trace import Trace, trace
from setpoint.groups.untouched import preserved_rng_state
from setpoint.host.find import real_optimizers
from setpoint.host.host import Host
from setpoint.interrupts import uninterrupted
from setpoint.loop.candidates import check_some, restricted
from setpoint.messages import a_type, counted, counts, progress, warn
from setpoint.one_shot.forward import batch_norms_of, first_batches, moments_on, norms_were_constant, run
from setpoint.resources.replica import Replica, replica
from setpoint.resources.serving import Served, check_runtime, serving
from setpoint.runtimes import Eager, Runtime
from setpoint.sensor.consumer import find_consumers, layers_by_weight
from setpoint.sensor.moments import find_readers
from setpoint.sensor.reconstruction import unit_scores
from setpoint.spending.changes import original_costs
from setpoint.spending.checks import check_reachable

# Least shares of an even cut's width that a group keeps, in the order in which they are tried: nothing is trained that
# could make up for a group that is far narrower than the others.
_FLOORS = (0.8, 0.25, 0.0)
_THIN = 0.25  # rows for each column below which a fit is warned of: no training mends it
_USED_UP = 0.9  # share of a budget below which the next floor is tried
_TRIES, _AIM, _NEAR = 4, 0.985, 0.96  # copies that are timed; shares of a limit that the fit aims at, and that will do


@dataclass(frozen=True, eq=False)
class Compressed:
    """What `compress` did; printed, some lines that a person reads."""

    resource: str  # of the budget
    limit: float  # what may be spent, in the resource's own unit
    before: Mapping[str, float]  # by resource, FLOPs of a training step on the first batch, and parameters
    after: Mapping[str, float]
    dense_widths: Mapping[str, int]  # units by group before
    widths: Mapping[str, int]  # and after
    refitted: tuple[str, ...]  # names of the layers whose weights were refitted
    num_samples: int  # that were looked at
    frozen: Mapping[str, str]  # by name or place, why it was not pruned
    runtime: str = ""  # of a budget of seconds: its name

    def __str__(self) -> str:
        flops, params = (100 * self.after[name] / self.before[name] for name in ("flops", "params"))
        units = f"{sum(self.widths.values()):,} of {counted(sum(self.dense_widths.values()), 'unit')}"
        # The first reason, and where the others are.
        why = "".join(f": {place}: {reason}" for place, reason in list(self.frozen.items())[:1])
        why += f"; {len(self.frozen) - 1} more in `frozen`" if len(self.frozen) > 1 else ""
        where = f" in {self.runtime}, of {amount(self.before[self.resource], self.resource)}" if self.runtime else ""
        return (
            f"compressed to {flops:.1f} % of its FLOPs, {params:.1f} % of its parameters: {units} in "
            f"{counted(len(self.widths), 'group')}\n"
            f"a budget of {amount(self.limit, self.resource)}, {amount(self.after[self.resource], self.resource)} "
            f"spent{where}\n"
            f"{counted(len(self.refitted), 'layer')} refitted to {counted(self.num_samples, 'sample')}; "
            f"{counted(len(self.frozen), 'place')} not pruned{why}"
        )


def compress(
    model: nn.Module,
    data: Iterable[Any],
    budget: Any,
    *,
    even: bool = False,
    num_samples: int = 1024,
    groups: Sequence[Group] | None = None,
    verify: bool = True,
    optimizer: Optimizer | None = None,
) -> Compressed:
    """Cut a trained model to a budget at once, in place, and refit the layers that read cut units; nothing is trained.

    1. *Score.* A unit's score is the share of the next layers' outputs that they cannot make without it, however they
       are fitted again (`unit_scores`).
    2. *Cut.* The units of least score per saving go until the budget is met. Four fifths of an even cut's width stay in
       each group, where the budget can be used up so.
    3. *Refit.* Layer by layer, in the order of the forward, the weights W on the inputs that stay (k) become those that
       change the layer's outputs least, `(G_kk + r I)^-1 ((G + r I) W)_k`, G the second moment of what the layer is
       given by then and r = .01 mean(diag G), more where there
       are fewer than 16 rows for each column; a bias with them. Heads are refitted in the output projection. A weight
       that is also used otherwise, as a tied embedding, stays as it is.
    4. *Renew.* Running statistics of BatchNorms become the means over the data, unless most are far from the data's:
       then they were constants in the training, and stay.

    The model can then be saved (`setpoint.save`), used, or trained on as any other, with a new optimizer or the one
    given. A budget that the model meets already changes nothing. An exception leaves the model as it was. What is being
    done is shown on a terminal's stderr, or else logged at INFO to the logger "setpoint".

    Args:
        model: trained; in one process, not in a wrapper.
        data: batches as in training, such as a `DataLoader`: tensors, tuples (inputs, labels), or dicts.
            Labels are left out, unless the model runs only with them; of a dict these are "label", "labels",
            "label_ids", "target" and "targets". Batches of one sample are left out where others have more.
        budget: of "flops" (of a training step on the first batch, as `attach` counts), of "params", or of the seconds
            of a forward in a runtime, of one sample unless the budget has an example: a fraction of the dense model's
            FLOPs, a text such as "50% params" or "8 ms onnxruntime", or a `Budget`. Seconds are a fit to copies. A copy
            of the widths that it chooses is timed in turns with the dense model: where it is over the budget, the fit
            is corrected, and units are chosen again.
        even: keep the same share of units in all groups; by default shares follow the scores.
        num_samples: whole batches are read until they have as many samples.
        groups: those of `find_groups(model, example)` that may be cut; by default all that only layers read that
            can be refitted, and in which a zeroed unit is the same as an absent one.
        verify: try every group's cut on copies first, and leave alone those that fail.
        optimizer: of the model, for training afterwards: its state is cut with the weights.

    Raises:
        BudgetError: for another resource, a budget per run, or one out of reach.
        ExportError: for a model that torch.jit or torch.export has made, or that the runtime does not take.
        ExampleError: for data that the model does not take, or that holds NaN.
        GroupError: where nothing can be cut, or weights hold NaN or infinity.
        OptimizerError: for an optimizer that is none, or not of this model.
        LoopError: when a loop is at work on the model, or `fully_shard` has sharded it.
        RuntimeUnavailable: a package is missing, or the runtime cannot run the model.
        ValueError: for a model or a number of samples that is none.

    >>> torch.manual_seed(0)
    <torch._C.Generator object at ...>
    >>> model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> x = torch.randn(256, 4)
    >>> before = model(x)
    >>> compressed = compress(model, [(x, None)], "50% flops")
    >>> model[0].out_features, bool((model(x) - before).square().mean() < 0.05 * before.square().mean())
    (8, True)
    """
    (num_samples,) = counts(num_samples=num_samples)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {a_type(model)}: write compress(model, data, budget)")
    model = unwrapped(model)
    check_python(model)
    if "eval" in vars(model):  # torch.export has put a method there that raises
        raise ExportError("a model of torch.export has no eval mode: give the one before torch.export")
    check_not_attached(model)
    check_data(model)
    optimizers = () if optimizer is None else real_optimizers(optimizer)
    check_trains(optimizers, model)
    for one in optimizers:
        check_optimizer(one)
    goal = one_budget(budget)
    for name, tensor in model.named_parameters():
        if holds_nan(tensor):
            raise GroupError(f"the weights {name} hold NaN or infinity: compress a model that works")
    if goal.resource == "inference":
        check_runtime(runtime_of(goal))
    # Read before anything is found out about the model: a loader may draw random numbers, which are the user's.
    batches = first_batches(data, num_samples, model)
    from setpoint.groups.unpruned import unpruned

    with _unchanged_on_error(model, optimizers), preserved_rng_state(model), progress("compress"):
        with uninterrupted():
            traced = trace(model, batches[0])
            active, frozen = _candidates(model, traced, batches[0], groups, verify=verify)
        costs: dict[str, Cost] = {"flops": flops_cost(restricted(traced, active)), "params": params_cost(model, active)}
        widths, clock = widths_of(active), None
        before = {name: known.total(widths) for name, known in costs.items()}
        original = original_costs(model, batches[0], (goal,), costs, widths)
        if goal.resource == "inference":
            asked = without_cache(model, one_sample(batches[0]) if goal.example is None else goal.example)
            clock, costs["inference"], active = serving(Host(model, (), ()), asked, active, runtime_of(goal))
            assert clock is not None, "a process that is alone has the clock"
            before["inference"] = clock.dense_s
        cost, dense = costs[goal.resource], original.get(goal.resource, before[goal.resource])
        limit = goal.absolute(dense)
        narrowest = {group.name: lowest_width(group) for group in active}
        check_reachable(goal, dense, cost.total(narrowest), partial(unpruned, model, traced, narrowest, frozen))
        constant = norms_were_constant(model, batches)
        readers = find_readers(model, active)
        moments = moments_on(model, readers, batches, "running" if constant else "batch")
        choose = partial(_choose, cost, active, unit_scores(model, active, readers, moments), even=even)
        if clock is None or limit >= dense:
            keep, seconds = choose(limit), None
        else:
            make = partial(replica, model, (), asked, active, [], data=True, trains=False)
            keep, seconds = _timed(clock, make, cost, limit, cost.total(narrowest), choose)
        refitted = tuple[str, ...]()
        if not all(kept.all() for kept in keep.values()):
            refitted = refit((model,), active, keep, moments, thin=_THIN)
            # Masked before the norms' statistics are renewed: these are of the cut model then.
            mask(model, None, active, keep)
            if constant:
                warn(
                    "most BatchNorms have running statistics far from those of the data. They count as constants "
                    "of the training, and stay. If they are none, give data that are prepared as in training"
                )
            elif batch_norms_of(model):
                run(model, batches, "renewed")
        cut = shrink(model, optimizers, active, keep)
        carry_sizes(model)
        after = {name: known.total(widths_of(cut)) for name, known in costs.items()}
        after |= {} if seconds is None else {"inference": seconds}
        seen, named = sum(map(samples_in, batches)), "" if clock is None else clock.runtime.name
        return Compressed(goal.resource, limit, before, after, widths, widths_of(cut), refitted, seen, frozen, named)


def one_budget(budget: Any) -> Budget:
    """The budget that `compress` is given, of FLOPs, parameters or inference; BudgetError for any other."""
    goal = parse_budget(budget, ("flops", "params"))
    if not isinstance(goal, Budget) or goal.resource not in ("flops", "params", "inference") or goal.per != "step":
        raise BudgetError(
            "compress takes one budget of flops, params or a runtime, such as '50%', '40% params' or "
            f"'8 ms onnxruntime', got {budget!r:.80}: other resources are met in training, by attach"
        )
    return goal


def runtime_of(goal: Budget) -> Runtime:
    """Where a budget of inference is timed."""
    runtime: Runtime = goal.runtime or Eager()
    return runtime


def _timed(
    clock: Served,
    make: Callable[[Mapping[str, int]], AbstractContextManager[Replica]],
    cost: Cost,
    limit: float,
    lowest: float,
    choose: Callable[[float], Keep],
) -> tuple[Keep, float | None]:
    """The widest choice of which a copy is within the limit on the clock, and its seconds; None where it is unread.

    The fit aims a little below the limit, since two readings of one model differ.
    """
    aim, best, seconds = _AIM * limit, None, math.inf
    for _ in range(_TRIES):
        keep = choose(max(aim, lowest))
        widths = {name: int(kept.sum()) for name, kept in keep.items()}
        with progress(f"timing a cut copy in {clock.runtime.name}"), make(widths) as copy:
            turns = clock.ratios(copy.model)
        if not turns:
            warn(
                f"the machine is busy: no two readings in {clock.runtime.name} agree. The budget is held by the fit: "
                "compress on a quiet machine"
            )
            return best or (keep, None)
        seconds = clock.dense_s * median(turns)
        if seconds <= limit and (best is None or seconds > best[1]):
            best = keep, seconds
        if _NEAR * limit <= seconds <= limit:
            break
        aim = _AIM * limit * cost.total(widths) / seconds
    if best is None:
        raise BudgetError(
            f"the budget of {amount(limit, 'inference')} in {clock.runtime.name} was missed by {_TRIES} cuts in turn: "
            f"the last takes {amount(seconds, 'inference')}. Ask for more than that, or try again on a quiet machine"
        )
    return best


def _candidates(
    model: nn.Module, traced: Trace, example: Example, groups: Sequence[Group] | None, *, verify: bool
) -> tuple[tuple[Group, ...], dict[str, str]]:
    frozen = {fixed.place: fixed.reason for fixed in traced.frozen}
    widths = widths_of(traced.groups)
    found: list[Group] = []
    layers = layers_by_weight(model)
    for group in traced.groups if groups is None else groups:
        if widths.get(group.name) != group.num_units:
            raise GroupError(
                f"group {group.name!r} is not one of this model's: use find_groups(model, example) on the model as it "
                "is now"
            )
        if not group.lossless:
            frozen[group.name] = "; ".join(group.notes) or "a zeroed unit is not the same as an absent one"
        elif not find_consumers(group, model, layers):
            frozen[group.name] = "the units are read by something else than linear layers and convolutions"
        else:
            found.append(group)
    if verify and found:
        for name in failing_on_few_rows(model, example, tuple(found))[0]:
            frozen[name] = "cutting it on a copy did not behave like masking it"
    active = tuple(group for group in found if group.name not in frozen)
    check_blocks(active)
    check_some(active, frozen)
    if traced.unreached or traced.unfollowed:
        from setpoint.groups.unpruned import warn_of_unseen

        warn_of_unseen(model, traced, active)
    return active, frozen


def _choose(
    cost: Cost, groups: tuple[Group, ...], saliency: dict[str, np.ndarray], limit: float, *, even: bool
) -> Keep:
    """Which units stay so that the cost is within the limit, and no block can be given back."""
    widths = widths_of(groups)
    density = even_density(cost, widths, widths, groups, limit)
    found: list[Selection] = []
    for share in (0.0,) if even else _FLOORS:
        floors = {name: math.ceil(share * density * width) for name, width in widths.items()}
        selection = start(cost, groups, saliency, widths, widths, "uniform" if even else "worth", floor=floors)
        if reach(selection, limit):
            found.append(selection)
            # A high floor that leaves much of the budget unused costs more than one narrow group.
            if selection.total >= _USED_UP * limit:
                break
    if not found:
        lost = [name for name, units in saliency.items() if np.isinf(units).any()]
        raise BudgetError(
            "no cut of the units that the data come to meets the budget: the data do not come to what reads "
            f"{lost[:3]}. Give data that run through the whole model, or a larger budget"
        )
    best = max(found, key=lambda selection: selection.total)  # the first of equal ones: of the highest floor
    return refined(best, groups, saliency, limit).keep()


@contextmanager
def _unchanged_on_error(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Inside, whatever is raised leaves everything as it was, shapes, gradients and optimizer state too."""
    put_back = snapshot(model, optimizers, [tensor.grad for tensor in model.parameters()])
    try:
        yield
    except BaseException:
        with uninterrupted():
            put_back()
            torch.clear_autocast_cache()
        raise
