"""An inspection: the groups, costs and frozen places of a model before any training, and what a person reads of it."""

import io
import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import mode
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape as plain
from rich.tree import Tree
from torch import nn

from setpoint.actuator.verify import failing_on_few_rows
from setpoint.controller.selection import lowest_width
from setpoint.cost.cost import flops_cost, params_cost
from setpoint.groups.example import Example, inputs_of, tensors_of
from setpoint.groups.group import Group, widths_of
from setpoint.groups.trace import Frozen, trace
from setpoint.messages import counted
from setpoint.report.markup import document, save
from setpoint.report.numbers import human, percent, share

ROLES = {"produce": "writes", "carry": "passes on", "consume": "reads"}  # what a tensor does with its units
_MOST_REASONS = 3
_NUMBER = re.compile(r"\d+")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class GroupReport:
    """One group for readers. Fields of the same name as in `Group` have its meaning."""

    name: str
    what: str
    num_units: int
    min_units: int
    multiple_of: int
    unit_size: int  # entries of a unit along a dim of the weight that writes it: 4 where it is four channels or gates
    kept_whole: str  # why `attach` does not prune it by default; empty if it may be pruned
    params: int  # that lie along its units; one may lie along units of two groups
    flops_share: float  # of the model's, saved by cutting this group alone to its fewest units
    places: tuple[tuple[str, int | None, str], ...]  # tensor, dim and role of each of its slices

    @property
    def units(self) -> str:
        """So many units in words: "16 channels", or "4 units of 4 channels". A neuron is one, whatever its gates."""
        if self.unit_size == 1 or self.what != "channel":
            return counted(self.num_units, self.what)
        return f"{counted(self.num_units, 'unit')} of {self.unit_size} channels"


@dataclass(frozen=True)
class Inspection:
    """Groups, costs and frozen places of a model."""

    model: str
    inputs: tuple[tuple[int, ...], ...]
    verified: bool
    groups: tuple[GroupReport, ...]
    flops: float
    params: int
    prunable_params_share: float  # of the parameters, which lie along a unit of a group that may be pruned
    cheapest_flops: float  # with every group that may be pruned cut to its fewest units
    cheapest_params: int
    frozen: tuple[Frozen, ...]


def inspect_model(name: str, model: nn.Module, example: Example, *, verify: bool = True) -> Inspection:
    """Trace a model, try its cuts on a copy as `attach` does, and report groups and costs.

    The model, which is not touched, is any module that `torch.export` can follow. On the "meta" device it has no
    weights to try cuts on, so it is not verified.
    """
    found = trace(model, example)
    verify = verify and not any(parameter.is_meta for parameter in model.parameters())
    flops, params = flops_cost(found), params_cost(model, found.groups)
    dense = widths_of(found.groups)
    whole = {g.name: "" if g.lossless else "; ".join(g.notes) or "not lossless" for g in found.groups}
    lossless = tuple(group for group in found.groups if group.lossless)
    if verify and lossless:
        failing = failing_on_few_rows(model, example, lossless)[0]
        whole |= dict.fromkeys(failing, "cutting it on a copy did not behave like masking it")
    pruned = tuple(group for group in found.groups if not whole[group.name])
    fewest = dense | {group.name: lowest_width(group) for group in pruned}
    spent = flops.total(dense)

    def report(group: Group) -> GroupReport:
        # Each group alone: shares of groups that share a layer add up to more than the whole.
        saving = flops.saving(dense, group.name, group.num_units - lowest_width(group))
        written = next((place for place in group.slices if place.role == "produce" and place.dim is not None), None)
        return GroupReport(
            name=group.name,
            what=group.what,
            num_units=group.num_units,
            min_units=lowest_width(group),
            multiple_of=group.multiple_of,
            unit_size=1 if written is None else int((written.index >= 0).sum()) // group.num_units,
            kept_whole=whole[group.name],
            params=params_along(model, (group,)),
            flops_share=saving / spent if spent else 0.0,
            places=tuple((place.tensor, place.dim, place.role) for place in group.slices),
        )

    args, kwargs = inputs_of(example)
    return Inspection(
        model=name,
        inputs=tuple(tuple(tensor.shape) for tensor in tensors_of([*args, *kwargs.values()])),
        verified=verify,
        groups=tuple(map(report, found.groups)),
        flops=spent,
        params=int(params.total(dense)),
        prunable_params_share=share_along(model, pruned),
        cheapest_flops=flops.total(fewest),
        cheapest_params=int(params.total(fewest)),
        frozen=found.frozen,
    )


def share_along(model: nn.Module, groups: Sequence[Group], *, embeddings: bool = True) -> float:
    """`params_along` as a share of all parameters, with or without tables of embeddings, tied or not."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) and not embeddings}
    counted_in = [parameter for parameter in model.parameters() if id(parameter) not in tables]
    total = sum(parameter.numel() for parameter in counted_in)
    return params_along(model, groups, counted_in) / total if total else 0.0


def params_along(model: nn.Module, groups: Sequence[Group], parameters: Iterable[nn.Parameter] | None = None) -> int:
    """How many of these parameters, by default all of the model, lie along a unit of any of these groups."""
    # Tied weights have several names, and would count once for each.
    named = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    places: dict[int, list[tuple[int, np.ndarray]]] = {}
    for group in groups:
        for place in group.slices:
            if place.dim is not None and place.tensor in named:
                places.setdefault(named[place.tensor], []).append((place.dim, place.index))
    along = 0
    for parameter in model.parameters() if parameters is None else parameters:
        free = [np.ones(length, dtype=bool) for length in parameter.shape]
        for dim, index in places.get(id(parameter), ()):
            free[dim] &= index < 0
        # An entry that no group holds has no unit along any of its dims.
        along += parameter.numel() - math.prod(int(entries.sum()) for entries in free)
    return along


# What a person reads: seven lines and a tree, in a terminal or on a page.


def inspection_lines(found: Inspection) -> tuple[str, ...]:
    """Seven lines that a person reads before any training, four where there is nothing to prune."""
    pruned = [group for group in found.groups if not group.kept_whole]
    whole = [group for group in found.groups if group.kept_whole]
    reasons = [why for group in whole for why in dict.fromkeys(w.partition(" (")[0] for w in _reasons(group))]
    shown = some((group.name for group in whole), 1)
    left = (
        _most_frequent(f"not pruned: {counted(len(whole), 'group')} ({shown})", reasons) or "not pruned: nothing",
        _most_frequent(f"frozen: {counted(len(found.frozen), 'place')}", [place.reason for place in found.frozen])
        or "frozen: nothing",
    )
    if not pruned:
        return _nothing(found), _dense(found), *left
    by_flops = sorted(pruned, key=lambda group: -group.flops_share)
    alike = by_key(by_flops, lambda group: (skeleton(group.name), group.units, percent(group.flops_share)))[0]
    names, largest = some(group.name for group in alike), alike[0]
    layer = f"layer {names}" if names.isdigit() else names  # "0" alone reads as a number
    many, each = (f"{len(alike)} x ", " each") if len(alike) > 1 else ("", "")
    units = counted(sum(group.num_units for group in pruned), "unit")
    return (
        _dense(found),
        f"can be pruned: {units} in {counted(len(pruned), 'group')}, "
        f"with {percent(found.prunable_params_share)} of the parameters",
        _cheapest(found),
        f"most FLOPs: {layer} ({many}{largest.units}, {percent(largest.flops_share)}{each})",
        *left,
        f"{'checked: each' if found.verified else 'not checked: no'} cut was tried on a copy of the model",
    )


def _dense(found: Inspection) -> str:
    shapes = ", ".join("x".join(map(str, shape)) for shape in found.inputs)
    costs = f"{human(found.flops, 'FLOPs')} per training step, {human(found.params)} parameters"
    return f"{found.model} on {shapes}: {costs}"


def _cheapest(found: Inspection) -> str:
    return (
        f"cheapest reachable: {human(found.cheapest_flops, 'FLOPs')} ({share(found.cheapest_flops, found.flops)}), "
        f"{human(found.cheapest_params)} parameters ({share(found.cheapest_params, found.params)})"
    )


def _nothing(found: Inspection) -> str:
    """That nothing can be pruned, and the reason that most groups, or else most places, have."""
    reasons = [_reasons(group)[0] for group in found.groups] or [place.reason for place in found.frozen]
    return f"nothing can be pruned: {mode(reasons) if reasons else 'it has no dim of its own'}"


def _reasons(group: GroupReport) -> list[str]:
    return group.kept_whole.split("; ")


def _most_frequent(what: str, reasons: Sequence[str]) -> str:
    """What has these reasons: the most frequent ones, and how often each is given; empty where there is none."""
    by_number = sorted(by_key(reasons, skeleton), key=len, reverse=True)
    shown = [f"{len(given)} x " * (len(given) > 1) + ", ".join(fold(given)) for given in by_number[:_MOST_REASONS]]
    if len(by_number) > len(shown):
        shown.append(f"and {counted(len(by_number) - len(shown), 'other reason')}")
    return f"{what}: {'; '.join(shown)}" if shown else ""


def inspection_tree(found: Inspection) -> Tree:
    """The tree of an inspection: every group with all its places, and what is frozen."""
    model, colon, costs = _dense(found).partition(" on ")
    tree = Tree(f"[bold]{plain(model)}[/]{colon}{plain(costs)}")
    if all(group.kept_whole for group in found.groups):
        tree.add(plain(_nothing(found)))
    tree.add(_cheapest(found))
    if not found.verified:
        tree.add("[yellow]not verified[/]: the cuts were not tried on a copy")
    # Twelve equal blocks are one line: a reader looks for the layers that differ.
    for groups in by_key(sorted(found.groups, key=lambda group: bool(group.kept_whole)), _but_for_numbers):
        first, several = groups[0], len(groups) > 1
        line = (
            f"[bold]{plain(', '.join(fold(group.name for group in groups)))}[/]: "
            f"{f'{len(groups)} groups of ' if several else ''}{first.units}, at least {first.min_units}, in steps of "
            f"{first.multiple_of}; {human(first.params)} parameters, {percent(first.flops_share)} of the FLOPs"
            f"{' each' if several else ''}"
        )
        why = some(reason for group in groups for reason in _reasons(group) if reason)
        node = tree.add(line + (f" [yellow](not pruned: {plain(why)})[/]" if why else ""))
        for places in by_key((place for group in groups for place in group.places), itemgetter(1, 2)):
            _, dim, role = places[0]
            for tensor in fold(place[0] for place in places):
                where = "every element" if dim is None else f"dim {dim}"
                node.add(f"[dim]{plain(tensor)}, {where}, {ROLES[role]}[/]")
    if found.frozen:
        node = tree.add(f"[bold]frozen[/] ({len(found.frozen)})")
        for same in by_key(found.frozen, attrgetter("reason")):
            node.add(f"{plain(', '.join(fold(frozen.place for frozen in same)))}: [dim]{plain(same[0].reason)}[/]")
    return tree


def _but_for_numbers(group: GroupReport) -> Hashable:
    """All of a group but the numbers in its names."""
    places = frozenset((skeleton(tensor), dim, role) for tensor, dim, role in group.places)
    name, why = skeleton(group.name), skeleton(group.kept_whole)
    return replace(group, name=name, kept_whole=why, places=(), flops_share=round(group.flops_share, 4)), places


def write_inspection(found: Inspection, out: Path) -> Path:
    """Write the lines and the tree as a page, which needs no network and no other file."""
    # A console that writes nowhere records; its tree is the one of the terminal.
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(inspection_tree(found))
    tree = console.export_html(inline_styles=True, code_format='<pre class="scroll tree">{code}</pre>')
    lines = "".join(f"<p>{escape(line)}</p>\n" for line in inspection_lines(found))
    head = f"<header><h1>Setpoint <span>inspection</span></h1><p>{escape(found.model)}</p></header>\n"
    return save(document(found.model, f"{head}<section>\n{lines}{tree}</section>\n"), out)


# Names.


def skeleton(name: str) -> str:
    """A name without its numbers.

    >>> skeleton("layer1.0.conv2")
    'layer#.#.conv#'
    """
    return _NUMBER.sub("#", name)


def by_key(items: Iterable[_Item], key: Callable[[_Item], Hashable]) -> list[list[_Item]]:
    """The items that have the same key, in the order of the first of each."""
    same: dict[Hashable, list[_Item]] = {}
    for item in items:
        same.setdefault(key(item), []).append(item)
    return list(same.values())


def fold(names: Iterable[str]) -> tuple[str, ...]:
    """The same names in fewer words: exactly these and no other.

    >>> fold(["h.0.mlp", "h.1.mlp", "h.2.mlp", "head"])
    ('h.{0..2}.mlp', 'head')
    >>> fold(["a.0.0", "a.0.1", "a.1.0"])
    ('a.0.{0,1}', 'a.1.0')
    """
    forms = by_key(dict.fromkeys(names), skeleton)
    return tuple(word for same in forms for word in _fold_form(skeleton(same[0]), list(map(_NUMBER.findall, same))))


def some(names: Iterable[str], most: int = 2) -> str:
    """The first of them, folded, and how many more there are.

    >>> some(["no weight", "no dim", "tied"])
    'no weight; no dim; and 1 more'
    """
    folded = fold(names)
    return "; ".join(folded[:most]) + (f"; and {len(folded) - most} more" if len(folded) > most else "")


def _fold_form(form: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Names of one form: one word if their numbers are a full grid, else one for each first number that differs."""
    columns = [sorted(set(column), key=lambda number: (int(number), number)) for column in zip(*rows, strict=True)]
    # Only a full grid may be written as one word: it stands for exactly these names.
    if math.prod(map(len, columns)) == len(rows):
        written = iter(columns)
        return [re.sub("#", lambda _: _span(next(written)), form)]
    first = next(place for place, column in enumerate(columns) if len(column) > 1)
    parts = ([numbers for numbers in rows if numbers[first] == number] for number in columns[first])
    return [word for part in parts for word in _fold_form(form, part)]


def _span(numbers: Sequence[str]) -> str:
    if len(numbers) > 2 and [str(int(numbers[0]) + step) for step in range(len(numbers))] == list(numbers):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(numbers)}}}" if len(numbers) > 1 else numbers[0]
