"""The weight Taylor sensor: its formula against the unit sensor's, steps left out, and weights that come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group, widths_of
from setpoint.weights.find import Pattern, active_of, find_weights, with_active
from setpoint.weights.taylor import WeightTaylorSensor, raised


def model_and_groups() -> tuple[nn.Module, tuple[Group, ...]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    return model, find_weights(model)


def gradients(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()


@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_a_weight_is_read_as_a_gate_of_its_own(num_steps: int) -> None:
    """Claim: the saliency is (8 var(r) + mean(r)^2) / 2 of r = w * dL/dw, a step's weight being decay^age."""
    model, groups = model_and_groups()
    sensor = WeightTaylorSensor(8, window=10)
    state, seen = sensor.init(groups, model), []
    for seed in range(num_steps):
        gradients(model, seed)
        state = sensor.update(state, groups, model)
        seen.append({name: (p * p.grad).detach().numpy() for name, p in model.named_parameters()})
    reading = sensor.read(state, groups, 9)
    assert (reading.step, reading.num_steps, reading.skipped_steps) == (9, num_steps, 0)
    share = 0.9 ** np.arange(num_steps)[::-1]
    share /= share.sum()
    for group in groups:
        r = np.stack([step[group.name].reshape(-1) for step in seen])
        mean = share @ r
        # Weighted means of few steps are too near to them: 1 - 1/n where all weigh the same.
        variance = share @ (r - mean) ** 2 / (1 - share @ share) if num_steps > 1 else 0.0
        np.testing.assert_allclose(reading.saliency[group.name], (8 * variance + mean**2) / 2, rtol=1e-6, atol=1e-15)


def test_steps_that_are_not_finite_are_left_out_and_scales_taken_back() -> None:
    """Claim: NaN, infinite gradients (of a bias, too) and a NaN scale leave a step out; scaled ones are divided."""
    model, groups = model_and_groups()
    sensor = WeightTaylorSensor(8)
    state = plain = sensor.init(groups, model)
    for seed in range(6):
        gradients(model, seed)
        if seed in (1, 4):
            model[0].bias.grad[2] = torch.inf if seed == 1 else torch.nan
        scale = torch.tensor(torch.nan if seed == 3 else 1024.0)
        if seed not in (1, 3, 4):
            plain = sensor.update(plain, groups, model)
        for parameter in model.parameters():
            parameter.grad *= 1024.0
        state = sensor.update(state, groups, model, scale)
    one, other = sensor.read(state, groups, 6), sensor.read(plain, groups, 6)
    assert (one.num_steps, one.skipped_steps, other.skipped_steps) == (3, 3, 0)
    assert all(np.array_equal(values, other.saliency[name]) for name, values in one.saliency.items())


def test_a_weight_that_came_back_is_judged_by_the_steps_since() -> None:
    """Claim: after `renew` its saliency is that of a sensor that began then, and the others' goes on."""
    model, groups = model_and_groups()
    sensor = WeightTaylorSensor(8, window=10)
    state = whole = sensor.init(groups, model)
    fresh = {group.name: torch.rand(model.get_parameter(group.name).shape) < 0.3 for group in groups}
    late = sensor.init(groups, model)
    for seed in range(9):
        gradients(model, seed)
        if seed == 4:
            state = follow(state, Change(grown=fresh))
        state, whole = sensor.update(state, groups, model), sensor.update(whole, groups, model)
        late = sensor.update(late, groups, model) if seed >= 4 else late
    for name, scores in sensor.scores(state).items():
        expected = torch.where(fresh[name], sensor.scores(late)[name], sensor.scores(whole)[name])
        torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-18)


def test_only_active_weights_are_read() -> None:
    """Claim: a reading has one value for each active weight, in row-major order."""
    model, groups = model_and_groups()
    sensor = WeightTaylorSensor(8)
    state = sensor.init(groups, model)
    gradients(model, 0)
    state = sensor.update(state, groups, model)
    some = tuple(with_active(group, np.arange(group.num_units) % 3 == 1) for group in groups)
    reading, whole = sensor.read(state, some, 1), sensor.read(state, groups, 1)
    assert {name: len(values) for name, values in reading.saliency.items()} == widths_of(some)
    for group in some:
        assert np.array_equal(reading.saliency[group.name], whole.saliency[group.name][active_of(group)])


@pytest.mark.parametrize("name", ["2:4", "1:4", "2:8", "2:3"])
def test_a_pattern_lets_the_least_salient_of_each_block_go(name: str) -> None:
    """Claim: stride by stride down to the pattern, the least salient weights of the raised reading are those with
    the lowest saliencies of each block, and what the next stride costs in saliency is as read.
    """
    pattern, shape = Pattern.named(name), (5, 24, 2, 2)
    model = nn.Sequential(nn.Conv2d(24, 5, 2))
    (group,) = find_weights(model, name)
    values = np.random.default_rng(0).lognormal(size=shape)
    values[0] = 0.5  # ties
    active = np.ones(group.num_units, dtype=bool)
    left = pattern.block
    while left > pattern.kept:
        group = with_active(group, active)
        read = values.reshape(-1)[active]
        seen = raised(read, group, shape, pattern)
        goes = np.argsort(seen, kind="stable")[: group.multiple_of]
        assert seen[goes].sum() == pytest.approx(read[goes].sum(), rel=1e-12)
        gone = np.flatnonzero(active)[goes]
        active[gone] = False
        blocks = pattern.blocks(active.reshape(shape))
        left -= pattern.stride
        assert (blocks.sum(-1) == left).all()
    lowest = np.sort(pattern.blocks(values), axis=-1)[..., : pattern.block - pattern.kept]
    assert values.reshape(-1)[~active].sum() == pytest.approx(lowest.sum())
