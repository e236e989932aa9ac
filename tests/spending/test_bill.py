"""A bill: budgets per step fix the finished model, and what the whole run may spend fixes the number of its steps."""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import setpoint
from loop.test_budgets import Machine, machine, mlp
from setpoint.controller.schedule import Schedule
from setpoint.distillation import Teacher
from setpoint.errors import BudgetError, CheckpointError, LoopError
from setpoint.spending.account import Account
from setpoint.spending.meter import StepMeter, Stopwatch
from setpoint.spending.run_budget import Bill

__all__ = ["machine"]

FULL = {"flops": "25%", "flops/run": "100%"}
X = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (16,), generator=torch.Generator().manual_seed(1))


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 4))
    return model, torch.optim.AdamW(model.parameters(), 1e-3)


def attached(budget: Any, total_steps: int = 200, **settings: Any) -> tuple[setpoint.Loop, nn.Module, Any]:
    model, optimizer = build()
    return (
        setpoint.attach(model, optimizer, budget, example=(X,), total_steps=total_steps, **settings),
        model,
        optimizer,
    )


def step(model: nn.Module, optimizer: Any, x: Tensor = X) -> None:
    nn.functional.cross_entropy(model(x), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


def train(loop: setpoint.Loop, model: nn.Module, optimizer: Any, x: Tensor = X) -> list[int]:
    """As long as the bill pays; the lengths that were planned on the way."""
    lengths = [loop.total_steps]
    while loop.step < loop.total_steps:
        step(model, optimizer, x)
        lengths.append(loop.total_steps)
    return lengths


@pytest.mark.parametrize(
    "budget",
    [
        {"flops": "25%", "flops/run": "100%"},
        {"flops": "50%", "flops/run": "60%"},
        {"params": "40%", "flops/run": "100%"},
        {"flops": "30%", "params": "50%", "flops/run": "80%"},
        {"memory": "80%", "flops/run": "100%"},
    ],
)
def test_the_bill_is_spent_and_never_exceeded(budget: dict[str, str]) -> None:
    """Claim: the run ends within one percent below the bill, with the budgets per step met, overhead counted in."""
    loop, model, optimizer = attached(budget)
    dense = loop.ledger.header["dense"]["flops"]
    bill = float(budget["flops/run"].rstrip("%")) / 100 * 200 * dense
    train(loop, model, optimizer)
    summary = loop.finish()
    assert summary.budget_met and f"FLOPs spent over {summary.steps} steps" in summary.reason, summary.reason
    assert 0.99 * bill <= summary.train_flops <= bill
    assert summary.limit_run == {"flops": bill} and summary.spent_run == {"flops": summary.train_flops}
    assert summary.steps == summary.total_steps > 200 * float(budget["flops/run"].rstrip("%")) / 100


class Lopsided(nn.Module):
    """Most FLOPs are in convolutions, most parameters in linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 256), nn.Linear(256, 256), nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x).relu()).relu().mean((2, 3))
        return self.fc3(self.fc2(self.fc1(out).relu()).relu())


def lopsided(budget: Any) -> tuple[setpoint.Loop, list[int]]:
    """A run of `Lopsided` with a bill, and the lengths that were planned on the way."""
    torch.manual_seed(0)
    model, x = Lopsided(), torch.randn(16, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loop = setpoint.attach(model, optimizer, {**budget, "flops/run": "100%"}, example=(x,), total_steps=100)
    return loop, train(loop, model, optimizer, x)


@pytest.mark.parametrize("budget", [{"params": "50%"}, {"params": "25%"}, {"memory": "60%"}])
def test_flops_are_forecast_where_the_budget_is_of_something_else(budget: dict[str, str]) -> None:
    """Claim: a budget that takes few FLOPs along pays for few more steps, and the first plan knows it."""
    loop, lengths = lopsided(budget)
    summary = loop.finish()
    assert summary.budget_met and 0.98 * summary.limit_run["flops"] < summary.train_flops <= summary.limit_run["flops"]
    assert max(lengths) / min(lengths) < 1.15 and lengths[-1] < 150


@pytest.mark.parametrize("share", ["10%", "2%"])
@pytest.mark.parametrize("misled", [False, True])
def test_the_budget_is_met_before_the_bill_is_spent(
    monkeypatch: pytest.MonkeyPatch, share: str, *, misled: bool
) -> None:
    """Claim: decisions move ahead where the run gets shorter, whatever forecasts have promised."""
    if misled:
        monkeypatch.setattr(
            "setpoint.spending.run_budget.likely_widths", lambda cost, groups, *_: {each.name: 1 for each in groups}
        )
    loop, lengths = lopsided({"params": share})
    summary = loop.finish()
    limit = summary.limit["params"]
    met = next(entry.step for entry in loop.ledger if entry.dropped and entry.spent["params"] <= limit)
    assert summary.budget_met and met <= 0.7 * summary.steps, (met, summary.reason)
    assert 0.98 * summary.limit_run["flops"] < summary.train_flops <= summary.limit_run["flops"]
    assert not misled or lengths[0] > max(lengths[met:])  # it had promised more


@given(
    share=st.floats(0.1, 0.9),
    paid=st.floats(0.4, 3.0),
    total_steps=st.integers(60, 500),
    sensing=st.sampled_from([0.0, 0.002, 0.02]),
    taught=st.floats(0.0, 1.0),
    every=st.integers(1, 5),
    short=st.floats(0.0, 0.3),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_a_total_is_spent_and_never_exceeded(
    share: float, paid: float, total_steps: int, sensing: float, taught: float, every: int, short: float
) -> None:
    """Claim: whatever limit, total, a teacher's passes and cuts that stay short come to: never over, little left."""
    schedule, total = Schedule(), paid * total_steps
    budget = setpoint.Budget.total(total, of="flops", per="run")
    account = Account(Stopwatch(), StepMeter(), step_flops=1.0, verification_flops=0.0, sensing_flops=sensing)
    bill = Bill(budget, schedule, total, saves=True, lowest=share, share=share).planned(account)
    while account.num_steps < bill.length:
        account.sensed((0.0 if bill.met else sensing) + (taught if account.num_steps % every == 0 else 0.0))
        account.train_flops += account.step_flops
        account.num_steps += 1
        bill = bill.stepped(account, learn=True)
        step, decisions_as = account.num_steps, bill.decisions_as
        if not bill.met and schedule.due(step, decisions_as):
            met = schedule.settled(step, decisions_as)
            reference = schedule.at(step, decisions_as, start=1.0, limit=share)
            cost = min(account.step_flops, reference + (0.0 if met else short * (1 - reference)))
            account.step_flops = cost
            overhead = replace(bill.overhead, noted=account.overhead_flops)
            bill = replace(bill, met=met, present=cost, share=share / cost, overhead=overhead).planned(account)
    assert account.train_flops <= total * (1 + 1e-12)
    assert total - account.train_flops <= 2 * account.step_flops + 3 * taught + 2 * sensing


def test_a_run_that_does_not_come_down_ends_in_time() -> None:
    """Claim: where no decision can be made, since nothing was read, the run gets shorter instead of going over."""
    loop, model, optimizer = attached({"flops": "25%", "flops/run": "50%"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while loop.step < loop.total_steps:
            optimizer.step()
        summary = loop.finish()
    assert not summary.budget_met and summary.train_flops <= summary.limit_run["flops"]


def resumed(run: tuple[setpoint.Loop, nn.Module, Any], budget: Any, total_steps: int) -> None:
    """A run goes on in two processes: with the same lengths, widths and weights."""
    saved = copy.deepcopy([part.state_dict() for part in run])
    again = attached(budget, total_steps)
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    assert train(*run) == train(*again)
    assert run[0].widths == again[0].widths
    assert all(map(torch.equal, run[1].parameters(), again[1].parameters()))


@pytest.mark.parametrize("at", [10, 60, 150, 300])
def test_a_run_with_a_bill_is_resumed_bit_for_bit(at: int) -> None:
    """Claim: length and weights go on as in the uninterrupted run, before the first cut, between cuts and after all."""
    run = attached(FULL)
    for _ in range(at):
        step(*run[1:])
    resumed(run, FULL, 200)


def test_a_state_of_another_bill_is_refused() -> None:
    """Claim: a run with a bill does not go on from one with another, or without."""
    state = attached(FULL)[0].state_dict()
    for other in ({"flops": "25%", "flops/run": "50%"}, {"flops": "25%"}):
        with pytest.raises(CheckpointError, match="the state is of another run"):
            attached(other)[0].load_state_dict(state)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"flops": "25%", "flops/run": "1 kflops"}, "pays for no run: attaching spent .*, so ask for"),
        ({"flops": "25%", "flops/run": "300%"}, "more than the dense run costs.*or 100% and 3 times the total_steps"),
        ({"flops": "25%", "latency/run": "10 s"}, "together with budgets per step a budget per run is of 'flops'"),
        ({"flops": "25%", "flops/epoch": "100%"}, "write the resource alone, or flops/run"),
        ({"flops": "25%", "params/run": "100%"}, "no budget per run of 'params'"),
        ([0.25, 0.5], "one budget for each resource"),
    ],
)
def test_bills_that_cannot_be(budget: Any, words: str) -> None:
    """Claim: a sentence at attach, and the model can be attached to afterwards."""
    model, optimizer = build()
    with pytest.raises(BudgetError, match=words):
        setpoint.attach(model, optimizer, budget, example=(X,), total_steps=200)
    setpoint.attach(model, optimizer, 0.5, example=(X,), total_steps=200).detach()


@pytest.mark.parametrize("bill", [1e15, "9e20"])
def test_a_large_bill_is_planned_at_once(bill: float | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: `attach` walks through no steps, so that a bill in a wrong unit is seen at once."""
    monkeypatch.setattr(Schedule, "due", None)
    loop = attached({"flops": "25%", "flops/run": bill})[0]
    assert loop.total_steps > 10**9
    loop.detach()


def test_a_run_that_leaves_its_bill_is_warned_of() -> None:
    """Claim: a run that stops long before its bill is spent says so, and one that trains to the end does not."""
    loop, model, optimizer = attached(FULL)
    for _ in range(200):
        step(model, optimizer)
    with pytest.warns(UserWarning, match=r"the run ended at step 200, and \d+% of the run budget is unused: train for"):
        assert loop.finish().budget_met
    loop, model, optimizer = attached(FULL)
    train(loop, model, optimizer)
    with warnings.catch_warnings(action="error"):
        assert "unused" not in loop.finish().note


def test_what_a_stopped_run_says() -> None:
    """Claim: it is not over its bill, and one that goes on after its end says how many steps it made."""
    loop, model, optimizer = attached(FULL, controller=setpoint.PricedController())
    for _ in range(100):
        step(model, optimizer)
    with pytest.warns(UserWarning, match="the budget is not met"):
        summary = loop.finish()
    assert "asked for the run" not in summary.reason and "of the run budget is unused" in summary.note
    assert f"of the dense FLOPs after 100 of {summary.total_steps} steps, 25.0 % asked for" in summary.reason
    loop, model, optimizer = attached({"flops": "25%", "flops/run": "10%"}, total_steps=100)
    length = loop.total_steps + 20
    with pytest.warns(UserWarning, match=r"(the run was to have|the budget is not met)"):
        for _ in range(length):
            step(model, optimizer)
        summary = loop.finish()
    assert f"spent after {length} of {summary.total_steps} steps" in summary.reason and summary.total_steps < length


def test_a_run_whose_budget_was_changed_is_resumed_bit_for_bit() -> None:
    """Claim: attached with the later budget it goes on in the same lengths and weights as the uninterrupted run."""
    run = attached(FULL, total_steps=100)
    for at in range(60):
        if at == 20:
            run[0].budget = 0.5
        step(*run[1:])
    resumed(run, {"flops": "50%", "flops/run": "100%"}, 100)


def test_length_and_bill_are_fixed() -> None:
    """Claim: length and bill are fixed beside a bill; budgets per step can change, and the length follows at once."""
    loop, model, optimizer = attached(FULL)
    with pytest.raises(LoopError, match="the run budget decides the length of the run"):
        loop.total_steps = 300
    with pytest.raises(BudgetError, match="fixed at attach"):
        loop.budget = {"flops": "50%", "flops/run": "90%"}
    before = loop.total_steps
    loop.budget = 0.5
    planned = loop.total_steps
    train(loop, model, optimizer)
    summary = loop.finish()
    assert 0.9 * summary.steps < planned < 1.1 * summary.steps
    assert summary.budget_met and summary.steps < before and summary.train_flops <= summary.limit_run["flops"]


def taught(total_steps: int, due: Callable[[int], bool], before: int = 0) -> tuple[setpoint.Loop, list[int]]:
    """A run in which a teacher as large as the dense model answers some steps, and many batches at first."""
    loop, model, optimizer = attached({"flops": "50%", "flops/run": "100%"}, total_steps)
    teacher = Teacher(build()[0], loop)
    for _ in range(before):
        teacher.logits(X)
    lengths = []
    while loop.step < loop.total_steps:
        own = model(X)
        loss = nn.functional.cross_entropy(own, Y)
        if due(loop.step):
            loss = teacher.loss(loss, own, teacher.logits(X))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths.append(loop.total_steps)
    return loop, lengths


@pytest.mark.parametrize(("total_steps", "every"), [(60, 1), (200, 2)])
def test_a_teacher_is_paid_for(total_steps: int, every: int) -> None:
    """Claim: the overhead of steps is planned with once it is seen; the budget is met, and the bill not exceeded."""
    loop, lengths = taught(total_steps, lambda step: step % every == 0)
    summary = loop.finish()
    assert summary.budget_met, summary.reason
    dense = summary.limit_run["flops"] / total_steps
    assert summary.limit_run["flops"] - dense < summary.train_flops <= summary.limit_run["flops"]
    planned = lengths[2 * every :]
    assert max(planned) / min(planned) < 1.15, planned


def test_a_pass_over_all_data_is_not_expected_again() -> None:
    """Claim: answers that are asked for once, before training, take their FLOPs from the bill and nothing more."""
    loop, lengths = taught(200, lambda step: False, before=100)
    summary = loop.finish()
    assert summary.budget_met and max(lengths[30:]) / min(lengths[30:]) < 1.1
    assert 0.99 * summary.limit_run["flops"] < summary.train_flops <= summary.limit_run["flops"]


@pytest.mark.parametrize("seed", range(2))
def test_a_clock_that_wavers_does_not_multiply_the_length(machine: Machine, seed: int) -> None:
    """Claim: where FLOPs fall much faster than seconds, the run is no longer than they have fallen by; once the budget
    is met, what is left pays for the rest of the steps exactly.
    """
    machine.step_s = lambda widths: 1e-3 + 2e-9 * math.prod(widths.values())  # type: ignore[method-assign]
    generator, (model, optimizer, x) = random.Random(seed), mlp()
    budget = {"latency": "92%", "flops/run": "100%"}
    loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=200)
    account, bill = loop.spending.account, loop.spending.limit_run["flops"]
    while loop.step < loop.total_steps:
        nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()
        machine.factor = 1.5 * generator.uniform(0.97, 1.03)
        machine.live(loop)
        optimizer.step()
        optimizer.zero_grad()
        paid = loop.step + (bill - account.train_flops) / account.step_flops
        assert loop.total_steps < 1.15 * paid
        if loop.budget_met:
            assert abs(loop.total_steps - paid) <= 1 + account.sensing_flops / account.step_flops
    assert account.train_flops <= bill
    loop.finish()
