"""Tests of follow: what is by unit is cut and grown with the units, everything else stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import setpoint
from setpoint.errors import LoopError
from setpoint.groups.follow import FOUND_ANEW, ByUnit, ByWeight, Change, check_follows, follow, fresh, of_groups


@dataclass(frozen=True, eq=False)
class Row:
    """Two groups one after the other, with something put off and something that points into the model."""

    names: tuple[str, ...]
    num_units: tuple[int, ...]
    moments: ByUnit[Tensor]
    put_off: tuple[Tensor, ...] = ()
    source: object = field(default=None, metadata=FOUND_ANEW)

    def folded(self) -> Row:
        return replace(self, moments=sum(self.put_off, self.moments), put_off=())


@dataclass(frozen=True, eq=False)
class Nest:
    """A state with all that can follow."""

    ages: Mapping[str, ByUnit[np.ndarray]]
    marks: Mapping[str, ByUnit[Tensor]] = field(metadata=fresh(-1.0))
    row: Row
    some: Row = field(metadata=of_groups("about"))
    apart: Row = field(metadata=of_groups(None))
    several: tuple[Row, ...] = ()
    about: frozenset[str] = frozenset({"a"})
    dense: Mapping[str, int] = field(default_factory=dict)
    score: float = 0.5


def nest(widths: Mapping[str, int], seed: int = 0) -> Nest:
    rng = np.random.default_rng(seed)

    def row() -> Row:
        values = torch.from_numpy(rng.random(sum(widths.values())))
        return Row(tuple(widths), tuple(widths.values()), values, (values / 2, values), object())

    ages = {name: rng.integers(0, 9, width) for name, width in widths.items()}
    marks = {name: torch.from_numpy(rng.random((width, 2))) for name, width in widths.items()}
    return Nest(ages, marks, row(), row(), row(), (row(), row()), dense=dict(widths))


def by_group(row: Row) -> dict[str, list[float]]:
    parts = torch.split(row.folded().moments, list(row.num_units))
    return {name: part.tolist() for name, part in zip(row.names, parts, strict=True)}


def contents(state: Nest) -> Any:
    rows = [by_group(each) for each in (state.row, state.some, state.apart, *state.several)]
    ages = {name: each.tolist() for name, each in state.ages.items()}
    return ages, {name: each.tolist() for name, each in state.marks.items()}, rows


@st.composite
def masks(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Widths, what stays at a first cut, and what of that stays at a second; either may leave groups out."""
    widths = draw(st.fixed_dictionaries({"a": st.integers(1, 9), "b": st.integers(1, 9), "c": st.integers(1, 3)}))

    def some(widths: Mapping[str, int]) -> dict[str, np.ndarray]:
        names = draw(st.sets(st.sampled_from(sorted(widths))))
        bits = {n: draw(st.lists(st.booleans(), min_size=widths[n], max_size=widths[n])) for n in sorted(names)}
        return {name: np.array(each, dtype=bool) for name, each in bits.items()}

    first = some(widths)
    return widths, first, some({n: int(first[n].sum()) if n in first else width for n, width in widths.items()})


@given(masks())
def test_two_cuts_are_one(drawn: tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]]) -> None:
    """Following two cuts one after the other is following the cut that leaves what both leave."""
    widths, first, second = drawn
    both = {}
    for name in {*first, *second}:
        left = np.flatnonzero(first.get(name, np.ones(widths[name], bool)))
        both[name] = np.isin(np.arange(widths[name]), left[second[name]] if name in second else left)
    one = follow(follow(nest(widths), Change(keep=first)), Change(keep=second))
    assert contents(one) == contents(follow(nest(widths), Change(keep=both)))


@given(masks())
def test_what_stays_and_what_comes_back(
    drawn: tuple[dict[str, int], dict[str, np.ndarray], dict[str, np.ndarray]],
) -> None:
    """After a cut and the return of what went, units that stayed have their values, the others the fresh one.

    What was put off is done first, and what points into the model is found again.
    """
    widths, keep, _ = drawn
    before, regrown = nest(widths), {name: ~kept for name, kept in keep.items()}
    after = follow(follow(before, Change(keep=keep)), Change(regrown=regrown))
    assert contents(after) == contents(follow(before, Change(keep=keep, regrown=regrown)))
    for name, width in widths.items():
        kept = keep.get(name, np.ones(width, bool))
        assert after.ages[name].tolist() == np.where(kept, before.ages[name], 0).tolist()
        assert after.ages[name].dtype == before.ages[name].dtype
        marks = np.where(kept[:, None], before.marks[name].numpy(), -1.0)
        assert after.marks[name].tolist() == marks.tolist()
        pairs = [(before.row, after.row), *zip(before.several, after.several, strict=True)]
        for was, now in pairs if name != "a" else [*pairs, (before.some, after.some)]:
            assert by_group(now)[name] == np.where(kept, by_group(was)[name], 0.0).tolist()
    for name in ("b", "c"):
        assert by_group(after.some)[name] == by_group(before.some)[name]
    assert by_group(after.apart) == by_group(before.apart)
    assert (after.dense, after.score) == (before.dense, before.score)
    for row in (after.row, after.some, after.apart, *after.several):  # also where none of its own units has changed
        assert row.put_off == () and row.source is None


def test_weights_that_came_in_begin_anew() -> None:
    """By tensor, and as another field of the state says; masks leave shapes alone."""
    came = torch.tensor([[True, False], [False, True]])
    state = Weighed({"w": torch.ones(2, 2), "v": torch.ones(3)}, {"w": torch.zeros(2, 2)}, torch.tensor(7.0))
    state = follow(state, Change(keep={"w": np.array([True, False, True, True])}, grown={"w": came}))
    assert state.first["w"].tolist() == [[0, 1], [1, 0]] and state.first["v"].tolist() == [1, 1, 1]
    assert state.since["w"].tolist() == [[7, 0], [0, 7]]


@dataclass(frozen=True, eq=False)
class Weighed:
    """A state of single weights."""

    first: Mapping[str, ByWeight[Tensor]]
    since: Mapping[str, ByWeight[Tensor]] = field(metadata=fresh("steps"))
    steps: Tensor


@pytest.mark.parametrize("state", [None, 3, {"a": 4}, (1, 2), setpoint.Budget.fraction(0.5, of="flops")])
def test_a_state_without_anything_by_unit_is_returned_as_it_is(state: object) -> None:
    """Whatever it is: it needs no code at all."""
    change = Change(keep={"a": np.array([True, False])}, regrown={"a": np.array([True, False])})
    assert follow(state, change) is state


def test_a_state_that_cannot_follow_is_refused_at_attach() -> None:
    """What has an entry for each unit, unmarked, is refused at attach, also deep inside a state and in a chain."""

    @dataclass(frozen=True)
    class Inner:
        seen: Mapping[str, np.ndarray]

    @dataclass(frozen=True)
    class Outer:
        inner: tuple[Inner, ...]

    widths = {"0": 3}
    for state, where in (
        ({"0": np.zeros(3)}, "a dict"),
        (Inner({"0": np.zeros(3)}), r"Inner\.seen"),
        (Outer((Inner({"0": np.zeros(3)}),)), r"Inner\.seen"),
        ((Outer(()), {"seen": {"0": torch.zeros(3, 2)}}), "a dict"),
    ):
        with pytest.raises(LoopError, match=rf"numbers for the units of '0' in {where}, which cannot follow"):
            check_follows(state, widths)
    for state in ({"0": np.zeros(2)}, Inner({"other": np.zeros(3)}), Outer(()), None, {"seen": 3}):
        check_follows(state, widths)

    class Old(setpoint.TaylorSensor):
        def init(self, groups: Any, weights: Any) -> Any:
            return super().init(groups, weights), {group.name: torch.zeros(group.num_units) for group in groups}

    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(LoopError, match="ByUnit"):
        setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(0.5, of="flops"),
            example=(torch.randn(4, 4),),
            total_steps=10,
            sensor=Old(4),
        )
