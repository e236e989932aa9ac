"""What a model remembers of its cuts, and a model that was cut in its dense shapes for a moment."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from golden.models import GPT
from setpoint.actuator.model_shapes import ModelShapes, apply_sizes, check_sizes, note_cut, was_cut
from setpoint.actuator.tensors import named_tensors
from setpoint.checkpoint.fit import at_dense_shapes
from setpoint.errors import BudgetError, GroupError
from setpoint.groups.sizes_in_code.place import read_size, write_size


class Configured(nn.Module):
    """A module with sizes in all the places where code keeps them."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.widths = [4, 5]
        self.nested = ((1, 2), torch.Size([3]))
        self.flag = True
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, 6)


def set_sizes(model: nn.Module, sizes: dict[tuple[str, str], int | None], undo: ExitStack) -> None:
    note_cut(model, {}, sizes, undo)
    apply_sizes(model, sizes, undo)


def configured() -> Configured:
    return Configured(SimpleNamespace(hidden_size=8))


@pytest.mark.parametrize(
    ("place", "old"),
    [("config.hidden_size", 8), ("widths[1]", 5), ("nested[0][1]", 2), ("nested[1][0]", 3), ("fc.out_features", 2)],
)
def test_a_size_is_read_and_written_wherever_it_is(place: str, old: int) -> None:
    """Claim: attributes, nested objects and items of any sequence read back what was written; types stay."""
    module = configured()
    before = module.widths, module.nested
    assert read_size(module, place) == old
    write_size(module, place, 1)
    assert read_size(module, place) == 1
    assert [type(each) for each in (module.widths, module.nested, module.nested[1])] == [list, tuple, torch.Size]
    assert before == ([4, 5], ((1, 2), torch.Size([3])))


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("gone", "no module 'gone.fc'"),
        ("hidden", "has no 'hidden'"),
        ("widths[7]", "has no"),
        ("flag", "not an integer"),
        ("fc", "not an integer"),
        ("[0]", "is not a place"),
        ("widths[x]", "is not a place"),
    ],
)
def test_a_place_that_is_none_is_refused(place: str, words: str) -> None:
    """Claim: a missing attribute or module, one that holds no integer, and a malformed place raise GroupError."""
    with pytest.raises(GroupError, match=words):
        check_sizes(configured(), [("", place)] if place != "gone" else [("gone.fc", "out_features")])


def test_what_was_set_is_recorded_and_survives_copies() -> None:
    """Claim: the record follows deepcopy, pickle and a parent module, and says what the places hold now."""
    model = configured()
    with ExitStack() as undo:
        set_sizes(model, {("", "config.hidden_size"): 7, ("fc", "in_features"): 1, ("", "view#0[1]"): 3}, undo)
        undo.pop_all()
    sizes = {("", "config.hidden_size"): 7, ("fc", "in_features"): 1, ("", "view#0[1]"): 3}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert ModelShapes.of(twin).sizes == sizes
        assert twin(torch.zeros(6)).shape == (2, 3)
    parent = nn.Sequential(nn.Identity(), model)
    assert ModelShapes.of(parent).sizes["1.fc", "in_features"] == 1
    assert ModelShapes.of(parent).sizes["1", "view#0[1]"] == 3


def test_sizes_go_back() -> None:
    """Claim: undo restores attributes, calls and the record, also over a former cut."""
    model = configured()
    with ExitStack() as undo:
        set_sizes(model, {("", "view#0[1]"): 3, ("", "widths[0]"): 3}, undo)
        undo.pop_all()
    with ExitStack() as undo:
        set_sizes(model, {("", "view#0[1]"): 2, ("", "widths[0]"): 2, ("fc", "in_features"): 1}, undo)
        assert ModelShapes.of(model).sizes["fc", "in_features"] == 1
    assert ModelShapes.of(model).sizes == {("", "view#0[1]"): 3, ("", "widths[0]"): 3}
    assert (model.widths, model.fc.in_features) == ([3, 5], 2)
    assert model(torch.zeros(6)).shape == (2, 3)


def _mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 4)), (
        torch.randn(64, 12),
    )


def _conv() -> tuple[nn.Module, tuple[Any, ...]]:
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 5))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last), (torch.randn(8, 3, 8, 8),)


def _gpt() -> tuple[nn.Module, tuple[Any, ...]]:
    return GPT(), (torch.randint(0, 16, (4, 8)),)


def _train(
    model: nn.Module, example: tuple[Any, ...], budget: Any, steps: int = 40, optimizer: Any = None
) -> setpoint.Loop:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    loop = setpoint.attach(model, optimizer, budget, example=example, total_steps=steps)
    for _ in range(steps):
        model(*example).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    return loop


@pytest.mark.filterwarnings("ignore:the data are too few")
@pytest.mark.parametrize("make", [_mlp, _conv, _gpt])
def test_a_model_at_its_dense_shapes_is_the_dense_one_and_comes_back_bit_for_bit(make: Any) -> None:
    """Claim: inside, shapes and code are the dense ones; after it tensors, sizes, moments and outputs are as before."""
    torch.manual_seed(0)
    model, example = make()
    dense = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    _train(model, example, setpoint.Budget.fraction(0.6, of="flops"), optimizer=optimizer)
    assert was_cut(model)
    before, sizes = {name: tensor.clone() for name, tensor in named_tensors(model).items()}, ModelShapes.of(model).sizes
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    kept = {name: id(tensor) for name, tensor in named_tensors(model).items()}
    out = model.eval()(*example)
    with at_dense_shapes(model, (optimizer,)):
        assert {name: tensor.shape for name, tensor in named_tensors(model).items()} == dense and not was_cut(model)
        assert model(*example).shape == out.shape and ModelShapes.of(model).sizes != sizes
        assert torch.is_grad_enabled()
    assert {name: id(tensor) for name, tensor in named_tensors(model).items()} == kept
    assert ModelShapes.of(model).sizes == sizes and torch.equal(model(*example), out)
    for name, tensor in named_tensors(model).items():
        assert torch.equal(tensor, before[name]) and tensor.stride() == before[name].stride()
    for number, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][key]) for key, value in state.items())


def test_a_fraction_is_one_of_the_dense_model_whatever_was_cut_before(tmp_path: Any) -> None:
    """Claim: a second run with the same budget, also after save and load, cuts nothing and says so; a third with a
    lower one is held to it.
    """
    torch.manual_seed(0)
    model, example = _mlp()
    half = setpoint.Budget.fraction(0.5, of="flops")
    first = _train(model, example, half)
    assert first.summary is not None and first.summary.budget_met
    setpoint.save(model, tmp_path / "small.safetensors")
    again = setpoint.load(tmp_path / "small.safetensors", into=_mlp()[0])
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
    with at_dense_shapes(model):
        assert [layer.weight.shape for layer in (model[0], model[2], model[4])] == dense


def test_a_part_of_a_cut_model_knows_its_own_shapes_under_any_name(tmp_path: Any) -> None:
    """Claim: a submodule is saved and loaded by itself, and in another model it still counts as cut."""
    torch.manual_seed(0)
    model, example = _mlp()
    holder = nn.ModuleDict({"body": model, "other": nn.Linear(2, 2)})
    groups = setpoint.find_groups(model, example)
    setpoint.shrink(model, None, groups, {groups[0].name: [False, *[True] * (groups[0].num_units - 1)]})
    elsewhere = nn.Sequential(nn.Identity(), holder["body"])
    assert ModelShapes.of(elsewhere).dense["1.0.weight"] == (48, 12) and was_cut(elsewhere) and was_cut(holder)
    assert ModelShapes.of(model[0]).dense == {"weight": (48, 12), "bias": (48,)}
    setpoint.save(model[0], tmp_path / "layer.safetensors")
    layer = setpoint.load(tmp_path / "layer.safetensors", into=nn.Linear(12, 48))
    assert layer.out_features == 47 and torch.equal(layer.weight, model[0].weight)
    taken = nn.Sequential(nn.Linear(2, 12), model[0])
    assert ModelShapes.of(copy.deepcopy(taken)).dense == {"1.weight": (48, 12), "1.bias": (48,)}


def test_a_tied_tensor_is_known_by_all_its_names() -> None:
    """Claim: the dense shape is found under each name, and a module that two others hold is listed once."""
    inner = nn.Linear(3, 4)
    model = nn.ModuleDict({"a": nn.Sequential(inner), "b": nn.Sequential(inner), "c": nn.Linear(3, 4)})
    model["c"].weight = inner.weight
    with ExitStack() as undo:
        note_cut(model, {"b.0.weight": (2, 3)}, {("b.0", "out_features"): 2}, undo)
        known = ModelShapes.of(model)
        assert known.dense == dict.fromkeys(("a.0.weight", "b.0.weight", "c.weight"), (4, 3))
        assert known.sizes == {("a.0", "out_features"): 4} and known.dense_sizes == known.sizes
    assert not ModelShapes.of(model).dense
