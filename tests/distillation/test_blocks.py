"""Blocks: their distance in closed form, what is cut inside of them, and what they refuse."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.distillation import Blocks, Teacher


class Residual(nn.Module):
    """A layer whose neurons can be cut, around which a residual stream goes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x + self.down(functional.relu(self.up(self.norm(x)))), None


class Net(nn.Module):
    """Two such layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Residual(), Residual()]), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        out: Tensor = self.head(x)
        return out


NAMES = ["layers.0", "layers.1"]


def pair() -> tuple[Net, Teacher, Blocks]:
    """A model, its teacher, and both layers."""
    torch.manual_seed(0)
    model, knows = Net(), Net()
    teacher = Teacher(knows)
    return model, teacher, Blocks(model, teacher, NAMES)


def test_the_distance_is_that_of_its_equation() -> None:
    """Claim: it is the mean of 1 - cos over blocks and positions; only positions of the mask count."""
    model, teacher, blocks = pair()
    inputs, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])

    def by_hand(count: Tensor) -> float:
        own, taught, found = inputs, inputs, []
        for mine, theirs in zip(model.layers, teacher.model.layers, strict=True):  # type: ignore[arg-type]
            own, taught = mine(own)[0], theirs(taught)[0]
            cosines = (own * taught).sum(-1) / (own.norm(dim=-1) * taught.norm(dim=-1))
            found.append((1 - cosines)[count.bool()].mean())
        return float(torch.stack(found).mean().detach())

    for given, count in ((None, torch.ones(2, 5)), (mask, mask)):
        expected = by_hand(count)
        model(inputs)
        teacher.logits(inputs)
        assert blocks.distance(given).item() == pytest.approx(expected, rel=1e-5)


def test_lengths_do_not_count_and_channels_of_images_do() -> None:
    """Claim: a scaled output is at distance 0, an opposite one at 2, along the dim that is named."""
    images = torch.randn(2, 4, 3, 3)
    for factor, expected in ((5.0, 0.0), (-0.1, 2.0)):
        model, knows = (nn.Sequential(nn.Conv2d(4, 4, 1, bias=False)) for _ in range(2))
        knows[0].weight.data = factor * model[0].weight.data  # type: ignore[union-attr, operator]
        blocks = Blocks(model, knows, "0", dim=1)
        model(images)
        knows(images)
        assert blocks.distance().item() == pytest.approx(expected, abs=1e-5)


def test_a_pruned_model_learns_the_direction_of_its_teacher() -> None:
    """Claim: neurons are cut inside blocks while the distance is trained; it falls, and the teacher learns nothing."""
    model, teacher, _ = pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loop = setpoint.attach(model, optimizer, 0.5, example=(torch.randn(16, 8),), total_steps=150)
    before, blocks, seen = copy.deepcopy(teacher.model.state_dict()), Blocks(model, teacher, NAMES), list[float]()
    for _ in range(150):
        inputs = torch.randn(16, 8)
        model(inputs)
        teacher.logits(inputs)
        loss = blocks.distance()
        seen.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met and sum(seen[-10:]) < 0.5 * sum(seen[:10])
    assert model.layers[0].up.out_features < 32  # type: ignore[union-attr, operator]
    assert all(torch.equal(value, before[name]) for name, value in teacher.model.state_dict().items())


def test_what_is_not_there_is_said() -> None:
    """Claim: no names, unknown ones, the model itself, a missing forward, other shapes and masks are refused."""
    model, teacher, blocks = pair()
    inputs = torch.randn(2, 8)
    cases: list[tuple[str, Any]] = [
        ("give the names", lambda: Blocks(model, teacher, [])),
        ("the model has no module 'layers.7'", lambda: Blocks(model, teacher, ["layers.7"])),
        ("the teacher has no module 'layers.0'", lambda: Blocks(model, nn.Linear(8, 3), ["layers.0"])),
        ("the teacher is the model", lambda: Blocks(model, model, NAMES)),
        ("the model has made no forward", blocks.distance),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=words):
            call()
    model(inputs)
    with pytest.raises(ValueError, match="the teacher has made no forward"):
        blocks.distance()
    model(inputs)
    teacher.logits(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 8\), the teacher's \(3, 8\)"):
        blocks.distance()
    model(inputs)
    teacher.logits(inputs)
    with pytest.raises(ValueError, match="the mask has shape"):
        blocks.distance(torch.ones(3))


def test_hooks_go() -> None:
    """Claim: after `remove` neither model keeps outputs, and both have no hooks."""
    model, teacher, blocks = pair()
    blocks.remove()
    model(torch.randn(2, 8))
    teacher.logits(torch.randn(2, 8))
    with pytest.raises(ValueError, match="no forward"):
        blocks.distance()
    assert not any(module._forward_hooks for each in (model, teacher.model) for module in each.modules())


def test_a_distance_is_finite_at_zero() -> None:
    """Claim: an output of zeros has a finite distance and gradient."""
    model, knows = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    nn.init.zeros_(model[0].bias)  # type: ignore[arg-type]
    blocks = Blocks(model, knows, ["0"])
    model(torch.randn(2, 4))
    knows(torch.randn(2, 4))
    blocks.distance().backward()
    assert all(math.isfinite(float(each.grad.abs().sum())) for each in model.parameters() if each.grad is not None)
