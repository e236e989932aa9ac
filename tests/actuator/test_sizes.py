from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from setpoint.actuator.sizes import apply_sizes, check_sizes, recorded_sizes
from setpoint.errors import GroupError
from setpoint.groups.place import read_size, write_size


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
        ("hidden", "has no 'hidden'"),
        ("widths[7]", "has no"),
        ("flag", "not an integer"),
        ("fc", "not an integer"),
        ("[0]", "is not a place"),
        ("widths[x]", "is not a place"),
    ],
)
def test_a_place_that_is_none_is_refused(place: str, words: str) -> None:
    """Claim: a missing attribute, one that holds no integer, and a malformed place raise GroupError."""
    with pytest.raises(GroupError, match=words):
        read_size(configured(), place)


def test_missing_modules_are_named() -> None:
    """Claim: a size in a module that does not exist raises GroupError with its name."""
    with pytest.raises(GroupError, match="no module 'gone.fc'"):
        check_sizes(configured(), [("gone.fc", "out_features")])


def test_what_was_set_is_recorded_and_survives_copies() -> None:
    """Claim: the record follows deepcopy, pickle and a parent module, and says what the places hold now."""
    model = configured()
    with ExitStack() as undo:
        apply_sizes(model, {("", "config.hidden_size"): 7, ("fc", "in_features"): 1, ("", "view#0[1]"): 3}, undo)
        undo.pop_all()
    sizes = {("", "config.hidden_size"): 7, ("fc", "in_features"): 1, ("", "view#0[1]"): 3}
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert recorded_sizes(twin) == sizes
        assert twin(torch.zeros(6)).shape == (2, 3)
    parent = nn.Sequential(nn.Identity(), model)
    assert recorded_sizes(parent)["1.fc", "in_features"] == 1
    assert recorded_sizes(parent)["1", "view#0[1]"] == 3


def test_sizes_go_back() -> None:
    """Claim: undo restores attributes, calls and the record, also over a former cut."""
    model = configured()
    with ExitStack() as undo:
        apply_sizes(model, {("", "view#0[1]"): 3, ("", "widths[0]"): 3}, undo)
        undo.pop_all()
    with ExitStack() as undo:
        apply_sizes(model, {("", "view#0[1]"): 2, ("", "widths[0]"): 2, ("fc", "in_features"): 1}, undo)
        assert recorded_sizes(model)["fc", "in_features"] == 1
    assert recorded_sizes(model) == {("", "view#0[1]"): 3, ("", "widths[0]"): 3}
    assert (model.widths, model.fc.in_features) == ([3, 5], 2)
    assert model(torch.zeros(6)).shape == (2, 3)
