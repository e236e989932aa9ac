"""An inspection as a terminal tree: groups with their units, parameters, share of the FLOPs and places."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from rich.markup import escape
from rich.tree import Tree

from setpoint.messages import counted
from setpoint.report.inspect_model import GroupReport, Inspection
from setpoint.report.inspection_lines import nothing
from setpoint.report.names import along, fold, skeleton, some
from setpoint.report.numbers import human, percent, share

_MOST_PLACES = 8
"""Lines shown of the places of one group."""


def inspection_tree(found: Inspection) -> Tree:
    """The tree of an inspection, prunable groups first; groups that differ only in their numbers share a branch."""
    tree = Tree(
        f"[bold]{escape(found.model)}[/] on {', '.join('x'.join(map(str, shape)) for shape in found.inputs)}: "
        f"{human(found.flops, 'FLOPs')} per training step, {human(found.params)} parameters"
    )
    if all(group.kept_whole for group in found.groups):
        tree.add(escape(nothing(found)))
    tree.add(
        f"cheapest reachable: {human(found.cheapest_flops, 'FLOPs')} ({share(found.cheapest_flops, found.flops)}), "
        f"{human(found.cheapest_params)} parameters ({share(found.cheapest_params, found.params)})"
    )
    if not found.verified:
        tree.add("[yellow]not verified[/]: the cuts were not tried on a copy")
    alike: dict[Hashable, list[GroupReport]] = {}
    for group in sorted(found.groups, key=lambda group: bool(group.kept_whole)):
        alike.setdefault(_likeness(group), []).append(group)
    for groups in alike.values():
        branch = tree.add(_line(groups))
        places = _places(groups)
        for line in places[:_MOST_PLACES]:
            branch.add(f"[dim]{escape(line)}[/]")
        if len(places) > _MOST_PLACES:
            branch.add(f"[dim]and {counted(len(places) - _MOST_PLACES, 'more place')}[/]")
    if found.frozen:
        branch = tree.add(f"[bold]frozen[/] ({len(found.frozen)})")
        reasons: dict[str, list[str]] = {}
        for frozen in found.frozen:
            reasons.setdefault(frozen.reason, []).append(frozen.place)
        for reason, where in reasons.items():
            branch.add(f"{escape(', '.join(fold(where)))}: [dim]{escape(reason)}[/]")
    return tree


def _likeness(group: GroupReport) -> Hashable:
    """Key of a branch: equal for groups that differ only in the numbers of their names."""
    places = {(skeleton(tensor), dim, role) for tensor, dim, role in group.places}
    sizes = (group.num_units, group.each, group.min_units, group.multiple_of, group.params, round(group.flops_share, 4))
    return skeleton(group.name), group.what, sizes, skeleton(group.kept_whole), frozenset(places)


def _line(groups: Sequence[GroupReport]) -> str:
    first, several = groups[0], len(groups) > 1
    line = (
        f"[bold]{escape(', '.join(fold(group.name for group in groups)))}[/]: "
        f"{f'{len(groups)} groups of ' if several else ''}{first.units}, "
        f"at least {first.min_units}, in steps of {first.multiple_of}; {human(first.params)} parameters, "
        f"{percent(first.flops_share)} of the FLOPs{' each' if several else ''}"
    )
    if first.kept_whole:
        reasons = some(reason for group in groups for reason in group.kept_whole.split("; "))
        line += f" [yellow](not pruned: {escape(reasons)})[/]"
    return line


def _places(groups: Sequence[GroupReport]) -> list[str]:
    found: dict[tuple[int | None, str], list[str]] = {}
    for group in groups:
        for tensor, dim, role in group.places:
            found.setdefault((dim, role), []).append(tensor)
    return [along(tensor, *place) for place, tensors in found.items() for tensor in fold(tensors)]
