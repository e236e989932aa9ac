"""What the README and docs claim in tables is what the committed result files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]


def test_tables_show_the_result_files() -> None:
    """Every generated table on the pages equals a fresh one."""
    command = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_setpoint_is_ahead_where_its_runs_are_better() -> None:
    """Each entry of the table of all methods is the mean of paired differences, bold where a t-test says so.

    Positive is better for accuracies and losses alike. All is computed again from the lines of the result files.
    """
    found: dict[tuple[str, str], dict[int, float]] = {}
    metric: dict[str, str] = {}
    for file in ROOT.glob("results/*/results.jsonl"):
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            for budget in (0.5, 0.25) if row["budget"] is None else (row["budget"],):
                column = f"{row['task']} {round(100 * budget)} %"
                found.setdefault((column, row["method"]), {})[row["seed"]] = row["value"]
                metric[column] = row["metric"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    head, _, *lines = page.partition("<!-- results:ahead -->\n")[2].partition("\n<!-- end -->")[0].splitlines()
    columns = [cell.strip() for cell in head.split("|")[2:-1]]
    assert len(lines) >= 26 and len(columns) >= 15
    for line in lines:
        method, *texts = (cell.strip() for cell in line.split("|")[1:-1])
        for column, text in zip(columns, texts, strict=True):
            ours, theirs = found[column, "setpoint"], found.get((column, method.strip("`")), {})
            pairs = np.array([ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()])
            if not pairs.size:
                assert text == "–", (method, column)
                continue
            scale, decimals = (100, 2) if metric[column] == "accuracy" else (-1, 3)
            shown = float(text.strip("*()").replace("−", "-"))
            assert abs(shown - scale * pairs.mean()) <= 0.5001 * 10.0**-decimals, (method, column)
            assert text.startswith("(") == (pairs.size < 3), (method, column)
            if pairs.size >= 3 and pairs.std() > 0:
                assert text.startswith("**") == (stats.ttest_1samp(pairs, 0.0).pvalue < 0.05), (method, column)
