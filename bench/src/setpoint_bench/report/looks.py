"""Looks: the colour, the mark and the dash of each method, the same in all figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from setpoint.report.drawing import BLUE, GREY, MARKS, ORANGE, OTHERS
from setpoint_bench.method import all_methods
from setpoint_bench.report.summary import DENSE, SETPOINT

FIXED = {DENSE: GREY, "small": ORANGE, SETPOINT: BLUE}
_DASHES = ("solid", "dash", "dashdot", "dot", "longdash")


@dataclass(frozen=True)
class Style:
    """How the curves of one method look: colour, dash and line width in pixels."""

    color: str
    dash: str
    width: float


def marks(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and mark of each method, by its place in `all_methods`; a user's own take the places left, in order.

    No two are alike up to as many as there are other colours times marks.
    """
    known = [name for method in all_methods() if (name := method.name) not in FIXED]
    names, num_places = tuple(dict.fromkeys(methods)), len(OTHERS) * len(MARKS)
    taken = {known.index(name) for name in names if name in known}
    free = (place for place in (*range(len(known), num_places), *range(len(known))) if place not in taken)
    found: dict[str, tuple[str, str]] = {}
    for number, name in enumerate(names):
        if name in FIXED:
            found[name] = FIXED[name], "circle"
        else:
            place = known.index(name) if name in known else next(free, number)
            found[name] = OTHERS[place % len(OTHERS)], [*MARKS][place // len(OTHERS) % len(MARKS)]
    return found


def styles(labels: Sequence[str], methods: Iterable[str] = ()) -> dict[str, Style]:
    """A style for each label: its method's colour, and a dash by its place among the method's labels.

    A method with a single label has a dash of its own, for readers who cannot see the hue.

    Args:
        methods: all of the task, where `labels` are of some.
    """
    by_method: dict[str, list[str]] = {}
    for label in labels:
        by_method.setdefault(label.partition(" ")[0], []).append(label)
    colors, found, free = marks([*methods, *by_method]), {}, 0
    for method, members in by_method.items():
        first = 0 if len(members) > 1 or method in (DENSE, SETPOINT) else 1 if method == "small" else 2 + free % 3
        free += method not in FIXED
        width = 2.4 if method == SETPOINT else 1.8
        for place, label in enumerate(members):
            found[label] = Style(colors[method][0], _DASHES[(first + place) % len(_DASHES)], width)
    return found
