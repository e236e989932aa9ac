"""What the README and docs claim in tables is what the committed result files say."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parents[2]


def test_tables_show_the_result_files() -> None:
    """Every generated table on the pages equals a fresh one."""
    command = [sys.executable, str(ROOT / "bench" / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_results_are_few_and_small() -> None:
    """What is committed of the results are packed tables and a few ledgers: at most 101 files and 8 MB in all."""
    files = [path for path in (ROOT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".xz")]
    assert len(files) <= 101 and sum(path.stat().st_size for path in files) < 8e6
    assert {path.name for path in files if path.suffix == ".jsonl"} == {"ledger.jsonl"}


def objects(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a packed file."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["resnet56", "banking77", "clothing", "finetune", "finetune-text"])
def test_differences_are_those_of_paired_seeds(name: str) -> None:
    """Claim: a difference to Setpoint is the mean over paired seeds, bold where a t-test says so.

    All is computed again from the lines of the result files.
    """
    runs: dict[tuple[str, float | None], dict[int, float]] = {}
    for row in objects(ROOT / "results" / name / "results.jsonl.xz"):
        runs.setdefault((row["method"], row["budget"]), {})[row["seed"]] = row["value"]
    page = (ROOT / "docs" / "results-by-task.md").read_text(encoding="utf-8")
    text = page.partition(f"<!-- results:task-{name} -->\n")[2].partition("\n\n")[0]
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    assert len(lines) >= 10
    for line in lines:
        for budget, words in ((0.5, "half"), (0.25, "quarter")):
            method, shown = line[0].strip("`"), line[head.index(f"{words} − Setpoint")]
            ours, theirs = runs["setpoint", budget], runs.get((method, budget), {})
            pairs = 100 * np.array([theirs[seed] - ours[seed] for seed in ours.keys() & theirs.keys()])
            if not pairs.size or method == "setpoint":
                assert shown == "–" or "no common seed" in shown, (method, words)
                continue
            assert abs(float(shown.strip("*").split()[0].replace("−", "-")) - pairs.mean()) <= 0.00501, (method, words)
            if pairs.size >= 3 and pairs.std() > 0:
                assert shown.startswith("**") == (stats.ttest_1samp(pairs, 0.0).pvalue < 0.05), (method, words)
