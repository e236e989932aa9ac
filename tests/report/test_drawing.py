"""Drawings: a figure is SVG and labels, which say at which place every point lies."""

from __future__ import annotations

import re

import pytest

from setpoint.report.drawing import BLUE, MOST_LABELLED, Figure, drawing, escape, layout, line, scatter


def test_points_lie_where_the_labels_say() -> None:
    """A line from the axes' ends to half of both goes through the middle of the plot, where labels say so."""
    shape = layout("share", "step") | {"height": 300}
    shape["xaxis"]["range"], shape["yaxis"]["range"] = [0, 100], [0, 1]
    made = drawing(Figure([line("spent", [(0, 0), (50, 0.5)], BLUE)], shape), "a picture")
    assert 'd="M0 1000L500 500"' in made and 'aria-label="a picture"' in made
    assert 'style="top:80.0%">&lrm;0.2&lrm;<' in made and 'style="left:40.0%">40<' in made
    assert "<title>spent at step 50\n0.5</title>" in made


def test_a_step_stays_until_the_next_one() -> None:
    """Of shape hv, a line goes across first."""
    shape = layout("share", "step") | {"height": 300}
    made = drawing(Figure([line("spent", [(0, 0), (10, 1)], BLUE, shape="hv")], shape), "steps")
    assert re.search(r'd="M0 1000H1000V[\d.]+"', made)


@pytest.mark.parametrize("many", [MOST_LABELLED, MOST_LABELLED + 1])
def test_a_drawing_of_many_points_stays_small(many: int) -> None:
    """Up to a number of points each has a text; of more, points of a colour are one path. Equal points are one."""
    points = [(step % 10, step // 10 % 5) for step in range(many)]
    made = drawing(Figure([scatter("markers", "cut", points, "cut at %{x}")], layout("y")), "cuts")
    assert made.count("<title>") == (50 if many <= MOST_LABELLED else 0)
    assert made.count("h.1") == 50


def test_no_legend_lies_in_the_plot() -> None:
    """Names of the traces come before the plot, with the colours that a dark page changes."""
    two = [line(name, [(0, 1), (1, 2)], BLUE) for name in ("dense", "Setpoint")]
    made = drawing(Figure(two, layout("accuracy")), "two")
    head, _, plot = made.partition("<svg")
    assert "dense" in head and "Setpoint" in head and "legend" not in plot
    assert f"var(--k{BLUE[1:]})" in head and f"var(--k{BLUE[1:]})" in plot


def test_names_stay_text() -> None:
    """A name with markup is text in labels, legend and titles."""
    evil = escape("<script>%{y}")
    made = drawing(Figure([line(evil, [(0, 1)], BLUE), line("b", [(0, 1)], BLUE)], layout(evil)), "<img>")
    assert "<script" not in made and "<img" not in made and "&lt;script&gt;%{y}" in made.replace("&#123;", "{")
