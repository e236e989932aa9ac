"""Seconds of inference as a budget: what is timed, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from setpoint.groups.group import widths_of
from setpoint.groups.trace import trace
from setpoint.host.find import host_of
from setpoint.resources.costing import cost_out
from setpoint.resources.replica import replica

Budget = setpoint.Budget


def test_prediction_is_of_a_forward_pass_in_eval_mode() -> None:
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
    assert 0 < cost.total(dense) < 0.1
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


def test_a_budget_of_one_trains_bit_identically() -> None:
    """Timed passes leave weights, buffers, moments, modes, hooks and the random generators as they are without."""
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
