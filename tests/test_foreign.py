"""What users' own models and loops do that small examples don't, each answered rightly or refused by name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import setpoint
from groups.zoo import GPT
from setpoint.errors import CheckpointError, GroupError, LoopError


def mlp(width: int = 64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def attach(model: nn.Module, example: tuple[Tensor, ...], trained: nn.Module) -> setpoint.Loop:
    """A loop to seven tenths of the FLOPs in 30 steps."""
    return setpoint.attach(model, torch.optim.SGD(trained.parameters(), 0.01), 0.7, example=example, total_steps=30)


def cut(model: nn.Module, example: tuple[Tensor, ...], copies: tuple[nn.Module, ...] = ()) -> None:
    """A whole run that lands."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with setpoint.attach(model, optimizer, 0.7, example=example, total_steps=30, copies=copies) as loop:
        for _ in range(30):
            model(*example).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.summary is not None and loop.summary.budget_met


@pytest.mark.parametrize("length", range(1, 65))
def test_every_saved_file_can_be_loaded(length: int, tmp_path: Path) -> None:
    """Whatever byte the file begins with, what `save` wrote `load` reads; the length of a name shifts that byte."""
    model = nn.Sequential()
    model.add_module("a" * length, nn.Linear(2, 3))
    setpoint.save(model, tmp_path / "m.safetensors")
    setpoint.load(tmp_path / "m.safetensors", into=copy.deepcopy(model))


@pytest.mark.parametrize("cut_first", [False, True])
def test_a_file_of_a_narrower_model_is_refused(cut_first: bool, tmp_path: Path) -> None:
    """A file made from 32 neurons, cut or not, does not load into a model of 64, which stays as it was."""
    model, other = mlp(32), mlp(64)
    if cut_first:
        cut(model, (torch.randn(4, 6),))
    setpoint.save(model, tmp_path / "m.safetensors")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="another model"):
        setpoint.load(tmp_path / "m.safetensors", into=other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_the_averaged_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    """The module inside an `AveragedModel` that was cut along is saved with its corrected sizes."""
    model, example = GPT(), (torch.randint(0, 20, (3, 8)),)
    ema = AveragedModel(model)
    cut(model, example, copies=(ema,))
    setpoint.save(ema.module, tmp_path / "ema.safetensors")
    loaded = setpoint.load(tmp_path / "ema.safetensors", into=GPT())
    torch.testing.assert_close(loaded(*example), ema(*example))


def test_a_part_of_a_cut_model_keeps_its_sizes(tmp_path: Path) -> None:
    """A submodule is saved with what belongs to it and loads into a fresh one of its kind."""
    model = nn.Sequential(mlp(), nn.Tanh())
    cut(model, (torch.randn(4, 6),))
    setpoint.save(model[0], tmp_path / "part.safetensors")
    loaded = setpoint.load(tmp_path / "part.safetensors", into=mlp())
    first = loaded.get_submodule("0")
    assert isinstance(first, nn.Linear) and first.out_features == first.weight.shape[0] < 64


class Remembers(nn.Module):
    """Keeps an activation, as attention maps and auxiliary losses are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.inner[1](self.inner[0](x))
        return self.inner[2](self.last)


@pytest.mark.parametrize("ran_before", [False, True])
def test_a_model_that_keeps_an_activation(ran_before: bool) -> None:
    """It can be attached to and cut, and what it keeps is its own, not a tensor without data."""
    model, x = Remembers(), torch.randn(4, 6)
    if ran_before:
        model(x)
    kept = model.last
    groups = setpoint.find_groups(model, (x,))
    assert model.last is kept and len(groups) == 1
    cut(model, (x,))


def test_a_second_optimizer_that_was_not_given_keeps_its_tensors() -> None:
    """Groups that another optimizer trains are not pruned, by name, so its next step does not break."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    loop = attach(model, (torch.randn(4, 6),), trained=model[2:])
    assert list(loop.widths) == ["2"]
    without = "0.weight, 0.bias: trained by no optimizer that attach was given"
    with pytest.raises(GroupError, match=f"^{without}: give all optimizers, and all tensors of a layer"):
        other = mlp()
        attach(other, (torch.randn(4, 6),), trained=other[2])


def test_a_part_of_an_attached_model_cannot_be_attached_again() -> None:
    """Two loops on overlapping modules would cut each other's tensors."""
    model = nn.Sequential(mlp(), nn.Tanh())
    loop = attach(model, (torch.randn(4, 6),), trained=model)
    with pytest.raises(LoopError, match="loop already"):
        attach(model[0], (torch.randn(4, 6),), trained=model)
    loop.detach()
    attach(model[0], (torch.randn(4, 6),), trained=model).detach()
