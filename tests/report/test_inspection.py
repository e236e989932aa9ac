"""An inspection: groups, parameters and costs of a model that comes by name; each parameter is counted once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import find_groups
from setpoint.report.inspection import inspect_model, params_along, parts, share_along


class Stack(nn.Module):
    """Twelve residual layers of one shape, over a LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8)) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        """All layers."""
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(self.norm(x))
        return out


def test_the_numbers_of_a_small_stack() -> None:
    """Parameters, shares and the cheapest reachable model have their closed form."""
    found = inspect_model("stack", Stack(), {"x": torch.randn(4, 5)})
    inner = [group for group in found.groups if group.num_units == 24]
    assert len(inner) == 12
    assert {group.params for group in inner} == {24 * 8 + 24 + 24 * 8}
    assert found.params == 5 * 8 + 8 + 12 * (24 * 8 * 2 + 24 + 8) + 2 * 8 + 8 * 3 + 3
    least = inner[0].min_units
    assert found.cheapest_params == found.params - 12 * (24 - least) * (8 + 1 + 8)
    assert found.prunable_params_share == pytest.approx(12 * inner[0].params / found.params)
    (stream,) = (group for group in found.groups if group.num_units == 8)
    assert "LayerNorm" in stream.kept_whole


def test_a_model_without_weights_is_not_verified() -> None:
    """On the meta device groups and costs are found, and that no cut was tried is said."""
    with torch.device("meta"):
        model = Stack()
    found = inspect_model("stack", model, (torch.randn(4, 5, device="meta"),))
    assert not found.verified
    assert len(found.groups) == 13


class Tied(nn.Module):
    """A language model of one layer whose head is its table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next token."""
        x = self.table(tokens)
        out: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return out


def test_every_parameter_is_in_one_part() -> None:
    """Parts sum up to the tensors they are of, whichever groups cross in them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    groups = find_groups(model, (torch.randn(2, 3, 9, 9),))
    found = parts(model, groups)
    for name, parameter in model.named_parameters():
        assert sum(part.params for part in found if part.tensor == name) == parameter.numel()
    assert {(part.tensor, part.group): part.params for part in found if part.tensor == "2.weight"} == {
        ("2.weight", "2"): 8 * 6 * 9  # the group that writes goes before the one that reads
    }
    assert [part for part in found if not part.group] == [type(found[0])("4.bias", "", 2)]
    assert params_along(model, groups[:1]) == 3 * 8 * 9 + 8 + 8 * 6 * 9


def test_tables_of_embeddings_can_be_left_out() -> None:
    """A tied table counts once, and not at all without embeddings."""
    model = Tied()
    groups = find_groups(model, (torch.randint(0, 30, (2, 5)),))
    inner = tuple(group for group in groups if group.num_units == 24)
    along = 8 * 24 + 24 + 24 * 8
    assert params_along(model, inner) == along
    assert share_along(model, inner) == pytest.approx(along / (30 * 8 + along + 8))
    assert share_along(model, inner, embeddings=False) == pytest.approx(along / (along + 8))
    stream = tuple(group for group in groups if group.num_units == 8)
    assert len(stream) == 1
    assert params_along(model, stream) == 30 * 8 + 8 * 24 + 24 * 8 + 8
    assert sum(part.params for part in parts(model, groups)) == sum(p.numel() for p in model.parameters())


def test_a_model_without_parameters_has_no_share() -> None:
    """Nothing out of nothing is 0."""
    assert share_along(nn.ReLU(), ()) == 0.0
