"""The table of timed operations: which points are timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils._pytree import tree_flatten

from setpoint.groups.group import Group, Size
from setpoint.resources import table as table_file
from setpoint.resources.curve import points
from setpoint.resources.problem import Problem, pose
from setpoint.resources.table import Table
from setpoint.resources.tape import Operand, Operation

CPU = torch.device("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Operations that take a millisecond for each entry of their first axis; yields the keys that were timed."""
    keys: list[str] = []

    def seconds(problem: Problem, point: tuple[int, ...], device: torch.device) -> float:
        keys.append(problem.key)
        return 1e-3 * point[0]

    monkeypatch.setattr(table_file, "_seconds", seconds)
    yield keys


def product(rows: int = 8) -> Problem:
    """A matrix product whose one axis is the width of a group of 64 units."""
    width = Size(0, (("a", 1),))
    one, other, out = (
        Operand(shape, (0, 1), (), torch.float32)
        for shape in ((Size(rows), width), (width, Size(4)), (Size(rows), Size(4)))
    )
    spec = tree_flatten(((one, other), {}))[1]
    operation = Operation(torch.ops.aten.mm.default, (one, other), spec, (out,))
    return pose(operation, {"a": Group("a", "unit", 64, ())})


def test_more_points_are_timed_of_what_takes_most_of_a_step(timed: list[str]) -> None:
    """Claim: where not all points fit into the limit, the operation with most seconds in the step has more of them."""
    often, once = product(8), product(16)

    def seconds(problem: Problem, *, coarse: bool) -> float:
        """Two calls at each point, by bytes, and what a short one takes."""
        dense = problem.num_bytes(problem.dense)
        return sum(0.128 * problem.num_bytes(each) / dense + 1e-3 for each in points(problem, coarse=coarse))

    limit = seconds(often, coarse=False) + seconds(once, coarse=True)
    assert seconds(once, coarse=False) > seconds(once, coarse=True)
    Table(CPU).time([often, once, often], limit_s=limit * 1.01)
    rounds = 3
    assert timed.count(often.key) == rounds * len(points(often, coarse=False))
    assert timed.count(once.key) == rounds * len(points(once, coarse=True))
