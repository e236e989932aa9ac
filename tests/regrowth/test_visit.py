"""Visits: units that come with outgoing weights at zero change no step, and what they would gain is read right."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actuator.hand_made import CASES, Case, some_keep
from groups.zoo import MODELS as ZOO
from regrowth.test_regrow import adamw
from setpoint.actuator.shrink import named_tensors, shrink
from setpoint.groups.group import Group, random_keep
from setpoint.regrowth.reserve import Reserve, regrow
from setpoint.regrowth.visit import Visit, silence
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


def visited(model: nn.Module, reserve: Reserve) -> tuple[tuple[Group, ...], dict[str, np.ndarray], Visit]:
    """All resting units of lossless groups, in the model with outgoing weights at zero: groups, who came, the visit."""
    exact = {group.name for group in reserve.groups if group.lossless}
    origins = {name: units for name, units in reserve.origins().items() if name in exact}
    groups, after = regrow(model, None, reserve.present(), reserve, origins)
    arrived = {name: np.isin(np.flatnonzero(after.active[name]), units) for name, units in origins.items()}
    visit = Visit.of(model, groups, arrived, origins)
    silence(model, groups, arrived)
    return groups, arrived, visit


@pytest.mark.parametrize("name", [*CASES, *ZOO])
def test_a_step_with_visitors_is_the_shrunk_models_step(name: str) -> None:
    """Claim: with visitors, outputs and gradients of all other units equal the shrunk model's to 1e-12 in fp64; once
    they have left, the shrunk model is as it was.
    """
    model, inputs, reserve = cut(name)
    twin, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    groups, arrived, visit = visited(model, reserve)
    output, want = model(*inputs), twin(*inputs)
    torch.testing.assert_close(output, want, rtol=1e-12, atol=1e-12)
    loss_of(output).backward()
    loss_of(want).backward()
    assert visit.gains(model) is not None or not visit.origins
    shrink(model, None, groups, {name: ~units for name, units in arrived.items()})
    for (key, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        wanted = torch.zeros_like(one) if other.grad is None else other.grad
        got = torch.zeros_like(one) if one.grad is None else one.grad
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12, msg=key)
        torch.testing.assert_close(one, before[key], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp", "residual", "concat", "attention", "tied", "gpt"])
def test_the_gain_is_the_slope_of_the_loss(name: str) -> None:
    """Claim: the gain of a unit is minus the slope of the loss as its outgoing weights go from zero to their
    resting values, by central differences on a model that it was really brought back into, to 1e-5; a gradient scale
    is divided out, micro-batches add up, and a visit that was saved tells the same.
    """
    model, inputs, reserve = cut(name)
    shrunk = copy.deepcopy(model)
    _, _, visit = visited(model, reserve)
    for _ in range(2):
        (512 * loss_of(model(*inputs))).backward()
    held = io.BytesIO()
    torch.save(visit.state_dict(), held)
    held.seek(0)
    again = Visit.resumed(torch.load(held, weights_only=True))
    gains, resumed = (each.gains(model, torch.tensor(1024.0)) for each in (visit, again))
    assert gains is not None and resumed is not None
    assert all(np.array_equal(gains[group], resumed[group]) for group in gains)
    for group, origins in list(visit.origins.items())[:3]:
        for number, origin in list(enumerate(origins))[:2]:
            want = slope(shrunk, inputs, reserve, group, int(origin))
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


def test_without_a_gradient_or_with_nan_there_is_no_reading() -> None:
    """Claim: no backward pass, or one with NaN, gives None rather than a number."""
    model, inputs, reserve = cut("mlp")
    _, _, visit = visited(model, reserve)
    assert visit.gains(model) is None
    (loss_of(model(*inputs)) * torch.nan).backward()
    assert visit.gains(model) is None
