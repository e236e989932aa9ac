"""The summary's rows equal what one computes by hand from the cells."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from setpoint.report.results import Cell, Point, Results, read_results
from setpoint.report.summary import HEADINGS, Row, row_texts, summary_rows


def cells(method: str, values: list[float], **more: Any) -> list[Cell]:
    """One cell per value, with seeds from 0."""
    return [Cell(task="t", method=method, value=value, seed=seed, **more) for seed, value in enumerate(values)]


def row(found: list[Cell], label: str) -> Row:
    """The row with this label."""
    return {row.label: row for row in summary_rows(Results(tuple(found)))}[label]


def test_mean_and_spread_over_seeds() -> None:
    """Value is the mean over seeds with the sample standard deviation; a single seed has none."""
    several = row(cells("dense", [0.9, 0.8, 0.7]), "dense").value
    assert several.mean == pytest.approx(0.8) and several.deviation == pytest.approx(0.1)
    assert row(cells("dense", [0.9]), "dense").value.deviation is None


def test_differences_are_paired_by_seed() -> None:
    """Seeds that move both models alike leave no spread in the difference."""
    ours = row(cells("dense", [0.9, 0.8, 0.7]) + cells("setpoint", [0.89, 0.79]), "setpoint")
    assert ours.difference and ours.difference.mean == pytest.approx(-0.01)
    assert ours.difference.deviation == pytest.approx(0.0, abs=1e-12)


def test_without_common_seeds_means_are_compared() -> None:
    """Without a common seed the difference is between the means and has no spread."""
    ours = [dataclasses.replace(cell, seed=9) for cell in cells("setpoint", [0.7])]
    found = row(cells("dense", [0.9, 0.8]) + ours, "setpoint").difference
    assert found and found.mean == pytest.approx(-0.15) and found.deviation is None


def test_without_dense_there_is_nothing_to_compare_with() -> None:
    """Without a dense run ratios and differences are unknown, not 0."""
    found = row(cells("setpoint", [0.9], final_flops=1.0), "setpoint")
    assert (found.difference, found.final_flops_ratio, found.realised) == (None, None, None)


def test_ratios_and_realised_savings() -> None:
    """Half of the FLOPs in 60 % of the seconds realises 0.8 of the savings."""
    dense = cells("dense", [0.9], train_flops=100.0, seconds=10.0)
    ours = row(dense + cells("setpoint", [0.9], train_flops=50.0, seconds=6.0), "setpoint")
    assert (ours.train_flops_ratio, ours.seconds_ratio) == (0.5, 0.6)
    assert ours.realised == pytest.approx(0.8)


def test_break_even_is_where_the_clock_falls_behind_dense_for_good() -> None:
    """A run that loses 5 s at the start and gains 0.5 s a step is ahead from the step after step 10 on."""

    def history(seconds: Any) -> tuple[Point, ...]:
        return tuple(Point(step, seconds(step), None, "train", 1.0, None) for step in range(0, 31))

    dense = cells("dense", [0.9], history=history(lambda step: float(step)))
    ours = cells("setpoint", [0.9], history=history(lambda step: 5 + 0.5 * step))
    assert row(dense + ours, "setpoint").break_even_step == 10
    never = cells("setpoint", [0.9], history=history(lambda step: 5 + 1.5 * step))
    assert row(dense + never, "setpoint").break_even_step is None


def test_budgets_of_a_method_are_rows_of_their_own() -> None:
    """A method at two budgets has two rows, the larger first, named by budget; dense comes first, then small."""
    found = cells("setpoint", [0.8], budget=0.25) + cells("setpoint", [0.9], budget=0.5)
    found += cells("small", [0.8], budget=0.5) + cells("dense", [0.95], budget=1.0)
    labels = [row.label for row in summary_rows(Results(tuple(found)))]
    assert labels == ["dense", "small", "setpoint 0.5", "setpoint 0.25"]


def test_rows_as_texts(make_results: Any) -> None:
    """A row's texts stand under the headings, in human units."""
    rows = summary_rows(read_results(make_results()))
    texts = dict(zip(HEADINGS, row_texts(rows[-1]), strict=False))
    assert all(len(row_texts(row)) == len(HEADINGS) for row in rows)
    assert texts["FLOPs / step"] == "1.2 GFLOP" and texts["landed"] == "2 of 2" and texts["cuts"] == "8"
    assert texts["to dense"].endswith(" points")


def test_a_diverged_run_is_called_so() -> None:
    """A metric that is not a number is said, not shown as a number."""
    found = row(cells("dense", [math.nan], metric="loss"), "dense")
    assert row_texts(found)[1] == "not a number"
