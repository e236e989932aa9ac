"""The page of the league: what its table, sentences and picture say of a record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from tables import league, renderer

ABOUT = {"cpu": "a processor", "threads": 1, "torch": "2"}
VALUES = {
    "dense+taught": [0.90, 0.91, 0.92, 0.91, 0.90],
    "neighbour+taught": [0.80, 0.81, 0.80, 0.82, 0.80],
    "setpoint-at-once+taught": [0.88, 0.89, 0.90, 0.89, 0.885],
    "fitted-first+taught": [0.99] * 5,
    "cubic+taught": [0.85, 0.86, 0.88, 0.86, 0.85],
    "cubic": [0.89] * 5,
    "taylor-first+taught": [0.91, 0.60],
}


def record(tasks: list[str]) -> dict[str, Any]:
    rows = []
    for method, values in VALUES.items():
        sized = not method.startswith(("dense", "neighbour"))
        for seed, value in enumerate(values):
            for budget in (0.5, 0.25) if sized else (None,):
                row = {"length": 1, "method": method, "budget": budget, "seed": seed, "value": value}
                rows.append(
                    {**row, "int8": value - 0.01, **({"ms": 4 * (budget or 1), "int8_ms": 2.0} if not seed else {})}
                )
    found = {"environment": ABOUT, "date": "2026-12-03T00:00:00", "before": 0.832, "failures": {"x": "it | fails"}}
    return {"tasks": {task: {**found, "runs": rows} for task in tasks}}


def test_rivals_are_others_with_all_seeds_and_the_same_words() -> None:
    """Claim: neither Setpoint's own methods, nor one without a teacher or with fewer seeds, is the best rival."""
    rows = record(["banking77"])["tasks"]["banking77"]["runs"]
    pair = ("setpoint-at-once+taught", "cubic+taught")
    assert league.best_rivals(rows) == {0.5: pair, 0.25: pair}


def test_the_page_says_what_the_record_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the table has a line a cell with the paired difference, sentences count cells, each has its dots."""
    (tmp_path / league.FILE).write_text(json.dumps(record(["resnet56", "banking77"])))
    monkeypatch.setattr(renderer, "RESULTS", tmp_path)
    monkeypatch.setattr(league, "RESULTS", tmp_path)
    lines = renderer.SPECS["league"]().splitlines()
    assert len(lines) == 2 + 4 + 2 and "83.2 % before training" in lines[4] + lines[2]
    assert "`cubic`" in lines[2] and "**+2.90 [+2.22, +3.58]**" in lines[2] and "4.00, 2.00, 2.00" in lines[2]
    told = renderer.SPECS["league-sentences"]().splitlines()
    assert told[0].startswith(
        "* Setpoint is clearly ahead of the best rival in 4 of 4 cells and clearly behind in 0; cor"
    )
    assert told[0].endswith("ahead in 4.") and "−1.9 to −1.9 points" in told[1] and "25% to 100%" in told[2]
    assert "clearly ahead in 4 of 4 cells" in told[3]
    assert "it \\| fails" in renderer.SPECS["league-failures"]()
    picture = league.chart()
    assert picture is not None and picture.count("<title>") == 2 * (2 + 2 + 1)


def test_holm() -> None:
    """Claim: the smallest of n p-values counts n-fold, the next n - 1, and none below one before it."""
    assert league.holm([0.04, 0.01, None, 0.03]) == pytest.approx([0.06, 0.03, None, 0.06])
