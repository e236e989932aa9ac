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


def test_forbidden_classes_are_as_if_they_were_not_there() -> None:
    """Claim: a class with a logit of -inf in both models, and one that only the teacher forbids, are no term."""
    torch.manual_seed(0)
    own, taught = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    both, teachers = torch.zeros(6, 5).bool(), torch.zeros(6, 5).bool()
    both[:, 1], teachers[:3, 4] = True, True
    teacher = Teacher(net(), temperature=3.0)
    found = teacher.distance(own.masked_fill(both, -math.inf), taught.masked_fill(both | teachers, -math.inf))
    allowed = [0, 2, 3, 4]
    expected = 0.0
    for row in range(6):
        q = functional.log_softmax(own[row, allowed].double() / 3, -1)
        known = allowed[:-1] if row < 3 else allowed
        p = functional.log_softmax(taught[row, known].double() / 3, -1)
        expected += 9 / 6 * (p.exp() * (p - q[: len(known)])).sum()
    torch.testing.assert_close(found.double(), expected)
    gradient, expected_gradient = (torch.autograd.grad(each, own)[0] for each in (found, expected))
    assert not gradient[:, 1].any()
    torch.testing.assert_close(gradient, expected_gradient)


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


class Answers(nn.Module):
    """Answers with what it was given."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer


def test_the_model_that_is_pruned_is_no_teacher_of_itself() -> None:
    """Claim: that model is refused before anything of it changes, and so is what is no model; one that has become
    the pruned model since, or holds it, is refused by a pass, before it is counted.
    """
    model = net()
    early = Teacher(model), Teacher(nn.Sequential(model))
    model.train().requires_grad_(True)
    loop = setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.05), "90% params", total_steps=20)
    with pytest.raises(ValueError, match=r"give another one, such as copy\.deepcopy\(model\)"):
        Teacher(model, loop)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match=r"write Teacher\(model, loop, .*: got a Loop and a Sequential"):
        Teacher(loop, model)  # type: ignore[arg-type]
    for teacher in early:
        with pytest.raises(ValueError, match=r"give another one, such as copy\.deepcopy\(model\)"):
            teacher.logits(torch.randn(4, 8))
        assert teacher.flops == 0
    loop.detach()


def test_flops_are_those_of_all_inputs() -> None:
    """Claim: inputs in dicts, lists and keywords, and flags that lead elsewhere, have FLOPs of their own."""

    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 3)

        def forward(self, batch: Any, times: int = 1) -> Any:
            x = batch["x"][0] if isinstance(batch, dict) else batch[0]
            return sum(self.net(x) for _ in range(times))

    teacher, x = Teacher(Nested()), torch.randn(16, 8)
    row = 2 * 8 * 3
    before = 0.0
    for args, settings, rows in (
        (({"x": [x[:1]]},), {}, 1),
        (({"x": [x]},), {}, 16),
        (([x[:4]],), {}, 4),
        (([x],), {}, 16),
        (([x],), {"times": 3}, 48),
        (([x],), {"times": 1}, 16),
        (({"x": [x[:1]]},), {}, 1),
    ):
        teacher.logits(*args, **settings)
        assert teacher.flops - before == rows * row
        before = teacher.flops


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -0.1}, "alpha must be from 0 to 1, got -0.1"),
        ({"alpha": math.nan}, "alpha must be from 0 to 1, got nan"),
        ({"alpha": "0.5"}, "alpha must be from 0 to 1, got '0.5'"),
        ({"alpha": None}, "alpha must be from 0 to 1, got None"),
        ({"temperature": "2"}, "temperature must be a finite number above 0, got '2'"),
        ({"dim": "a"}, "dim is the number of the dim that the classes are in, or None; got 'a'"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
        ({"loop": 0.5}, r"write Teacher\(model, loop, alpha=0\.5\): got a Sequential and a float"),
    ],
)
def test_settings_out_of_range_are_refused_before_the_teacher_changes(settings: dict[str, Any], words: str) -> None:
    """Claim: each is named, and the model trains on."""
    model = net()
    with pytest.raises(ValueError, match=words):
        Teacher(model, **settings)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("own", "taught", "words"),
    [
        ((4, 5), (4, 3), r"logits have shape \(4, 3\), the model's \(4, 5\)"),
        ((3,), (3,), r"got shape \(3,\)"),
        ((4, 1), (4, 1), "two classes or more"),
        ((2, 1, 8, 8), (2, 1, 8, 8), r"Teacher\(model, dim=...\) says which dim"),
    ],
)
def test_shapes_that_teach_nothing_or_the_wrong_thing_are_refused(own: Any, taught: Any, words: str) -> None:
    """Claim: other classes, no rows, one score, and maps of one class."""
    with pytest.raises(ValueError, match=words):
        Teacher(net()).loss(torch.zeros(()), torch.randn(own), torch.randn(taught))


def test_a_dim_that_logits_do_not_have_is_named() -> None:
    """Claim: the message has the shape and the dim."""
    with pytest.raises(ValueError, match=r"got shape \(4, 3\): Teacher\(model, dim=...\) .* here 9"):
        Teacher(net(), dim=9).rows(torch.randn(4, 3))


def test_answers_without_logits_are_refused() -> None:
    """Claim: an output that has logits is read, and any other is named."""
    x = torch.randn(2, 8)
    assert Teacher(Answers({"logits": torch.ones(2, 3)})).logits(x).shape == (2, 3)
    with pytest.raises(ValueError, match="returned last_hidden_state: say where they are"):
        Teacher(Answers({"last_hidden_state": torch.ones(2, 3)})).logits(x)
    with pytest.raises(ValueError, match="returned a SimpleNamespace"):
        Teacher(Answers(SimpleNamespace())).logits(x)


def test_a_teacher_answers_in_eval_mode_whatever_holds_it() -> None:
    """Claim: as a part of a module in train mode it drops nothing out and keeps its statistics."""
    teacher = Teacher(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    holder = nn.ModuleDict({"teacher": teacher.model, "student": nn.Linear(4, 3)})
    x, norm = torch.randn(16, 4), teacher.model[1]
    holder.train()
    assert torch.equal(teacher.logits(x), teacher.logits(x)) and int(norm.num_batches_tracked) == 0
