"""Hard concrete gates: closed forms of their distribution against draws."""

from __future__ import annotations

import pytest
import torch

from setpoint_bench.baselines.hard_concrete import drawn, logit_of, probability_above, settled

NUM_DRAWS = 200_000
logits = pytest.mark.parametrize("logit", [-4.0, -1.0, 0.0, 0.7, 3.0])


def draws(logit: float) -> torch.Tensor:
    """Many gates of one logit."""
    generator = torch.Generator().manual_seed(1)
    return drawn(torch.full((NUM_DRAWS,), logit), torch.rand(NUM_DRAWS, generator=generator))


@logits
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.999])
def test_probability_above(logit: float, threshold: float) -> None:
    """Claim: gates are above a threshold as often as the closed form says; above 0, so often the unit is there."""
    closed = float(probability_above(torch.tensor(logit), threshold))
    assert float((draws(logit) > threshold).double().mean()) == pytest.approx(closed, abs=5e-3)


@logits
def test_mean(logit: float) -> None:
    """Claim: the mean of a gate is the integral over thresholds of the probability to be above."""
    thresholds = (torch.arange(1000) + 0.5) / 1000
    integral = sum(float(probability_above(torch.tensor(logit), float(t))) for t in thresholds) / 1000
    assert float(draws(logit).double().mean()) == pytest.approx(integral, abs=5e-3)


def test_settled() -> None:
    """Claim: what is not drawn is 0 and 1 at the ends, the mean at logit 0, and follows the paper between."""
    ends = settled(torch.tensor([-5.0, 5.0]))
    assert ends.tolist() == [0.0, 1.0]
    assert float(settled(torch.tensor(0.0))) == pytest.approx(float(draws(0.0).mean()), abs=5e-3) == 0.5
    value = torch.tensor(1.5)
    assert float(settled(value)) == pytest.approx(min(1.0, float(torch.sigmoid(value)) * 1.2 - 0.1))


def test_some_draws_are_exactly_0_and_1() -> None:
    """Claim: gates are closed and open whole with positive probability, and hand gradients on between."""
    gates = draws(0.0)
    assert bool((gates == 0).any()) and bool((gates == 1).any())
    logit = torch.zeros(5, requires_grad=True)
    torch.autograd.backward(drawn(logit, torch.full((5,), 0.4)).sum())
    assert logit.grad is not None and bool((logit.grad > 0).all())


@pytest.mark.parametrize("probability", [0.05, 0.5, 0.99])
def test_logit_of(probability: float) -> None:
    """Claim: it is the inverse of the probability to be there."""
    assert float(probability_above(torch.tensor(logit_of(probability)))) == pytest.approx(probability)
