"""Magnitude pruning: the largest weights stay, at once or along the cubic."""

from __future__ import annotations

import pytest
import torch

from baselines.weights import counts, draw, run, target
from setpoint_bench.baselines.magnitude import Gradual, OneShot
from setpoint_bench.baselines.schedule import cubic_density


def test_one_shot_keeps_the_largest() -> None:
    """Each tensor keeps the target's count, and nothing that goes is larger than what stays."""
    weights = draw()
    masks = OneShot().start(weights, target(), torch.Generator())
    assert counts(masks) == target().counts
    for name, weight in weights.items():
        assert weight[masks[name]].abs().min() >= weight[~masks[name]].abs().max()


@pytest.mark.parametrize("total_steps", [1, 2, 5, 40, 1000])
def test_gradual_follows_the_cubic(total_steps: int) -> None:
    """After every update each tensor has the cubic's density, to a weight, and at the last the target's count."""
    rule = Gradual()
    history = run(rule, target(), total_steps)
    last = max(0, min(round(0.7 * total_steps), total_steps - 1))
    first = min(round(0.05 * total_steps), last - 1)
    for step, masks in history[1:]:
        for name, mask in masks.items():
            final = target().counts[name] / mask.numel()
            expected = cubic_density((step - first) / (last - first), final=final) * mask.numel()
            assert abs(int(mask.sum()) - expected) <= 0.5 + 1e-6
    assert history[-1][0] == last and counts(history[-1][1]) == target().counts
    assert len(history) <= 52


def test_gradual_never_brings_back() -> None:
    """Masks are nested: each is part of the one before."""
    history = run(Gradual(), target(), 200)
    for (_, before), (_, after) in zip(history, history[1:], strict=False):
        assert all(bool((before[name] | ~after[name]).all()) for name in before)


def test_settings_out_of_range() -> None:
    """An end before the beginning is an error."""
    with pytest.raises(ValueError, match="begin < end"):
        Gradual(begin=0.7, end=0.7)
