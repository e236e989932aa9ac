"""A teacher as an argument of attach: equal to the explicit loss in any loop, and what it refuses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import setpoint
from setpoint.distillation import Teacher
from setpoint.errors import LoopError

STEPS = 12


def net(width: int = 24, seed: int = 1) -> nn.Module:
    """A small classifier of four classes in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4)).double()


def maps(width: int = 24, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 4, 1)).double()


def logged(width: int = 24, seed: int = 1) -> nn.Module:
    return nn.Sequential(net(width, seed), nn.LogSoftmax(-1))


def lines(width: int = 24, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv1d(3, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, 4, 1)).double()


def rows_of(x: Tensor) -> Tensor:
    return x[..., :4].argmax(-1)


def some_ignored(x: Tensor) -> Tensor:
    targets = rows_of(x)
    targets[..., 0] = -100
    return targets


@dataclass
class Case:
    """A model, its inputs, its targets, the user's loss, and its weight for each row that counts."""

    build: Callable[..., nn.Module] = net
    shape: tuple[int, ...] = (16, 8)
    targets: Callable[[Tensor], Tensor] = rows_of
    loss: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy
    times: float = 1.0  # of the mean
    dim: int | None = None  # of the classes, which the explicit loss must be told


def of_tokens(own: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(own.flatten(0, 1), targets.flatten())


CASES = {
    "mean": Case(),
    "sum": Case(loss=partial(functional.cross_entropy, reduction="sum"), times=16),
    "scaled": Case(loss=lambda own, targets: 1024 * functional.cross_entropy(own, targets), times=1024),
    "tokens, some ignored": Case(shape=(4, 6, 8), targets=some_ignored, loss=of_tokens),
    "maps": Case(maps, (4, 3, 5, 5), lambda x: x[:, :3].argmax(1)),
    "lines": Case(lines, (4, 3, 5), lambda x: x[:, :3].argmax(1), dim=1),
    "log-probabilities": Case(logged, loss=functional.nll_loss),
    "class weights": Case(loss=partial(functional.cross_entropy, weight=torch.tensor([0.1, 1, 1, 5]).double())),
    "smoothed": Case(loss=partial(functional.cross_entropy, label_smoothing=0.1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_argument_equals_the_explicit_loss(case: Case) -> None:
    """Claim: with any scale of the loss, ignored rows, maps, classes in another dim, log-probabilities, class weights
    and accumulation, weights and widths are those of `Teacher.loss` to rounding; the teacher's FLOPs count the same.
    """
    runs = []
    for explicit in (True, False):
        model, dense = case.build(), case.build(48, seed=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.05 / case.times, momentum=0.9)
        teacher = Teacher(dense, alpha=0.4, temperature=3.0, dim=case.dim if explicit else None)
        loop = setpoint.attach(
            model, optimizer, 0.5, total_steps=STEPS, verify=False, teacher=None if explicit else teacher
        )
        if explicit:
            teacher.loop = loop
        torch.manual_seed(0)
        for _ in range(STEPS):
            for _ in range(2):  # accumulates
                x = torch.randn(*case.shape, dtype=torch.float64)
                targets, own = case.targets(x), model(x)
                loss = case.loss(own, targets)
                if explicit:
                    counts = targets != -100 if targets.dim() == 2 and case.dim is None else None
                    distance = teacher.distance(own, teacher.logits(x), counts)
                    loss = 0.6 * loss + 0.4 * case.times * distance
                (loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, loop.finish()))
    (explicit_model, one), (model, other) = runs
    assert one.widths == other.widths and one.budget_met
    for a, b in zip(explicit_model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert one.overhead_flops == other.overhead_flops
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_shrunk_model_with_a_teacher_equals_its_masked_twin() -> None:
    """Claim: after the cut, the small model and the dense one with masked units learn the same from a teacher."""
    model, dense = net(), net(48, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=40, verify=False, teacher=dense)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, teacher: Teacher | None = None) -> None:
        own = model(x)
        loss = functional.cross_entropy(own, rows_of(x))
        (teacher.loss(loss, own, teacher.logits(x)) if teacher else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.manual_seed(0)
    while not loop.budget_met:
        step(model, optimizer, torch.randn(16, 8, dtype=torch.float64))
    kept = torch.as_tensor(loop.origin["0"])
    twin, mask = net(), torch.zeros(24, dtype=torch.bool)
    mask[kept] = True
    twins = torch.optim.SGD(twin.parameters(), 0.05, momentum=0.9)
    places: list[tuple[Any, ...]] = [(kept,), (kept,), (slice(None), kept), (slice(None),)]
    with torch.no_grad():
        for large, small, place in zip(twin.parameters(), model.parameters(), places, strict=True):
            large.zero_()
            large[place] = small
            moment = torch.zeros_like(large)
            moment[place] = optimizer.state[small]["momentum_buffer"]
            twins.state[large]["momentum_buffer"] = moment
    teacher = Teacher(dense)
    for _ in range(6):
        x = torch.randn(16, 8, dtype=torch.float64)
        step(model, optimizer, x)
        step(twin, twins, x, teacher)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-10, atol=1e-12)


class InHalf(nn.Module):
    """Computes its loss itself from bfloat16 logits, and returns them in float32, as wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net().bfloat16()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits.float()}


def test_a_loss_inside_of_the_model_and_cast_logits() -> None:
    """Claim: the teacher reaches the logits that the model computes its own loss of, not only those that it returns."""
    x = torch.randn(64, 8).bfloat16()
    found = {}
    for alpha in (0.0, 1.0):
        model, dense = InHalf(), InHalf()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        loop = setpoint.attach(model, optimizer, 1.0, total_steps=4, verify=False, teacher=Teacher(dense, alpha=alpha))
        model(x, labels=rows_of(x))["loss"].backward()
        found[alpha] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        loop.detach()
    assert found[0.0].abs().sum() > 0 and not found[1.0].any()  # the teacher has the same weights


def _steps(model: nn.Module, count: int = 3, /, **settings: Any) -> setpoint.Loop:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, verify=False, **settings)
    try:
        torch.manual_seed(0)
        for _ in range(count):
            x = torch.randn(16, 8, dtype=torch.float64)
            own = model(x)
            functional.cross_entropy(own[0] if isinstance(own, tuple) else own, rows_of(x)).backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        loop.detach()
    return loop


def test_true_is_a_frozen_copy_and_a_new_head_is_refused() -> None:
    """Claim: True equals a copy by hand for a trained model; one that only guesses is refused, also a confident one."""
    trained, optimizer = net(), None
    optimizer = torch.optim.Adam(trained.parameters(), 0.02)
    for _ in range(100):
        x = torch.randn(64, 8, dtype=torch.float64)
        functional.cross_entropy(trained(x), rows_of(x)).backward()
        optimizer.step()
        optimizer.zero_grad()
    one, other = copy.deepcopy(trained), copy.deepcopy(trained)
    _steps(one, 6, teacher=True)
    _steps(other, 6, teacher=trained)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for times in (0.1, 100.0):
        fresh = net()
        with torch.no_grad():
            fresh[2].weight.mul_(times)  # type: ignore[index, operator, union-attr]
        with pytest.raises(LoopError, match="its head is new, and teaches nothing. Train the dense model first"):
            _steps(fresh, 6, teacher=True)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.net(x)
        return found, found.sum()


def test_what_cannot_teach_is_refused_before_the_first_step() -> None:
    """Claim: itself, a wrapper, shared parameters, other classes, no logits, and no module are named."""
    model = net()
    for own in (model, nn.Sequential(model), model[0]):  # type: ignore[index]
        with pytest.raises(ValueError, match="or shares parameters with it or .*: teacher=True takes a frozen"):
            _steps(model, teacher=own)
    average = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"copies=, which are cut with it: .*teacher=copy\.deepcopy\(average\)"):
        _steps(model, teacher=average, copies=[average])
    with pytest.raises(ValueError, match=r"or a Teacher\(module\); got an int"):
        _steps(model, teacher=3)
    with pytest.raises(ValueError, match="the teacher is on meta, the model on cpu: move the teacher"):
        _steps(model, teacher=net().to("meta"))
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(net(), nn.Linear(4, 5)).double()
    with pytest.raises(ValueError, match=r"logits have shape \(16, 5\), the model's \(16, 4\)"):
        _steps(model, teacher=other)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model._forward_hooks and all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="the model returned a tuple: say where they are"):
        _steps(Twice(), teacher=Twice())
    _steps(Twice(), teacher=Teacher(Twice(), output=0))


class Detaches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = net(), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.net(x)
        return {"logits": found * 1, "loss": self.head(found).square().mean()}


def test_a_loss_that_does_not_come_from_the_logits_is_warned_of_once() -> None:
    """Claim: training continues without the teacher, with one warning."""
    model, dense = Detaches(), Detaches()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, verify=False, teacher=dense)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(STEPS):
            model(torch.randn(16, 8, dtype=torch.float64))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.finish().budget_met
    assert sum("the teacher teaches nothing: no gradient arrived" in str(each.message) for each in caught) == 1


class Broken(nn.Module):
    """A teacher whose logits are NaN in the first rows."""

    def __init__(self, inner: nn.Module, rows: int) -> None:
        super().__init__()
        self.inner, self.rows = inner, rows

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        found[: self.rows] = float("nan")
        return found


def test_rows_that_the_teacher_answers_by_nan_are_learnt_without_it() -> None:
    """Claim: a teacher of NaN alone leaves training as it is without one, and is warned of once."""
    plain, model = net(), net()
    _steps(plain)
    with pytest.warns(UserWarning, match="the teacher's logits hold NaN") as caught:
        _steps(model, teacher=Broken(net(48, seed=2), 16))
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    with pytest.warns(UserWarning, match="the teacher's logits hold NaN"):
        _steps(some := net(), teacher=Broken(net(48, seed=2), 3))
    assert all(parameter.isfinite().all() for parameter in some.parameters())


def test_known_samples_need_no_pass() -> None:
    """Claim: with `samples`, a second epoch costs the teacher nothing, and learns the same."""
    data = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = []
    for kept in (False, True):
        model, teacher = net(), Teacher(net(48, seed=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        loop = setpoint.attach(model, optimizer, 0.5, total_steps=8, verify=False, teacher=teacher)
        for step in range(8):
            indices = torch.arange(16) + 16 * (step % 2)
            if kept:
                teacher.samples(indices)
            functional.cross_entropy(model(data[indices]), rows_of(data[indices])).backward()
            optimizer.step()
            optimizer.zero_grad()
        loop.finish()
        runs.append((model, teacher))
    (one, without), (other, kept_by) = runs
    assert kept_by.flops == without.flops / 4
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    kept_by.samples([1, 99])
    with pytest.raises(ValueError, match=r"samples\(\) named 2, and the forward has 16 rows"):
        kept_by.logits(data[:16] + 1)


def test_evaluation_asks_no_teacher() -> None:
    """Claim: forwards in eval mode or without gradients cost no pass of the teacher; training in eval mode warns."""
    model, teacher, x = net(), Teacher(net(48, seed=2)), torch.randn(16, 8, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=8, verify=False, example=(x,), teacher=teacher)
    with torch.no_grad():
        model(x)
    model.eval()(x).square().mean().backward()
    with pytest.warns(UserWarning, match="the teacher teaches nothing: training calls the model in eval mode"):
        optimizer.step()
    assert teacher.flops == 0
    model.train()(x)
    assert teacher.flops > 0
    before = teacher.flops
    loop.detach()
    model(x)
    assert teacher.flops == before


@dataclass
class Answer:
    logits: Tensor


class InPlace(nn.Module):
    """Changes its inputs, and is trained through another method, with logits in a dataclass."""

    def __init__(self, seed: int = 1) -> None:
        super().__init__()
        self.net = net(seed=seed)

    def predict(self, x: Tensor) -> Answer:
        return Answer(self.net(x.sub_(1.0)))


def test_a_method_that_changes_its_inputs_is_taught_at_every_step() -> None:
    """Claim: without an example, a method is followed until the end; the teacher gets the inputs as the model got them,
    and the model's own method is back afterwards.
    """
    model, teacher = InPlace(), Teacher(InPlace(2))
    seen = list[Tensor]()
    teacher.model.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, verify=False, method="predict", teacher=teacher)
    for _ in range(STEPS):
        functional.cross_entropy(model.predict(torch.zeros(4, 8).double()).logits, torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loop.finish().budget_met and "predict" not in vars(model)
    assert len(seen) == STEPS and all((x == -1).all() for x in seen)
    assert all(parameter.requires_grad for parameter in teacher.model.parameters())  # it may be trained afterwards


def test_a_run_with_a_teacher_and_a_bill_goes_on_as_if_it_had_not_stopped() -> None:
    """Claim: weights, length and FLOPs equal those of the run that was not interrupted, without an example."""
    torch.manual_seed(0)
    data = torch.randn(80, 16, 8, dtype=torch.float64)

    def run(model: nn.Module, first: int, state: Any = None) -> tuple[setpoint.Loop, Any]:
        optimizer, saved = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), None
        budget = {"flops": "50%", "flops/run": "100%"}
        settings: dict[str, Any] = {"total_steps": 50, "verify": False, "resume": True, "teacher": net(48, seed=2)}
        loop, step = setpoint.attach(model, optimizer, budget, **settings), first
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        while step == first or step < loop.total_steps:
            functional.cross_entropy(model(data[step]), rows_of(data[step])).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == 12:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        loop.finish()
        return loop, saved

    one, state = run(model := net(), 0)
    other, _ = run(again := net(seed=5), 12, state)
    assert one.summary is not None and other.summary is not None and 20 < one.step == other.step
    assert one.summary.train_flops == other.summary.train_flops
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_another_loss_is_warned_of_once() -> None:
    """Claim: where gradients do not add up to 0 over classes, as in a loss of several labels, one warning says so."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=STEPS, verify=False, teacher=net(48, seed=2))
    x = torch.randn(16, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="the loss is no cross entropy of the logits: its gradient does not") as caught:
        for _ in range(3):
            functional.binary_cross_entropy_with_logits(model(x), (x[:, :4] > 0).double()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(caught) == 1
    loop.detach()
