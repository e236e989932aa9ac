"""Setpoint is invisible until it acts."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)),
        *(nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.BatchNorm1d(8), nn.ReLU()),
        *(nn.Conv1d(8, 8, 1), nn.Flatten(), nn.Linear(48, 3)),
    )


def _train(build: Callable[[], nn.Module], kind: Callable[..., torch.optim.Optimizer], held: bool) -> dict[str, Any]:
    """Everything that 20 steps leave behind."""
    np.random.seed(3)
    torch.manual_seed(3)
    model = build()
    optimizer = kind(model.parameters())
    loop = None
    if held:
        model.zero_grad()
        loop = setpoint.attach(model, optimizer, 1.0, example=(torch.ones(8, 6),), total_steps=20)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(torch.randn(8, 6)), torch.randint(0, 3, (8,)))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if loop is not None:
        summary = loop.finish()
        assert summary.budget_met and summary.resizes == 0
    return {
        "losses": losses,
        "tensors": dict(model.state_dict()),
        "gradients": [each.grad for each in model.parameters()],
        "optimizer": optimizer.state_dict(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.random(),
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("build", [_mlp, _conv])
def test_a_budget_of_one_trains_bit_identically(build: Callable[[], nn.Module], optimizer: str) -> None:
    """Losses, weights, buffers, gradients, optimizer state and the random states are those without Setpoint."""
    alone, held = (_train(build, OPTIMIZERS[optimizer], each) for each in (False, True))
    for what in alone:
        assert _equal(alone[what], held[what]), what


def test_attach_leaves_everything_as_it_is() -> None:
    """Attaching changes no tensor, gradient, mode, requires_grad, hook of a module, or random state."""
    model = _conv()
    model[1].weight.requires_grad_(False)
    model[2].eval()
    model(torch.randn(4, 6)).sum().backward()
    before = copy.deepcopy(model)
    gradients = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    chance = (torch.get_rng_state(), np.random.get_state()[1].tolist())
    loop = setpoint.attach(model, optimizer, 0.5, example=(torch.ones(4, 6),), total_steps=10)
    assert _equal(model.state_dict(), before.state_dict())
    assert [each.training for each in model.modules()] == [each.training for each in before.modules()]
    assert [each.requires_grad for each in model.parameters()] == [each.requires_grad for each in before.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(parameter.grad, gradient)
    assert _equal(chance, (torch.get_rng_state(), np.random.get_state()[1].tolist()))
    assert not optimizer.state
    loop.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


_PYTHONS_OWN = """
import random, torch, setpoint
model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
state = random.getstate()
budget = setpoint.Budget.fraction(0.5, of="flops")
with setpoint.attach(model, optimizer, budget, example=(torch.ones(8, 4),), total_steps=20) as loop:
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
assert loop.summary.budget_met and loop.summary.resizes
assert random.getstate() == state
"""


def test_pythons_own_random_state_is_left_alone() -> None:
    """A whole run with cuts draws nothing from `random` (in a process without the argument checks of the tests,
    which do).
    """
    done = subprocess.run([sys.executable, "-c", _PYTHONS_OWN], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_users_hooks_keep_their_order() -> None:
    """Hooks that were there before run before Setpoint's, and those that come later after it; all are left in place."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("first"))
    loop = setpoint.attach(model, optimizer, 1.0, example=(torch.ones(4, 6),), total_steps=10)
    optimizer.register_step_pre_hook(lambda *_: seen.append("second"))
    optimizer.register_step_post_hook(lambda *_: seen.append(f"post, {loop.step} done"))
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    loop.detach()
    optimizer.step()
    assert seen == ["first", "second", "post, 1 done", "first", "second", "post, 1 done"]
