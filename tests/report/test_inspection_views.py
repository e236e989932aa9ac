"""Lines, tree and page of an inspection."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from report.test_inspection import Stack
from setpoint.groups.trace import Frozen
from setpoint.report.inspection import GroupReport, Inspection, inspect_model
from setpoint.report.inspection_views import (
    inspection_lines,
    inspection_tree,
    render_inspection,
    write_inspection,
)


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
GROUP = GroupReport("body.conv", "channel", 16, 8, 8, 1, "", 300, 0.5, 0.25, PLACES)
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


def test_the_page_of_a_network_is_small(tmp_path: Path) -> None:
    """Of a network of twelve blocks the page has less than a tenth of a megabyte, the reach first, and is for print."""
    page = write_inspection(inspect_model("stack", Stack(), (torch.randn(4, 5),)), tmp_path / "inspect.html")
    assert page.stat().st_size < 100_000
    text = page.read_text(encoding="utf-8")
    assert text.index("cheapest reachable") < text.index("12 groups of 24 neurons")
    assert "@media print" in text and "<script" not in text


def test_the_page_holds_groups_and_reasons() -> None:
    """The page stands alone, with a row per kind of group and the frozen places folded by their reason."""
    page = render_inspection(FOUND)
    assert "layer.{0..11}: view" in page
    assert "a norm (a); a norm (b); and 1 more" in page
    assert "body.conv.weight, dim 0, writes" in page
    assert '<link rel="stylesheet"' not in page and "<script src" not in page


def test_hostile_names_stay_text() -> None:
    """A name with HTML in it is shown as it is."""
    bad = "<img src=x onerror=alert(1)>"
    group = replace(GROUP, name=bad, places=((f"{bad}.weight", 0, "produce"),))
    assert bad not in render_inspection(replace(FOUND, model=bad, groups=(group,)))


def test_nothing_found_is_a_page_too() -> None:
    """A model without groups, parameters or frozen places has a page that says so."""
    nothing = replace(FOUND, groups=(), frozen=(), params=0, flops=0.0, cheapest_flops=0.0, verified=False)
    assert "nothing can be pruned" in render_inspection(nothing) and "not verified" in tree_of(nothing)
