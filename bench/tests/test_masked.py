"""Masked training: density and theoretical FLOPs are those asked for, and masks hold through the steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD

from setpoint_bench.baselines.drop_and_grow import DropAndGrow, Static
from setpoint_bench.baselines.magnitude import Gradual, OneShot
from setpoint_bench.baselines.rule import Rule
from setpoint_bench.course import Outcome
from setpoint_bench.masked import Masked
from setpoint_bench.networks import ResidualNet
from setpoint_bench.task import BenchError
from setpoint_bench.weight_flops import weight_flops

RULES: dict[str, Rule] = {
    "one-shot": OneShot(),
    "gradual": Gradual(),
    "static": Static(),
    "set": DropAndGrow("random"),
    "rigl": DropAndGrow("gradient"),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
WIDTHS = {f"stage{s}{b}": 16 * s for s in (1, 2) for b in ("", ".block1", ".block2")}
EXAMPLE = (torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)
STEPS = 20


def train(rule: Rule, budget: float = 0.25, density: float | None = None) -> tuple[nn.Module, Outcome, set[int]]:
    """A short run; the finished model, its outcome, and the numbers of zero weights after each step."""
    model = ResidualNet(WIDTHS, (2, 2), channels=1, classes=10)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    pruner = Masked(model, optimizer, rule, EXAMPLE, total_steps=STEPS, budget=budget, density=density)
    zeros = set()
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(model(torch.randn_like(EXAMPLE[0])), torch.tensor([0, 1, 2, 3]))
        torch.autograd.backward(loss)
        pruner.observe(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        zeros.add(sum(int((weight == 0).sum()) for weight in pruner.weights.values()))
    return model, pruner.finish(), zeros


@rules
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_theoretical_flops_meet_the_budget(rule: Rule, budget: float) -> None:
    """The FLOPs of the weights that are not zero in the finished model are the budget's, to 0.1 % and never over."""
    model, outcome, _ = train(rule, budget)
    flops = weight_flops(model, EXAMPLE)
    active = {name: int(model.get_parameter(name).count_nonzero()) for name in flops.sizes}
    assert active == outcome.widths and outcome.budget_met
    assert outcome.theoretical_flops == flops.at(active)
    assert 0.999 * budget <= flops.at(active) / flops.total <= budget


@rules
def test_density_is_the_one_asked_for(rule: Rule) -> None:
    """With a density in place of a budget, a tenth of the weights is not zero in the end, to 0.1 %."""
    model, outcome, _ = train(rule, density=0.1)
    weights = [model.get_parameter(name) for name in outcome.widths]
    kept = sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert kept == pytest.approx(0.1, rel=1e-3) and outcome.density == pytest.approx(kept)


def test_training_flops_are_the_literatures() -> None:
    """Static: steps x sparse step. RigL: dense gradients on top at each update. Gradual: between sparse and dense."""
    static, rigl, gradual = (train(RULES[name])[1] for name in ("static", "rigl", "gradual"))
    assert static.theoretical_flops is not None and static.dense_flops is not None
    assert static.theoretical_train_flops == pytest.approx(STEPS * static.theoretical_flops)
    flops = weight_flops(ResidualNet(WIDTHS, (2, 2), channels=1, classes=10), EXAMPLE)
    updates = len([step for step in range(STEPS) if RULES["rigl"].due(step, STEPS)])
    assert rigl.theoretical_flops == static.theoretical_flops and updates > 10
    extra = updates * flops.dense_gradients(rigl.widths)
    assert rigl.theoretical_train_flops == pytest.approx(STEPS * static.theoretical_flops + extra)
    assert gradual.theoretical_train_flops is not None
    assert STEPS * static.theoretical_flops < gradual.theoretical_train_flops < STEPS * static.dense_flops


@pytest.mark.parametrize("name", ["static", "set", "rigl"])
def test_density_is_constant(name: str) -> None:
    """Sparse training never has more weights than at the end (a grown one may be zero for its first step)."""
    _, outcome, zeros = train(RULES[name])
    total = sum(outcome.dense_widths.values())
    inactive = total - sum(outcome.widths.values())
    assert min(zeros) >= inactive
    assert max(zeros) <= inactive + 0.01 * total


def test_a_budget_out_of_reach_says_the_least() -> None:
    """Below what one weight in each tensor costs there is an error with the least budget."""
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(BenchError, match=r"what they do not save is 0\.125"):
        Masked(model, optimizer, Static(), (torch.zeros(1, 4),), total_steps=5, budget=0.1)
    with pytest.raises(BenchError, match="above 0 and at most 1, got 1.5"):
        Masked(model, optimizer, Static(), (torch.zeros(1, 4),), total_steps=5, budget=0.5, density=1.5)
