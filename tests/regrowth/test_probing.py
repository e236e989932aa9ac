"""Probing: resting units change nothing, and what they would contribute is read right."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from actuator.hand_made import CASES, Case, residual, some_keep
from groups.zoo import MODELS as ZOO
from regrowth.test_regrow import adamw, assert_same, snapshot
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors
from setpoint.groups.group import random_keep
from setpoint.regrowth.probing import Probing
from setpoint.regrowth.regrow import regrow
from setpoint.regrowth.reserve import Reserve
from twin.test_twin import double, groups_of


def case(name: str) -> Case:
    if name in CASES:
        model, inputs, groups = CASES[name]()
        return model.double(), double(inputs), groups
    build, example = ZOO[name]
    return build().double(), double(example()), groups_of(name)


def cut(name: str) -> tuple[nn.Module, tuple[Tensor, ...], Reserve]:
    """A model after one step and a cut, and the reserve."""
    torch.manual_seed(0)
    model, inputs, groups = case(name)
    keep = some_keep(groups) if name in CASES else random_keep(groups)
    step(model, adamw(model), inputs)
    model.zero_grad()
    reserve = Reserve.of(model, groups).rest(model, None, keep)
    shrink(model, None, groups, keep)
    return model, inputs, reserve


def loss_of(output: Any) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    return (first - torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view_as(first)).square().mean()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Tensor, ...]) -> None:
    optimizer.zero_grad()
    loss_of(model(*inputs)).backward()
    optimizer.step()


@pytest.mark.parametrize("name", [*CASES, *ZOO])
def test_a_probed_step_is_the_shrunk_models_step(name: str) -> None:
    """Claim: with units present, outputs and gradients equal the shrunk model's to 1e-13 in fp64, buffers too;
    and right after the forward pass every parameter, size and forward is the shrunk model's own.
    """
    model, inputs, reserve = cut(name)
    twin = copy.deepcopy(model)
    before, identities = snapshot(model)[2:], [id(tensor) for tensor in named_tensors(model).values()]
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    output = model(*inputs)
    assert_same(snapshot(model)[2:], before)
    assert identities == [id(tensor) for tensor in named_tensors(model).values()]
    want = twin(*inputs)
    torch.testing.assert_close(output, want, rtol=1e-13, atol=1e-13)
    loss_of(output).backward()
    loss_of(want).backward()
    probing.stop()
    assert probing.num_forwards == 1 and probing.gains() is not None
    for (key, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        wanted = torch.zeros_like(one) if other.grad is None else other.grad
        got = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13, msg=key)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["mlp", "residual", "concat", "attention", "tied", "gpt"])
def test_the_gain_is_the_slope_of_the_loss(name: str) -> None:
    """Claim: the gain of a unit is minus the slope of the loss as its outgoing weights go from zero to their
    resting values, by central differences on a model that it was really brought back into, to 1e-6.
    """
    model, inputs, reserve = cut(name)
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    loss_of(model(*inputs)).backward()
    probing.stop()
    gains = probing.gains()
    assert gains is not None
    for group, origins in list(reserve.origins().items())[:3]:
        for number, origin in list(enumerate(origins))[:2]:
            want = slope(model, inputs, reserve, group, int(origin))
            assert gains[group][number] == pytest.approx(-want, rel=1e-5, abs=1e-8)


def slope(model: nn.Module, inputs: tuple[Tensor, ...], reserve: Reserve, group: str, origin: int) -> float:
    twin = copy.deepcopy(model)
    now, after = regrow(twin, None, reserve.present(), reserve, {group: [origin]})
    unit = int(np.flatnonzero(np.flatnonzero(after.active[group]) == origin)[0])
    (of,) = (each for each in now if each.name == group)
    tensors, losses = named_tensors(twin), []
    resting = {}
    for part in of.slices:
        if part.role == "consume":
            resting[part.tensor, part.dim] = tensors[part.tensor].detach().clone()
    for scale in (1e-4, -1e-4):
        for part in of.slices:
            if part.role == "consume":
                entries = torch.from_numpy(np.flatnonzero(part.index == unit))
                tensor, whole = tensors[part.tensor], resting[part.tensor, part.dim]
                tensor.data.index_copy_(part.dim, entries, scale * whole.index_select(part.dim, entries))
        losses.append(loss_of(copy.deepcopy(twin)(*inputs)).item())
    return (losses[0] - losses[1]) / 2e-4


def test_evaluation_and_checkpoints_in_between_see_the_shrunk_model() -> None:
    """Claim: while probing is on, eval, no_grad and functional calls, state_dict, deepcopy and another model run
    as without it, and nothing of it is found in a copy.
    """
    model, inputs, reserve = cut("residual")
    widths = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    output = model(*inputs)
    model.eval()
    evaluated = model(*inputs)
    model.train()
    with torch.no_grad():
        model(*inputs)
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
    torch.func.functional_call(model, tensors, inputs)
    residual()[0].double()(*inputs)
    assert probing.num_forwards == 1
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == widths
    twin = copy.deepcopy(model)
    loss_of(output).backward()
    probing.stop()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in twin.modules())
    assert evaluated.shape == output.shape


def test_micro_batches_add_up_and_clipping_is_seen_through() -> None:
    """Claim: gains of two micro-batches add up, and follow the scale that the gradients have before the step."""
    model, inputs, reserve = cut("mlp")

    def read(parts: int, clip: float | None) -> tuple[dict[str, np.ndarray], float]:
        model.zero_grad()
        probing = Probing(model, reserve, reserve.origins())
        probing.start()
        for piece in inputs[0].chunk(parts):
            (model(piece).square().sum() / len(inputs[0])).backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), clip or torch.inf))
        probing.stop()
        assert probing.num_forwards == parts
        gains = probing.gains()
        assert gains is not None
        return gains, norm

    whole, norm = read(1, None)
    for parts, clip in ((2, None), (1, norm / 4)):
        other, seen = read(parts, clip)
        assert seen == pytest.approx(norm)
        for name, values in whole.items():
            np.testing.assert_allclose(other[name], values / (4 if clip else 1), rtol=1e-5, atol=1e-12)


def test_a_gradient_scaler_is_seen_through() -> None:
    """Claim: gains are the same whether the loss was scaled and the gradients unscaled before the step, or the
    optimizer is left to divide by the scale itself.
    """
    model, inputs, reserve = cut("mlp")
    gains = []
    for scale, unscaled in ((1.0, True), (1024.0, True), (1024.0, False)):
        model.zero_grad()
        probing = Probing(model, reserve, reserve.origins())
        probing.start()
        (loss_of(model(*inputs)) * scale).backward()
        probing.stop()
        for parameter in model.parameters():
            parameter.grad.div_(scale if unscaled else 1.0)
        gains.append(probing.gains(None if unscaled else torch.tensor(scale)))
    for other in gains[1:]:
        for name, values in gains[0].items():
            np.testing.assert_allclose(other[name], values, rtol=1e-9, atol=1e-15)


def overflow(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """A step that a GradScaler skips."""
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model(*inputs)) * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def foreign(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """A backward pass of another loss, whose gradients are set to zero."""
    (1000 * model(*inputs)).square().mean().backward()
    optimizer.zero_grad(set_to_none=False)


def penalty(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """Gradients that never lie in the parameters."""
    torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters()), allow_unused=True)


def of_others(model: nn.Module, inputs: tuple[Tensor, ...], optimizer: torch.optim.Optimizer) -> None:
    """A backward pass, and then one of a loss that the model's outputs are not part of, which is thrown away too."""
    foreign(model, inputs, optimizer)
    sum(each.square().sum() for each in model.parameters()).backward()
    optimizer.zero_grad()


@pytest.mark.parametrize("before", [overflow, foreign, penalty, of_others])
@pytest.mark.parametrize("name", ["mlp", "residual", "attention"])
def test_what_counts_is_what_lies_in_the_gradients(name: str, before: Any) -> None:
    """Claim: gains are the same to the bit after a step that a GradScaler skipped, and after backward passes whose
    gradients were thrown away or never accumulated, be it before the own backward pass or between micro-batches.
    """
    model, inputs, reserve = cut(name)
    model.eval()  # running statistics stay as they are
    optimizer, read = torch.optim.SGD(model.parameters(), lr=0.0), []
    for others in (None, before):
        optimizer.zero_grad()
        probing = Probing(model, reserve, reserve.origins(), in_training=False)
        probing.start()
        if others is not None:
            others(model, inputs, optimizer)
        loss_of(model(*inputs)).backward()
        if others is penalty:
            others(model, inputs, optimizer)
        loss_of(model(*(2 * x if x.is_floating_point() else x for x in inputs))).backward()
        probing.stop()
        read.append(probing.gains())
        assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    for group, values in read[0].items():
        assert values.any() and np.array_equal(values, read[1][group])


def test_what_was_thrown_away_last_is_no_reading() -> None:
    """Claim: a step whose gradients were all thrown away, or come from elsewhere than the probed passes, reads None."""
    model, inputs, reserve = cut("mlp")
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    loss_of(model(*inputs)).backward()
    model.zero_grad()
    assert probing.gains() is None
    sum(each.square().sum() for each in model.parameters()).backward()
    assert probing.gains() is None
    probing.stop()


def test_an_exception_in_the_forward_pass_leaves_the_shrunk_model() -> None:
    """Claim: after a forward that raises, tensors and sizes are the shrunk model's, and it runs."""
    model, inputs, reserve = cut("residual")
    before = snapshot(model)
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 7, 3, 3, dtype=torch.float64))
    assert_same(snapshot(model), before)
    model(*inputs)
    probing.stop()


def test_without_a_backward_pass_or_with_nan_there_is_no_reading() -> None:
    """Claim: no backward pass, or one with NaN, gives None rather than a number."""
    model, inputs, reserve = cut("mlp")
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    output = model(*inputs)
    assert probing.gains() is None
    (output.sum() * torch.nan).backward()
    probing.stop()
    assert probing.gains() is None


def test_recurrent_weights_are_exchanged_too() -> None:
    """Claim: an LSTM, which keeps a list of its weights, is probed and put back like any other layer."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.lstm, self.head = nn.Linear(3, 8), nn.LSTM(8, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(torch.tanh(self.inner(x)))[0])

    torch.manual_seed(0)
    model, inputs = Recurrent().double(), (torch.randn(2, 5, 3, dtype=torch.float64),)
    groups = tuple(group for group in setpoint.find_groups(model, inputs) if group.lossless)
    keep = random_keep(groups)
    reserve = Reserve.of(model, groups).rest(model, None, keep)
    shrink(model, None, groups, keep)
    twin = copy.deepcopy(model)
    probing = Probing(model, reserve, reserve.origins())
    probing.start()
    loss_of(model(*inputs)).backward()
    probing.stop()
    loss_of(twin(*inputs)).backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-13)
    assert probing.gains() is not None
    torch.testing.assert_close(model(*inputs), twin(*inputs), rtol=1e-13, atol=1e-13)
