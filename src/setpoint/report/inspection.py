"""An inspection: the groups, costs and frozen places of a model, before any training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from setpoint.actuator.verify import failing_on_few_rows
from setpoint.controller.ladder import lowest_width
from setpoint.cost.cost import flops_cost, params_cost
from setpoint.groups.example import Example, inputs_of, tensors_of
from setpoint.groups.group import Group, Slice, widths_of
from setpoint.groups.trace import Frozen, trace
from setpoint.messages import counted


@dataclass(frozen=True)
class Part:
    """The entries of a tensor along units of one group, or of none (""); a model's parts hold each parameter once."""

    tensor: str
    group: str
    params: int


@dataclass(frozen=True)
class GroupReport:
    """One group for readers. Fields of the same name as in `Group` have its meaning.

    Args:
        each: entries of a unit along a dim of the weight that writes it: 4 where it is four channels, or four gates.
        kept_whole: why `attach` does not prune it by default; empty if it may be pruned.
        params: parameters that lie along its units; one may lie along units of two groups.
        flops_share: share of the model's FLOPs saved by cutting this group alone to its fewest units.
        places: (tensor, dim, role) of each of its slices.
    """

    name: str
    what: str
    num_units: int
    min_units: int
    multiple_of: int
    each: int
    kept_whole: str
    params: int
    params_share: float
    flops_share: float
    places: tuple[tuple[str, int | None, str], ...]

    @property
    def units(self) -> str:
        """So many units in words: "16 channels", or "4 units of 4 channels". A neuron is one, whatever its gates."""
        if self.each == 1 or self.what != "channel":
            return counted(self.num_units, self.what)
        return f"{counted(self.num_units, 'unit')} of {self.each} channels"


@dataclass(frozen=True)
class Inspection:
    """Groups, costs and frozen places of a model.

    Args:
        prunable_params_share: share of the parameters that lie along a unit of a group that may be pruned.
        cheapest_flops, cheapest_params: both with every group that may be pruned cut to its fewest units.
    """

    model: str
    inputs: tuple[tuple[int, ...], ...]
    verified: bool
    groups: tuple[GroupReport, ...]
    flops: float
    params: int
    prunable_params_share: float
    cheapest_flops: float
    cheapest_params: int
    frozen: tuple[Frozen, ...]


def inspect_model(name: str, model: nn.Module, example: Example, *, verify: bool = True) -> Inspection:
    """Trace a model, try its cuts on a copy as `attach` does, and report groups and costs.

    The model, which is not touched, is any module that `torch.export` can follow. On the "meta" device it has no
    weights to try cuts on, so it is not verified.

    Raises:
        ExampleError: the model does not accept the example.
        ExportError: the model cannot be exported.
    """
    found = trace(model, example)
    # On the meta device there are no weights that a cut could be compared with.
    verify = verify and not any(parameter.is_meta for parameter in model.parameters())
    flops, params = flops_cost(found), params_cost(model, found.groups)
    dense = widths_of(found.groups)
    lossless = tuple(group for group in found.groups if group.lossless)
    whole = {g.name: "" if g.lossless else "; ".join(g.notes) or "not lossless" for g in found.groups}
    if verify and lossless:
        failing = failing_on_few_rows(model, example, lossless)[0]
        whole |= dict.fromkeys(failing, "cutting it on a copy did not behave like masking it")
    pruned = tuple(group for group in found.groups if not whole[group.name])
    fewest = dense | {group.name: lowest_width(group) for group in pruned}
    spent, total = flops.total(dense), int(params.total(dense))
    reports = []
    for group in found.groups:
        # Alone: shares of groups that share a layer add up to more than the whole.
        low, along = lowest_width(group), params_along(model, (group,))
        report = GroupReport(
            name=group.name,
            what=group.what,
            num_units=group.num_units,
            min_units=low,
            multiple_of=group.multiple_of,
            each=_each(group),
            kept_whole=whole[group.name],
            params=along,
            params_share=along / total if total else 0.0,
            flops_share=flops.saving(dense, group.name, group.num_units - low) / spent if spent else 0.0,
            places=tuple((place.tensor, place.dim, place.role) for place in group.slices),
        )
        reports.append(report)
    args, kwargs = inputs_of(example)
    return Inspection(
        model=name,
        inputs=tuple(tuple(tensor.shape) for tensor in tensors_of([*args, *kwargs.values()])),
        verified=verify,
        groups=tuple(reports),
        flops=spent,
        params=total,
        prunable_params_share=share_along(model, pruned),
        cheapest_flops=flops.total(fewest),
        cheapest_params=int(params.total(fewest)),
        frozen=found.frozen,
    )


def _each(group: Group) -> int:
    written = next((place for place in group.slices if place.role == "produce" and place.dim is not None), None)
    return 1 if written is None else int((written.index >= 0).sum()) // group.num_units


def parts(model: nn.Module, groups: Sequence[Group]) -> tuple[Part, ...]:
    """Divide the parameters among the groups; an entry along units of several counts for the one that writes it."""
    places = _places(model, groups)
    found: dict[tuple[str, str], float] = {}
    for name, parameter in model.named_parameters():
        free = [np.ones(length, dtype=bool) for length in parameter.shape]
        # Writers first: what a group writes is its own, what it reads belongs to the group before it.
        for group, place in sorted(places.get(name, ()), key=lambda it: it[1].role == "consume"):
            assert place.dim is not None, "places have a dim"
            mine = free[place.dim] & (place.index >= 0)
            others = math.prod(int(entries.sum()) for dim, entries in enumerate(free) if dim != place.dim)
            found[name, group] = found.get((name, group), 0) + int(mine.sum()) * others
            # Entries count once: the next group gets what is left of this dim.
            free[place.dim] &= ~mine
        found[name, ""] = math.prod(int(entries.sum()) for entries in free)
    return tuple(Part(tensor, group, int(params)) for (tensor, group), params in found.items() if params)


def params_along(model: nn.Module, groups: Sequence[Group], *, embeddings: bool = True) -> int:
    """Number of parameters that lie along a unit of any of these groups.

    With `embeddings`, tables of `nn.Embedding` modules (and weights tied to them) count.
    """
    chosen = {name for name, _ in _parameters(model, embeddings)}
    return sum(part.params for part in parts(model, groups) if part.group and part.tensor in chosen)


def share_along(model: nn.Module, groups: Sequence[Group], *, embeddings: bool = True) -> float:
    """`params_along` as a share of all parameters that count; 0 for a model without any."""
    total = sum(parameter.numel() for _, parameter in _parameters(model, embeddings))
    return params_along(model, groups, embeddings=embeddings) / total if total else 0.0


def _parameters(model: nn.Module, embeddings: bool) -> Iterator[tuple[str, nn.Parameter]]:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if embeddings or id(parameter) not in tables:
            yield name, parameter


def _places(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[tuple[str, Slice]]]:
    """(group, slice) by the first name of each parameter: a tied one has several."""
    # Tied weights have several names, and would count once for each.
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    places: dict[str, list[tuple[str, Slice]]] = {}
    for group in groups:
        for place in group.slices:
            if place.dim is not None and place.tensor in named:
                places.setdefault(named[place.tensor], []).append((group.name, place))
    return places
