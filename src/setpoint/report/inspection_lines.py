"""An inspection in seven lines: cost, what can be pruned, how far, what is not pruned, and what was checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from setpoint.messages import counted
from setpoint.report.inspect_model import GroupReport, Inspection
from setpoint.report.names import fold, skeleton, some
from setpoint.report.numbers import human, percent, share

_WIDTH = 80
"""Columns of the line of the most FLOPs, as far as names let it fit."""
_MOST_REASONS = 3


def inspection_lines(found: Inspection) -> tuple[str, ...]:
    """Seven lines that a person reads before any training, four where there is nothing to prune.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from setpoint.report.inspect_model import inspect_model
        >>> model = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 4))
        >>> for line in inspection_lines(inspect_model("mine", model, (torch.zeros(2, 8),))):
        ...     print(line)
        mine on 2x8: 2.24 kFLOPs per training step, 264 parameters
        can be pruned: 20 units in 1 group, with 98.5 % of the parameters
        cheapest reachable: 224 FLOPs (10.0 %), 30 parameters (11.4 %)
        most FLOPs: layer 0 (20 neurons, 90.0 %)
        not pruned: nothing
        frozen: 2 places: input of the network, or other data; output of the network
        checked: each cut was tried on a copy of the model
    """
    pruned = [group for group in found.groups if not group.kept_whole]
    whole = [group for group in found.groups if group.kept_whole]
    units = sum(group.num_units for group in pruned)
    dense = (
        f"{found.model} on {', '.join('x'.join(map(str, shape)) for shape in found.inputs)}: "
        f"{human(found.flops, 'FLOPs')} per training step, {human(found.params)} parameters"
    )
    if not pruned:
        return nothing(found), dense, _not_pruned(whole), _frozen(found)
    return (
        dense,
        f"can be pruned: {counted(units, 'unit')} in {counted(len(pruned), 'group')}, "
        f"with {percent(found.prunable_params_share)} of the parameters",
        f"cheapest reachable: {human(found.cheapest_flops, 'FLOPs')} ({share(found.cheapest_flops, found.flops)}), "
        f"{human(found.cheapest_params)} parameters ({share(found.cheapest_params, found.params)})",
        _largest(pruned),
        _not_pruned(whole),
        _frozen(found),
        "checked: each cut was tried on a copy of the model"
        if found.verified
        else "not checked: no cut was tried on a copy of the model",
    )


def nothing(found: Inspection) -> str:
    """That nothing can be pruned, and the reason that most units, or else most places, have."""
    reasons = Counter[str]()
    for group in found.groups:
        reasons[group.kept_whole.partition("; ")[0]] += group.num_units
    reasons = reasons or Counter(each.reason for each in found.frozen) or Counter(["it has no dim of its own"])
    return f"nothing can be pruned: {reasons.most_common(1)[0][0]}"


def _largest(pruned: Sequence[GroupReport]) -> str:
    alike: dict[tuple[str, str, str], list[str]] = {}
    for group in sorted(pruned, key=lambda group: -group.flops_share):
        saved = percent(group.flops_share)
        alike.setdefault((skeleton(group.name), group.units, saved), []).append(group.name)
    shares, line, total = {group.name: group.flops_share for group in pruned}, "most FLOPs: ", 0.0
    for (_, units, saved), names in alike.items():
        several = len(names) > 1
        size = f"{f'{len(names)} x ' if several else ''}{units}, {saved}{' each' if several else ''}"
        named = [f"layer {name}" if name.isdigit() else name for name in fold(names)]  # "0" alone reads as a number
        more = f"{', '.join(named)} ({size})"
        if line.endswith(")") and len(line) + len(more) + 2 > _WIDTH:
            break
        line += f", {more}" if line.endswith(")") else more
        total += sum(shares[name] for name in names)
    return line + ("; groups share FLOPs, so these add up to over 100 %" if total > 1 else "")


def _not_pruned(whole: Sequence[GroupReport]) -> str:
    if not whole:
        return "not pruned: nothing"
    of_each = [dict.fromkeys(why.partition(" (")[0] for why in group.kept_whole.split("; ")) for group in whole]
    reasons = (reason for each in of_each for reason in each)
    return _reasons(f"not pruned: {counted(len(whole), 'group')} ({some((group.name for group in whole), 1)})", reasons)


def _frozen(found: Inspection) -> str:
    if not found.frozen:
        return "frozen: nothing"
    return _reasons(f"frozen: {counted(len(found.frozen), 'place')}", (each.reason for each in found.frozen))


def _reasons(of: str, reasons: Iterable[str]) -> str:
    """What has these reasons: the most frequent ones, and how often each is given."""
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        alike.setdefault(skeleton(reason), []).append(reason)
    by_number = sorted(alike.values(), key=len, reverse=True)
    shown = [f"{len(each)} x " * (len(each) > 1) + ", ".join(fold(each)) for each in by_number[:_MOST_REASONS]]
    rest = len(by_number) - len(shown)
    return f"{of}: {'; '.join(shown)}" + (f"; and {counted(rest, 'other reason')}" if rest else "")
