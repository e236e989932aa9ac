"""Accumulated gradients: what was thrown away is told from what is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from setpoint.regrowth.accumulated import Accumulated, RunningSum


def added(weight: nn.Parameter, sums: RunningSum, value: float) -> None:
    """A backward pass whose gradient is `value`, and in which as much is brought."""
    y = weight * 1.0
    y.register_hook(lambda gradient: sums.bring(gradient.detach().clone()))
    (value * y).sum().backward()


ENDS: dict[str, Callable[[torch.optim.Optimizer, nn.Parameter], None]] = {
    "none": lambda optimizer, _: optimizer.zero_grad(),
    "zero": lambda optimizer, _: optimizer.zero_grad(set_to_none=False),
    "replaced": lambda _, weight: setattr(weight, "grad", torch.zeros_like(weight)),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_sum_is_what_the_gradient_is(end: str) -> None:
    """Claim: where each backward pass brings its gradient, the sum is `.grad` after any passes without clipping,
    after all was thrown away, and after passes that bring nothing; `torch.autograd.grad` adds nothing.
    """
    weight = nn.Parameter(torch.ones(2))
    optimizer, sums = torch.optim.SGD([weight], lr=0.1), RunningSum(weight)
    for value in (1.0, 2.0, -3.0):  # adds up to zero, which is not the same as nothing
        added(weight, sums, value)
    added(weight, sums, 5.0)
    assert_equal(sums, weight)
    y = weight * 1.0
    y.register_hook(lambda gradient: sums.bring(gradient))
    torch.autograd.grad((100 * y).sum(), weight)
    assert_equal(sums, weight)
    added(weight, sums, torch.inf)
    ENDS[end](optimizer, weight)
    assert sums.total() is None
    added(weight, sums, 7.0)
    assert_equal(sums, weight)
    nn.utils.clip_grad_norm_(weight, 0.1)
    added(weight, sums, 1.0)
    total = sums.total()
    assert total is not None and total.tolist() == [8.0, 8.0]
    ENDS[end](optimizer, weight)
    (3.0 * weight).sum().backward()
    assert sums.total() is None
    sums.stop()
    assert not weight._backward_hooks and not weight._post_accumulate_grad_hooks


def assert_equal(sums: RunningSum, weight: nn.Parameter) -> None:
    total, gradient = sums.total(), weight.grad
    assert total is not None and gradient is not None and torch.equal(total, gradient)


def test_a_gradient_of_zero_is_not_one_that_was_zeroed() -> None:
    """Claim: a gradient that a backward pass has left at zero is there; one that somebody has set to zero is not."""
    weight: Tensor = nn.Parameter(torch.ones(2))
    seen = Accumulated(weight)
    assert seen.discarded and not seen.untouched
    (0.0 * weight).sum().backward()
    seen.note()
    assert seen.untouched and not seen.discarded
    assert weight.grad is not None
    weight.grad.zero_()
    assert seen.discarded and not seen.untouched
    weight.grad += 1
    assert not seen.discarded and not seen.untouched
