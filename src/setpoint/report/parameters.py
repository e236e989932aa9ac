"""Parameters: which of them lie along units of groups, and how many."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from setpoint.groups.group import Group, Slice


@dataclass(frozen=True)
class Part:
    """The entries of a tensor along units of one group, or of none (""); a model's parts hold each parameter once."""

    tensor: str
    group: str
    params: int


def parts(model: nn.Module, groups: Sequence[Group], whole: Collection[str] = ()) -> tuple[Part, ...]:
    """Divide the parameters among the groups.

    An entry that lies along units of several groups counts for one that may be pruned, and among these for the one
    that writes it. `whole` names the groups that are not pruned.
    """
    places = _places(model, groups)
    found: dict[tuple[str, str], float] = {}
    for name, parameter in model.named_parameters():
        free = [np.ones(length, dtype=bool) for length in parameter.shape]
        for group, place in sorted(places.get(name, ()), key=lambda it: (it[0] in whole, it[1].role == "consume")):
            assert place.dim is not None, "places have a dim"
            mine = free[place.dim] & (place.index >= 0)
            others = math.prod(int(each.sum()) for dim, each in enumerate(free) if dim != place.dim)
            found[name, group] = found.get((name, group), 0) + int(mine.sum()) * others
            free[place.dim] &= ~mine
        found[name, ""] = math.prod(int(each.sum()) for each in free)
    return tuple(Part(tensor, group, int(params)) for (tensor, group), params in found.items() if params)


def params_along(model: nn.Module, groups: Sequence[Group], *, embeddings: bool = True) -> int:
    """Number of parameters that lie along a unit of any of these groups.

    With `embeddings`, tables of `nn.Embedding` modules (and weights tied to them) count.
    """
    counted = {name for name, _ in _counted(model, embeddings)}
    return sum(part.params for part in parts(model, groups) if part.group and part.tensor in counted)


def share_along(model: nn.Module, groups: Sequence[Group], *, embeddings: bool = True) -> float:
    """`params_along` as a share of all parameters that count; 0 for a model without any."""
    total = sum(parameter.numel() for _, parameter in _counted(model, embeddings))
    return params_along(model, groups, embeddings=embeddings) / total if total else 0.0


def _counted(model: nn.Module, embeddings: bool) -> Iterator[tuple[str, nn.Parameter]]:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if embeddings or id(parameter) not in tables:
            yield name, parameter


def _places(model: nn.Module, groups: Sequence[Group]) -> dict[str, list[tuple[str, Slice]]]:
    """(group, slice) by the first name of each parameter: a tied one has several."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    named = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    places: dict[str, list[tuple[str, Slice]]] = {}
    for group in groups:
        for place in group.slices:
            if place.dim is not None and place.tensor in named:
                places.setdefault(named[place.tensor], []).append((group.name, place))
    return places
