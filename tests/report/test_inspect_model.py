"""An inspection: groups, parameters and costs of a model that comes by name, and its tree."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from setpoint.report.inspect_model import inspect_model
from setpoint.report.inspection_lines import inspection_lines
from setpoint.report.inspection_tree import inspection_tree
from setpoint.report.target import load_target


def tree_of(found: object) -> str:
    """The tree as text."""
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


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
    assert sum(part.params for part in found.parts) == found.params


def test_a_model_with_nothing_to_prune_says_so_first() -> None:
    """The first line says it with the main reason, and so does the tree; four lines are enough."""
    found = inspect_model("plain", nn.Sequential(nn.Linear(6, 3)), (torch.zeros(2, 6),))
    lines = inspection_lines(found)
    assert len(lines) == 4 and lines[0].startswith("nothing can be pruned: ")
    assert lines[0] in tree_of(inspection_tree(found))


def test_shares_over_the_whole_are_explained() -> None:
    """Two groups that share a layer add up to more than all FLOPs, and the line says why."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    line = inspection_lines(inspect_model("mine", model, (torch.zeros(2, 16),)))[3]
    assert line.startswith("most FLOPs: layer 0 (64 neurons, ") and ", layer 2 (64 neurons, " in line
    assert line.endswith("; groups share FLOPs, so these add up to over 100 %")


def test_reasons_are_grouped_by_their_number() -> None:
    """The three that most places have are shown, and how many more there are."""
    found = inspect_model("plain", nn.Sequential(nn.Linear(6, 3)), (torch.zeros(2, 6),))
    given = ("a view", "a table", *["a sum"] * 3, "a view", "a loop", "a sort")
    places = tuple(replace(found.frozen[0], reason=reason) for reason in given)
    line = inspection_lines(replace(found, frozen=places))[-1]
    assert line == "frozen: 8 places: 3 x a sum; 2 x a view; a table; and 2 other reasons"


def test_repeated_layers_share_a_branch() -> None:
    """Twelve layers that differ only in their number are one branch of the tree, and nothing is left out."""
    tree = tree_of(inspection_tree(inspect_model("stack", Stack(), (torch.randn(4, 5),))))
    (line,) = [line for line in tree.splitlines() if "layers.{0..11}.0:" in line]
    assert "12 groups of 24 neurons" in line
    assert "408 parameters" in line
    assert "layers.{0..11}.2.weight, dim 1, reads" in tree
    assert "not pruned: a LayerNorm runs over these channels" in tree
    assert "cheapest reachable" in tree
    assert "frozen" in tree
    assert len(tree.splitlines()) < 25


@pytest.mark.parametrize(
    ("target", "shape", "unit"),
    [
        ("torchvision:squeezenet1_1", (2, 3, 64, 64), "channel"),
        ("timm:test_convnext", None, "neuron"),
        ("transformers:poolformer", (2, 3, 64, 64), "channel"),
    ],
)
def test_models_by_name(target: str, shape: tuple[int, ...] | None, unit: str) -> None:
    """A model of each library is inspected by its name alone, verified or not."""
    pytest.importorskip(target.partition(":")[0])
    model, example = load_target(target, shape)
    found = inspect_model(target, model, example, verify="squeezenet" in target)
    assert any(group.what == unit and not group.kept_whole for group in found.groups)
    assert 0 < found.cheapest_flops < found.flops
    assert 0 < found.cheapest_params < found.params
    assert found.frozen
    assert 0 < found.prunable_params_share <= 1


def test_a_model_without_weights_is_not_verified() -> None:
    """On the meta device groups and costs are found, and that no cut was tried is said."""
    with torch.device("meta"):
        model = Stack()
    found = inspect_model("stack", model, (torch.randn(4, 5, device="meta"),))
    assert not found.verified
    assert len(found.groups) == 13
    assert "not verified" in tree_of(inspection_tree(found))
