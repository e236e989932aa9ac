"""The page of an inspection: a map whose areas add up, and tables of groups and of what is frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from setpoint.report.inspection_page import parameter_map, render_inspection, write_inspection

GROUP: dict[str, Any] = {
    "name": "body.conv",
    "what": "channel",
    "num_units": 16,
    "min_units": 8,
    "multiple_of": 8,
    "kept_whole": "",
    "params": 300,
    "params_share": 0.5,
    "flops_share": 0.25,
    "places": [["body.conv.weight", 0, "produce"], ["head.weight", 1, "consume"]],
}
FOUND: dict[str, Any] = {
    "model": "small",
    "inputs": [[2, 3, 8, 8]],
    "verified": True,
    "groups": [GROUP, {**GROUP, "name": "stem", "kept_whole": "a norm (a); a norm (b); a sum"}],
    "flops": 1e6,
    "params": 600,
    "prunable_params_share": 0.5,
    "cheapest_flops": 1e5,
    "cheapest_params": 60,
    "frozen": [{"place": f"layer.{i}: view", "reason": "no rule"} for i in range(12)],
    "parts": [
        {"tensor": "body.conv.weight", "group": "body.conv", "params": 250},
        {"tensor": "body.conv.bias", "group": "body.conv", "params": 50},
        {"tensor": "head.weight", "group": "body.conv", "params": 100},
        {"tensor": "head.weight", "group": "stem", "params": 120},
        {"tensor": "head.bias", "group": "", "params": 30},
        {"tensor": "token", "group": "", "params": 50},
    ],
}


def test_areas_of_the_map_add_up() -> None:
    """Each module is as large as what it holds, and every parent is there."""
    figure = parameter_map(FOUND)
    assert figure is not None
    (trace,) = figure.data
    values = dict(zip(trace["ids"], trace["values"], strict=True))
    parents = dict(zip(trace["ids"], trace["parents"], strict=True))
    assert len(values) == len(trace["ids"])
    (root,) = [each for each, parent in parents.items() if not parent]
    assert values[root] == 600
    for each in set(parents.values()) - {""}:
        assert values[each] == sum(values[child] for child, parent in parents.items() if parent == each)
    colors = dict(zip(trace["labels"], trace["marker"]["colors"], strict=True))
    assert len({colors["body.conv"], colors["stem"], colors["stays whole"]}) == 3


def test_plotly_accepts_the_map() -> None:
    """The treemap is valid to Plotly's own check."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    figure = parameter_map(FOUND)
    assert figure is not None
    graph_objects.Figure({"data": list(figure.data), "layout": dict(figure.layout)})


def test_the_page_holds_groups_and_reasons(tmp_path: Path) -> None:
    """The page stands alone, with a row per group and the frozen places folded by their reason."""
    page = write_inspection(FOUND, tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert "layer.{0..11}: view" in page
    assert "a norm (a); a norm (b); and 1 more" in page
    assert "body.conv.weight, dim 0, produce" in page
    assert '<link rel="stylesheet"' not in page
    assert "<script src" not in page


def test_hostile_names_stay_text() -> None:
    """A name with HTML in it is shown as it is."""
    bad = "<img src=x onerror=alert(1)>"
    found = json.loads(json.dumps(FOUND).replace("body.conv", bad))
    page = render_inspection({**found, "model": bad}, "")
    assert bad not in page


def test_nothing_found_is_a_page_too() -> None:
    """A model without groups, parameters or frozen places has a page that says so."""
    nothing = {"groups": [], "parts": [], "frozen": [], "params": 0, "flops": 0.0, "cheapest_flops": 0.0}
    page = render_inspection({**FOUND, **nothing, "verified": False, "cheapest_params": 0}, "")
    assert "No units were found" in page
    assert "Not verified" in page
    assert parameter_map({**FOUND, **nothing}) is None
