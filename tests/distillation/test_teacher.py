"""The teacher: its loss in closed form, what it costs, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.distillation import Teacher


def net(width: int = 24) -> nn.Sequential:
    """A small classifier of three classes."""
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def test_the_loss_is_that_of_its_equation() -> None:
    """Claim: alpha blends the targets' loss with T^2 times the divergence of softened answers, row by row."""
    own, taught = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    p, q = (taught / 3).softmax(-1), (own / 3).softmax(-1)
    divergence = (p * (p / q).log()).sum(-1).mean()
    hard = functional.cross_entropy(own, torch.tensor([0, 1, 2, 0, 1]))
    loss = Teacher(net(), alpha=0.7, temperature=3.0).loss(hard, own, taught)
    torch.testing.assert_close(loss, 0.3 * hard + 0.7 * 9 * divergence)


def test_only_the_rows_of_the_mask_count() -> None:
    """Claim: masked rows of a sequence are as if they were not there."""
    own, taught, mask = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    teacher = Teacher(net(), alpha=1.0)
    kept = [(0, 0), (0, 1), (1, 0)]
    rows = [torch.stack([each[place] for place in kept]) for each in (own, taught)]
    torch.testing.assert_close(teacher.distance(own, taught, mask), teacher.distance(*rows))


def _train(taught: bool, *, steps: int = 40) -> tuple[setpoint.Loop, Teacher]:
    torch.manual_seed(0)
    model, knows = net(), net(48)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=steps, verify=False)
    teacher = Teacher(knows, loop)
    for _ in range(steps):
        x = torch.randn(16, 8)
        logits = model(x)
        loss = functional.cross_entropy(logits, x[:, :3].argmax(1))
        (teacher.loss(loss, logits, teacher.logits(x)) if taught else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    return loop, teacher


def test_what_it_takes_is_overhead_of_the_run() -> None:
    """Claim: a run with a teacher has the teacher's FLOPs as overhead, and the teacher itself is left as it was."""
    (plain, _), (taught, teacher) = _train(False), _train(True)
    assert plain.summary is not None and taught.summary is not None
    own = 40 * 2 * 16 * (8 * 48 + 48 * 3)
    assert teacher.flops == own
    assert taught.summary.overhead_flops - plain.summary.overhead_flops == own
    assert taught.summary.budget_met
    torch.manual_seed(0)
    net()
    assert all(torch.equal(a, b) for a, b in zip(teacher.model.parameters(), net(48).parameters(), strict=True))


class Named(nn.Module):
    """Answers with a mapping."""

    def __init__(self, **outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Any:
        """What it was given."""
        return self.outputs


class Answers(nn.Module):
    """Answers with something that has no logits."""

    def forward(self, x: Tensor) -> Any:
        """Nothing."""
        return SimpleNamespace()


def test_the_model_that_is_pruned_is_no_teacher_of_itself() -> None:
    """Claim: that model is refused before anything of it is frozen, and so is what is no model."""
    model = net()
    loop = setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.05), 0.5, total_steps=20)
    with pytest.raises(ValueError, match=r"give another one, such as copy\.deepcopy\(model\)"):
        Teacher(model, loop)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"got Loop: write Teacher\(model, loop\)"):
        Teacher(loop, model)  # type: ignore[arg-type]
    loop.detach()


def test_what_it_refuses() -> None:
    """Claim: settings out of range, other shapes, a mask that does not fit, and answers without logits are named."""
    for settings, words in (
        ({"alpha": -0.1}, "alpha must be from 0 to 1, got -0.1"),
        ({"alpha": math.nan}, "alpha must be from 0 to 1, got nan"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
    ):
        with pytest.raises(ValueError, match=words):
            Teacher(net(), **settings)
    teacher = Teacher(net())
    with pytest.raises(ValueError, match=r"logits have shape \(4, 3\), the model's \(4, 5\)"):
        teacher.distance(torch.randn(4, 5), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"mask has shape \(3,\) for logits of shape \(4, 3\)"):
        teacher.distance(torch.randn(4, 3), torch.randn(4, 3), torch.ones(3))
    x = torch.randn(2, 8)
    assert Teacher(Named(logits=torch.ones(2, 3))).logits(x).shape == (2, 3)
    with pytest.raises(ValueError, match="returned last_hidden_state: train without a teacher"):
        Teacher(Named(last_hidden_state=torch.ones(2, 3))).logits(x)
    with pytest.raises(ValueError, match="returned a SimpleNamespace"):
        Teacher(Answers()).logits(x)


def test_cached_logits_cost_one_pass_over_the_data() -> None:
    """Claim: from the second pass on, shuffled batches have the same logits as a forward, and cost no FLOPs."""
    teacher, data = Teacher(net()), torch.randn(12, 8)
    for _ in range(3):
        for index in torch.randperm(12).split(4):
            taught = teacher.cached_logits(index, data[index])
            torch.testing.assert_close(taught, teacher.model(data[index]))
    once = Teacher(teacher.model)
    once.logits(data)
    assert teacher.flops == once.flops > 0


def test_cached_logits_need_one_key_a_sample_and_one_length() -> None:
    """Claim: keys of another number and rows of several lengths are refused, and nothing wrong is kept."""
    teacher = Teacher(nn.Linear(8, 3))
    with pytest.raises(ValueError, match="3 keys for the logits of 2 samples"):
        teacher.cached_logits([0, 1, 2], torch.randn(2, 8))
    teacher.cached_logits(["short"], torch.randn(1, 4, 8))
    teacher.cached_logits(["long"], torch.randn(1, 6, 8))
    with pytest.raises(ValueError, match=r"shapes \[\(4, 3\), \(6, 3\)\]: pad every sample"):
        teacher.cached_logits(["short", "long"], torch.randn(2, 6, 8))
