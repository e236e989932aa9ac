"""A forecast of widths: where a budget is likely to find its savings, before any gradient says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from setpoint.groups.group import Group
from setpoint.spending.run_budget import likely_widths

DEAR, CHEAP = Group("dear", "unit", num_units=100, slices=()), Group("cheap", "unit", num_units=100, slices=())
DENSE = {"dear": 100, "cheap": 100}


class Weighted:
    """A unit of the one group costs 9, one of the other 1."""

    resource = "params"

    def total(self, widths: Mapping[str, int]) -> float:
        return 9.0 * widths["dear"] + widths["cheap"]

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        return num_units * (9.0 if group == "dear" else 1.0)


@pytest.mark.parametrize("limit", [300.0, 550.0, 800.0])
def test_worth_is_level(limit: float) -> None:
    """Claim: the limit is kept by less than a dear unit, and worth is level there.

    With saliencies k / N^2 nine times as many units go of the group whose units cost nine times as much: 9 g and g,
    with 81 g + g saved.
    """
    widths = likely_widths(Weighted(), (DEAR, CHEAP), DENSE, limit)
    assert limit - 9 < Weighted().total(widths) <= limit
    assert 100 - widths["dear"] == pytest.approx(9 * (1000 - limit) / 82, abs=1)


def test_a_group_that_was_cut_goes_on_from_there() -> None:
    """Claim: no width rises, and a cut in two steps comes out as one at once."""
    at_once = likely_widths(Weighted(), (DEAR, CHEAP), DENSE, 500.0)
    half_way = likely_widths(Weighted(), (DEAR, CHEAP), DENSE, 700.0)
    groups = tuple(replace(each, num_units=half_way[each.name]) for each in (DEAR, CHEAP))
    after = likely_widths(Weighted(), groups, DENSE, 500.0)
    assert after == pytest.approx(at_once, abs=1) and all(after[name] <= half_way[name] for name in after)
