"""Closed-form plants: the controller in closed loop with meters that differ from the prediction in known ways."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.signal import lfilter

from controller.plants import Decision, Meter, chain, lognormal, run, unit_group
from setpoint.controller.priced import Gains, PricedController, PricedState
from setpoint.cost.cost import Cost, ProductCost, Term
from setpoint.groups.group import Group, Size, widths_of

FRACTION = 0.5


def _fine() -> tuple[tuple[Group, ...], Cost]:
    """A plant whose blocks are below 0.2 % of its cost, so that quantisation is no matter."""
    return chain(400, 400, 400)


def _loop(meter: Meter, controller: PricedController | None = None, **settings: Any) -> tuple[list[Decision], float]:
    """A run on the fine plant, and its limit."""
    groups, cost = _fine()
    limit = settings.get("fraction", FRACTION) * cost.total(widths_of(groups))
    settings = {"fraction": FRACTION, "meter": meter, **settings}
    return run(controller or PricedController(), groups, cost, lognormal(groups), **settings), limit


def _correction(decision: Decision) -> float:
    state: PricedState = decision.state
    return state.feedback.correction


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.05, 1.3, 2.0])
def test_constant_factor_converges(factor: float) -> None:
    """A meter that is off by a constant factor: metered cost lands within dead-band and a block of the limit."""
    decisions, limit = _loop(lambda step, predicted: factor * predicted, fraction=FRACTION * factor)
    assert decisions[-1].plan.budget_met
    assert 0.985 * limit <= decisions[-1].metered <= limit
    assert decisions[-1].step <= 400


def test_without_feedback_the_same_meter_misses() -> None:
    """The same plant with feedback as good as off misses the limit when it first tries to land: the PI part matters."""

    def meter(step: int, predicted: float) -> float:
        return 1.3 * predicted

    with_feedback, limit = _loop(meter)
    without, _ = _loop(meter, PricedController(gains=Gains(kp=0.0, ki=1e-9)))
    at_settle = {
        name: next(d for d in run_ if d.step == 300) for name, run_ in (("on", with_feedback), ("off", without))
    }
    assert abs(at_settle["on"].metered / limit - 1) < 0.015
    assert at_settle["off"].metered / limit > 1.25
    assert not without[-1].plan.budget_met


@pytest.mark.parametrize("gains", [Gains(), Gains(kp=0.0, ki=0.3), Gains(kp=0.3, ki=0.7)])
def test_feedback_is_the_textbook_loop(gains: Gains) -> None:
    """Whatever the slew limit, blocks and floors do, the correction is the closed-form response to ln(factor)."""
    factors = np.exp(np.cumsum(np.random.default_rng(3).normal(0.0, 0.01, 1001)))
    decisions, _ = _loop(
        lambda step, predicted: float(factors[step]) * predicted,
        PricedController(gains=gains, deadband=0.0, slew=0.02),
        stop_at_landing=False,
    )
    disturbance = np.log(factors[[decision.step for decision in decisions]])
    errors = lfilter([1.0, -1.0], [1.0, gains.kp + gains.ki - 1.0, -gains.kp], disturbance)
    expected = gains.kp * errors + gains.ki * np.cumsum(errors)
    assert [_correction(decision) for decision in decisions] == pytest.approx(list(expected), abs=1e-9)


def test_step_response_does_not_overshoot() -> None:
    """After a step of the meter, metered cost is never 0.7 % (half a dead-band and a block) below the reference."""
    decisions, _ = _loop(lambda step, predicted: 1.5 * predicted)
    errors = [decision.metered / decision.reference - 1 for decision in decisions]
    assert all(error > -0.007 for error in errors)


def test_settling_step() -> None:
    """A factor known from the first decision is settled to 1 % by the decision that its dominant root predicts."""
    factor, gains = 1.5, Gains()
    root = max(abs(np.roots([1.0, gains.kp + gains.ki - 1.0, -gains.kp])))
    predicted_decisions = 1 + math.ceil(math.log(0.01 / math.log(factor)) / math.log(root))
    decisions, _ = _loop(lambda step, predicted: factor * predicted, PricedController(deadband=0.0))
    errors = [abs(math.log(factor) - _correction(decision)) for decision in decisions]
    settled = next(i for i in range(len(errors)) if max(errors[i:]) < 0.01)
    assert settled <= predicted_decisions <= 8


def test_fixed_overhead_converges_to_its_fixed_point() -> None:
    """With a fixed overhead on top of the prediction, the cost reached is the fixed point known in closed form."""
    groups, cost = _fine()
    dense = cost.total(widths_of(groups))
    overhead = 0.2 * dense
    decisions, limit = _loop(lambda step, predicted: overhead + predicted, fraction=0.6)
    aim = 0.995 * limit - overhead
    assert decisions[-1].plan.budget_met and decisions[-1].metered <= limit
    assert decisions[-1].predicted == pytest.approx(aim, rel=0.015)


def test_drift_is_followed() -> None:
    """A meter that drifts by 5 % over the run lands within the limit, and lags by drift / ki as derived."""

    def meter(step: int, predicted: float) -> float:
        return math.exp(0.05 * step / 1000) * predicted

    decisions, limit = _loop(meter)
    assert decisions[-1].plan.budget_met and 0.985 * limit < decisions[-1].metered <= limit

    decisions, _ = _loop(meter, PricedController(deadband=0.0), stop_at_landing=False)
    ramp_checks = [decision for decision in decisions if decision.step <= 700][8:]
    drift = 0.05 * (ramp_checks[1].step - ramp_checks[0].step) / 1000
    lags = [0.05 * d.step / 1000 - _correction(d) for d in ramp_checks]
    # the error e = d / ki is seen before the decision; what is left after it is e less one drift
    assert lags[-1] == pytest.approx(drift / 0.5 - drift, rel=0.1)


@pytest.mark.parametrize("when", [150, 310, 500])
def test_disturbance_is_rejected(when: int) -> None:
    """A jump of the meter by 10 %, on the ramp or after settle, is taken out again: the end is within the limit."""
    decisions, limit = _loop(lambda step, predicted: (1.1 if step >= when else 1.0) * predicted, stop_at_landing=False)
    by_70 = [decision for decision in decisions if decision.step <= 700]
    assert by_70[-1].plan.budget_met and by_70[-1].plan.empty()
    assert 0.98 * limit < by_70[-1].metered <= limit


def test_noisy_meter_costs_little() -> None:
    """White noise of 0.5 % on the meter, which no cut can undo, costs less than 3 % of the limit."""
    noise = np.exp(np.random.default_rng(1).normal(0.0, 0.005, 2000))
    decisions, limit = _loop(lambda step, predicted: float(noise[step]) * predicted)
    assert decisions[-1].plan.budget_met
    assert 0.97 * limit < decisions[-1].predicted <= 1.01 * limit


def test_actuator_at_its_stop_winds_nothing_up() -> None:
    """Held far above the reference by the slew limit, the integral learns ln(factor) rather than sum the error.

    Once the slew limit is lifted, the landing does not undershoot.
    """
    factor = 1.2
    decisions, limit = _loop(
        lambda step, predicted: factor * predicted, PricedController(slew=0.01, min_density=0.0), stop_at_landing=False
    )
    ramp = [decision for decision in decisions if decision.step < 300]
    tracking = [decision.metered / decision.reference - 1 for decision in ramp]
    assert max(tracking) > 0.3 and 0.5 * sum(tracking) > 3 * math.log(factor)
    assert all(_correction(decision) <= math.log(factor) + 1e-9 for decision in decisions)
    landing = next(decision for decision in decisions if decision.step == 300)
    assert 0.985 * limit < landing.metered <= limit


def test_unmetered_stop_is_exact() -> None:
    """Without a meter the correction is exactly zero and the landing is the first decision of the settled reference."""
    groups, cost = _fine()
    decisions = run(PricedController(), groups, cost, lognormal(groups), fraction=FRACTION)
    assert all(_correction(decision) == 0.0 for decision in decisions)
    limit = FRACTION * cost.total(widths_of(groups))
    assert decisions[-1].step == 300 and 0.998 * limit < decisions[-1].predicted <= limit


def test_an_exact_meter_changes_little() -> None:
    """A meter that agrees with the prediction lands where no meter lands, but for half a dead-band."""
    groups, cost = _fine()
    without = run(PricedController(), groups, cost, lognormal(groups), fraction=FRACTION)[-1]
    decisions, _ = _loop(lambda step, predicted: predicted)
    assert decisions[-1].metered == pytest.approx(0.995 * without.metered, rel=0.002)


@pytest.mark.parametrize("meter", [None, lambda step, predicted: 1.07 * predicted])
@pytest.mark.parametrize("multiple_of", [1, 16, 64])
def test_no_limit_cycle(meter: Meter | None, multiple_of: int) -> None:
    """Coarse alignment leaves an error beyond the dead-band, yet once the budget is met every later plan is empty."""
    groups, cost = chain(128, 192, 128, multiple_of=multiple_of)
    decisions = run(
        PricedController(), groups, cost, lognormal(groups), fraction=0.4, meter=meter, stop_at_landing=False
    )
    first = next(i for i, decision in enumerate(decisions) if decision.plan.budget_met)
    assert all(decision.plan.empty() and decision.plan.budget_met for decision in decisions[first + 1 :])
    assert len(decisions) - first > 5


def test_loop_gain_does_not_depend_on_the_spread_of_worths() -> None:
    """From almost equal worths to worths spread over decades, the loop settles in the same number of decisions."""
    groups, cost = _fine()
    limit = FRACTION * cost.total(widths_of(groups))
    tracks = []
    for spread in (0.01, 1.0, 5.0):
        decisions = run(
            PricedController(slew=1.0, min_density=0.0),
            groups,
            cost,
            lognormal(groups, spread=spread),
            fraction=FRACTION,
            meter=lambda step, predicted: 1.3 * predicted,
        )
        tracks.append([decision.metered / limit for decision in decisions])
    assert tracks[1] == pytest.approx(tracks[0], rel=0.01)
    assert tracks[2] == pytest.approx(tracks[0], rel=0.01)


@pytest.mark.parametrize("elasticity", [0.5, 2.0])
def test_price_is_the_pi_law_with_scheduled_gain(elasticity: float) -> None:
    """Where cost is price ** -elasticity, price = price_ff * exp(u / elasticity) with price_ff in closed form.

    One group of equal savings, whose marginal worth is c ** (-1 / elasticity) once the cost is down to c of dense.
    """
    width = 20_000
    group = unit_group("only", width)
    cost = ProductCost("flops", (Term(1.0 / width, (Size(0, (("only", 1),)),)),))
    left = 1.0 - (np.arange(width) + 0.5) / width
    decisions = run(
        PricedController(hysteresis=0.0, slew=1.0),
        (group,),
        cost,
        {"only": left ** (-1 / elasticity) / width},
        fraction=0.6,
        meter=lambda step, predicted: 1.25 * predicted,
    )
    cuts = [decision for decision in decisions if decision.step < 300 and not decision.plan.empty()]
    assert len(cuts) >= 5
    for decision in cuts:
        price_ff = decision.reference ** (-1 / elasticity)
        expected = price_ff * math.exp(_correction(decision) / elasticity)
        assert decision.plan.price["flops"] == pytest.approx(expected, rel=1e-3)
