"""The teacher: its loss in closed form, what it costs, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
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


def test_a_mask_without_rows_counts_zero() -> None:
    """Claim: where no row counts, the divergence is 0, and so is its gradient."""
    own = torch.randn(2, 5, 4, requires_grad=True)
    loss = Teacher(net(), alpha=0.25).loss(torch.tensor(1.0), own, torch.randn(2, 5, 4), torch.zeros(2, 5))
    loss.backward()
    assert loss.item() == 0.75
    assert own.grad is not None and not own.grad.any()


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


def test_a_class_that_only_the_model_forbids_is_infinite() -> None:
    """Claim: what the teacher holds possible and the model does not is infinitely far, with a finite gradient."""
    own, taught = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    forbidden = torch.tensor([False, True, False, False])
    teacher = Teacher(net(), temperature=1.0)
    loss = teacher.distance(own.masked_fill(forbidden, -math.inf), taught)
    categorical = torch.distributions.Categorical
    masked = categorical(logits=own.detach().masked_fill(forbidden, -math.inf))
    assert torch.distributions.kl_divergence(categorical(logits=taught), masked).mean() == loss.item() == math.inf
    loss.backward()
    assert own.grad is not None and own.grad.isfinite().all() and not own.grad[:, 1].any()
    impossible = taught.masked_fill(forbidden, -200.0)  # e^-200 is 0 in float32
    assert teacher.distance(own.masked_fill(forbidden, -math.inf), impossible).isfinite()


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


class Wrapped(nn.Module):
    """A model around another one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        """What the inner one answers."""
        return self.module(x)


@pytest.mark.parametrize("example", [True, False], ids=["begun", "waiting"])
@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "bare"])
def test_a_teacher_that_is_attached_later_is_refused(example: bool, wrapped: bool) -> None:
    """Claim: a teacher that became the pruned model is refused with its loop and by a pass, and trains again."""
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    teacher, x = Teacher(Wrapped(model) if wrapped else model), torch.randn(4, 8)
    model.requires_grad_(example)  # with an example attach refuses a frozen model itself
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    given = {"example": (x,)} if example else {}
    loop = setpoint.attach(model, optimizer, "90% params", total_steps=20, verify=False, **given)
    with pytest.raises(ValueError, match=r"give another one, such as copy\.deepcopy\(model\)"):
        teacher.logits(x)
    assert teacher.flops == 0
    assert [each.requires_grad for each in model.parameters()] == [example, True, True, True]
    assert [each.training for each in model] == [True, False, True]
    with pytest.raises(ValueError, match="the teacher is the model that is pruned"):
        teacher.loop = loop
    assert teacher.loop is None
    loop.detach()


def test_a_teacher_may_lie_beside_the_pruned_part() -> None:
    """Claim: a module that holds a net and its frozen copy is attached whole, and the copy teaches."""
    both = nn.ModuleDict({"net": net(), "teacher": net()})
    both.forward = lambda x: both["net"](x)  # type: ignore[method-assign]
    teacher, x = Teacher(both["teacher"]), torch.randn(4, 8)
    optimizer = torch.optim.SGD(both["net"].parameters(), 0.05)
    loop = setpoint.attach(both, optimizer, "90% params", total_steps=20, verify=False)
    teacher.loop = loop
    assert teacher.logits(x).shape == (4, 3)
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


def test_keys_that_are_tensors_are_found_again() -> None:
    """Claim: a list of tensors without dims, alone or in tuples, is a list of numbers; the cache does not grow."""
    teacher, x = Teacher(nn.Linear(8, 3)), torch.randn(4, 8)
    for keys in (list(torch.arange(4)), range(4), torch.arange(4), np.arange(4), [np.array(each) for each in range(4)]):
        torch.testing.assert_close(teacher.cached_logits(keys, x), teacher.model(x))
    assert teacher.flops == 2 * 4 * 8 * 3
    for _ in range(2):
        teacher.cached_logits([("train", each) for each in torch.arange(4)], x)
    assert teacher.flops == 2 * 2 * 4 * 8 * 3


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.tensor(3), "give one key a sample in a list or a tensor of one dim, got tensor"),
        (np.array(3), "give one key a sample in a list or a tensor of one dim, got array"),
        (3, "give one key a sample in a list or a tensor of one dim, got 3"),
        (torch.arange(4)[:, None], r"a key is a number, a string or a tuple of them, got \[0\]"),
        (list(torch.arange(4)[:, None]), r"a key is a number, a string or a tuple of them, got tensor\(\[0\]\)"),
        ([[0], [1], [2], [3]], r"a key is a number, a string or a tuple of them, got \[0\]"),
    ],
)
def test_keys_that_could_not_be_found_again_are_refused(keys: Any, words: str) -> None:
    """Claim: what is no key of one sample is named before the teacher's pass."""
    teacher = Teacher(nn.Linear(8, 3))
    with pytest.raises(ValueError, match=words):
        teacher.cached_logits(keys, torch.randn(4, 8))
    assert teacher.flops == 0


def test_a_loop_that_is_none_is_refused_at_once() -> None:
    """Claim: a share in the loop's place, or a word, is named before the teacher is frozen, and so is a later one."""
    model = net()
    with pytest.raises(
        ValueError, match=r"the loop is what attach returned, got 0\.5: .* write Teacher\(model, loop, alpha"
    ):
        Teacher(model, 0.5)  # type: ignore[arg-type]
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="the loop is what attach returned, got 'abc'"):
        Teacher(model).loop = "abc"  # type: ignore[assignment]


def test_what_it_refuses() -> None:
    """Claim: settings out of range, other shapes, a mask that does not fit, and answers without logits are named."""
    for settings, words in (
        ({"alpha": -0.1}, "alpha must be from 0 to 1, got -0.1"),
        ({"alpha": math.nan}, "alpha must be from 0 to 1, got nan"),
        ({"alpha": "0.5"}, "alpha must be from 0 to 1, got '0.5'"),
        ({"alpha": None}, "alpha must be from 0 to 1, got None"),
        ({"temperature": "2"}, "temperature must be a finite number above 0, got '2'"),
        ({"temperature": math.inf}, "temperature must be a finite number above 0, got inf"),
    ):
        with pytest.raises(ValueError, match=words):
            Teacher(net(), **settings)
    teacher = Teacher(net())
    with pytest.raises(ValueError, match=r"logits have shape \(4, 3\), the model's \(4, 5\)"):
        teacher.distance(torch.randn(4, 5), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"logits have classes last, behind a dim of rows: got shape \(3,\)"):
        teacher.distance(torch.randn(3), torch.randn(3))
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


@pytest.mark.parametrize("shape", [(4, 1), (2, 3, 8, 8)], ids=["one score", "a map with classes before it"])
def test_logits_that_teach_nothing_or_the_wrong_thing_are_refused(shape: tuple[int, ...]) -> None:
    """Claim: a single score has no distribution, and of a map the last dim is its width: both are refused by shape."""
    teacher = Teacher(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Move classes to the end"):
        teacher.loss(torch.zeros(()), torch.randn(shape), torch.randn(shape))


def test_a_teacher_answers_in_eval_mode_whatever_holds_it() -> None:
    """Claim: as a part of a module in train mode it drops nothing out and keeps its statistics."""
    teacher = Teacher(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)))
    holder = nn.ModuleDict({"teacher": teacher.model, "student": nn.Linear(4, 3)})
    x, norm = torch.randn(16, 4), teacher.model[1]
    holder.train()
    assert torch.equal(teacher.logits(x), teacher.logits(x)) and int(norm.num_batches_tracked) == 0
