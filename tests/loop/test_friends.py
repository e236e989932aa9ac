"""What people train with beside an optimizer: schedulers, clipping, layers that are frozen for a while."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import setpoint
from loop.test_regrowth import Scripted
from setpoint.controller.schedule import Schedule

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda step: 0.9**step, lambda step: 1 / (1 + step)]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.01], total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.05),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 8)], milestones=[3]
    ),
}


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 3))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups of parameters with settings of their own."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "betas": (0.8, 0.99)}]
    return torch.optim.AdamW(groups, lr=0.01)


def settings(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [{name: value for name, value in each.items() if name != "params"} for each in optimizer.param_groups]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: range) -> list[Any]:
    """Loss, and settings of all parameter groups, of each step."""
    seen = []
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(*([loss.item()] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        seen.append((loss.item(), copy.deepcopy(settings(optimizer))))
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_go_on_after_a_cut(name: str, tmp_path: Path) -> None:
    """Claim: with every kind of scheduler, and parameter groups of different settings, a cut run goes on bit for bit
    like a fresh small model whose optimizer and scheduler were given the states; the learning rates move on.
    """
    torch.manual_seed(0)
    model = build()
    optimizer = make_optimizer(model)
    scheduler = SCHEDULERS[name](optimizer)
    loop = setpoint.attach(
        model,
        optimizer,
        setpoint.Budget.fraction(0.9, of="params"),
        example=(torch.zeros(8, 6),),
        total_steps=12,
        controller=Scripted({3: {"0": [1, 4]}, 4: {"2": [0]}}, regrow=False),
        verify=False,
    )
    train(model, optimizer, scheduler, range(5))
    assert loop.widths == {"0": 22, "2": 23}
    setpoint.save(model, tmp_path / "small")
    small = setpoint.load(tmp_path / "small", into=build())
    alone = make_optimizer(small)
    beside = SCHEDULERS[name](alone)
    alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    beside.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    seen = train(model, optimizer, scheduler, range(5, 10))
    assert seen == train(small, alone, beside, range(5, 10))
    assert len({each["lr"] for _, groups in seen for each in groups}) > 2


def test_a_layer_that_is_frozen_for_a_while_is_not_taken_for_worthless() -> None:
    """Claim: units whose outgoing weights are frozen for the time of several decisions keep their saliency, stay and go
    by it, and train on afterwards; frozen weights are cut along, and otherwise do not move.
    """
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    controller = setpoint.PricedController(Schedule(0.2, 0.8, 0.9, num_cuts=8))
    budget = setpoint.Budget.fraction(0.5, of="flops")
    loop = setpoint.attach(
        model, optimizer, budget, example=(torch.zeros(16, 6),), total_steps=80, controller=controller, verify=False
    )
    kept, before = model[2].weight, torch.empty(0)
    for step in range(80):
        if step == 30:
            kept.requires_grad_(False)
            seen, before = loop.reading().saliency["0"], kept.detach().clone()
            narrow = loop.origin
        if step == 60:
            rows, columns = (np.isin(narrow[name], loop.origin[name]) for name in ("2", "0"))
            assert torch.equal(kept, before[rows][:, columns]) and kept.shape != before.shape
            np.testing.assert_allclose(loop.reading().saliency["0"], seen[columns], rtol=1e-6)
            kept.requires_grad_(True)
        x = torch.randn(16, 6)
        nn.functional.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 0).long()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met and loop.widths["0"] > 6
    assert kept.requires_grad and not torch.equal(kept[:1], before[:1, : kept.shape[1]])


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_parametrized_weights_go_on_after_a_cut(name: str, tmp_path: Path) -> None:
    """Claim: after cuts a model with parametrized weights trains on bit for bit like a fresh small one that was given
    its weights and moments.
    """
    wrap = getattr(nn.utils.parametrizations, name)

    def parametrized() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Linear(6, 24)), nn.ReLU(), wrap(nn.Linear(24, 24)), nn.GELU(), nn.Linear(24, 3))

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = parametrized()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    budget = setpoint.Budget.fraction(0.5, of="flops")
    loop = setpoint.attach(model, optimizer, budget, example=(torch.zeros(8, 6),), total_steps=40)
    go(model, optimizer, range(30))
    assert loop.budget_met and len(loop.widths) == 2
    setpoint.save(model, tmp_path / "small")
    fresh = setpoint.load(tmp_path / "small", into=parametrized())
    again = torch.optim.AdamW(fresh.parameters(), lr=0.01)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        again.state[theirs] = {key: value.clone() for key, value in optimizer.state[ours].items()}
    assert go(model, optimizer, range(30, 36)) == go(fresh, again, range(30, 36))
