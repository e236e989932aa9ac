from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actuator.hand_made import CASES, Residual, group, mlp, residual
from setpoint.actuator.verify import CutCheck, Outcome, failing_groups
from setpoint.errors import ExampleError
from setpoint.groups.group import Group, random_keep
from setpoint.groups.trace import find_groups

UNITS = "a.weight:0:produce a.bias:0:carry b.weight:1:consume", "a:out_features b:in_features"
"""Of two linear layers a and b."""


def verify(model: nn.Module, example: Any, groups: tuple[Group, ...]) -> None:
    """Fail with the first group whose cut does not behave like its masked twin, and why."""
    for name, why in CutCheck.of(model, example, groups).failing():
        pytest.fail(f"{name!r}: {why}")


def turned(right: Group, tensor: str) -> Group:
    """A group with the units of this tensor in the other order, where they are read last."""
    at = max(number for number, part in enumerate(right.slices) if part.tensor == tensor)
    part = replace(right.slices[at], index=right.slices[at].index[::-1].copy())
    return replace(right, slices=(*right.slices[:at], part, *right.slices[at + 1 :]))


@pytest.mark.parametrize("name", list(CASES))
def test_right_groups_pass(name: str) -> None:
    """Claim: a cut that follows right groups behaves like its masked twin."""
    model, inputs, groups = CASES[name]()
    verify(model, inputs, groups)
    assert failing_groups(model, inputs, groups) == ()


def test_a_forgotten_size_is_found() -> None:
    """Claim: a group that leaves a size behind is named, with the model's own error."""
    model, inputs, (heads,) = CASES["attention"]()
    with pytest.raises(pytest.fail.Exception, match=r"'heads'.*RuntimeError"):
        verify(model, inputs, (replace(heads, sizes=heads.sizes[:-1]),))


@pytest.mark.parametrize("zeros", [False, True])
def test_a_wrong_unit_order_is_found_in_the_right_group_only(zeros: bool) -> None:
    """Claim: shapes alone do not pass: a table in the wrong order is found, and only that group is named, also where
    all-zero layers keep the mistake from outputs and gradients.
    """
    model, inputs, (first, second) = mlp()
    if zeros:
        nn.init.zeros_(model[4].weight)
        nn.init.zeros_(model[2].weight)
    wrong = turned(first, "2.weight"), second
    assert failing_groups(model, inputs, wrong) == ("first",)
    with pytest.raises(pytest.fail.Exception, match="'first'"):
        verify(model, inputs, wrong)


def test_all_failing_groups_are_found_among_good_ones() -> None:
    """Claim: bisection names exactly the bad ones of seven groups."""
    layers: list[nn.Module] = []
    groups = []
    for number in range(8):
        layers += [nn.Linear(4 if number else 3, 4 if number < 7 else 2), nn.Tanh()]
    for number in range(7):
        here, after = 2 * number, 2 * number + 2
        places = f"{here}.weight:0:produce {here}.bias:0:carry {after}.weight:1:consume"
        right = group(f"g{number}", 4, places, f"{here}:out_features {after}:in_features")
        groups.append(turned(right, f"{after}.weight") if number in (1, 5) else right)
    assert set(failing_groups(nn.Sequential(*layers), (torch.randn(5, 3),), tuple(groups))) == {"g1", "g5"}


class Normed(nn.Module):
    """A LayerNorm over the units: zero is not absent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))


def test_lossy_groups_are_checked_for_shapes_only() -> None:
    """Claim: a norm over the units fails as a lossless group, passes as a lossy one, and not with a size missing."""
    places = "a.weight:0:produce a.bias:0:carry norm.weight:0:carry norm.bias:0:carry b.weight:1:consume"
    normed = group("normed", 6, places, "a:out_features norm:normalized_shape[0] b:in_features")
    model, inputs, lossy = Normed(), (torch.randn(4, 3),), replace(normed, lossless=False)
    assert failing_groups(model, inputs, (normed,)) == ("normed",)
    assert failing_groups(model, inputs, (lossy,)) == ()
    assert failing_groups(model, inputs, (replace(lossy, sizes=(lossy.sizes[0], lossy.sizes[2])),)) == ("normed",)


class Random(nn.Module):
    """Dropout in every form: a module, a function, and a random scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.drop(torch.relu(self.a(x))), 0.5, self.training)
        return self.b(x) * (1 + torch.rand(()) if self.training else 1)


class OnlySingle(nn.Module):
    """A model that insists on fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x.float())))


@pytest.mark.parametrize("kind", [Random, OnlySingle])
def test_random_and_single_precision_models_are_compared(kind: type[nn.Module]) -> None:
    """Claim: chance does not fail a right group, or hide a wrong one; nor does a model that does not run in float64."""
    right = group("units", 6, *UNITS)
    assert failing_groups(kind(), (torch.randn(4, 3),), (right,)) == ()
    assert failing_groups(kind(), (torch.randn(4, 3),), (turned(right, "b.weight"),)) == ("units",)


def test_the_users_model_and_random_numbers_are_left_alone() -> None:
    """Claim: weights, statistics, gradients, modes, sizes and the generators of torch and NumPy are as before."""
    model, inputs, groups = residual()
    model(*inputs).sum().backward()
    before = copy.deepcopy(model.state_dict())
    grads = [parameter.grad for parameter in model.parameters()]
    chance = torch.get_rng_state(), np.random.get_state()[1].copy()
    verify(model, inputs, groups)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(one is parameter.grad for one, parameter in zip(grads, model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), chance[0])
    assert (np.random.get_state()[1] == chance[1]).all()
    assert model.training and model.conv.out_channels == 8


@dataclass
class Output:
    logits: Tensor
    labels: Tensor
    rest: object = None


class Wrapped(Residual):
    """Answers in a dataclass with integers, None, a dict and a tuple inside; computes in fp32 whatever it is given."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Output:
        x = torch.relu(self.stem(x))
        x = x + self.out(torch.relu(self.norm(self.conv(x)).float()).to(x.dtype))
        y = self.head(x.mean((2, 3)))
        return Output(y if scale is None else y * scale, y.argmax(1), {"a": (y.sum(), None)})


def test_outputs_of_any_form_and_keyword_inputs() -> None:
    """Claim: dataclass outputs, keyword inputs and a detour through fp32 in the forward are all followed."""
    _, (x,), (stream, inner) = residual()
    verify(Wrapped(), {"x": x, "scale": torch.tensor(2.0)}, (stream, inner))
    assert failing_groups(Wrapped(), {"x": x}, (stream, turned(inner, "out.weight"))) == ("inner",)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as large."""
    monkeypatch.setattr("setpoint.actuator.verify._LARGE", 0)


@pytest.mark.parametrize("norm", [False, True])
def test_a_large_model_is_tried_in_float32(norm: bool, large: None) -> None:
    """Claim: a cut that is right needs no float64 there, and one that is wrong is found all the same; batch norms of
    the copy use running statistics, so that rounding does not grow.
    """
    seen: set[torch.dtype] = set()
    if norm:
        model, inputs, (stream, right) = residual()
        model.norm.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        others, wrong = (stream,), turned(right, "norm.running_var")
    else:
        model, inputs, others = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), (torch.randn(4, 3),), ()
        model.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        (right,) = find_groups(model, inputs)
        wrong = turned(right, "2.weight")
    assert failing_groups(model, inputs, (*others, right)) == () and seen == {torch.float32}
    assert failing_groups(model, inputs, (*others, wrong)) == (right.name,) and torch.float64 in seen


class FaintlyWide(nn.Module):
    """Its outputs depend a little on the width itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 600), nn.Linear(600, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))) * (1 + 3e-6 * len(self.a.bias))


def test_a_small_difference_in_float32_is_looked_at_again(large: None) -> None:
    """Claim: a wrong cut whose outputs differ by less than float32 allows on its own is found in float64."""
    assert failing_groups(FaintlyWide(), (torch.randn(4, 3),), (group("units", 600, *UNITS),)) == ("units",)


class Coupled(nn.BatchNorm2d):
    """Divides by its width, in training only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (np.sqrt(x.shape[1]) if self.training else 1)


class AsksTheNorm(Residual):
    """Divides by its width where its norm is in training."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (np.sqrt(len(self.norm.weight)) if self.norm.training else 1)


def asked_by_a_hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
    """Divides by the width in training."""
    return output / np.sqrt(output.shape[1]) if module.training else output


def test_what_batch_norms_do_in_training_is_tried_in_a_large_model(large: None) -> None:
    """Claim: a norm's subclass, its hook and its model may ask whether it trains: a wrong cut shows all the same."""
    subclass, inputs, groups = residual()
    subclass.norm = Coupled(len(subclass.norm.weight))
    asking, hooked = AsksTheNorm(), Residual()
    hooked.norm.register_forward_hook(asked_by_a_hook)
    for model in (subclass, asking, hooked):
        assert "inner" in failing_groups(model, inputs, groups), model


def test_statistics_that_were_left_out_are_found() -> None:
    """Claim: a running mean missing from a group is found, since the cut then does not run or updates another."""
    model, inputs, (stream, inner) = residual()
    kept = tuple(part for part in inner.slices if part.tensor != "norm.running_mean")
    assert failing_groups(model, inputs, (stream, replace(inner, slices=kept))) == ("inner",)


def test_an_example_that_does_not_fit_is_the_examples_fault() -> None:
    """Claim: when the uncut model does not run, ExampleError says so."""
    model, _, groups = mlp()
    with pytest.raises(ExampleError, match="does not run on the example"):
        verify(model, (torch.randn(4, 9),), groups)


def test_random_widths_are_unequal_and_respect_the_floor() -> None:
    """Claim: groups of equal width get unequal random widths, never below min_units, at least 2 where possible."""
    groups = tuple(group(f"g{number}", 6, "") for number in range(4)) + (replace(group("f", 6, ""), min_units=6),)
    keep = random_keep(groups)
    widths = [int(keep[each.name].sum()) for each in groups]
    assert len(set(widths[:4])) == 4 and min(widths) >= 2 and widths[4] == 6
    assert random_keep((group("pair", 2, ""),))["pair"].sum() == 1


def test_a_constant_example_is_as_good_as_noise() -> None:
    """An example of zeros, whose batch norms would see round-off alone, fails no group."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )  # fmt: skip
    example = (torch.zeros(2, 3, 8, 8),)
    assert failing_groups(model, example, find_groups(model, example)) == ()
    assert not example[0].any()


def test_rounding_in_a_sum_that_cancels_is_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a bias before a norm gets a gradient of rounding alone, which is judged beside the largest gradient."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for width in 6, 64, 64:
        model.extend([nn.Linear(width, 64), nn.BatchNorm1d(64), nn.ReLU()])
    model.append(nn.Linear(64, 8))
    with torch.no_grad():
        model[9].weight *= 1e6  # type: ignore[operator]
    example = (torch.randn(64, 6),)
    groups = find_groups(model, example)
    verify(model, example, groups)
    monkeypatch.setattr("setpoint.actuator.verify._ROUNDED", 0.0)
    with pytest.raises(pytest.fail.Exception, match=r"gradient of \d\.bias differs"):
        verify(model, example, groups)


def test_a_large_buffer_hides_no_difference_of_another() -> None:
    """Claim: the floor for rounding is one of gradients; a mask as large as numbers get leaves buffers compared."""
    stay = torch.zeros(3, dtype=torch.float64)
    mask = torch.full((3,), torch.finfo(torch.float32).min, dtype=torch.float64)
    one, other = (Outcome([], {}, {"mean": each, "mask": mask}, False) for each in (stay, stay + 1.0))
    assert one.difference(other, 1e-9) is not None
