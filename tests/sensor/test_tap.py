"""Frozen outgoing weights are read through their layer's input: the same readings as if they were trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from loop.test_regrowth import Scripted
from setpoint.errors import LoopError
from setpoint.sensor.taylor import TaylorSensor

# Losses are asked for twice in a step.
pytestmark = pytest.mark.filterwarnings("ignore:a step gives the model")


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base, self.a, self.b = nn.Linear(inputs, outputs), nn.Linear(inputs, 3, bias=False), nn.Linear(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Convolved(nn.Module):
    """Convolutions, the second of which reads the first one's channels, and a layer that a frozen one follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


def update(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


def adapted() -> nn.Module:
    return nn.Sequential(Adapted(5, 12), nn.GELU(), Adapted(12, 10), nn.ReLU(), Adapted(10, 3))


def bases(model: nn.Module) -> list[nn.Parameter]:
    return [p for each in model.modules() if isinstance(each, Adapted) for p in each.base.parameters()]


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module], list[nn.Parameter]]]] = {
    "low-rank": (adapted, (7, 5), bases),
    "tokens": (adapted, (4, 6, 5), bases),
    "convolution": (Convolved, (4, 3, 6, 6), lambda model: [model.second.weight]),  # type: ignore[list-item]
}


def start(case: str, frozen: bool, **options: Any) -> tuple[nn.Module, Any, setpoint.Loop, Callable[[int], Tensor]]:
    build, shape, which = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    if frozen:
        for parameter in which(model):
            parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    settings = {"total_steps": 40, "controller": Scripted({}, regrow=False), "verify": False, **options}
    budget = setpoint.Budget.fraction(0.9, of="params")
    loop = setpoint.attach(model, optimizer, budget, example=(x,), **settings)

    def loss(step: int) -> Tensor:
        batch = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return model(batch).square().mean()

    return model, optimizer, loop, loss


def gates(case: str, frozen: bool, do: Callable[..., None], steps: int = 3) -> dict[str, Any]:
    model, optimizer, loop, loss = start(case, frozen)
    for step in range(steps):
        do(model, optimizer, lambda part, step=step: loss(10 * step + part))
    reading = loop.reading()
    assert reading.num_steps == steps
    loop.detach()
    return {"slope": reading.slope, "saliency": reading.saliency}


def plain(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    with torch.no_grad():
        loss(1)  # an evaluation in between
    loss(2)  # a forward pass that no backward pass follows
    loss(0).backward()
    update(optimizer)


def accumulated(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    for part in range(3):
        (loss(part) / 3).backward()
    update(optimizer)


def scaled(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    (loss(0) * 1024).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 1024
    update(optimizer)


def discarded(model: nn.Module, optimizer: Any, loss: Callable[[int], Tensor]) -> None:
    (50 * loss(1)).backward()  # a batch that is thrown away, as a scaler does with one that overflows
    optimizer.zero_grad()
    plain(model, optimizer, loss)


@pytest.mark.parametrize("do", [plain, accumulated, scaled, discarded])
@pytest.mark.parametrize("case", CASES)
def test_readings_are_those_of_trained_weights(case: str, do: Callable[..., None]) -> None:
    """Claim: slope and saliency of all units are those of the same model with the same weights trained, to rounding."""
    frozen, trained = gates(case, True, do), gates(case, False, do)
    for part, by_group in trained.items():
        assert by_group.keys() == frozen[part].keys() and by_group
        for name, values in by_group.items():
            np.testing.assert_allclose(frozen[part][name], values, rtol=1e-10, err_msg=f"{part} {name}")
            assert np.abs(values).min() > 0


def test_frozen_bases_are_pruned_and_hooks_go() -> None:
    """Claim: a model with low-rank adapters is pruned to its budget with frozen bases cut along; losses until the first
    cut are those without Setpoint, bit for bit; no hook is left after the landing.
    """

    def losses(attach: bool) -> tuple[list[float], Any]:
        model, optimizer, loop, loss = start("low-rank", True, total_steps=60, controller=setpoint.PricedController())
        hooks = sum(len(each._forward_pre_hooks) for each in model.modules())
        assert hooks == 2
        if not attach:
            loop.detach()
            assert not sum(len(each._forward_pre_hooks) for each in model.modules())
        optimizer.param_groups[0]["lr"] = 0.1
        seen = []
        for step in range(60):
            seen.append(loss(step).item())
            loss(step).backward()
            update(optimizer)
        return seen, (model, loop)

    without, _ = losses(attach=False)
    within, (model, loop) = losses(attach=True)
    first = loop.ledger[0].step
    assert within[:first] == without[:first] and first > 2
    assert not sum(len(each._forward_pre_hooks) for each in model.modules())
    assert loop.finish().budget_met and model[0].base.out_features == model[2].base.in_features < 12
    assert not model[2].base.weight.requires_grad


def test_what_hooks_never_see_is_an_error() -> None:
    """Claim: a group of which nothing could be seen is not taken for worthless; the error says so, by name."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    model[1].weight.requires_grad_(False)
    groups, sensor = setpoint.find_groups(model, (torch.zeros(4, 5),)), TaylorSensor(4)
    state = sensor.init(groups, model)
    nn.functional.linear(model[0](torch.randn(4, 5)), model[1].weight).sum().backward()  # the layer is not called
    state = sensor.update(state, groups, model)
    with pytest.raises(LoopError, match="nothing was seen of group '0'"):
        sensor.read(state, groups, 1)


def test_compiled_models_leave_them_whole() -> None:
    """Claim: what hooks cannot read in compiled code is not pruned at attach, and the ledger says why."""
    model = adapted()
    for parameter in bases(model):
        parameter.requires_grad_(False)
    model.append(nn.Linear(3, 16)).append(nn.ReLU()).append(nn.Linear(16, 2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    budget = setpoint.Budget.fraction(0.95, of="params")
    called = torch.compile(model, backend="eager")
    loop = setpoint.attach(called, optimizer, budget, example=(torch.zeros(4, 5),), total_steps=10, verify=False)
    assert {"5", "0.a"} <= set(loop.widths) and not {"0.base", "2.base"} & set(loop.widths)
    assert sum("compiled code" in reason for reason in loop.ledger.header["frozen"].values()) == 2
    loop.detach()
