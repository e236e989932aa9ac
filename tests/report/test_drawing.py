"""Drawings: a figure is SVG and labels, which say at which place every point lies."""

from __future__ import annotations

import re

import pytest

from setpoint.report.markup import BLUE, MOST_LABELLED, Figure, Trace, drawing, line


def test_points_lie_where_the_labels_say() -> None:
    """A line from the axes' ends to half of both goes through the middle of the plot, where labels say so; in stairs it
    goes across first.
    """
    points: list[tuple[float, float | None]] = [(0, 0), (50, 0.5), (100, None), (100, 1)]
    made = drawing(Figure([Trace("spent", points, BLUE, width=2), line("top", [(0, 0.943396)], BLUE)]), "a picture")
    assert 'd="M0 1000L500 528.3M1000 56.6"' in made and 'aria-label="a picture"' in made
    assert 'style="top:81.13%">&lrm;0.2&lrm;<' in made and 'style="left:40.0%">40<' in made
    assert "<title>top at step 0\n0.9434</title>" in made
    made = drawing(Figure([line("spent", [(0, 0), (10, 1)], BLUE, stairs=True)]), "steps")
    assert re.search(r'd="M0 1000H1000V[\d.]+"', made)


@pytest.mark.parametrize("many", [MOST_LABELLED, MOST_LABELLED + 1])
def test_a_drawing_of_many_points_stays_small(many: int) -> None:
    """Up to a number of points each has a text; of more, points of a colour are one path. Equal points are one."""
    points = [(step % 10, step // 10 % 5) for step in range(many)]
    texts = [f"cut at {x}" for x, _ in points]
    made = drawing(Figure([Trace("cut", points, BLUE, texts, dot=6)]), "cuts")
    assert made.count("<title>") == (50 if many <= MOST_LABELLED else 0)
    assert made.count("h.1") == 50


def test_no_legend_lies_in_the_plot() -> None:
    """Names of the traces come before the plot, with the colours that a dark page changes."""
    made = drawing(Figure([line(name, [(0, 1), (1, 2)], BLUE) for name in ("dense", "Setpoint")]), "two")
    head, _, plot = made.partition("<svg")
    assert "dense" in head and "Setpoint" in head and "legend" not in plot
    assert f"var(--k{BLUE[1:]})" in head and f"var(--k{BLUE[1:]})" in plot


def test_names_stay_text() -> None:
    """A name with markup is text in labels, legend and titles."""
    evil = "<script>%{y}"
    made = drawing(Figure([line(evil, [(0, 1)], BLUE), line("b", [(0, 1)], BLUE)], evil, evil), "<img>")
    assert "<script" not in made and "<img" not in made and "&lt;script&gt;%{y}" in made
