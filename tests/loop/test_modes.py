"""Tests of prices, tolerances, changes in mid-run and the watch over the loss, on small nets that really train."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.tolerant import TolerantController
from setpoint.errors import BudgetError, LoopError
from setpoint.gates.gated import GatedController
from setpoint.regrowth.regrowing import Regrowing
from setpoint.weights.controller import DropAndGrowController
from setpoint.weights.masking import Masking

Change = Callable[[setpoint.Loop, int], None]
GRADUAL = setpoint.PricedController()


def net(seed: int = 0, width: int = 64) -> nn.Sequential:
    """Two hidden layers, of which both can be pruned."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))


def train(
    goal: object,
    total_steps: int = 300,
    *,
    change: Change = lambda loop, step: None,
    observe: bool = True,
    spoil: Callable[[int], float] = lambda step: 0.0,
    lose: Callable[[int], float] = lambda step: 1.0,
    **settings: object,
) -> tuple[setpoint.Summary, setpoint.Loop, list[torch.Tensor]]:
    """Fit a small teacher; `change` is called after every step, `spoil` is added to the loss that is told, and `lose`
    multiplies the one that is trained.
    """
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    teacher, x = torch.randn(8, 4, generator=generator), torch.randn(32, 8, generator=generator)
    loop = setpoint.attach(model, optimizer, goal, example=(x,), total_steps=total_steps, **settings)  # type: ignore[arg-type]
    step = 0
    while step < loop.total_steps:
        x = torch.randn(32, 8, generator=generator)
        loss = (model(x) - torch.tanh(x @ teacher)).square().mean()
        if observe:
            loop.observe(loss=loss + spoil(step))
        (loss * lose(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        change(loop, step)
    return loop.finish(), loop, [parameter.detach().clone() for parameter in model.parameters()]


def test_the_higher_the_rate_the_smaller_the_model() -> None:
    """Sweeping the rate gives a monotone cost, from the whole model to nearly nothing; each run lands with a reason."""
    ratios = []
    for rate in (0.0, 0.003, 0.03, 0.3):
        summary, loop, _ = train(setpoint.Price(rate, of="flops"))
        assert summary.budget_met
        assert summary.reason.startswith("done at step")
        assert not summary.limit
        assert loop.price == pytest.approx(rate / summary.dense_flops)
        ratios.append(summary.final_flops_ratio)
    assert ratios[0] == 1.0
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 0.5


def test_observing_the_loss_changes_nothing_while_it_keeps_to_its_trend() -> None:
    """A budget run that is told the loss makes the same cuts, to the same bits, as one that is not."""
    told, loop, weights = train(setpoint.Budget.fraction(0.5, of="flops"))
    untold, other, same = train(setpoint.Budget.fraction(0.5, of="flops"), observe=False)
    assert told.widths == untold.widths
    assert [entry.dropped for entry in loop.ledger] == [entry.dropped for entry in other.ledger]
    assert all(torch.equal(one, two) for one, two in zip(weights, same, strict=True))
    assert told.gave_way == untold.gave_way == ""


def test_a_tolerance_lands_within_it() -> None:
    """The cuts that stay cost no more than the tolerance by the loop's own account; a wide one prunes more."""
    narrow, loop, _ = train(setpoint.Tolerance(loss=0.002), 800)
    wide, _, _ = train(setpoint.Tolerance(loss=0.2), 800)
    assert narrow.budget_met
    assert wide.budget_met
    assert wide.final_flops_ratio < narrow.final_flops_ratio
    assert wide.final_flops_ratio < 0.6
    assert any(entry.grown for entry in loop.ledger)
    assert "taken back" in " ".join(entry.reason for entry in loop.ledger)


def jump_after_a_cut() -> dict[str, Any]:
    """Arguments of `train` by which the loss that is told is higher by 3 from the first cut on."""
    cuts: list[int] = []

    def note(loop: setpoint.Loop, step: int) -> None:
        if not cuts and loop.ledger and loop.ledger[-1].reason.startswith("dropped"):
            cuts.append(step)

    return {"change": note, "spoil": lambda step: 3.0 if cuts else 0.0}


def test_a_loss_that_leaves_its_trend_takes_the_last_cut_back_once() -> None:
    """In budget mode: a jump after a cut brings its units back, with a warning; then the budget has the last word."""
    with pytest.warns(UserWarning, match="the cut was taken back at step"):
        summary, loop, _ = train(
            setpoint.Budget.fraction(0.5, of="flops"),
            800,
            **jump_after_a_cut(),
            controller=setpoint.PricedController(setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=8)),
        )
    back = [entry for entry in loop.ledger if entry.grown]
    assert len(back) == 1
    at = [entry.step for entry in loop.ledger].index(back[0].step)
    taken = next(entry for entry in reversed(list(loop.ledger)[:at]) if entry.dropped)
    assert {name: sorted(units) for name, units in taken.dropped.items()} == dict(back[0].grown)
    assert not back[0].dropped
    assert summary.budget_met
    assert "the cut was taken back" in summary.gave_way
    assert summary.gave_way.endswith("the budget was met")


WATCHED = setpoint.PricedController(setpoint.Schedule(warmup=0.2, settle=0.6, num_cuts=8))


@pytest.mark.parametrize(
    "settings",
    [
        {"actuator": Regrowing(reserve_bytes=0), "controller": WATCHED},
        {"actuator": Masking(), "controller": DropAndGrowController(WATCHED)},
    ],
    ids=["full reserve", "single weights"],
)
@pytest.mark.filterwarnings("ignore:the reserve of")
def test_a_cut_that_cannot_be_taken_back_says_so(settings: dict[str, object]) -> None:
    """In budget mode, a cut that does not rest lets the reference pause, a warning says why; the budget is met."""
    with pytest.warns(UserWarning, match="does not rest in full in a reserve, and the reference pauses"):
        summary, loop, _ = train(
            setpoint.Budget.fraction(0.5, of="flops"),
            800,
            **jump_after_a_cut(),
            **settings,
        )
    (paused,) = (entry for entry in loop.ledger if entry.reason.startswith("paused"))
    assert not paused.dropped and not paused.grown and paused.step < loop.ledger[-1].step
    assert summary.budget_met and summary.gave_way.endswith("the budget was met")


@pytest.mark.filterwarnings("ignore:the reserve of")
def test_a_tolerance_without_a_reserve_cuts_no_further() -> None:
    """A cut beyond the tolerance that does not rest stays, is the last one, and is said to stay."""
    summary, loop, _ = train(
        setpoint.Tolerance(loss=0.05),
        800,
        spoil=lambda step: 3.0 if step >= 100 else 0.0,
        actuator=Regrowing(reserve_bytes=0),
    )
    last = loop.ledger[-1]
    assert summary.budget_met and last.reason.startswith("done: the last cut stays")
    assert not last.grown and not any(entry.grown for entry in loop.ledger)
    assert [entry.step for entry in loop.ledger if entry.dropped][-1] < last.step
    assert dict(last.widths) == summary.widths


@pytest.mark.parametrize(
    ("goal", "controller"),
    [
        (setpoint.Price(0.1, of="flops"), setpoint.PricedController()),
        (setpoint.Price(0.1, of="flops"), GatedController()),
        (setpoint.Price(0.1, of="flops"), PenaltyController(setpoint.Price(0.2, of="flops"))),
        (setpoint.Tolerance(0.1), setpoint.PricedController()),
        (setpoint.Budget.fraction(0.5, of="flops"), PenaltyController(setpoint.Price(0.2, of="flops"))),
        (setpoint.Budget.fraction(0.5, of="flops"), TolerantController(setpoint.Tolerance(0.1))),
    ],
    ids=str,
)
def test_a_controller_of_another_goal_is_refused(goal: object, controller: object) -> None:
    """A price, a tolerance or a budget beside a controller that pursues something else is refused at attach."""
    with pytest.raises(BudgetError, match=r"holds a budget|pursues"):
        train(goal, controller=controller)


@pytest.mark.parametrize("controller", [setpoint.PricedController(), GatedController()])
def test_a_change_of_budget_is_bumpless_and_lands(controller: object) -> None:
    """The reference goes on from what a step costs at the change, and the run lands on the new budget."""
    at_change: list[float] = []

    def change(loop: setpoint.Loop, step: int) -> None:
        if step == 48:
            at_change.append(loop.ledger[-1].spent["flops"])
            loop.budget = setpoint.Budget.fraction(0.25, of="flops")

    summary, loop, _ = train(setpoint.Budget.fraction(0.6, of="flops"), change=change, controller=controller)
    assert summary.budget_met
    assert 0.15 < summary.final_flops_ratio <= 0.25
    following = [entry.reference["flops"] for entry in loop.ledger if entry.step > 48]
    # Of the 42 steps that are left of the way down, four are gone at the first decision after the change.
    share = 4 / 42
    expected = at_change[0] ** (1 - share) * (0.25 * summary.dense_flops) ** share
    assert following[0] == pytest.approx(expected, rel=0.02)
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(following, following[1:], strict=False))


def test_a_change_to_another_resource_and_to_a_run() -> None:
    """Half way down the goal may become parameters, or the whole run."""

    def to_params(loop: setpoint.Loop, step: int) -> None:
        if step == 50:
            loop.budget = setpoint.Budget.fraction(0.3, of="params")

    summary, _, _ = train(setpoint.Budget.fraction(0.6, of="flops"), change=to_params)
    assert summary.budget_met
    assert summary.spent["params"] <= summary.limit["params"]

    def to_run(loop: setpoint.Loop, step: int) -> None:
        if step == 50:
            loop.budget = setpoint.Budget.fraction(0.6, of="flops", per="run")

    summary, _, _ = train(setpoint.Budget.fraction(0.6, of="flops"), change=to_run, controller=GRADUAL)
    assert summary.budget_met
    assert 0.99 <= summary.spent_run["flops"] / summary.limit_run["flops"] <= 1 + 1e-12


def test_a_budget_is_frozen_after_the_landing() -> None:
    """After the landing, without a budget, or out of reach, a new one is refused, and the old one stays."""

    def late(loop: setpoint.Loop, step: int) -> None:
        if step == 200:
            with pytest.raises(LoopError, match="the budget is frozen at step 200.*met, and before step \\d+"):
                loop.budget = setpoint.Budget.fraction(0.25, of="flops")
        if step == 40:
            with pytest.raises(BudgetError, match="cannot be reached"):
                loop.budget = setpoint.Budget.fraction(0.0001, of="flops")
            with pytest.raises(BudgetError, match="was not costed out"):
                loop.budget = setpoint.Budget.fraction(0.5, of="latency")
            with pytest.raises(ValueError, match="above the 40 steps done"):
                loop.total_steps = 40

    budget = setpoint.Budget.fraction(0.5, of="flops")
    summary, loop, _ = train(budget, change=late, controller=GRADUAL)
    assert summary.budget_met
    assert loop.budget == budget

    def none(loop: setpoint.Loop, step: int) -> None:
        if step == 40:
            with pytest.raises(LoopError, match="Price or a Tolerance"):
                loop.budget = budget

    train(setpoint.Price(0.01, of="flops"), change=none)


def test_another_length_moves_the_decisions() -> None:
    """A run told in the middle that it is twice as long settles at 30 % of its new length."""

    def longer(loop: setpoint.Loop, step: int) -> None:
        if step == 40:
            loop.total_steps = 600

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary, loop, _ = train(setpoint.Budget.fraction(0.5, of="flops"), change=longer, controller=GRADUAL)
    assert summary.budget_met
    assert summary.total_steps == summary.steps == 600
    assert loop.ledger[-1].step == 180
    assert summary.final_flops_ratio <= 0.5
