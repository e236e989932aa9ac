"""The picture is well-formed SVG whose lines come from the runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from setpoint.errors import ReportError
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.moving_picture import write_moving_picture
from setpoint_bench.report.picture import learning_line, mean_line, write_picture

SVG = "{http://www.w3.org/2000/svg}"


def lines_of(path: Path) -> list[list[tuple[float, float]]]:
    """The points of every line with more than the two points of a legend mark or a rule."""
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    found = [item.get("d", "") for item in root.iter(f"{SVG}path") if "line" in item.get("class", "")]
    pairs = [re.findall(r"([\d.]+) ([\d.]+)", path) for path in found if "L" in path]
    return [[(float(x), float(y)) for x, y in points] for points in pairs]


def test_lines_of_all_methods_are_drawn(make_results: Any, tmp_path: Path) -> None:
    """Three methods have a line in each of the two panels, and Setpoint's spending falls to half of dense."""
    lines = lines_of(write_picture(make_results(seeds=(0,)), tmp_path / "picture.svg"))
    assert len(lines) == 6
    dense, small, ours = lines[3:]
    bottom = 62.0 + 210.0
    assert bottom - small[-1][1] == pytest.approx((bottom - dense[-1][1]) / 2, abs=0.1)
    assert ours[0][1] == pytest.approx(dense[0][1], abs=0.1)
    assert ours[-1][1] == pytest.approx(small[-1][1], abs=1.0)


def test_the_picture_stands_alone_and_keeps_names_text(make_results: Any, tmp_path: Path) -> None:
    """Hostile names stay text, and the picture has neither scripts nor references."""
    folder = make_results(task="<script>x</script>", methods=("dense", "<b>&"), seeds=(0,))
    text = write_picture(folder, tmp_path / "a" / "picture.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert {item.tag for item in root.iter()} == {f"{SVG}{tag}" for tag in ("svg", "style", "rect", "path", "text")}
    assert "<b>&" in [item.text for item in root.iter(f"{SVG}text")]
    assert "href" not in text and "url(" not in text


def test_an_unknown_task_is_refused(make_results: Any, tmp_path: Path) -> None:
    """A task that is not in the folder is an error that names those that are."""
    with pytest.raises(ReportError, match="no task 'cifar10'.*digits"):
        write_picture(make_results(methods=("dense",), seeds=(0,)), tmp_path / "picture.svg", task="cifar10")


def test_no_history_no_picture(make_results: Any, tmp_path: Path) -> None:
    """Without histories there is nothing to draw, and the error says which file lacks."""
    folder = make_results(methods=("dense",), seeds=(0,))
    next(folder.glob("*/history.jsonl")).unlink()
    with pytest.raises(ReportError, match=r"needs history\.jsonl"):
        write_picture(folder, tmp_path / "picture.svg")


def test_a_line_is_the_mean_over_seeds(make_results: Any, tmp_path: Path) -> None:
    """With a second seed that was judged after the same steps, dense's line goes through the means of both."""
    folder = make_results(methods=("dense",), seeds=(0, 1))
    cells = read_results(folder).cells
    points = [[point for point in cell.history if point.split == "validation"] for cell in cells]
    drawn = mean_line(cells, "accuracy", "validation")
    assert len(drawn) == len(points[0]) > 1
    for (_, value), first, second in zip(drawn, *points, strict=True):
        assert value == pytest.approx(50 * (first.accuracy + second.accuracy))
    assert mean_line([cells[0], replace(cells[1], history=())], "accuracy", "validation") == learning_line(
        cells[0], "accuracy", "validation"
    )


def test_a_moving_picture_ends_with_the_whole_run(make_results: Any, tmp_path: Path) -> None:
    """It shows where accuracy and FLOPs end, moves by CSS that motion and print switch off, and follows dark pages."""
    folder = make_results(methods=("dense", "setpoint"), seeds=(0,))
    (cell,) = (each for each in read_results(folder).cells if each.method == "setpoint")
    assert cell.record is not None
    text = write_moving_picture(folder, tmp_path / "run.svg", "setpoint", 0.5, "A <run>").read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    share = cell.record.entries[-1].spent["flops"] / cell.record.dense["flops"]
    assert f">{100 * share:.0f} %<" in text and "A &lt;run&gt;" in text
    for words in ("prefers-reduced-motion", "prefers-color-scheme: dark", "@media print"):
        assert words in text
    with pytest.raises(ReportError, match="no run of 'magic'"):
        write_moving_picture(folder, tmp_path / "run.svg", "magic", 0.5, "")
