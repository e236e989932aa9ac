"""The exchanging controller: what it leaves to the inner one, and when a run lands."""

from __future__ import annotations

import numpy as np

from controller.plants import chain, lognormal, run
from setpoint.controller.priced import PricedController
from setpoint.weights.controller import DropAndGrowController
from setpoint_bench.scheduled import ScheduledController


def test_how_many_stay_at_which_price_is_the_inner_controller_s_choice() -> None:
    """Claim: keep, worth and price of every plan are those of the inner controller alone; the share falls to 0 at
    `end`, and there the run lands.
    """
    groups, cost = chain(20, 40, 30)
    both = [
        run(controller, groups, cost, lognormal(groups), fraction=0.5, total_steps=200)
        for controller in (PricedController(), DropAndGrowController(PricedController()))
    ]
    assert len(both[0]) <= len(both[1])
    for alone, wrapped in zip(both[0], both[1], strict=False):
        assert all(np.array_equal(keep, wrapped.plan.keep[name]) for name, keep in alone.plan.keep.items())
        assert alone.plan.price == wrapped.plan.price and alone.step == wrapped.step
    shares = [(decision.step, decision.plan.drop_and_grow) for decision in both[1]]
    assert all(share > 0 for step, share in shares if step < 140) and shares[-1] == (140, 0.0)
    assert sorted((share for _, share in shares), reverse=True) == [share for _, share in shares]
    assert [decision.plan.budget_met for decision in both[1]] == [False] * (len(shares) - 1) + [True]


def test_a_run_lands_where_the_inner_controller_decides_for_the_last_time() -> None:
    """Claim: where no decision is to come, the landing is not put off, and nothing is exchanged with it."""
    groups, cost = chain(20, 40, 30)
    decisions = run(
        DropAndGrowController(ScheduledController(end=0.4)),
        groups,
        cost,
        lognormal(groups),
        fraction=0.5,
        total_steps=100,
    )
    assert decisions[-1].step == 40 and decisions[-1].plan.budget_met and decisions[-1].plan.drop_and_grow == 0
    assert decisions[0].plan.drop_and_grow > 0
