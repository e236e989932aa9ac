"""Tests of the selection: greedy by worth, nothing fits back, exchanges come nearer."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.plants import chain, lognormal, residual, unit_group
from setpoint.controller.finer import refined
from setpoint.controller.selection import (
    Allocation,
    Ladder,
    Selection,
    add_back,
    cheapest,
    descend,
    reach,
    start,
    swap,
    trade,
)
from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.group import Group, Size, widths_of


def _start(
    groups: tuple[Group, ...], cost: Cost, saliency: dict[str, np.ndarray], allocation: Allocation = "worth"
) -> Selection:
    return start(cost, groups, saliency, widths_of(groups), widths_of(groups), allocation)


def _dropped(selection: Selection) -> float:
    return sum(float(ladder.salience[selection.rungs[name]]) for name, ladder in selection.ladders.items())


def _naive(groups: tuple[Group, ...], cost: Cost, ladders: Mapping[str, Ladder], target: float) -> dict[str, int]:
    """Greedy descent that weighs every block of every group again before each pick, straight from totals."""
    widths, rungs = widths_of(groups), dict.fromkeys(ladders, 0)
    while cost.total(widths) > target:
        worths = []
        for name, ladder in ladders.items():
            if rungs[name] == ladder.num_rungs:
                continue
            units = int(ladder.edges[rungs[name] + 1] - ladder.edges[rungs[name]])
            saving = cost.total(widths) - cost.total({**widths, name: widths[name] - units})
            salience = ladder.salience[rungs[name] + 1] - ladder.salience[rungs[name]]
            worths.append((salience / saving, name, units))
        if not worths:
            break
        _, name, units = min(worths)
        widths[name] -= units
        rungs[name] += 1
    return rungs


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.sampled_from([1, 2, 4]),
    st.floats(0.05, 1.0),
    st.integers(0, 100),
)
def test_lazy_heap_is_the_naive_greedy(widths: list[int], multiple_of: int, fraction: float, seed: int) -> None:
    """Weighing only the top of the heap picks the same blocks as weighing all blocks before each pick."""
    groups, cost = chain(*widths, multiple_of=multiple_of)
    saliency = lognormal(groups, seed=seed)
    selection = _start(groups, cost, saliency)
    target = fraction * cost.total(widths_of(groups))
    descend(selection, target)
    assert selection.rungs == _naive(groups, cost, selection.ladders, target)
    assert selection.total == cost.total(selection.widths)


@given(st.integers(0, 50), st.lists(st.floats(0.1, 1.0), min_size=2, max_size=6))
def test_price_is_monotone(seed: int, fractions: list[float]) -> None:
    """The lower the target, the higher the price and the lower the cost; what goes at one price goes at a higher."""
    groups, cost = residual(24, (16, 40), multiple_of=2)
    saliency, dense = lognormal(groups, seed=seed), cost.total(widths_of(groups))
    results = []
    for fraction in sorted(fractions, reverse=True):
        selection = _start(groups, cost, saliency)
        descend(selection, fraction * dense)
        results.append(selection)
    for looser, tighter in zip(results, results[1:], strict=False):
        assert tighter.marginal_worth() >= looser.marginal_worth()
        assert tighter.total <= looser.total
        assert all(tighter.rungs[name] >= looser.rungs[name] for name in tighter.rungs)


def test_free_units_of_no_saving_stay() -> None:
    """A group that costs nothing is not touched, and a target that cannot be met does not loop for ever."""
    groups = (unit_group("paid", 10), unit_group("free", 10))
    cost = ProductCost("flops", (Term(5.0, (Size(0, (("paid", 1),)),)),))
    selection = _start(groups, cost, {"paid": np.ones(10), "free": np.zeros(10)})
    descend(selection, 0.0)
    assert selection.widths == {"paid": 1, "free": 10}
    assert selection.total == cheapest(cost, groups) == 5.0


@given(st.integers(0, 200), st.floats(0.2, 0.95), st.sampled_from([2, 4, 8]))
def test_nothing_fits_back_after_exchanges(seed: int, fraction: float, multiple_of: int) -> None:
    """Swaps and trades never pass the target, never lower the cost, and leave no single block that fits back."""
    groups, cost = chain(16, 32, 24, 40, multiple_of=multiple_of)
    selection = _start(groups, cost, lognormal(groups, seed=seed))
    target = fraction * selection.total
    descend(selection, target)
    add_back(selection, target)
    totals = [selection.total]
    swap(selection, target, 0.01)
    totals.append(selection.total)
    trade(selection, target, 0.01)
    totals.append(selection.total)
    assert totals == sorted(totals) and selection.total <= target
    assert selection.total == cost.total(selection.widths)
    for name, rung in selection.rungs.items():
        if rung:
            wider = {**selection.widths, name: selection.widths[name] + selection.size(name, rung - 1)}
            assert cost.total(wider) > target


@given(st.integers(0, 200), st.floats(0.2, 0.9), st.sampled_from([4, 8, 16]), st.sampled_from(["worth", "uniform"]))
def test_parts_of_blocks_use_a_budget_up(seed: int, fraction: float, multiple_of: int, allocation: Allocation) -> None:
    """Claim: broken blocks leave 5 % at most where units allow it, never exceed a budget, and drop nothing more."""
    groups, cost = chain(40, 64, multiple_of=multiple_of)
    groups = (replace(groups[0], usual_block=multiple_of), groups[1])  # the other one's block was asked for
    saliency, limit = lognormal(groups, seed=seed), fraction * cost.total(widths_of(groups))
    before = _start(groups, cost, saliency, allocation)
    assert reach(before, limit)
    after = refined(before, groups, saliency, limit)
    assert before.total <= after.total == cost.total(after.widths) <= limit
    assert after.widths["layer1"] == before.widths["layer1"]
    fits = after.total + cost.saving({**after.widths, "layer0": after.widths["layer0"] + 1}, "layer0", 1) <= limit
    broken = before.rungs["layer0"] > 0
    assert after.total >= 0.95 * limit or not (broken and fits)
    for name, kept in after.keep().items():
        assert kept.sum() == after.widths[name] and (kept | ~before.keep()[name]).all()


def test_swap_inside_the_dead_band_never_drops_more_saliency() -> None:
    """With a dead-band of everything, swaps come nearer to the target only where no more saliency goes."""
    swapped = 0
    for seed in range(40):
        groups, cost = chain(16, 32, 24, 40, multiple_of=4)
        selection = _start(groups, cost, lognormal(groups, seed=seed))
        target = 0.5 * selection.total
        descend(selection, target)
        add_back(selection, target)
        before, rungs = _dropped(selection), dict(selection.rungs)
        swap(selection, target, deadband=1.0)
        assert _dropped(selection) <= before
        swapped += rungs != selection.rungs
    assert swapped > 0


def test_trade_is_the_best_trade() -> None:
    """The result of one trade is the best among all combinations within two blocks up and two down."""
    groups, cost = chain(16, 16, 16, multiple_of=4)
    for seed in range(10):
        selection = _start(groups, cost, lognormal(groups, seed=seed))
        target = 0.45 * selection.total
        descend(selection, target)
        add_back(selection, target)
        price, before, salience = selection.highest, selection.total, _dropped(selection)
        objectives = [0.0]
        for moves in itertools.product(range(-2, 3), repeat=3):
            ups, downs = -sum(min(m, 0) for m in moves), sum(max(m, 0) for m in moves)
            rungs = {group.name: selection.rungs[group.name] + m for group, m in zip(groups, moves, strict=True)}
            if not (1 <= ups <= 2 and 1 <= downs <= 2 and all(0 <= r <= 3 for r in rungs.values())):
                continue
            total = cost.total({name: 16 - 4 * rung for name, rung in rungs.items()})
            if before < total <= target:
                lost = sum(float(selection.ladders[name].salience[rung]) for name, rung in rungs.items()) - salience
                objectives.append(lost - 3 * price * (total - before))
        trade(selection, target, deadband=0.0)
        reached = _dropped(selection) - salience - 3 * price * (selection.total - before)
        assert reached <= min(objectives) + 1e-12 * abs(min(objectives))


def test_many_blocks_are_quick() -> None:
    """200 groups of 4,096 units are decided in well under a second even with run-time type checks on."""
    groups, cost = chain(*([4096] * 200))
    saliency = lognormal(groups)
    begin = time.process_time()
    selection = _start(groups, cost, saliency)
    target = 0.5 * selection.total
    descend(selection, target)
    add_back(selection, target)
    swap(selection, target, 0.01)
    seconds = time.process_time() - begin
    assert 0.999 * target < selection.total <= target
    assert seconds < 1.5


def test_coarse_descent_is_close_to_the_exact_one() -> None:
    """Weighing many blocks at once drops at most 1 % more saliency than weighing them one by one."""
    groups, cost = chain(*([2048] * 3))
    saliency = lognormal(groups)
    selection = _start(groups, cost, saliency)
    target = 0.5 * selection.total
    descend(selection, target)
    exact = _naive(groups, cost, selection.ladders, target)
    best = sum(float(selection.ladders[name].salience[rung]) for name, rung in exact.items())
    assert _dropped(selection) == pytest.approx(best, rel=0.01)


class Staircase:
    """Cost of hardware that pads every width to a multiple of 16: three of four blocks of 4 save nothing."""

    resource = "latency"

    def total(self, widths: Mapping[str, int]) -> float:
        return float(sum(-(-width // 16) * 16 for width in widths.values()))

    def saving(self, widths: Mapping[str, int], group: str, num_units: int) -> float:
        return self.total(widths) - self.total({**widths, group: widths[group] - num_units})


def test_steps_of_a_staircase_are_found() -> None:
    """A descent takes as many blocks as reach the next step down, whichever of them saves, and gives back the rest."""
    groups = (unit_group("wide", 64, multiple_of=4), unit_group("narrow", 64, multiple_of=4))
    saliency = {"wide": np.linspace(1.0, 2.0, 64), "narrow": np.linspace(5.0, 6.0, 64)}
    selection = _start(groups, Staircase(), saliency)
    descend(selection, 96.0)
    add_back(selection, 96.0)
    assert selection.widths == {"wide": 32, "narrow": 64} and selection.total == 96.0
