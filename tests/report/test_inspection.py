"""The page of an inspection: bars that add up, and tables of groups and of what is frozen."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from setpoint.report.figures import BLUE, FAINT, ORANGE
from setpoint.report.inspect_model import inspect_model
from setpoint.report.inspection_page import parameters_by_kind, render_inspection, write_inspection
from setpoint.report.target import load_target

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


def test_bars_of_parameters_add_up() -> None:
    """Each module has the parameters that it holds, by kind; of many modules, those that hold them have."""
    rows = parameters_by_kind(FOUND)
    assert rows == {"body.conv": {BLUE: 300}, "head": {BLUE: 100, ORANGE: 120, FAINT: 30}, "": {FAINT: 50}}
    many = [{"tensor": f"block.{place // 9}.{place}.weight", "group": "", "params": 2} for place in range(90)]
    rows = parameters_by_kind({**FOUND, "parts": many})
    assert list(rows) == [f"block.{place}" for place in range(10)]
    assert {kinds[FAINT] for kinds in rows.values()} == {18}


def test_the_page_of_a_network_is_small(tmp_path: Path) -> None:
    """Of a ResNet-18 the page has less than a tenth of a megabyte, budgets first, and is made for print too."""
    model, example = load_target("torchvision:resnet18", (2, 3, 64, 64))
    found = inspect_model("resnet18", model, example, verify=False)
    page = write_inspection(asdict(found), tmp_path / "inspect.html")
    assert page.stat().st_size < 100_000
    text = page.read_text(encoding="utf-8")
    assert text.index("Budgets within reach") < text.index("Where the parameters are") < text.index("Groups")
    assert "@media print" in text and "<script" not in text


def test_the_page_holds_groups_and_reasons(tmp_path: Path) -> None:
    """The page stands alone, with a row per group and the frozen places folded by their reason."""
    page = write_inspection(FOUND, tmp_path / "inspect.html").read_text(encoding="utf-8")
    assert "layer.{0..11}: view" in page
    assert "a norm (a); a norm (b); and 1 more" in page
    assert "body.conv.weight, dim 0, writes" in page
    assert '<link rel="stylesheet"' not in page
    assert "<script src" not in page


def test_hostile_names_stay_text() -> None:
    """A name with HTML in it is shown as it is."""
    bad = "<img src=x onerror=alert(1)>"
    found = json.loads(json.dumps(FOUND).replace("body.conv", bad))
    page = render_inspection({**found, "model": bad})
    assert bad not in page


def test_nothing_found_is_a_page_too() -> None:
    """A model without groups, parameters or frozen places has a page that says so."""
    nothing = {"groups": [], "parts": [], "frozen": [], "params": 0, "flops": 0.0, "cheapest_flops": 0.0}
    page = render_inspection({**FOUND, **nothing, "verified": False, "cheapest_params": 0})
    assert "No units were found" in page
    assert "Not verified" in page
    assert parameters_by_kind({**FOUND, **nothing}) == {}
