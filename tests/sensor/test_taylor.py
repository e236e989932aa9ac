"""The Taylor sensor."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from setpoint.errors import GroupError
from setpoint.groups.group import Group, Slice
from setpoint.sensor.taylor import Moments, TaylorSensor


def _group(num_units: int, *slices: Slice, name: str = "units") -> Group:
    return Group(name, "unit", num_units, slices)


@dataclass
class Case:
    """A model whose forward takes gates on its units, and the group of these units."""

    model: nn.Module
    forward: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    group: Group


def _mlp() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double()
    group = _group(6, Slice("0.weight", 0, "produce", np.arange(6)), Slice("2.weight", 1, "consume", np.arange(6)))
    return Case(model, lambda x, g: model[2](model[1](model[0](x)) * g), torch.randn(8, 4).double(), group)


def _conv() -> Case:
    """Convolution, norm, activation; read by a second convolution and, flattened, by a linear layer."""
    convs = {"a": nn.Conv2d(2, 5, 3, padding=1), "b": nn.Conv2d(5, 3, 3, padding=1)}
    net = nn.ModuleDict({**convs, "n": nn.BatchNorm2d(5), "c": nn.Linear(5 * 16, 2)}).double()

    def forward(x: Tensor, gate: Tensor) -> Tensor:
        y = torch.relu(net["n"](net["a"](x))) * gate.view(-1, 1, 1)
        return net["b"](y).mean((1, 2, 3)).unsqueeze(1) + net["c"](y.flatten(1))

    read = Slice("b.weight", 1, "consume", np.arange(5)), Slice("c.weight", 1, "consume", np.repeat(np.arange(5), 16))
    group = _group(5, Slice("a.weight", 0, "produce", np.arange(5)), *read)
    return Case(net, forward, torch.randn(6, 2, 4, 4).double(), group)


def _heads() -> Case:
    """Attention with four heads of size 3; a unit is a head."""
    net = nn.ModuleDict({"qkv": nn.Linear(12, 36), "out": nn.Linear(12, 12)}).double()

    def forward(x: Tensor, gate: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 3)).transpose(1, 2) for part in net["qkv"](x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v) * gate.view(-1, 1, 1)
        return net["out"](y.transpose(1, 2).flatten(2))

    index = np.repeat(np.arange(4), 3)
    written = Slice("qkv.weight", 0, "produce", np.tile(index, 3))
    group = _group(4, written, Slice("out.weight", 1, "consume", index))
    return Case(net, forward, torch.randn(2, 5, 12).double(), group)


CASES: dict[str, Callable[[], Case]] = {"gelu": _mlp, "conv-norm": _conv, "heads": _heads}


def _loss(output: Tensor) -> Tensor:
    return (output - 0.3).square().mean()


@pytest.mark.parametrize("name", CASES)
def test_reads_the_gate_gradient_exactly(name: str) -> None:
    """The sum of w * dL/dw over outgoing weights is the gradient of a gate on the unit, to 1e-13."""
    case = CASES[name]()
    gate = torch.ones(case.group.num_units, dtype=torch.float64, requires_grad=True)
    _loss(case.forward(case.x, gate)).backward()
    sensor = TaylorSensor(len(case.x))
    state = sensor.update(sensor.init((case.group,), case.model), (case.group,), case.model).folded()
    assert gate.grad is not None
    torch.testing.assert_close(state.mean, gate.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("first_order", [False, True])
def test_follows_its_formula_over_steps(first_order: bool) -> None:
    """Over several steps the reading is the formula with the unbiased variance; a long window forgets nothing."""
    case = CASES["gelu"]()
    sensor = TaylorSensor(8, window=10**8, first_order=first_order)
    state = sensor.init((case.group,), case.model)
    gradients = []
    for _ in range(7):
        case.model.zero_grad()
        gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
        _loss(case.forward(torch.randn(8, 4).double(), gate)).backward()
        assert gate.grad is not None
        gradients.append(gate.grad)
        state = sensor.update(state, (case.group,), case.model)
    reading = sensor.read(state, (case.group,), step=7)
    mean, variance = torch.stack(gradients).mean(0), torch.stack(gradients).var(0)
    want = (-mean * first_order + 0.5 * (8 * variance + mean**2)).clamp(min=0).numpy()
    np.testing.assert_allclose(reading.saliency["units"], want, rtol=1e-5, atol=1e-12)
    assert (reading.num_steps, reading.skipped_steps, reading.calibrated) == (7, 0, True)


def _one_weight() -> tuple[nn.Module, tuple[Group, ...]]:
    """A unit read by one weight of 1, so that r is that weight's gradient."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1.0)
    return model, (_group(1, Slice("weight", 1, "consume", np.arange(1))),)


def _feed(sensor: TaylorSensor, gradients: list[float]) -> Moments:
    model, groups = _one_weight()
    state = sensor.init(groups, model)
    for gradient in gradients:
        model.weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        state = sensor.update(state, groups, model)
    return state.folded()


def test_mean_and_variance_forget_without_bias() -> None:
    """Mean and variance are the weighted ones with weights decay^age, normalised, from the first step on."""
    gradients = [1.0, 4.0, -2.0, 0.5]
    state = _feed(TaylorSensor(1, window=3), gradients)
    weights = (2 / 3) ** np.arange(3, -1, -1)
    weights /= weights.sum()
    mean = (weights * gradients).sum()
    assert state.mean.item() == pytest.approx(mean, rel=1e-12)
    assert state.variance.item() == pytest.approx((weights * (np.array(gradients) - mean) ** 2).sum(), rel=1e-12)


def test_predicts_leave_one_out_on_a_quadratic() -> None:
    """Where the loss is exactly quadratic in each gate and the model fits, saliency is the true loss increase."""
    scales, weights = torch.tensor([0.5, 1.0, 1.5, 2.0]).double(), torch.tensor([1.0, -0.8, 0.6, 0.05]).double()
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights)
    group = _group(4, Slice("weight", 1, "consume", np.arange(4)))
    sensor, sloped = (TaylorSensor(64, window=4000, first_order=first_order) for first_order in (False, True))
    state = sensor.init((group,), model)
    for _ in range(1500):
        x = torch.randn(64, 4).double() * scales
        model.zero_grad()
        (0.5 * (model(x).squeeze() - (x @ weights + torch.randn(64).double())).square()).mean().backward()
        state = sensor.update(state, (group,), model)
    # Noise of unit variance and half squared error are a Gaussian log-likelihood, whose optimum the weights are.
    true = 0.5 * (weights * scales).square().numpy()
    for each in (sensor, sloped):  # which differ in how they read only
        np.testing.assert_allclose(each.read(state, (group,), 0).saliency["units"], true, rtol=0.15, atol=2e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_leaves_out_bad_steps_and_counts_them(bad: float) -> None:
    """NaN and infinite gradients change nothing but the count of skipped steps, the first step included."""
    sensor = TaylorSensor(4, window=3)
    clean, dirty = _feed(sensor, [1.0, 2.0]), _feed(sensor, [bad, 1.0, bad, 2.0])
    assert (dirty.mean, dirty.variance, dirty.num_steps) == (clean.mean, clean.variance, clean.num_steps)
    assert (clean.skipped_steps.item(), dirty.skipped_steps.item()) == (0, 2)
    assert sensor.read(dirty, (), 4).finite()


def test_keeps_float32_moments_for_narrow_weights() -> None:
    """With bfloat16 weights the sums are those of the same numbers in float64, to float32 precision."""
    model = nn.Linear(6, 300, bias=False).bfloat16()
    model.weight.grad = torch.randn(300, 6).bfloat16()
    group = _group(6, Slice("weight", 1, "consume", np.arange(6)))
    sensor = TaylorSensor(1)
    state = sensor.update(sensor.init((group,), model), (group,), model).folded()
    want = (model.weight.detach().double() * model.weight.grad.double()).sum(0)
    assert state.mean.dtype == torch.float32
    torch.testing.assert_close(state.mean.double(), want, rtol=1e-5, atol=1e-5)


def test_divides_by_the_gradient_scale() -> None:
    """Gradients still multiplied by a scaler's factor read as without it, a NaN factor leaves the step out, and one
    without any gradient counts as r = 0.
    """
    (model, groups), sensor = _one_weight(), TaylorSensor(1)
    state = sensor.update(sensor.init(groups, model), groups, model).folded()
    assert (state.mean.item(), state.num_steps.item()) == (0.0, 1.0)
    model.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64) * 1024
    state = sensor.update(sensor.init(groups, model), groups, model, torch.tensor(1024.0)).folded()
    assert state.mean.item() == 3.0
    state = sensor.update(state, groups, model, torch.tensor(torch.nan)).folded()
    assert (state.mean.item(), state.skipped_steps.item()) == (3.0, 1.0)


def test_what_was_seen_before_a_group_was_frozen_stands() -> None:
    """While a group's outgoing weight is frozen its moments are those of the steps before and after, whatever lies in
    the weight's gradient; other groups go on, and so does the count of steps.
    """
    model = nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in "ab"}).double()
    groups = tuple(_group(1, Slice(f"{name}.weight", 1, "consume", np.arange(1)), name=name) for name in "ab")
    sensor, gradients = TaylorSensor(1, window=3), [1.0, 4.0, 9.0, 9.0, 9.0, -2.0, 0.5]
    state = sensor.init(groups, model)
    for step, gradient in enumerate(gradients):
        for name in "ab":
            nn.init.constant_(model[name].weight, 1.0)
            model[name].weight.grad = torch.tensor([[gradient]], dtype=torch.float64)
        model["b"].weight.requires_grad_(not 2 <= step < 5)
        state = sensor.update(state, groups, model)
    state = state.folded()
    all_of_them, without = _feed(sensor, gradients), _feed(sensor, [1.0, 4.0, -2.0, 0.5])
    for part in ("mean", "variance", "weight", "squares"):
        want = torch.cat([getattr(all_of_them, part), getattr(without, part)])
        torch.testing.assert_close(getattr(state, part), want, rtol=1e-12, atol=0)
    assert (state.num_steps.item(), state.skipped_steps.item()) == (7, 0)


def test_frozen_outgoing_weights_are_not_readable() -> None:
    """A group is read only if every outgoing weight gets a gradient; init refuses others by name."""
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    both = [Slice(f"{name}.weight", 1, "consume", np.arange(2)) for name in "ab"]
    partly, whole = _group(2, *both, name="partly"), _group(2, both[0], name="whole")
    none = _group(2, Slice("a.weight", 0, "produce", np.arange(2)), name="none")
    model["b"].weight.requires_grad_(False)
    sensor = TaylorSensor(1)
    assert sensor.readable((partly, whole, none), model) == (whole,)
    with pytest.raises(GroupError, match="'none', 'partly'"):
        sensor.init((partly, whole, none), model)


def test_counts_its_own_flops() -> None:
    """An update costs 3 per outgoing weight of the group, and 1 per gradient that it does not read whole."""
    group = _group(3, Slice("weight", 1, "consume", np.array([-1, -1, 0, 1, 2, -1])))
    assert TaylorSensor(1).flops((group,), nn.Linear(6, 5)) == 3 * 3 * 5 + 6 * 5 + 5


@pytest.mark.parametrize("arguments", [(0,), (-1,), (True,), (4, 0), (4, -3)])
def test_refuses_settings_that_make_no_sense(arguments: tuple[int, ...]) -> None:
    """Samples and window are positive integers."""
    with pytest.raises(ValueError, match="must be a positive integer"):
        TaylorSensor(*arguments)
