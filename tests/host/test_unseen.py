"""A loop says when the model trains on without the optimizer that it watches, and when a run misses its budget."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import setpoint


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3))


def attached(model: nn.Module, optimizer: Any, total_steps: int = 40, **options: Any) -> setpoint.Loop:
    budget = options.pop("budget", setpoint.Budget.fraction(0.5, of="flops"))
    if isinstance(budget, setpoint.Budget):
        options = {"controller": setpoint.PricedController(), **options}
    return setpoint.attach(model, optimizer, budget, example=(torch.zeros(8, 6),), total_steps=total_steps, **options)


def backward(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(x), (x[:, 0] > 0).long())
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("before", [0, 5])
def test_another_optimizer_is_told_of_in_mid_run(before: int) -> None:
    """Claim: where another optimizer object trains the model, from the start or from some step on, the loop warns once,
    after a few of its steps; the given one is named.
    """
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    loop = attached(model, optimizer)
    train(model, optimizer, before)
    other = torch.optim.AdamW(model.parameters())
    words = rf"the weights move, but AdamW, given to attach, does not step \(it has {before} times so far\).*detach\(\)"
    with pytest.warns(UserWarning, match=words) as told:
        train(model, other, 5)
    assert len(told) == 1 and loop.step == before
    train(model, other, 100)  # once only
    loop.detach()


@pytest.mark.parametrize("gone", [0, 1])
def test_one_of_several_optimizers_that_was_replaced_is_told_of(gone: int) -> None:
    """Claim: where one of two optimizers steps no more while the other does, the loop says in mid-run which, once."""
    model = build()
    parameters = list(model.parameters())
    optimizers: list[Any] = [torch.optim.AdamW(parameters[:2]), torch.optim.SGD(parameters[2:], 0.1)]
    loop = attached(model, optimizers, verify=False, total_steps=400)

    def both(steps: int) -> None:
        for step in range(steps):
            backward(model, step)
            for each in optimizers:
                each.step()
                each.zero_grad()

    both(5)
    optimizers[gone] = torch.optim.SGD(parameters[2 * gone : 2 * gone + 2], 0.1)
    words = f"but {('AdamW', 'SGD')[gone]}, given to attach, does not step, as the others do, .it has 5 times"
    with pytest.warns(UserWarning, match=words) as told:
        both(80)
    assert len(told) == 1 and loop.step == 5
    loop.detach()


def accumulating(model: nn.Module, loop: Callable[[Any], setpoint.Loop]) -> None:
    """A step of 100 batches."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop(optimizer)
    for _ in range(2):
        for batch in range(100):
            backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def with_a_closure(model: nn.Module, loop: Callable[[Any], setpoint.Loop]) -> None:
    """Many passes, and as many moves, within one step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop(optimizer)

    def closure() -> Tensor:
        for batch in range(70):
            optimizer.zero_grad()
            loss = backward(model, batch)
            with torch.no_grad():
                for each in model.parameters():
                    each.mul_(0.999)
        return loss

    for _ in range(3):
        optimizer.step(closure)


def two_optimizers(model: nn.Module, loop: Callable[[Any], setpoint.Loop]) -> None:
    """Each of its own half."""
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[:2], 0.1), torch.optim.AdamW(parameters[2:])]
    loop(optimizers)
    for step in range(10):
        backward(model, step)
        for each in optimizers:
            each.step()
            each.zero_grad()


def skipped(model: nn.Module, loop: Callable[[Any], setpoint.Loop]) -> None:
    """A scaler finds its scale."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1000)  # overflows at first
    for step in range(30):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean() * 1e3).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def after_the_last_decision(model: nn.Module, loop: Callable[[Any], setpoint.Loop]) -> None:
    """The budget is met, and something else goes on."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = loop(optimizer)
    train(model, optimizer, 40)
    assert found.budget_met
    train(model, torch.optim.AdamW(model.parameters()), 100)


@pytest.mark.parametrize("training", [accumulating, with_a_closure, two_optimizers, skipped, after_the_last_decision])
def test_training_as_it_is_done_is_not_told_of(training: Callable[..., None]) -> None:
    """Claim: gradients that add up over many batches, closures, several
    optimizers, a scaler that skips steps, and what comes after the last decision give no warning.
    """
    model, loops = build(), []

    def loop(optimizer: Any) -> setpoint.Loop:
        loops.append(attached(model, optimizer, verify=False))
        return loops[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "a step gives the model 70 times")  # of its size: the closure's calls
        training(model, loop)
    loops[0].detach()


def test_watching_changes_nothing_and_holds_nothing() -> None:
    """Claim: while a loop is attached the model is copied, pickled, compiled and saved as before, and `detach` leaves
    no hook on it; a loop that is dropped is not kept by its model.
    """
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = attached(model, optimizer)
    train(model, optimizer, 2)
    backward(model, 0)
    parameter = model[0].weight
    assert parameter._post_accumulate_grad_hooks
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not twin[0].weight._post_accumulate_grad_hooks and torch.equal(twin[0].weight, parameter)
    file = io.BytesIO()
    torch.save(model, file)
    compiled = torch.compile(model, backend="eager")
    backward(compiled, 0)
    optimizer.step()
    loop.detach()
    assert not parameter._post_accumulate_grad_hooks
    again = attached(model, optimizer)
    gone = weakref.ref(again)
    again.detach()
    del again, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            setpoint.Budget.fraction(0.5, of="flops"),
            r"50\.0 % asked for \(a step takes [\d.]+ kFLOPs, the limit is [\d.]+ kFLOPs",
        ),
        (
            setpoint.Budget.fraction(0.5, of="params"),
            r"50\.0 % asked for \(a step takes 223 params, the limit is 122 params\)\. "
            "total_steps counts optimizer steps, not batches, and this run had 3$",
        ),
        (
            setpoint.Budget.fraction(0.5, of="flops", per="run"),
            r"asked for the run.* spent, the limit of the run is [\d.]+ kFLOPs",
        ),
    ],
)
def test_a_miss_is_warned_of(budget: setpoint.Budget, words: str) -> None:
    """Claim: a run that ends without meeting its budget, be it of FLOPs, of parameters or of the whole run,
    says so in one sentence at `finish`, with the steps that were seen, what was spent and the limit.
    """
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = attached(model, optimizer, budget=budget)
    train(model, optimizer, 3)
    with pytest.warns(UserWarning, match=rf"the budget is not met: .* after 3 of 40 steps.*{words}") as told:
        loop.finish()
    assert len(told) == 1 and loop.summary is not None and not loop.summary.budget_met


def test_steps_that_were_not_seen_are_counted_at_the_end() -> None:
    """Claim: where a model trained on without steps that the loop saw, the miss says how many backward passes came."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loop = attached(model, optimizer)
    train(model, optimizer, 3)
    for step in range(30):
        backward(model, step)
        for each in model.parameters():
            each.data.add_(each.grad, alpha=-0.01)  # not counted by any tensor
            each.grad = None
    with pytest.warns(UserWarning, match="after 3 of 40 steps.*30 backward passes came after the last step"):
        loop.finish()


def test_a_run_without_a_miss_says_nothing() -> None:
    """Claim: a run that meets its budget, one that ends early after that, one without a budget, and one that never
    began end without a word.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps, budget, met in ((40, 0.5, True), (39, 0.5, True), (3, 1.0, True), (0, 0.5, False)):
            model = build()
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            with attached(model, optimizer, budget=setpoint.Budget.fraction(budget, of="flops")) as loop:
                train(model, optimizer, steps)
            assert loop.summary is not None and loop.summary.budget_met == met
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        loop = attached(model, optimizer, budget=setpoint.Price(1e-9, of="flops"))
        train(model, optimizer, 3)
        loop.finish()
        assert re.search("last decision was not made", loop.summary.reason)


@pytest.mark.parametrize("later", ["unfrozen", "a new group", "exchanged"])
@pytest.mark.parametrize("waits", [True, False])
def test_weights_that_are_trained_later_are_warned_of(later: str, waits: bool) -> None:
    """Claim: weights that were frozen when the loop began, and are not later, are warned of, once."""
    model = build()
    first, second = list(model[0].parameters()), list(model[2].parameters())  # type: ignore[index, union-attr]
    for each in first:
        each.requires_grad_(False)
    optimizer = torch.optim.SGD(second if later == "a new group" else [*first, *second], 0.01)
    options: dict[str, Any] = {} if waits else {"example": (torch.zeros(8, 6),)}
    loop = setpoint.attach(model, optimizer, 0.5, total_steps=40, **options)
    train(model, optimizer, 3)
    for each in first:
        each.requires_grad_(True)
    if later == "a new group":
        optimizer.add_param_group({"params": first})
    if later == "exchanged":
        second[1].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias are trained now, and were frozen when the loop began"):
        train(model, optimizer, 1)
    train(model, optimizer, 3)
    loop.detach()


class InMode(nn.Module):
    """A forward that has gradients in train mode only, or only once `learns` is set."""

    def __init__(self, by_mode: bool) -> None:
        super().__init__()
        self.by_mode, self.learns, self.net = by_mode, False, build()

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training if self.by_mode else self.learns):
            hidden = self.net[:2](x)  # type: ignore[index]
        out: Tensor = self.net[2](hidden)  # type: ignore[index]
        return out


def test_a_model_in_eval_mode_is_traced_as_it_trains() -> None:
    """Claim: a model that is attached in eval mode keeps it, and its FLOPs are those of its training."""
    model = InMode(by_mode=True).eval()
    optimizer = torch.optim.AdamW(model.parameters())
    loop = attached(model, optimizer)
    assert not any(module.training for module in model.modules())
    model.train()
    train(model, optimizer, 40)
    with FlopCounterMode(display=False) as counter:
        backward(model, 0)
    summary = loop.finish()
    assert summary.budget_met and summary.spent["flops"] == counter.get_total_flops()


def test_a_backward_pass_that_was_not_seen_is_warned_of() -> None:
    """Claim: weights that get gradients, and had none in the forward that was traced, are warned of, once."""
    model = InMode(by_mode=False)
    optimizer = torch.optim.AdamW(model.parameters())
    with attached(model, optimizer, budget=setpoint.Price(1e-9, of="flops"), controller=None):
        train(model, optimizer, 3)
        model.learns = True
        with pytest.warns(
            UserWarning, match=r"net\.0\.weight, net\.0\.bias are trained now, and had no gradient when"
        ) as told:
            train(model, optimizer, 3)
        assert len(told) == 1
