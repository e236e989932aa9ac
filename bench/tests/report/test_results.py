"""Results are read as written; what is damaged is left out and said, what is unknown is refused."""

from __future__ import annotations

import json
import lzma
import os
import random
from pathlib import Path
from typing import Any

import pytest

from setpoint.errors import CheckpointError, ReportError
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.markdown import markdown
from setpoint_bench.report.page import render
from setpoint_bench.results import load_results
from setpoint_bench.task import BenchError


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
    with pytest.raises(BenchError, match="line 1 of .*results.jsonl is damaged: delete that line"):
        load_results(folder)


def test_a_damaged_ledger_is_said(make_results: Any) -> None:
    """A ledger that can't be read is missing, and the remark names the run."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    path.write_text("no ledger\n")
    results = read_results(folder)
    assert results.cells[0].record is None
    assert results.remarks[0].startswith("digits setpoint seed 0: its ledger could not be read")


@pytest.mark.parametrize("schema", [3, "1", None])
def test_an_unknown_schema_is_refused(make_results: Any, schema: object) -> None:
    """A schema other than ours is an error that names it and what to do."""
    with pytest.raises(ReportError, match=f"schema {schema!r}.*reads schema 1 and 2.*use the version that wrote it"):
        read_results(make_results(methods=("dense",), seeds=(0,), schema=schema))


def test_a_result_without_its_basics_is_refused(tmp_path: Path) -> None:
    """A result without task, method or value is an error that names what lacks."""
    (tmp_path / "results.jsonl").write_text('{"schema": 1, "task": "digits"}\n')
    with pytest.raises(ReportError, match="lacks method, value"):
        read_results(tmp_path)


def test_only_half_a_line_is_no_result(tmp_path: Path) -> None:
    """A file with nothing complete in it is an error, not an empty page."""
    (tmp_path / "results.jsonl").write_text('{"schema": 1, "ta')
    with pytest.raises(ReportError, match="no complete result yet"):
        read_results(tmp_path)


def test_a_repeated_run_counts_once(make_results: Any) -> None:
    """Of a run that was done again, the last result counts."""
    folder = make_results(methods=("dense",), seeds=(0,))
    line = json.loads((folder / "results.jsonl").read_text())
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(line | {"value": 0.5}) + "\n")
    (cell,) = read_results(folder).cells
    assert cell.value == 0.5


def test_a_folder_outside_is_not_read(make_results: Any, tmp_path: Path) -> None:
    """A result that names a folder outside its own results folder gets no history from there."""
    folder = make_results(methods=("dense",), seeds=(0,), folder="../elsewhere")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "history.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (cell,) = read_results(folder).cells
    assert cell.history == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": "bleu"}, "has metric 'bleu', this version of Setpoint reads accuracy and loss"),
        ({"metric": ["loss"]}, "its metric is no text"),
        ({"split": {"test": 1}}, "its split is no text"),
        ({"task": None}, "its task is no text"),
        ({"method": 3}, "its method is no text"),
    ],
)
def test_a_result_of_another_kind_is_refused(make_results: Any, changes: dict[str, object], said: str) -> None:
    """A metric that nobody can compare, or a name that is none, is an error that says which result."""
    with pytest.raises(ReportError, match=f"result 1 of .*results.jsonl.*{said}"):
        read_results(make_results(methods=("dense",), seeds=(0,), **changes))


@pytest.mark.parametrize("line", ["[" * 100_000, '{"schema": 2, "seed": ' + "9" * 5000 + "}", '{"schema": "\\ud800"}'])
def test_lines_that_python_cannot_read_are_damaged(make_results: Any, line: str) -> None:
    """JSON nested without end, a number of thousands of digits and half a character are damage like any other."""
    folder = make_results(methods=("dense",), seeds=(0,))
    path = folder / "results.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    for read, error in ((read_results, ReportError), (load_results, BenchError)):
        with pytest.raises(error, match=r"line 1 of .*results.jsonl is damaged"):
            read(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": "many"}, "its steps must be a count, got 'many'"),
        ({"widths": [1, 2]}, "its widths must be an object, got a list"),
        ({"seed": 1.5}, "its seed must be a count, got 1.5"),
        ({"final_flops": 10**200}, "its final_flops must be a number, got a huge number"),
        ({"environment": {"cpu": {"name": "x"}}}, r"its environment\['cpu'\] must be"),
    ],
)
def test_a_folder_with_fields_of_other_types_is_not_continued(
    make_results: Any, changes: dict[str, object], said: str
) -> None:
    """`bench` goes on only from lines that it wrote: field and value are named."""
    whole = {"steps": 9, "claimed_flops": None, "evaluation_seconds": 1.0}
    assert load_results(make_results(methods=("small",), seeds=(0,), **whole))[0].steps == 9
    folder = make_results(methods=("dense",), seeds=(0,), **{**whole, **changes})
    with pytest.raises(BenchError, match=rf"line 2 of .*results.jsonl is damaged \({said}"):
        load_results(folder)


ODD = [None, True, -1, 10**400, 1e308, "x", "<b>|", "", [], {}, [[1]], {"a": [1]}, {"a": 10**12}]
"""Values of every kind, one of which is of another type wherever it is put."""


def test_a_folder_of_anything_is_shown_or_refused(make_results: Any) -> None:
    """Whatever stands in a field of a result or a timing, there are tables and a page, or one sentence."""
    folder = make_results(seeds=(0,), methods=("dense", "setpoint"))
    for history in folder.glob("*/history.jsonl"):
        history.write_text("".join(history.read_text().splitlines(keepends=True)[::99]))
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    keys = ("task", "method", "budget", "seed", "date")
    stages = {"rounds": [9.0, 11.0], "own_seconds": 0.1, "stage_steps": [5], "step_seconds": [0.1], "control": [1.0]}
    timings = [{**{key: row[key] for key in keys}, "seconds": 9.0, **stages, "schema": 2} for row in results]
    rng, outcomes = random.Random(0), set()
    for name, rows in (("results.jsonl", results), ("timing.jsonl", timings)):
        for number, key in enumerate(rows[0]):
            for value in rng.sample(ODD, 1):
                for each, lines in (("results.jsonl", results), ("timing.jsonl", timings)):
                    changed = [*lines[:-1], {**lines[-1], key: value}] if each == name else lines
                    (folder / each).write_text("".join(json.dumps(line) + "\n" for line in changed))
                try:
                    found = read_results(folder)
                except ReportError as error:
                    outcomes.add("refused")
                    assert ".jsonl" in str(error)
                else:
                    outcomes.add("shown")
                    if number % 3 == 0:  # a page takes longer
                        render(found)
                    assert "<b>" not in markdown(found)
    assert outcomes == {"refused", "shown"}


def test_a_seed_that_diverged_has_no_deviation(make_results: Any) -> None:
    """Where the metric of one seed is not a number, tables and page say so, and nothing breaks."""
    folder = make_results(seeds=(0, 1, 2))
    path = folder / "results.jsonl"
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(json.loads(last) | {"value": None})]) + "\n")
    found = read_results(folder)
    render(found)
    row = next(line for line in markdown(found).splitlines() if line.startswith("| setpoint |"))
    assert "not a number" in row


def test_a_damaged_packed_history_is_refused(make_results: Any) -> None:
    """A packed table of histories that holds something else is named."""
    folder = make_results(methods=("dense",), seeds=(0,))
    (folder / "results.jsonl.xz").write_bytes(lzma.compress((folder / "results.jsonl").read_bytes()))
    (folder / "results.jsonl").unlink()
    for line in ("[" * 100_000, "3", '{"folder": "x", "history": [1]}', '{"folder": "x", "history": {"step": 3}}'):
        (folder / "histories.jsonl.xz").write_bytes(lzma.compress(line.encode()))
        with pytest.raises(ReportError, match="histories.jsonl.xz is damaged"):
            read_results(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_a_pipe_in_place_of_results_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe of that name is refused by `bench` and by the report."""
    os.mkfifo(tmp_path / "results.jsonl")
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_results(tmp_path)
    with pytest.raises(ReportError, match="no results.jsonl"):
        read_results(tmp_path)
