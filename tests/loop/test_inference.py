"""Seconds of inference as a budget: predicted, read from the model itself, held, and invisible."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from loop.test_budgets import Machine, machine, train
from setpoint.controller.priced import PricedController
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.host.find import host_of
from setpoint.resources.costing import cost_out
from setpoint.resources.replica import replica
from setpoint.spending import meter as meter_file

__all__ = ["machine"]

Budget = setpoint.Budget


class Answering(nn.Module):
    """Two hidden layers; a forward pass in eval mode turns the machine's clock, half as long again as a copy's."""

    def __init__(self, turn: Callable[[Answering], None]) -> None:
        super().__init__()
        self.turn = turn
        self.layers = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        if not self.training:
            self.turn(self)
        out: Tensor = self.layers(x)
        return out

    @property
    def widths(self) -> dict[str, int]:
        """Units of both hidden layers."""
        return {name: len(self.layers[place].bias) for name, place in (("a", 0), ("b", 2))}


def answering(machine: Machine) -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """A model on this machine, with optimizer and batch."""

    def turn(model: Answering) -> None:
        machine.now += machine.factor * machine.pass_s(model.widths)

    model = Answering(turn)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(8, 16)


@pytest.mark.parametrize("relative", [True, False])
def test_inference_is_held_by_the_meter(machine: Machine, relative: bool) -> None:
    """A pass takes half as long again as on a copy: feedback lands within the limit, and not far below it."""
    dense = machine.factor * machine.pass_s({"a": 256, "b": 256})
    make, limit = (Budget.fraction, 0.6) if relative else (Budget.total, 0.6 * dense)
    budget, made = make(limit, of="inference", example=(torch.randn(2, 16),)), answering(machine)
    loop = train(made, budget, 60, machine.live)
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    assert summary.limit["inference"] == pytest.approx(0.6 * dense)
    final = machine.factor * machine.pass_s(loop.widths)
    assert 0.9 * 0.6 * dense < final <= 1.03 * 0.6 * dense
    assert summary.metered["inference"] == pytest.approx(final)
    assert summary.sources["inference"].startswith("measured")
    assert loop.ledger.header["modelled"]["inference"].startswith("modelled")
    read = [entry for entry in loop.ledger if "inference" in entry.metered]
    assert read and all("inference" in entry.predicted for entry in read)


def test_a_busy_machine_does_not_end_the_cuts(machine: Machine) -> None:
    """Something else that slows most passes of two decisions is no reason to give a budget up: the quick ones tell."""
    dense, passes = machine.factor * machine.pass_s({"a": 256, "b": 256}), 0

    def turn(model: Answering) -> None:
        nonlocal passes
        passes += 1
        busy = 1 < cuts <= 3 and passes % 4
        machine.now += dense * 1.2 if busy else machine.factor * machine.pass_s(model.widths)

    model, cuts = Answering(turn), 0
    made = model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(8, 16)

    def live(loop: setpoint.Loop) -> None:
        nonlocal cuts
        cuts = sum(1 for entry in loop.ledger if entry.dropped)
        machine.live(loop)

    loop = train(made, Budget.fraction(0.5, of="inference", example=(torch.randn(2, 16),)), 100, live)
    assert loop.summary is not None and loop.summary.budget_met, loop.summary
    assert machine.factor * machine.pass_s(loop.widths) <= 1.03 * 0.5 * dense


def test_passes_are_overhead(machine: Machine) -> None:
    """FLOPs of the timed passes are in `overhead_flops`, those of two samples of a batch of eight as a quarter."""
    began, found = list[float](), list[float]()

    def live(loop: setpoint.Loop) -> None:
        if not loop.step:
            began.append(loop.spending.account.overhead_flops)  # with what attach spent on copies
        machine.live(loop)

    budgets = Budget.fraction(1.0, of="inference", example=(torch.randn(2, 16),)), Budget.fraction(1.0, of="flops")
    gradual = PricedController()
    loops = [train(answering(machine), budget, 20, live, controller=gradual) for budget in budgets]
    for loop, before in zip(loops, began, strict=True):
        assert loop.summary is not None
        found.append(loop.summary.overhead_flops - before)
    one_pass = 2 * 2 * (16 * 256 + 256 * 256 + 256 * 4)
    read = found[0] - found[1]
    assert read > 0 and read % one_pass == 0
    seconds = [loop.summary.overhead["deciding"] for loop in loops if loop.summary]
    assert seconds[0] > seconds[1]


def test_prediction_is_of_a_forward_pass_in_eval_mode(machine: Machine) -> None:
    """The tape holds a forward pass only, of the batch that is asked for, without dropout."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer, example = torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(8, 16),)
    groups = setpoint.find_groups(model, example)
    dense, budget = widths_of(groups), Budget.fraction(0.5, of="inference", example=(torch.randn(3, 16),))
    with replica(model, (), budget.example, groups, [], dense, data=True, trains=False) as made:
        assert not any(module.training for module in made.model.modules()) and made.held()[-1].shape == (3, 16)
        with torch.profiler.profile() as seen:
            made.step()
    names = {event.name for event in seen.events()}
    assert "aten::addmm" in names and not any("bernoulli" in name or "backward" in name for name in names)
    assert all(module.training for module in model.modules())
    costing = cost_out(host_of(model, optimizer, ()), example, trace(model, example), groups, [budget])
    cost, name = costing.costs["inference"], groups[0].name
    assert cost.resource == "inference" and set(costing.costs) == {"inference"}
    assert cost.total(dense) == pytest.approx(machine.pass_s(dense), rel=0.2)
    assert cost.saving(dense, name, 32) == pytest.approx(cost.total(dense) - cost.total({**dense, name: 32}))


class Untidy(nn.Module):
    """A model whose forward leaves traces, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3)
        self.layers = nn.Sequential(*first, nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(3))
        self.modes: list[bool] = []

    def train(self, mode: bool = True) -> Untidy:
        """Note each call."""
        self.modes.append(mode)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Logits with noise; counts its calls and keeps its output."""
        out: Tensor = self.layers(x) + 0.01 * torch.randn(3)
        self.seen += 1
        self.last = out.detach().mean(0)
        self.kept = out
        return out


def trained(held: bool) -> dict[str, Any]:
    """Everything that 20 steps leave behind."""
    torch.manual_seed(3)
    np.random.seed(3)
    model, calls = Untidy(), []
    model.layers[1].eval()
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = None
    if held:
        budget = Budget.fraction(1.0, of="inference")
        loop = setpoint.attach(model, optimizer, budget, example=(torch.ones(8, 6),), total_steps=20)
        calls.clear()
    for _ in range(20):
        nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
        optimizer.zero_grad()
    if loop is not None:
        summary = loop.finish()
        assert summary.budget_met and summary.resizes == 0 and summary.metered["inference"] > 0
    return {
        "tensors": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "modes": [module.training for module in model.modules()],
        "calls": len(calls),
        "told": model.modes,
        "drawn": (torch.get_rng_state(), float(np.random.random())),  # the tests' argument checks draw from `random`
    }


def test_a_budget_of_one_trains_bit_identically(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed passes leave weights, buffers, moments, modes, hooks and the random generators as they are without."""
    monkeypatch.setattr(meter_file, "_now", lambda synchronize: time.perf_counter())
    alone, held = trained(False), trained(True)
    for what in alone:
        assert equal(alone[what], held[what]), what


def equal(one: Any, other: Any) -> bool:
    """Whether nested data are the same to the last bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
