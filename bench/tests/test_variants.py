"""Variants of Setpoint: those of the ablation meet their budget, and the lasso acts beside a loop as it says."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import setpoint
from setpoint_bench.baselines.group_lasso import lasso_norms
from setpoint_bench.lasso import Lasso
from setpoint_bench.looped import Looped
from setpoint_bench.method import ABLATION_METHODS, Setpoint
from setpoint_bench.task import dense_widths
from setpoint_bench.tasks.digits import digits
from setpoint_bench.training import Cell, train

TASK = digits(width=16).with_steps(100)


@dataclass
class Stage:
    """A dense model, its optimizer, a loop that does nothing by itself before the run is half over, and batches."""

    budget: float = 0.5
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = TASK.build(dense_widths(TASK))
        self.optimizer = TASK.optimizer(self.model)
        self.batches = TASK.batches(0)

    def attach(self) -> setpoint.Loop:
        """The loop."""
        return setpoint.attach(
            self.model,
            self.optimizer,
            setpoint.Budget.fraction(self.budget, of="flops"),
            example=TASK.example(),
            total_steps=TASK.steps,
        )


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(each, marks=[pytest.mark.slow] * (n not in (0, len(ABLATION_METHODS) - 1)), id=each.name)
        for n, each in enumerate(ABLATION_METHODS)
    ],
)
def test_variants_meet_the_budget(method: Setpoint, tmp_path: Path) -> None:
    """Every variant of the ablation trains to its end and lands at the FLOPs asked for."""
    training = train(Cell(TASK.with_steps(50), method, 0.5, 0), tmp_path)
    while True:
        try:
            next(training)
        except StopIteration as end:
            result = end.value
            break
    assert result.budget_met and 0.42 * result.dense_flops < result.final_flops <= 0.5 * result.dense_flops
    assert np.isfinite(result.value)


def test_the_penalty_is_timed_as_the_method_s_own() -> None:
    """The lasso's seconds grow with every step that it takes part in, and end up in the outcome's overhead."""
    stage = Stage()
    loop = stage.attach()
    lasso = Lasso(loop, stage.model, stage.optimizer, 0.2)
    looped, told = Looped(loop, lasso), 0.0
    for _ in range(3):
        loss = TASK.loss(stage.model, *next(stage.batches))
        torch.autograd.backward(loss)
        looped.observe(loss)
        stage.optimizer.step()
        assert lasso.seconds > told
        told = lasso.seconds
    outcome = looped.finish()
    assert outcome.overhead_seconds == pytest.approx(loop.summary.overhead_seconds + told)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_the_penalty_joins_the_gradient_under_sgd_alone(rule: str) -> None:
    """Under AdamW gradients stay those of the loss, and units shrink beside the optimizer."""
    task = replace(TASK, recipe=replace(TASK.recipe, rule=rule, weight_decay=0.0))
    model = task.build(dense_widths(task))
    optimizer = task.optimizer(model)
    loop = setpoint.attach(
        model, optimizer, setpoint.Budget.fraction(0.5, of="flops"), example=task.example(), total_steps=50
    )
    lasso = Lasso(loop, model, optimizer, 0.5)
    loss = task.loss(model, *next(task.batches(0)))
    torch.autograd.backward(loss)
    lasso.observe(loss)
    told = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    twin = copy.deepcopy(model)
    alone = task.optimizer(twin)
    for mine, its in zip(twin.parameters(), model.parameters(), strict=True):
        mine.grad = None if its.grad is None else its.grad.clone()
    alone.step()
    optimizer.step()
    now = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    same = all(torch.equal(one, other) for one, other in zip(told, now, strict=True))
    assert same == (rule == "adamw")
    assert float(lasso_norms(model, loop.groups)) < float(lasso_norms(twin, loop.groups))
