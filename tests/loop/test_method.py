"""Models that training calls by another method than their forward: `attach(..., method="name")`."""

from __future__ import annotations

import copy
import re
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.errors import ExampleError, GroupError, LoopError
from setpoint.groups.example import called_by
from setpoint.groups.group import random_keep
from setpoint.groups.trace import trace


class Step(nn.Module):
    """A model without a forward, as some frameworks have them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 24), nn.Linear(24, 3)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int = 0) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.body(x).relu()), y)


class CallsItself(Step):
    """One whose step calls its forward."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x).relu())
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], index: int = 0) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


class Shapes(Step):
    """One whose step writes out a size that a cut changes."""

    def training_step(self, batch: tuple[Tensor, Tensor], index: int = 0) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.head(self.body(x).view(-1, 24).relu()), y)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6), torch.randint(0, 3, (8,))


@pytest.mark.parametrize("given", [True, False], ids=["example", "no example"])
@pytest.mark.parametrize("kind", [Step, CallsItself])
def test_a_run_by_another_method(kind: type[Step], given: bool) -> None:
    """Claim: with or without an example the method's call is traced, the budget is met, and the model is as before."""
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    example: Any = {"example": (batch(), 0)} if given else {}
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=30, method="training_step", **example)
    for step in range(30):
        model.training_step(batch(), index=step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met and loop.widths["body"] < 24
    assert not {"forward", "training_step"} & set(vars(model))


@pytest.mark.parametrize("kind", [Step, CallsItself])
def test_the_cut_by_another_method_equals_its_twin(kind: type[Step]) -> None:
    """Claim: in float64 the cut model's step is the masked twin's."""
    torch.manual_seed(0)
    model, (x, y) = kind(), batch()
    with called_by(model, "training_step"):
        groups = trace(model, ((x, y),)).groups
    assert [group.name for group in groups] == ["body"]
    twin, keep = copy.deepcopy(model.double()), random_keep(groups)
    mask(twin, None, groups, keep)
    shrink(model, None, groups, keep)
    small, full = (each.training_step((x.double(), y)) for each in (model, twin))
    torch.testing.assert_close(small, full, rtol=1e-12, atol=1e-12)


def test_a_size_that_the_method_writes_out_stays() -> None:
    """Claim: only a forward's sizes can be corrected in place, so units that such a size counts are not pruned."""
    model, example = Shapes(), (batch(),)
    with called_by(model, "training_step"):
        found = trace(model, example)
    assert not found.groups and any(each.place == "body" for each in found.frozen)


def test_bad_methods() -> None:
    """Claim: a name that is no method, and a forward that there is not, are refused in words; nothing is changed."""
    model = Step()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(LoopError, match="Step has no method 'step'"):
        setpoint.attach(model, optimizer, 0.5, total_steps=10, method="step")
    with pytest.raises(ExampleError, match='method="name"'):
        setpoint.attach(model, optimizer, 0.5, total_steps=10, example=(batch(),))
    assert "forward" not in vars(model)
    setpoint.attach(model, optimizer, 0.5, total_steps=10)
    model.training_step(batch()).backward()
    with pytest.raises(GroupError, match=r'its parts one by one: .*method="loss"'):
        optimizer.step()


class Autoencoder(nn.Module):
    """Its loss leaves out a branch of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.big = nn.Sequential(nn.Linear(8, 200), nn.ReLU(), nn.Linear(200, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x) + self.big(x)
        return out

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - x).square().mean()


@pytest.mark.parametrize(("options", "accumulate"), [({}, 1), ({"method": "loss"}, 1), ({"method": "loss"}, 3)])
def test_a_forward_that_is_never_called_is_warned_of(options: Any, accumulate: int, monkeypatch: Any) -> None:
    """Claim: before the second step, when nothing is cut, a warning names `method=`, also where a metric calls the
    model without gradients; with that only several calls of the method in a step are warned of; a method of the
    object's own is there again.
    """
    monkeypatch.setattr("setpoint.loop.calls.anything_compiled", lambda: False)
    torch.manual_seed(0)
    model = Autoencoder()
    own = vars(model)["loss"] = partial(Autoencoder.loss, model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, 0.5, example=(torch.randn(16, 8),), total_steps=1000, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            for _ in range(accumulate):
                model.loss(torch.randn(16, 8)).backward()
            with torch.no_grad():
                model(torch.randn(16, 8))
            optimizer.step()
            optimizer.zero_grad()
    words = "gives the model 3 times" if options else 'without a call of model(x).*attach(..., method="loss")'
    assert len(caught) == (not options or accumulate > 1) and loop.widths == loop.dense_widths
    assert all(re.search(re.escape(words).replace(r"\.\*", ".*"), str(each.message)) for each in caught)
    assert vars(model)["loss"] is own
    loop.detach()
    assert not model._forward_hooks


def test_gradients_that_are_set_by_hand_need_no_forward() -> None:
    """Claim: without a backward pass nothing is said of the forward: warnings are errors."""
    model = Autoencoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = setpoint.attach(model, optimizer, 0.5, example=(torch.randn(16, 8),), total_steps=100)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    loop.detach()
