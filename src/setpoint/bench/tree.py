"""An inspection as a terminal tree: groups with their units, places and share of the FLOPs."""

from __future__ import annotations

from rich.markup import escape
from rich.tree import Tree

from setpoint.bench.inspection import GroupReport, Inspection
from setpoint.report.numbers import human, percent


def inspection_tree(found: Inspection) -> Tree:
    """The tree of an inspection, the costs at its root."""
    cheapest = f"{human(found.cheapest_flops, 'FLOP')} ({percent(found.cheapest_flops / found.flops)})"
    tree = Tree(
        f"[bold]{escape(found.model)}[/]: {human(found.flops, 'FLOP')} per training step, "
        f"{human(found.params)} parameters; cheapest reachable {cheapest}"
    )
    for group in found.groups:
        branch = tree.add(_line(group))
        for tensor, dim, role in group.places:
            branch.add(f"[dim]{escape(tensor)}, {'every element' if dim is None else f'dim {dim}'}, {role}[/]")
    if found.frozen:
        branch = tree.add(f"[bold]frozen[/] ({len(found.frozen)})")
        for frozen in found.frozen:
            branch.add(f"{escape(frozen.place)}: [dim]{escape(frozen.reason)}[/]")
    return tree


def _line(group: GroupReport) -> str:
    """A group in one line."""
    line = (
        f"[bold]{escape(group.name)}[/]: {group.num_units} {group.what}s, at least {group.min_units}, "
        f"in steps of {group.multiple_of}; {percent(group.flops_share)} of the FLOPs"
    )
    if group.kept_whole:
        line += f" [yellow](left whole: {escape(group.kept_whole)})[/]"
    return line
