"""What the README and docs claim in tables is what the committed result files say."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from functools import cache
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


def test_every_results_folder_has_a_page() -> None:
    """Each folder of results/ has its page in docs/tasks/, to which results.md links, and no page is of none."""
    folders = {path.parent.name for path in (ROOT / "results").glob("*/results.jsonl.xz")}
    assert folders == {page.stem for page in (ROOT / "docs" / "tasks").glob("*.md")}
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert all(f"](tasks/{name}.md)" in text for name in folders)


def test_results_are_few_and_small() -> None:
    """What is committed of the results are packed tables and a few ledgers: at most 100 files and 8 MB in all."""
    files = [path for path in (ROOT / "results").rglob("*") if path.suffix in (".json", ".jsonl", ".xz")]
    assert len(files) <= 100 and sum(path.stat().st_size for path in files) < 8e6
    assert {path.name for path in files if path.suffix == ".jsonl"} == {"ledger.jsonl"}


def columns_of(page: str, table: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Of a generated table: the columns behind the first, and for each row its method and its texts."""
    text = page.partition(f"<!-- results:{table} -->\n")[2].partition("\n<!-- end -->")[0]
    head, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())
    return head[1:], [(line[0].strip("`"), line[1:]) for line in lines]


def objects(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a packed file."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def lines_of(name: str) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The lines of all tables of a name, by column of the tables and method, and by seed, the last one of each."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for file in ROOT.glob(f"results/*/{name}.jsonl.xz"):
        for row in objects(file):
            for budget in (0.5, 0.25) if row["budget"] is None else (row["budget"],):
                column = f"{row['task']} {round(100 * budget)} %"
                found.setdefault((column, row["method"]), {})[row["seed"]] = row
    return found


@cache
def histories_of(task: str) -> dict[str, dict[str, list[Any]]]:
    """The histories of a task's runs by their folders, each a list by key."""
    return {each["folder"]: each["history"] for each in objects(ROOT / "results" / task / "histories.jsonl.xz")}


def value_of(row: dict[str, Any], table: str) -> float:
    """The metric of a run: on test data, or on validation data at its end."""
    if table == "ahead":
        return float(row["value"])
    history = histories_of(row["task"])[row["folder"]]
    judged = [
        value for split, value in zip(history["split"], history[row["metric"]], strict=True) if split == "validation"
    ]
    return float(judged[-1])


@pytest.mark.parametrize("table", ["ahead", "ahead-validation"])
def test_setpoint_is_ahead_where_its_runs_are_better(table: str) -> None:
    """Each entry of the tables of all methods is the mean of paired differences, bold where a t-test says so.

    Positive is better for accuracies and losses alike, an arrow says who ends over 2 % cheaper or dearer. All is
    computed again from the lines of the result files and of the runs' histories.
    """
    found = lines_of("results")
    value = cache(lambda column, method, seed: value_of(found[column, method][seed], table))
    columns, rows = columns_of((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), table)
    assert len(rows) >= 26 and len(columns) >= 15
    for method, texts in rows:
        for column, text in zip(columns, texts, strict=True):
            ours, theirs = found[column, "setpoint"], found.get((column, method), {})
            seeds = ours.keys() & theirs.keys()
            pairs = np.array([value(column, "setpoint", seed) - value(column, method, seed) for seed in seeds])
            if not pairs.size:
                assert text == "–", (method, column)
                continue
            scale, decimals = (100, 2) if ours[0]["metric"] == "accuracy" else (-1, 3)
            shown = float(text.strip("*() ↓↑").replace("−", "-"))
            assert abs(shown - scale * pairs.mean()) <= 0.5001 * 10.0**-decimals, (method, column)
            assert text.startswith("(") == (pairs.size < 3), (method, column)
            if pairs.size >= 3 and pairs.std() > 0:
                assert text.startswith("**") == (stats.ttest_1samp(pairs, 0.0).pvalue < 0.05), (method, column)
            spent = [
                np.mean([each["theoretical_flops"] or each["final_flops"] for each in rows.values()])
                for rows in (theirs, ours)
            ]
            unsized = all(each["budget"] is None for each in theirs.values())
            apart = 0.0 if unsized else spent[0] / spent[1] - 1
            assert text.endswith("↓") == (apart < -0.02) and text.endswith("↑") == (apart > 0.02), (method, column)
