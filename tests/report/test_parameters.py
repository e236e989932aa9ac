"""Parameters: each counted once, and counted along units exactly where they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setpoint import find_groups
from setpoint.report.parameters import params_along, parts, share_along


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


def test_prunable_groups_go_first() -> None:
    """An entry along units of two groups belongs to the one that may be pruned."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = find_groups(model, (torch.randn(2, 4),))
    found = {(part.tensor, part.group) for part in parts(model, groups, whole=["2"])}
    assert ("2.weight", "0") in found
    assert ("2.weight", "2") not in found


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
