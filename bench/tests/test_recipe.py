"""The table of the recipe's parts: differences of common seeds, in points, on the pretrained models alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_cells_are_differences_of_common_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a seed that one method lacks does not count, and a part that was not run has a dash."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.variants import recipe_table

    shared = {"cpu": "none", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
    values = {
        ("resnet56", "cubic"): (0.8, 0.9),
        ("resnet56", "cubic-taylor"): (0.82, 0.91, 0.5),
        ("digits", "cubic"): (0.1,),
    }
    rows = [
        {**shared, "task": task, "method": method, "seed": seed, "value": value}
        for (task, method), found in values.items()
        for seed, value in enumerate(found)
    ]
    file = tmp_path / "ablation.json"
    file.write_text(json.dumps({"rows": rows}), encoding="utf-8")
    lines = recipe_table(file).splitlines()
    assert lines[0].count("|") == 6 and "digits" not in recipe_table(file)
    (line,) = (line for line in lines if "`cubic-taylor` − `cubic`" in line)
    assert [cell.strip() for cell in line.split("|")[3:6]] == ["+1.50 (+2.0, +1.0)", "–", "–"]


def test_every_method_that_was_measured_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: each row of the pretrained models in the results file is part of a cell."""
    monkeypatch.syspath_prepend(str(ROOT / "bench" / "benchmarks"))
    from tables.variants import PAIRS, PARTS

    rows = json.loads((ROOT / "results" / "ablation.json").read_text(encoding="utf-8"))["rows"]
    shown = {method for part in PARTS for method in part[2:]}
    assert {row["method"] for row in rows if row["task"] in PAIRS} <= shown
