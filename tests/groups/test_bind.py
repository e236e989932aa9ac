"""Sizes in live Python code: bound where the sizes come from them, corrected by place, or the group frozen."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from groups.zoo import GPT, SeparateAttention
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups, trace
from setpoint.groups.trial import random_keep


def places(groups: tuple[Group, ...]) -> set[tuple[str, str]]:
    return {(size.module, size.place) for group in groups for size in group.sizes}


def test_attributes_are_bound_where_they_suffice() -> None:
    """When every size comes from an attribute, the attribute is bound and the forward runs as written."""
    model = SeparateAttention()
    groups = find_groups(model, (torch.randn(3, 6, 24),))
    assert ("", "heads") in places(groups)
    assert not any("#" in place for _, place in places(groups))


def test_calls_are_corrected_where_attributes_do_not_suffice() -> None:
    """A head size worked out as `C // n_head` is corrected at its call, in every module of the class."""
    groups = tuple(g for g in find_groups(GPT(), (torch.randint(0, 20, (3, 8)),)) if g.lossless)
    bound = places(groups)
    for layer in range(2):
        assert (f"h.{layer}.attn", "view#0[3]") in bound
        assert (f"h.{layer}.attn", "n_head") not in bound


class Coincidence(nn.Module):
    """Integers that equal sizes by accident, and sizes written as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats = 6
        self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for _ in range(self.repeats):
            x = torch.tanh(x)
        return self.c(torch.relu(self.b(x)).view(-1, 6))


def test_an_integer_that_equals_a_size_by_accident_is_left_alone() -> None:
    """A loop count of 6 beside layers of 6 stays 6; the written size of the view is corrected."""
    model, x = Coincidence(), torch.randn(4, 5)
    groups = find_groups(model, (x,))
    assert {group.name for group in groups} == {"a", "b"}
    twin = copy.deepcopy(model)
    keep = random_keep(groups)
    shrink(model, None, groups, keep)
    mask(twin, None, groups, keep)
    assert model.repeats == 6
    torch.testing.assert_close(model(x), twin(x))


def test_what_the_forward_does_not_survive_is_frozen_by_name() -> None:
    """The heads of `nn.MultiheadAttention` cannot be cut under its own forward: they stay, by name; neurons can go."""
    model = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    traced = trace(model, (torch.randn(2, 5, 16),))
    assert [group.name for group in traced.groups if group.lossless] == ["linear1"]
    assert any(frozen.place.startswith("self_attn") for frozen in traced.frozen)


class Tail(nn.Module):
    """A slice by an attribute that a cut would make wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)[:, :4])


def test_slices_by_written_numbers_freeze() -> None:
    """A dim that is sliced by written numbers stays whole, and the trace says so."""
    traced = trace(Tail(), (torch.randn(3, 5),))
    assert traced.groups == ()
    assert any("cut out by written numbers" in frozen.reason for frozen in traced.frozen)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_either_mode_gives_the_same_groups(mode: str) -> None:
    """Discovery works in training and in evaluation mode."""
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Dropout(), nn.Flatten(), nn.Linear(24, 2))
    getattr(model, mode)()
    (group,) = find_groups(model, (torch.randn(2, 3, 2, 2),))
    assert group.num_units == 6 and model.training is (mode == "train")
