"""A model that was cut, in its dense shapes for a moment."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from golden.models import GPT
from setpoint.actuator.lift import lifted, was_cut
from setpoint.actuator.shrink import named_tensors
from setpoint.actuator.sizes import recorded_sizes
from setpoint.errors import BudgetError


def _mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)), (
        torch.randn(64, 12),
    )


def _conv() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 5))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last), (torch.randn(8, 3, 8, 8),)


def _gpt() -> tuple[nn.Module, tuple[Any, ...]]:
    return GPT(), (torch.randint(0, 16, (4, 8)),)


def _train(model: nn.Module, example: tuple[Any, ...], budget: Any, steps: int = 40) -> setpoint.Loop:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=steps)
    for _ in range(steps):
        model(*example).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    return loop


@pytest.mark.parametrize("make", [_mlp, _conv, _gpt])
def test_a_lifted_model_is_the_dense_one_and_comes_back_bit_for_bit(make: Any) -> None:
    """Claim: inside, shapes and code are the dense ones; after it tensors, sizes, moments and outputs are as before."""
    torch.manual_seed(0)
    model, example = make()
    dense = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, setpoint.Budget.fraction(0.6, of="flops"), example=example, total_steps=40)
    for _ in range(40):
        model(*example).float().square().mean().backward()
        optimizer.step()
    loop.finish()
    assert was_cut(model)
    before, sizes = {name: tensor.clone() for name, tensor in named_tensors(model).items()}, recorded_sizes(model)
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    kept = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    out = model.eval()(*example)
    with lifted(model, (optimizer,)):
        assert {name: tensor.shape for name, tensor in named_tensors(model).items()} == dense and not was_cut(model)
        assert model(*example).shape == out.shape and recorded_sizes(model) != sizes
        assert torch.is_grad_enabled()
    assert {name: id(tensor) for name, tensor in named_tensors(model).items()} == kept
    assert recorded_sizes(model) == sizes and torch.equal(model(*example), out)
    for name, tensor in named_tensors(model).items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride()
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][key]) for key, value in state.items())


def test_a_fraction_is_one_of_the_dense_model_whatever_was_cut_before() -> None:
    """Claim: a second run with the same budget cuts nothing and says so; a third with a lower one is held to it."""
    torch.manual_seed(0)
    model, example = _mlp()
    half = setpoint.Budget.fraction(0.5, of="flops")
    first = _train(model, example, half)
    assert first.summary is not None and first.summary.budget_met
    again = pickle.loads(pickle.dumps(model))
    with pytest.warns(UserWarning, match=r"cut before and takes 4\d\.\d% of the dense flops, which is within"):
        second = _train(again, example, half)
    assert second.summary is not None and second.summary.budget_met and second.widths == first.widths
    assert second.summary.dense_flops == first.summary.dense_flops
    assert second.summary.final_flops_ratio == first.summary.final_flops_ratio
    assert second.ledger.header["dense"] == first.ledger.header["dense"]
    with warnings.catch_warnings(action="error"):
        third = _train(again, example, setpoint.Budget.fraction(0.25, of="flops"))
    assert third.summary is not None and third.summary.budget_met
    assert 0.15 < third.summary.final_flops_ratio <= 0.25
    assert third.summary.limit["flops"] == first.summary.dense_flops / 4
    with pytest.raises(BudgetError, match="latency of the dense model"):
        _train(again, example, setpoint.Budget.fraction(0.5, of="latency"))


def test_a_cut_model_from_a_file_remembers_what_it_was(tmp_path: Any) -> None:
    """Claim: fractions are of the dense model after save and load, too."""
    torch.manual_seed(0)
    model, example = _mlp()
    _train(model, example, setpoint.Budget.fraction(0.5, of="params"))
    setpoint.save(model, tmp_path / "small.safetensors")
    loaded = setpoint.load(tmp_path / "small.safetensors", into=_mlp()[0])
    with pytest.warns(UserWarning, match="of the dense params"):
        loop = _train(loaded, example, setpoint.Budget.fraction(0.5, of="params"))
    assert loop.summary is not None and loop.summary.resizes == 0


def _renew(model: nn.Module, places: tuple[int, ...]) -> None:
    """Put new layers of the same shapes in these places, which know nothing of a cut."""
    for place in places:
        rows, columns = model[place].weight.shape
        model[place] = nn.Linear(columns, rows)


@pytest.mark.parametrize("places", [(4,), (2,), (0, 2, 4)])
def test_a_fraction_is_one_of_the_dense_model_where_layers_were_exchanged_since(places: tuple[int, ...]) -> None:
    """Claim: new layers in the places of cut ones count as narrow ones: a model within its budget is cut no further,
    neither at once nor after another cut.
    """
    torch.manual_seed(0)
    model, example = _mlp()
    dense = [layer.weight.shape for layer in (model[0], model[2], model[4])]
    for fraction in (0.5, 0.25):
        budget = setpoint.Budget.fraction(fraction, of="flops")
        _train(model, example, budget, steps=20)
        present = [tuple(each.shape) for each in model.parameters()]
        _renew(model, places)
        with pytest.warns(UserWarning, match="the model was cut before and takes .* which is within the budget"):
            _train(model, example, budget, steps=20)
        assert [tuple(each.shape) for each in model.parameters()] == present
    with lifted(model):
        assert [layer.weight.shape for layer in (model[0], model[2], model[4])] == dense
