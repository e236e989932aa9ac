"""Candidates: what of a model may be pruned, on what inputs, and what it costs in FLOPs and parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from setpoint.actuator.tensors import named_tensors
from setpoint.actuator.verify import failing_on_few_rows
from setpoint.cost.cost import Cost, flops_cost, params_cost
from setpoint.errors import GroupError, LoopError
from setpoint.groups.example import Example, holds_nan
from setpoint.groups.group import Group, Size, widths_of
from setpoint.groups.trace import UNTRAINED, Trace
from setpoint.host.host import Host
from setpoint.messages import listed, warn
from setpoint.sensor.reading import Sensor
from setpoint.sensor.tap import tappable


@dataclass(frozen=True, eq=False)
class Inputs:
    """What an optimizer step computes on."""

    example: Example
    passes: int = 1  # calls of the model with such inputs in one step
    samples: int = 1  # independent ones behind one step
    recorded: bool = False  # whether they are those of a first batch, which the next run may get in other shapes


@dataclass(frozen=True, eq=False)
class Candidates:
    """What may be pruned."""

    groups: tuple[Group, ...]  # at dense widths
    frozen: Mapping[str, str]  # by name or place, why it is not pruned
    costs: Mapping[str, Cost]  # by resource, over the widths of `groups`
    passes: float = 0.0  # training steps' worth of FLOPs that it took to find out
    sources: Mapping[str, str] = field(default_factory=dict)  # by resource, what its cost was modelled by
    header: Mapping[str, Any] = field(default_factory=dict)  # more entries of the ledger's header


_LOSSY = " (allow_lossy=True prunes it all the same)"


def unit_candidates(
    host: Host,
    found: Trace,
    example: Example,
    sensor: Sensor[Any],
    wanted: Sequence[Group] | None,
    *,
    allow_lossy: bool,
    verify: bool,
) -> Candidates:
    """The units that may be cut, out of the groups that are wanted (None for all), and why others are not pruned."""
    model, passes = host.model, 0.0
    frozen = {place.place: place.reason for place in found.frozen}
    chosen = _chosen(model, found, wanted, frozen)
    for group in chosen:
        if group.kind == "state" and not host.single_process:
            why = "states are not cut on several ranks in this version: each would balance them by itself"
            frozen[group.name] = why
        elif not group.lossless and not allow_lossy and sensor.readable((group,), model):  # else that would not help
            notes = "; ".join(group.notes) or "a zeroed unit is not the same as an absent one"
            frozen[group.name] = notes + _LOSSY
        elif host.compiled and sensor.traits.hooks and tappable(group, model):
            frozen[group.name] = "frozen outgoing weights are not read in compiled code"
    active = _readable(model, tuple(group for group in chosen if group.name not in frozen), sensor, frozen)
    active, strangers = in_hand(host, active)
    frozen |= strangers
    check_copies(host, active)
    if verify and active:
        failed, share = failing_on_few_rows(model, example, active)
        if failed:
            _check_numbers(model, example)
            warn(f"not pruned, because cutting them on a copy did not behave like masking them: {', '.join(failed)}")
        # At most four forward and backward passes vouch for all groups at once; each culprit is found by bisection.
        passes = share * (4 + 2 * len(failed) * (2 + math.ceil(math.log2(len(active)))))
        active = tuple(group for group in active if group.name not in failed)
        frozen |= dict.fromkeys(failed, "cutting it on a copy did not behave like masking it")
    check_some(active, frozen)
    costs = {"flops": flops_cost(restricted(found, active)), "params": params_cost(model, active)}
    if found.unreached or found.unfollowed:
        from setpoint.groups.unpruned import warn_of_unseen

        warn_of_unseen(model, found, active)
    return Candidates(active, frozen, costs, passes)


def _chosen(
    model: nn.Module, found: Trace, wanted: Sequence[Group] | None, frozen: dict[str, str]
) -> tuple[Group, ...]:
    """The groups that the user wants; without a word all but ranks of adapters, which `frozen` then names."""
    if wanted is None:
        adapters = _adapter_tensors(model)
        ranks = {group.name for group in found.groups if {place.tensor for place in group.slices} <= adapters}
        frozen |= dict.fromkeys(ranks, "the rank of an adapter stays as it is (give it in groups=... to prune it)")
        return tuple(group for group in found.groups if group.name not in ranks)
    widths = widths_of(found.groups)
    for group in wanted:
        if group.kind == "weight":
            raise GroupError(f"group {group.name!r} holds single weights: add actuator=Masking()")
        if widths.get(group.name) != group.num_units:
            raise GroupError(
                f"group {group.name!r} with {group.num_units} units is not one of this model's: "
                "use find_groups(model, example) on the model as it is now"
            )
    return tuple(wanted)


def _adapter_tensors(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that PEFT has added to layers: low ranks are small by choice already."""
    found = set[str]()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            found |= {f"{name}.{tensor}" for tensor in named_tensors(module) if not tensor.startswith("base_layer.")}
    return frozenset(found)


def _readable(
    model: nn.Module, groups: tuple[Group, ...], sensor: Sensor[Any], frozen: dict[str, str]
) -> tuple[Group, ...]:
    """The groups that the sensor can read; `frozen` then names the others."""
    readable = sensor.readable(groups, model)
    names = {group.name for group in readable}
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    for group in groups:
        if group.name not in names:
            why = "the group's weights get no gradient"
            if group.kind == "state" or all(p.tensor in trained for p in group.slices if p.role == "consume"):
                why = f"the sensor ranks no {group.kind}s like these"
            frozen[group.name] = f"{type(sensor).__name__} cannot read it ({why})"
    return readable


def in_hand(host: Host, groups: tuple[Group, ...]) -> tuple[tuple[Group, ...], dict[str, str]]:
    """The groups whose trained tensors are all in these optimizers; another one would not survive a cut of them."""
    held = {id(p) for optimizer in host.optimizers for settings in optimizer.param_groups for p in settings["params"]}
    trained = {name for name, p in host.model.named_parameters() if p.requires_grad and id(p) not in held}
    strangers = {}
    for group in groups:
        missing = list(dict.fromkeys(place.tensor for place in group.slices if place.tensor in trained))
        if missing:
            strangers[group.name] = f"{listed(missing, 3)}: {UNTRAINED}"
    return tuple(group for group in groups if group.name not in strangers), strangers


def check_copies(host: Host, groups: tuple[Group, ...]) -> None:
    """A copy must hold every tensor that will be cut, in the same shape."""
    own = named_tensors(host.model)
    for number, copy in enumerate(host.copies):
        theirs = {name.removeprefix("module."): tensor for name, tensor in named_tensors(copy).items()}
        for name in dict.fromkeys(piece.tensor for group in groups for piece in group.slices):
            if name not in theirs or theirs[name].shape != own[name].shape:
                raise GroupError(
                    f"copies[{number}] ({type(copy).__name__}) is no copy of the model: it has no {name!r} of shape "
                    f"{tuple(own[name].shape)}; pass a deepcopy or an AveragedModel of the model"
                )


def check_some(groups: tuple[Group, ...], frozen: Mapping[str, str]) -> None:
    if not groups:
        from setpoint.groups.unpruned import nothing_to_prune

        raise nothing_to_prune(frozen)


def _check_numbers(model: nn.Module, example: Example) -> None:
    """Check that neither a weight nor an input is NaN or infinite: no cut of them behaves like its masked twin."""
    for what, values in [
        ("the example", example),
        *((repr(name), weight) for name, weight in model.named_parameters()),
    ]:
        if holds_nan(values):
            raise LoopError(f"{what} holds NaN or infinity, so that no cut can be tried out: begin without")


def restricted(found: Trace, groups: tuple[Group, ...]) -> Trace:
    """The trace over the widths of these groups only; the widths of all others become constants."""
    active = {group.name for group in groups}
    fixed = {group.name: group.num_units for group in found.groups if group.name not in active}

    def restrict(size: Size) -> Size:
        constant = size.constant + sum(factor * fixed[name] for name, factor in size.parts if name in fixed)
        return Size(constant, tuple(part for part in size.parts if part[0] in active))

    contractions = tuple(
        replace(contraction, sizes=tuple(map(restrict, contraction.sizes))) for contraction in found.contractions
    )
    return replace(found, groups=groups, contractions=contractions)
