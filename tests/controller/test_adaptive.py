"""Tests of the adaptive controller: when the reference leaves dense, and that the rest is the inner one's."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from controller.plants import after, chain, lognormal, observe
from setpoint.controller.adaptive import AdaptiveController, agreement
from setpoint.controller.plan import Plan
from setpoint.controller.priced import PricedController
from setpoint.groups.group import widths_of
from setpoint.sensor.reading import Reading
from setpoint.ssm import BalancedPairs, DiagonalSystem, balance

SYSTEM = DiagonalSystem(*(torch.full(shape, 0.5j, dtype=torch.complex128) for shape in ((1,), (1, 1), (1, 1))))


def run(
    controller: AdaptiveController | PricedController, noise: float, followed: float | None = None
) -> tuple[list[Plan], float]:
    """A run at half the cost whose saliencies are multiplied by fresh noise at each reading.

    With `followed` the units are in coordinates of their own, and that is what the last reading's rank like by now.
    """
    groups, cost = chain(64, 64, 64)
    dense = cost.total(widths_of(groups))
    state, saliency, rng, plans = controller.init(groups), lognormal(groups), np.random.default_rng(0), []
    for step in range(1, 1001):
        if not controller.due(step, 1000):
            continue
        noisy = {name: values * np.exp(noise * rng.standard_normal(len(values))) for name, values in saliency.items()}
        basis = {} if followed is None else dict.fromkeys(noisy, BalancedPairs(balance(SYSTEM)))
        reading = Reading(step, noisy, num_samples=64, calibrated=True, basis=basis)
        seen = observe(groups, cost, limit=dense / 2, dense=dense, reading=reading, step=step, total_steps=1000)
        seen = replace(seen, rank_correlation=dict.fromkeys(basis, followed))
        state, plan = controller.decide(state, seen, cost, groups)
        state = controller.cut(state, plan.keep)
        saliency = {name: values[plan.keep[name]] for name, values in saliency.items()}
        groups = after(groups, plan)
        plans.append(plan)
        if plan.landed:
            break
    return plans, cost.total(widths_of(groups)) / dense


def first_cut(plans: list[Plan]) -> int:
    """Step of the first plan that drops anything."""
    return next(plan.step for plan in plans if plan.drops())


def test_settled_readings_let_go_at_once_and_noisy_ones_at_the_deadline() -> None:
    """Equal readings leave dense at the second decision, unlike ones not before the deadline; both land in time."""
    settled, cost = run(AdaptiveController(), noise=0.0)
    assert "readings rank units alike (rank correlation with the last reading 1.00)" in settled[1].reason
    assert first_cut(settled) == settled[2].step
    noisy, noisy_cost = run(AdaptiveController(), noise=5.0)
    left = next(plan for plan in noisy if "leaves dense" in plan.reason)
    assert "the deadline is here" in left.reason
    assert left.step >= 150 > noisy[noisy.index(left) - 1].step
    assert first_cut(noisy) > left.step
    for plans, spent in ((settled, cost), (noisy, noisy_cost)):
        assert plans[-1].landed
        assert plans[-1].step == 300
        assert 0.48 < spent <= 0.5


def test_states_in_coordinates_of_their_own_are_judged_by_what_was_followed() -> None:
    """Such readings are in order by definition; that says nothing, and what the last one's states rank like does."""
    for followed, when in ((0.2, "the deadline is here"), (0.99, "readings rank units alike")):
        plans, _ = run(AdaptiveController(), noise=0.0, followed=followed)
        assert when in next(plan.reason for plan in plans if "leaves dense" in plan.reason)


def test_the_fixed_reference_cuts_earlier() -> None:
    """The price of patience: the fixed reference makes its first cut at its first decision."""
    fixed, _ = run(PricedController(), noise=0.0)
    adaptive, _ = run(AdaptiveController(), noise=0.0)
    assert first_cut(fixed) == fixed[0].step < first_cut(adaptive)


def test_agreement_is_spearmans() -> None:
    """Across groups it equals SciPy's rank correlation, ties included; within groups it is the mean of theirs."""
    rng = np.random.default_rng(1)
    before = {"a": rng.integers(0, 6, 20).astype(float), "b": rng.random(30)}
    now = {"a": rng.integers(0, 6, 20).astype(float), "b": before["b"] + 0.3 * rng.random(30)}
    joined = [np.concatenate([each["a"], each["b"]]) for each in (before, now)]
    assert agreement(before, now, across=True) == pytest.approx(spearmanr(*joined).statistic)
    within = np.mean([spearmanr(before[name], now[name]).statistic for name in ("a", "b")])
    assert agreement(before, now, across=False) == pytest.approx(within)
    assert agreement({"a": np.ones(3)}, {"a": np.ones(3)}, across=True) == 1.0


@pytest.mark.parametrize("settings", [{"alike": 1.5}, {"deadline": 0.01}, {"deadline": 0.3}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    """A correlation beyond 1, or a deadline before the warm-up or after settle, is refused."""
    with pytest.raises(ValueError, match="got"):
        AdaptiveController(**settings)


def test_it_hands_over_to_a_priced_controller_only() -> None:
    """Any other inner controller is refused when it is given, not in the middle of training.

    In another process: here the types of arguments are checked before.
    """
    code = "import setpoint; setpoint.AdaptiveController(setpoint.GatedController())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "ValueError: the adaptive controller hands over to a PricedController, got GatedController" in ended.stderr
