"""Results are read as written; what is damaged is left out and said, what is unknown is refused."""

from __future__ import annotations

from typing import Any

import pytest

from setpoint.errors import ReportError
from setpoint_bench.report.folder import read_results
from setpoint_bench.results import load_results


def test_cells_are_read_as_written(make_results: Any) -> None:
    """Every field, the history and the ledger of a cell come back."""
    results = read_results(make_results(methods=("dense", "setpoint"), seeds=(0,)))
    dense, ours = results.cells
    assert (dense.method, dense.final_flops, dense.budget_met, dense.record) == ("dense", 2.4e9, None, None)
    assert (ours.budget, ours.resizes, ours.budget_met, ours.split) == (0.5, 8, True, "test")
    assert len(ours.history) == 510
    assert ours.record and len(ours.record.entries) == 8 and ours.record.total_steps == 1000
    assert results.remarks == ()


def test_a_half_written_line_is_left_out_and_said(make_results: Any) -> None:
    """An interrupted run leaves half a line in any of the three files: the rest is read, with a remark each."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    for path in (folder / "results.jsonl", *folder.glob("*/*.jsonl")):
        with path.open("a") as file:
            file.write('{"schema": 1, "task": "dig')
    results = read_results(folder)
    assert len(results.cells) == 1
    assert len(results.cells[0].history) == 510
    assert results.cells[0].record and len(results.cells[0].record.entries) == 8
    assert "line 2 of results.jsonl is not a complete JSON object and was left out" in results.remarks


def test_a_damaged_result_is_refused(make_results: Any) -> None:
    """A line of the results that is broken and not the last is an error for the report as it is for `bench`."""
    folder = make_results(methods=("dense", "setpoint"), seeds=(0,))
    path = folder / "results.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:40]}\n{second}\n")
    with pytest.raises(ReportError, match="line 1 of .*results.jsonl is damaged: delete that line"):
        read_results(folder)
    with pytest.raises(ReportError, match="line 1 of .*results.jsonl is damaged: delete that line"):
        load_results(folder)


@pytest.mark.parametrize("schema", [3, "1", None])
def test_an_unknown_schema_is_refused(make_results: Any, schema: object) -> None:
    """A schema other than ours is an error that names it and what to do."""
    with pytest.raises(ReportError, match=f"schema {schema!r}.*reads schema 1 and 2.*use the version that wrote it"):
        read_results(make_results(methods=("dense",), seeds=(0,), schema=schema))
