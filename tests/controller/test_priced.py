"""Tests of the priced controller: the contracts of a decision and of a landing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.plants import (
    after,
    chain,
    decide_once,
    fitting_blocks,
    lognormal,
    observe,
    run,
    unit_group,
)
from setpoint.controller.plan import Controller, Plan
from setpoint.controller.priced import PricedController, PricedState
from setpoint.controller.selection import cheapest, even_density
from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.group import Group, Size, widths_of
from setpoint.sensor.reading import Reading
from setpoint_bench.scheduled import ScheduledController

numbers = st.floats(0, 1e3, allow_nan=False, allow_subnormal=False)
layers = st.lists(
    st.tuples(
        st.integers(1, 40),  # width
        st.floats(0, 1),  # min_units, as a share of the width
        st.sampled_from([1, 2, 4, 8]),  # multiple_of
        st.floats(1, 1000),  # coefficient
        st.sampled_from([0.0, 1.0, 3.0]),  # spread of log saliency; 0: all alike
    ),
    min_size=1,
    max_size=6,
)


def _build(spec: list[tuple[int, float, int, float, float]]) -> tuple[tuple[Group, ...], Cost, dict[str, np.ndarray]]:
    """A chain of layers with a residual square on the first; built here, as strategies must not be type-checked."""
    groups = tuple(
        unit_group(f"layer{i}", width, min_units=1 + int(share * (width - 1)), multiple_of=multiple)
        for i, (width, share, multiple, _, _) in enumerate(spec)
    )
    sizes = [Size(3), *(Size(0, ((group.name, 1),)) for group in groups), Size(10)]
    terms = [Term(spec[min(i, len(spec) - 1)][3], (sizes[i], sizes[i + 1])) for i in range(len(sizes) - 1)]
    cost = ProductCost("flops", (*terms, Term(2.0, (sizes[1], sizes[1]))))
    rng = np.random.default_rng(len(spec))
    saliency = {
        group.name: np.exp(spread * rng.standard_normal(group.num_units))
        for group, (*_, spread) in zip(groups, spec, strict=True)
    }
    return groups, cost, saliency


def _limit(groups: tuple[Group, ...], cost: Cost, share: float) -> float:
    """A limit between the cheapest and the dense cost."""
    least, dense = cheapest(cost, groups), cost.total(widths_of(groups))
    return max(least, least + share * (dense - least))


def _decide(
    plan_for: tuple[Group, ...], cost: Cost, reading: Reading | None, **settings: float | None
) -> tuple[PricedState, Plan]:
    controller = PricedController()
    dense = cost.total(widths_of(plan_for))
    seen = observe(plan_for, cost, limit=0.5 * dense, dense=dense, reading=reading, **settings)  # type: ignore[arg-type]
    return controller.decide(controller.init(plan_for), seen, cost, plan_for)


@given(layers, st.floats(0, 1), st.booleans())
def test_one_decision_lands(spec: list[tuple[int, float, int, float, float]], share: float, calibrated: bool) -> None:
    """Any limit from the cheapest cost up is met by one decision: never over, aligned, and nothing fits back."""
    groups, cost, saliency = _build(spec)
    limit = _limit(groups, cost, share)
    plan = decide_once(PricedController(), groups, cost, saliency, limit=limit, calibrated=calibrated)
    widths = widths_of(after(groups, plan))
    assert plan.budget_met and cost.total(widths) <= limit
    assert fitting_blocks(groups, cost, plan, limit) == []
    for group in groups:
        assert widths[group.name] >= group.min_units
        assert widths[group.name] % group.multiple_of == 0 or widths[group.name] == group.num_units
        dropped, kept = ~plan.keep[group.name], plan.keep[group.name]
        if dropped.any() and kept.any():
            assert saliency[group.name][dropped].max() <= saliency[group.name][kept].min()


@given(layers, st.floats(0, 1), st.integers(1, 200))
def test_whole_run_lands(spec: list[tuple[int, float, int, float, float]], share: float, total_steps: int) -> None:
    """A run of any length lands by 70 % of it, or by the first decision after settle, and never over the limit."""
    groups, cost, saliency = _build(spec)
    dense = cost.total(widths_of(groups))
    limit = _limit(groups, cost, share) * (1 + 1e-12)  # or limit / dense * dense may round to below the cheapest
    decisions = run(PricedController(), groups, cost, saliency, fraction=limit / dense, total_steps=total_steps)
    last = decisions[-1]
    assert last.plan.budget_met and last.predicted <= limit / dense * dense
    assert last.step <= max(1, round(0.7 * total_steps))
    assert not any(decision.plan.budget_met for decision in decisions[:-1])


@given(layers, st.floats(0, 1))
def test_the_order_of_groups_is_no_matter(spec: list[tuple[int, float, int, float, float]], share: float) -> None:
    """The same groups the other way round get the same plan."""
    groups, cost, saliency = _build(spec)
    limit = _limit(groups, cost, share)
    one, other = (
        decide_once(PricedController(), arranged, cost, saliency, limit=limit) for arranged in (groups, groups[::-1])
    )
    assert all(np.array_equal(keep, other.keep[name]) for name, keep in one.keep.items())
    assert all(np.array_equal(worth, other.worth[name], equal_nan=True) for name, worth in one.worth.items())
    assert (one.price, one.reason) == (other.price, other.reason)


def test_bad_readings_make_no_decision() -> None:
    """A reading that is missing or incomplete, and a meter that is missing or reads nonsense, drop nothing."""
    groups, cost = chain(16, 16)
    full = lognormal(groups)
    for reading, metered, words in (
        (None, None, "no reading"),
        (Reading(1, {"layer0": full["layer0"]}, 1), None, "lacks layer1"),
        (Reading(1, {**full, "layer1": np.ones(15)}, 1), None, "layer1 has 16 units"),
        *((Reading(1, full, 1), metered, "the meter reads") for metered in (np.nan, np.inf, 0.0, -1.0)),
    ):
        _, plan = _decide(groups, cost, reading, metered=metered)
        assert plan.empty() and not plan.budget_met and words in plan.reason
    state, _ = _decide(groups, cost, Reading(1, full, 1), metered=cost.total(widths_of(groups)), total_steps=100)
    seen = observe(groups, cost, limit=1.0, dense=2.0, reading=Reading(30, full, 1), step=30, total_steps=100)
    _, plan = PricedController().decide(state, seen, cost, groups)
    assert plan.empty() and "missing" in plan.reason


def test_spending_follows_the_reference() -> None:
    """On the way down, predicted cost is within 1 % below the reference at every decision when blocks are fine."""
    groups, cost = chain(256, 256, 256)
    decisions = run(PricedController(), groups, cost, lognormal(groups), fraction=0.4)
    assert len(decisions) == 8
    for decision in decisions:
        assert 0.99 * decision.reference < decision.predicted <= decision.reference
    assert decisions[-1].plan.budget_met


def test_hysteresis_separates_dropped_worth_from_price() -> None:
    """Every dropped unit's worth is at most price * (1 - hysteresis), and the dearest one reaches it."""
    groups, cost = chain(32, 64, 32, multiple_of=4)
    plan = decide_once(
        PricedController(hysteresis=0.2), groups, cost, lognormal(groups), limit=0.5 * cost.total(widths_of(groups))
    )
    worth = np.concatenate([plan.worth[group.name][~plan.keep[group.name]] for group in groups])
    assert np.isfinite(worth).all()
    assert worth.max() == pytest.approx(plan.price["flops"] * 0.8)


def test_slew_limit_on_the_way_down() -> None:
    """Before settle no group loses more than the slew limit at one decision, though a single block may always go."""
    groups, cost = chain(40, 40, 4)
    saliency = lognormal(groups)
    saliency["layer0"] = saliency["layer0"] * 1e-9
    decisions = run(PricedController(slew=0.1), groups, cost, saliency, fraction=0.3)
    moved = False
    for decision in decisions[:-1]:
        for group in decision.groups:
            dropped = decision.before[group.name] - group.num_units
            assert dropped <= max(1, int(0.1 * decision.before[group.name]))
            moved |= dropped > 0
    assert moved


def test_landing_lifts_the_slew_limit_and_says_so() -> None:
    """Where the slew limit would make the landing miss the limit it is lifted, and the reason says it."""
    groups, cost = chain(40, 40)
    decisions = run(PricedController(slew=0.05), groups, cost, lognormal(groups), fraction=0.2)
    assert decisions[-1].plan.budget_met and decisions[-1].step == 300
    assert "the slew limit (units per cut) was lifted to reach the budget" in decisions[-1].plan.reason


def test_density_floor_keeps_layers_alive() -> None:
    """A layer of almost no saliency keeps a quarter of the density that a uniform cut would have."""
    groups, cost = chain(64, 64, 64, 64)
    saliency = lognormal(groups)
    saliency["layer2"] = saliency["layer2"] * 1e-9
    widths = {}
    for min_density in (0.25, 0.0):
        controller = PricedController(min_density=min_density)
        widths[min_density] = widths_of(run(controller, groups, cost, saliency, fraction=0.3)[-1].groups)["layer2"]
    dense = cost.total(widths_of(groups))
    uniform = next(w for w in range(64, 0, -1) if cost.total(dict.fromkeys(widths_of(groups), w)) <= 0.3 * dense)
    assert 0.25 * uniform <= widths[0.25] <= 0.25 * (uniform + 1) + 1
    assert widths[0.0] < widths[0.25]


def test_density_floor_gives_way_to_the_limit() -> None:
    """Where min_density makes the limit unreachable it is lifted at the landing, and the reason says so."""
    groups = (unit_group("layer0", 32, min_units=32), unit_group("layer1", 32))
    _, cost = chain(32, 32)
    limit = 1.1 * cheapest(cost, groups)
    plan = decide_once(PricedController(min_density=1.0), groups, cost, lognormal(groups), limit=limit)
    assert plan.budget_met and "density floor" in plan.reason


def test_dwell_keeps_units_that_came_back() -> None:
    """Units back for fewer decisions than the dwell stay, whatever they are worth; then they may go."""
    groups, cost = chain(32, 32)
    controller, saliency = PricedController(dwell=2), lognormal(groups)
    saliency["layer0"][:8] = 0.0
    state = controller.init(groups)
    age = {name: values.copy() for name, values in state.age.items()}
    age["layer0"][:8] = 0
    state, dense = replace(state, age=age), cost.total(widths_of(groups))
    reading, kept = Reading(1, saliency, 1), []
    for step in (100, 150, 200):
        seen = observe(groups, cost, limit=0.5 * dense, dense=dense, reading=reading, step=step, total_steps=1000)
        state, plan = controller.decide(state, seen, cost, groups)
        kept.append(int(plan.keep["layer0"][:8].sum()))
    assert kept == [8, 8, 0]


WIDTHS = (32, 64, 64, 128, 128, 128)
EVEN_PLANTS = {
    "image": (
        tuple(unit_group(f"layer{i}", width, multiple_of=width // 8) for i, width in enumerate(WIDTHS)),
        chain(*WIDTHS, coefficients=(64.0, 64.0, 16.0, 16.0, 4.0, 4.0, 1.0))[1],
    ),
    "cheap end": chain(64, 64, 64, 64, multiple_of=8, coefficients=(1.0, 64.0, 64.0, 1.0, 0.01)),
    "coarse": chain(32, 64, 128, multiple_of=16),
}


@pytest.mark.parametrize("metered", [False, True])
@pytest.mark.parametrize("controller", [PricedController(), ScheduledController()], ids=["closed loop", "cubic"])
@pytest.mark.parametrize("name", EVEN_PLANTS)
def test_an_even_cut_starves_no_group(name: str, controller: Controller[Any], metered: bool) -> None:
    """Where groups are thinned alike, none is at any decision further below the even density that meets the limit than
    the coarsest block: coming nearer to the budget is not worth a layer.
    """
    groups, cost = EVEN_PLANTS[name]
    dense = widths_of(groups)
    coarsest = max(group.multiple_of / group.num_units for group in groups)
    meter = (lambda step, predicted: predicted) if metered else None
    for fraction in (0.8, 0.5, 0.25):
        limit = fraction * cost.total(dense)
        even = even_density(cost, dense, dense, groups, 0.99 * limit)
        decisions = run(controller, groups, cost, lognormal(groups), fraction=fraction, calibrated=False, meter=meter)
        for decision in decisions:
            assert min(group.num_units / dense[group.name] for group in decision.groups) >= even - coarsest
        assert decisions[-1].plan.budget_met and decisions[-1].predicted <= limit


@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("multiple_of", [1, 8])
def test_typical_landings_are_near(spread: float, multiple_of: int) -> None:
    """On nets of usual widths the landing is near the limit for any spread of saliencies: within 3 % in blocks of 8."""
    groups, cost = chain(64, 64, 128, 128, 256, multiple_of=multiple_of)
    dense = cost.total(widths_of(groups))
    for fraction in (0.3, 0.5, 0.7):
        last = run(PricedController(), groups, cost, lognormal(groups, spread=spread), fraction=fraction)[-1]
        nearest = 0.97 if multiple_of == 8 else 0.998
        assert nearest * fraction < last.predicted / dense <= fraction


def test_blocks_too_coarse_for_the_dead_band_are_named() -> None:
    """Where no combination of blocks comes within the dead-band, the landing is below it and the reason says why."""
    groups, cost = chain(32, multiple_of=16)
    (*_, last) = run(PricedController(), groups, cost, lognormal(groups), fraction=0.9)
    assert last.plan.budget_met and last.predicted == 0.5 * cost.total({"layer0": 32})
    assert (
        "% below the reference; " in last.plan.reason
        and "% of the reference, which is too much to bring it back" in last.plan.reason
    )


def test_unreachable_limit_does_not_land() -> None:
    """Below the cheapest cost nothing lands, and guards are not lifted for a limit that stays out of reach."""
    groups, cost = chain(16, 16)
    limit = 0.5 * cheapest(cost, groups)
    plan = decide_once(PricedController(), groups, cost, lognormal(groups), limit=limit)
    assert not plan.budget_met and "2 of 2 groups cannot be cut further" in plan.reason
    assert all(group.num_units >= 1 for group in after(groups, plan))


def test_coarse_blocks_are_left_for_the_landing() -> None:
    """With coarse blocks the ramp stops above the limit, says so, and the landing finds a near combination."""
    groups, cost = chain(16, 32, 32, 64, multiple_of=8, coefficients=(97.0, 211.0, 131.0, 53.0, 89.0))
    dense, ends = cost.total(widths_of(groups)), []
    for seed in range(8):
        decisions = run(PricedController(), groups, cost, lognormal(groups, seed=seed), fraction=0.5)
        assert any("left for the last cut" in decision.plan.reason for decision in decisions)
        ends.append(decisions[-1].predicted / dense)
    assert max(ends) <= 0.5 and np.mean(ends) > 0.5 * 0.97
