"""An inspection: groups, parameters and costs of a model that comes by name; each parameter is counted once."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from setpoint import find_groups
from setpoint.groups.trace import Frozen
from setpoint.report.inspection import (
    GroupReport,
    Inspection,
    inspect_model,
    inspection_lines,
    inspection_tree,
    params_along,
    share_along,
    write_inspection,
)


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


def test_entries_along_units_of_two_groups_count_once() -> None:
    """A weight between two groups lies along the units of both."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    groups = find_groups(model, (torch.randn(2, 3, 9, 9),))
    assert params_along(model, groups[:1]) == 3 * 8 * 9 + 8 + 8 * 6 * 9
    assert params_along(model, groups) == sum(parameter.numel() for parameter in model.parameters()) - 2


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


def tree_of(found: Inspection) -> str:
    """The tree as text."""
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(inspection_tree(found))
    return console.export_text()


def test_a_model_with_nothing_to_prune_says_so_first() -> None:
    """The first line says it with the main reason, and so does the tree; four lines are enough."""
    found = inspect_model("plain", nn.Sequential(nn.Linear(6, 3)), (torch.zeros(2, 6),))
    lines = inspection_lines(found)
    assert len(lines) == 4 and lines[0].startswith("nothing can be pruned: ")
    assert lines[0] in tree_of(found)


def test_reasons_are_grouped_by_their_number() -> None:
    """The three that most places have are shown, and how many more there are."""
    found = inspect_model("plain", nn.Sequential(nn.Linear(6, 3)), (torch.zeros(2, 6),))
    given = ("a view", "a table", *["a sum"] * 3, "a view", "a loop", "a sort")
    places = tuple(replace(found.frozen[0], reason=reason) for reason in given)
    line = inspection_lines(replace(found, frozen=places))[-1]
    assert line == "frozen: 8 places: 3 x a sum; 2 x a view; a table; and 2 other reasons"


def test_repeated_layers_share_a_branch() -> None:
    """Twelve layers that differ only in their number are one branch of the tree, and nothing is left out."""
    tree = tree_of(inspect_model("stack", Stack(), (torch.randn(4, 5),)))
    (line,) = [line for line in tree.splitlines() if "layers.{0..11}.0:" in line]
    assert "12 groups of 24 neurons" in line
    assert "408 parameters" in line
    assert "layers.{0..11}.2.weight, dim 1, reads" in tree
    assert "not pruned: a LayerNorm runs over these channels" in tree
    assert "cheapest reachable" in tree
    assert "frozen" in tree
    assert len(tree.splitlines()) < 25


PLACES = (("body.conv.weight", 0, "produce"), ("head.weight", 1, "consume"))
GROUP = GroupReport("body.conv", "channel", 16, 8, 8, 1, "", 300, 0.25, PLACES)
FOUND = Inspection(
    model="small",
    inputs=((2, 3, 8, 8),),
    verified=True,
    groups=(GROUP, replace(GROUP, name="stem", kept_whole="a norm (a); a norm (b); a sum")),
    flops=1e6,
    params=600,
    prunable_params_share=0.5,
    cheapest_flops=1e5,
    cheapest_params=60,
    frozen=tuple(Frozen(f"layer.{i}: view", "no rule") for i in range(12)),
)


def page_of(found: Inspection, folder: Path) -> str:
    """The HTML of its page."""
    return write_inspection(found, folder / "page.html").read_text(encoding="utf-8")


def test_the_page_holds_groups_and_reasons(tmp_path: Path) -> None:
    """The page stands alone, with a row per kind of group and the frozen places folded by their reason."""
    page = page_of(FOUND, tmp_path)
    assert page.index("cheapest reachable") < page.index("16 channels, at least 8")
    assert len(page) < 100_000 and "@media print" in page and "<script" not in page
    assert "layer.{0..11}: view" in page
    assert "a norm (a); a norm (b); and 1 more" in page
    assert "body.conv.weight, dim 0, writes" in page
    assert '<link rel="stylesheet"' not in page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    """A name with HTML in it is shown as it is."""
    bad = "<img src=x onerror=alert(1)>"
    group = replace(GROUP, name=bad, places=((f"{bad}.weight", 0, "produce"),))
    assert bad not in page_of(replace(FOUND, model=bad, groups=(group,)), tmp_path)


def test_nothing_found_is_a_page_too(tmp_path: Path) -> None:
    """A model without groups, parameters or frozen places has a page that says so."""
    nothing = replace(FOUND, groups=(), frozen=(), params=0, flops=0.0, cheapest_flops=0.0, verified=False)
    assert "nothing can be pruned" in page_of(nothing, tmp_path) and "not verified" in tree_of(nothing)
