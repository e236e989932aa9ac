"""Learned gates: where they begin, what they learn, what they leave alone, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from controller.plants import chain, lognormal, observe
from setpoint.controller.offer import Probe
from setpoint.controller.plan import Plan
from setpoint.controller.priced import PricedController
from setpoint.cost.cost import Cost
from setpoint.gates.gated import GatedController, GateNet
from setpoint.groups.group import Group, widths_of
from setpoint.sensor.reading import Reading


def decide(
    controller: GatedController | PricedController, reading: Reading, groups: tuple[Group, ...], cost: Cost
) -> Plan:
    """The plan of a run of one step, down to half of the dense cost."""
    dense = cost.total(widths_of(groups))
    seen = observe(groups, cost, limit=0.5 * dense, dense=dense, reading=reading)
    return controller.decide(controller.init(groups), seen, cost, groups)[1]


def test_untrained_gates_decide_as_the_priced_controller() -> None:
    """Gates begin at worth / price: with next to no learning rate the plan drops the same units."""
    groups, cost = chain(20, 40, 30)
    reading = Reading(1, lognormal(groups), 1)
    gated = decide(GatedController(learning_rate=1e-12), reading, groups, cost)
    plain = decide(PricedController(), reading, groups, cost)
    assert all(np.array_equal(gated.keep[name], plain.keep[name]) for name in plain.keep)
    assert gated.price["flops"] == pytest.approx(plain.price["flops"], rel=1e-4)


def test_a_gate_of_one_half_is_a_worth_equal_to_the_price() -> None:
    """Trained on units of one kind, the gate goes to where dJ/dg vanishes: 1 - (1 + slope) / curvature."""
    features = torch.zeros(64, 3)
    for slope, curvature in ((0.0, 2.0), (0.0, 8.0), (1.0, 4.0)):
        net = GateNet.fresh(3, 16, seed=0)
        wanted = 1.0 - (1.0 + slope) / curvature
        net = net.trained(features, torch.full((64,), slope), torch.full((64,), curvature), 400, 0.01)
        assert torch.sigmoid(net.logits(features)).tolist() == pytest.approx([wanted] * 64, abs=0.02)


def test_slopes_that_features_foretell_change_the_order() -> None:
    """Of units with equal curvature, those whose slope says that the loss falls without them go first."""
    groups, cost = chain(40)
    slope = np.where(np.arange(40) % 2 == 0, 0.05, -0.05)
    reading = Reading(1, {"layer0": np.full(40, 0.1)}, 1, slope={"layer0": slope})
    dropped = ~decide(GatedController(steps=200), reading, groups, cost).keep["layer0"]
    assert dropped.sum() == 20 and (np.flatnonzero(dropped) % 2 == 0).all()


def test_learning_goes_on_from_decision_to_decision() -> None:
    """The state that comes out holds a net that was trained on, and the one that went in is as it was."""
    groups, cost = chain(20, 40)
    controller, reading = GatedController(), Reading(1, lognormal(groups), 1)
    dense = cost.total(widths_of(groups))
    seen = observe(groups, cost, limit=0.5 * dense, dense=dense, reading=reading)
    state = controller.init(groups)
    before = [each.clone() for each in state.net.weights]
    once, _ = controller.decide(state, seen, cost, groups)
    twice, _ = controller.decide(once, seen, cost, groups)
    assert (once.net.count, twice.net.count) == (controller.steps, 2 * controller.steps)
    assert all(torch.equal(a, b) for a, b in zip(before, state.net.weights, strict=True))
    assert not torch.equal(once.net.weights[-2], twice.net.weights[-2])


def test_the_training_around_it_is_left_alone() -> None:
    """It draws nothing from the global generator, and learns in float32 whatever the user's modes and defaults are."""
    groups, cost = chain(20, 40)
    reading, controller = Reading(1, lognormal(groups), 1), GatedController(seed=3)
    plain = decide(controller, reading, groups, cost)
    random_state = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            odd = decide(controller, reading, groups, cost)
            assert {each.dtype for each in controller.init(groups).net.weights} == {torch.float32}
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(np.array_equal(plain.keep[name], odd.keep[name]) for name in plain.keep)
    assert plain.price == odd.price


@pytest.mark.parametrize("block", [1, 4])
def test_price_and_worth_are_in_loss_per_unit(block: int) -> None:
    """However gates are trained: the price is the priced controller's, the worth of what goes its saliency / saving."""
    groups, cost = chain(40, multiple_of=block)
    reading = Reading(1, lognormal(groups), 1, slope={"layer0": np.where(np.arange(40) % 2 == 0, 0.5, -0.5)})
    gated, plain = (decide(each, reading, groups, cost) for each in (GatedController(steps=200), PricedController()))
    gone = ~gated.keep["layer0"]
    assert not np.array_equal(gated.keep["layer0"], plain.keep["layer0"])
    assert gated.price == plain.price
    saving = cost.saving({"layer0": 40}, "layer0", block)  # of one layer all blocks save the same
    summed = reading.saliency["layer0"][gone].sum()
    assert gated.worth["layer0"][gone].sum() / block == pytest.approx(summed / saving, rel=1e-9)
    if block == 1:
        assert gated.worth["layer0"][gone] == pytest.approx(reading.saliency["layer0"][gone] / saving, rel=1e-9)


def test_what_comes_back_is_the_priced_controllers() -> None:
    """The same units come back, of the same worth, as without gates: what was probed is set against the real price."""
    groups, cost = chain(24, 40)
    reading, two = Reading(1, lognormal(groups), 1), np.array([50, 51])
    error, many = {"layer1": np.zeros(2)}, {"layer1": np.full(2, 9)}
    dense, gains = cost.total(widths_of(groups)), np.geomspace(0.03, 30.0, 13)
    for gain in gains:
        probe = Probe(
            1, {"layer1": two}, {"layer1": np.array([gain, gain / 3])}, error, many, {"layer1": np.ones(2, int)}
        )
        seen = observe(groups, cost, limit=0.5 * dense, dense=dense, reading=reading, step=20, total_steps=100)
        plans = []
        for controller in (PricedController(regrow=True), GatedController(PricedController(regrow=True), steps=100)):
            plans.append(controller.decide(controller.init(groups), replace(seen, probe=probe), cost, groups)[1])
        plain, gated = plans
        assert {n: list(v) for n, v in plain.grow.items()} == {n: list(v) for n, v in gated.grow.items()}
        assert {n: list(v) for n, v in plain.grow_worth.items()} == {n: list(v) for n, v in gated.grow_worth.items()}
        assert plain.price == gated.price


def test_its_flops_are_those_of_its_products() -> None:
    """One decision costs what a counter counts for its forward and backward passes, within a tenth."""
    from torch.utils.flop_counter import FlopCounterMode

    groups, cost = chain(64, 64)
    controller = GatedController()
    assert controller.conduct.learns
    with FlopCounterMode(display=False) as counter:
        decide(controller, Reading(1, lognormal(groups), 1), groups, cost)
    assert counter.get_total_flops() == pytest.approx(controller.flops(groups), rel=0.1)


@pytest.mark.parametrize("setting", [{"hidden": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": 2.0}])
def test_a_setting_out_of_range_is_refused(setting: dict[str, float]) -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match=next(iter(setting))):
        replace(GatedController(), **setting)  # type: ignore[arg-type]
