from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actuator.hand_made import concat, group, mlp
from setpoint.actuator.cut import check_keep, cut_groups, plan_cut
from setpoint.actuator.tensors import cut_state, in_format, moments_of, take
from setpoint.errors import GroupError, OptimizerError
from setpoint.groups.group import Group, Slice

Drawn = list[tuple[list[int], list[bool]]]


@st.composite
def coupled(draw: st.DrawFn) -> Drawn:
    """For up to three groups: which unit lies on each entry of one shared dim, and which units stay."""
    length = draw(st.integers(1, 12))
    drawn = []
    for _ in range(draw(st.integers(1, 3))):
        keep = draw(st.lists(st.booleans(), min_size=1, max_size=5))
        drawn.append((draw(st.lists(st.integers(-1, len(keep) - 1), min_size=length, max_size=length)), keep))
    return drawn


def build(drawn: Drawn) -> tuple[tuple[Group, ...], dict[str, np.ndarray]]:
    """The groups, each with the shared dim and one of its own (outside the strategy: type checks draw too)."""
    groups = []
    for name, (units, keep) in zip("abc", drawn, strict=False):
        slices = (Slice("shared", 0, "carry", np.array(units)), Slice(name, 1, "produce", np.arange(len(keep))))
        groups.append(Group(name, "unit", len(keep), slices, min_units=0))
    return tuple(groups), {name: np.array(keep) for name, (_, keep) in zip("abc", drawn, strict=False)}


@given(coupled())
def test_an_entry_stays_if_every_unit_on_it_stays(drawn: Drawn) -> None:
    """Claim: an entry stays exactly if no group that has a unit there drops that unit."""
    groups, keep = build(drawn)
    kept = plan_cut(groups, keep).entries["shared", 0]
    for entry, stays in enumerate(kept):
        units = [(each.name, each.slices[0].index[entry]) for each in groups]
        assert stays == all(unit < 0 or keep[name][unit] for name, unit in units)


@given(coupled())
def test_cut_groups_describe_what_is_left(drawn: Drawn) -> None:
    """Claim: after a cut, entry i of a shortened table names the same unit as before, by its new number."""
    groups, keep = build(drawn)
    cut = plan_cut(groups, keep)
    for before, after in zip(groups, cut_groups(groups, keep), strict=True):
        old_number = np.flatnonzero(keep[before.name])
        assert after.num_units == len(old_number)
        for old, new in zip(before.slices, after.slices, strict=True):
            rest = old.index[cut.entries[old.tensor, 0 if old.dim is None else old.dim]]
            assert [-1 if unit < 0 else old_number[unit] for unit in new.index] == list(rest)


@given(coupled(), st.integers(0, 99))
def test_two_cuts_in_a_row_equal_one(drawn: Drawn, seed: int) -> None:
    """Claim: cutting by k1 and then by k2 leaves the same entries as cutting by both at once."""
    groups, first = build(drawn)
    generator = np.random.default_rng(seed)
    second = {name: kept & (generator.random(kept.size) < 0.5) for name, kept in first.items()}
    at_once = plan_cut(groups, second).entries["shared", 0]
    once = plan_cut(groups, first).entries["shared", 0]
    then = plan_cut(cut_groups(groups, first), {name: second[name][first[name]] for name in first})
    both = np.zeros_like(once)
    both[np.flatnonzero(once)[then.entries["shared", 0]]] = True
    assert (both == at_once).all()


def test_a_concatenation_counts_entries_that_both_groups_keep() -> None:
    """Claim: a size bound by two groups counts the kept entries of both."""
    _, _, groups = concat()
    cut = plan_cut(groups, {"left": np.array([1, 0, 1, 1], bool), "right": np.array([1, 1, 0, 0, 1], bool)})
    assert cut.sizes["both", "in_channels"].sum() == 6
    assert cut.dims()["both.weight"][1].tolist() == [0, 2, 3, 4, 5, 8]
    assert [each.num_units for each in cut_groups(groups, {"left": np.array([1, 0, 1, 1], bool)})] == [3, 5]


def test_groups_that_lose_nothing_may_be_absent_and_keep_their_tables() -> None:
    """Claim: an absent group keeps all, and its index tables stay the same objects."""
    _, _, groups = mlp()
    first, second = cut_groups(groups, {})
    assert first.slices[0].index is groups[0].slices[0].index
    assert second.num_units == groups[1].num_units


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"frist": np.ones(6, bool)}, "unknown group 'frist'"),
        ({"first": np.ones(5, bool)}, "6 active units"),
        ({"first": np.ones(6, int)}, "array of bool"),
        ({"first": [True] * 6}, "array of bool"),
        ({"first": np.zeros(6, bool)}, "min_units is 1"),
    ],
)
def test_a_keep_that_does_not_fit_is_refused(keep: dict[str, object], words: str) -> None:
    """Claim: each way of getting keep wrong raises GroupError that says what is wrong."""
    _, _, groups = mlp()
    with pytest.raises(GroupError, match=words):
        check_keep(groups, keep)


def test_groups_that_contradict_each_other_are_refused() -> None:
    """Claim: two lengths for one dim raise GroupError."""
    a, b = group("a", 3, "w:0:carry"), group("b", 4, "w:0:carry")
    with pytest.raises(GroupError, match="disagree about the length"):
        plan_cut((a, b), {})


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (8, 1, 3, 3), (8, 4, 1, 1), (8, 3, 2, 3, 3)])
@pytest.mark.parametrize("last", [False, True])
def test_take_keeps_the_memory_format(shape: tuple[int, ...], last: bool) -> None:
    """Claim: the strides of a cut tensor are those PyTorch gives a fresh one of that shape and format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    chosen = formats[len(shape)] if last else torch.contiguous_format
    tensor = torch.randn(shape).to(memory_format=chosen)
    small = take(tensor, {0: np.array([0, 3, 4, 7])})
    assert torch.equal(small, tensor[[0, 3, 4, 7]])
    assert small.stride() == torch.empty(small.shape, memory_format=chosen).stride()


def test_take_copies_and_in_format_follows_any_order_of_dims() -> None:
    """Claim: what take returns owns its memory, and a transposed matrix stays transposed in memory."""
    tensor = torch.randn(5, 3).t()
    small = take(tensor, {1: np.array([1, 2])})
    assert torch.equal(small, tensor[:, [1, 2]])
    assert small.stride() == (1, 3)
    assert small.untyped_storage().nbytes() == small.numel() * 4
    assert take(tensor, {}).data_ptr() != tensor.data_ptr()
    assert in_format(torch.randn(2, 2), tensor).stride() == (1, 2)


class Pair(NamedTuple):
    first: torch.Tensor
    second: float


def with_state(**state: object) -> tuple[torch.optim.Optimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter] = state
    return optimizer, parameter


def test_nested_state_is_cut_and_everything_else_stays() -> None:
    """Claim: tensors of the parameter's shape are cut in lists, dicts and named tuples; scalars and None stay."""
    moment = torch.arange(6.0).reshape(3, 2)
    step = torch.tensor(4.0)
    optimizer, parameter = with_state(
        a=[moment, None], b={"c": Pair(moment, 0.5)}, step=step, one=torch.ones(1), d=None
    )
    state = cut_state(optimizer, parameter, {0: np.array([0, 2])}, "w")
    assert state["a"][0].tolist() == [[0, 1], [4, 5]]
    assert state["a"][1] is None and state["d"] is None
    assert isinstance(state["b"]["c"], Pair) and state["b"]["c"].first.shape == (2, 2)
    assert state["step"] is step and state["one"].shape == (1,)
    assert optimizer.state[parameter]["a"][0] is moment and moment.shape == (3, 2)


def test_state_of_another_shape_is_named() -> None:
    """Claim: the error names the optimizer, the entry, both shapes and the parameter."""
    optimizer, parameter = with_state(rows=[torch.zeros(3, 1)])
    with pytest.raises(
        OptimizerError, match=r"SGD keeps state\['rows\[0\]'\] of shape \(3, 1\) for w of shape \(3, 2\)"
    ):
        cut_state(optimizer, parameter, {0: np.array([0])}, "w")


def test_only_tensors_of_the_parameters_shape_are_moments() -> None:
    """Claim: step counters and factors are not."""
    optimizer, parameter = with_state(moment=torch.ones(3, 2), step=torch.tensor(1.0), rows=torch.ones(3, 1))
    assert [part for part, _ in moments_of(optimizer, parameter)] == ["moment"]
