"""The page holds every section, stands alone, and survives names and folders of any kind."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from setpoint.errors import ReportError
from setpoint.report import figures
from setpoint.report.drawing import drawing
from setpoint.report.record import Record
from setpoint_bench.report.curves import curves
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.history import Point
from setpoint_bench.report.page import curve_section, render, run_section, write_page
from setpoint_bench.report.summary import series

ROOT = Path(__file__).resolve().parents[3]

SECTIONS = (
    "What it costs",
    "All numbers",
    "Against its rivals",
    "How training went",
    "How the budget was met",
    "Decision by decision",
    "Spent against reference",
    "Price of FLOPs",
    "Width of each group",
    "What was dropped when, and why",
    "Architecture before and after",
    "The loss around each event",
    "Where the seconds went",
    "Environment",
)


class Elements(HTMLParser):
    """Collects the elements of a page, with their attributes, and the visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data


def page_of(folder: Path) -> str:
    """The page of a folder."""
    return render(read_results(folder))


def record_in(folder: Path) -> Record:
    """The record of the folder's only run that has one."""
    (record,) = [cell.record for cell in read_results(folder).cells if cell.record]
    return record


def test_the_page_has_every_section(make_results: Any) -> None:
    """A folder with everything in it gives a page with every section and figure, the budget first."""
    page = page_of(make_results())
    seen = Elements(page)
    assert [section for section in SECTIONS if section not in seen.text] == []
    drawn = [attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg" and attrs.get("role") == "img"]
    # the budget, three costs, loss and accuracy against three axes, and of two runs five each
    assert len(drawn) == 1 + 3 + 3 * 2 + 2 * 5 and drawn[0] == "How the budget was met: FLOPs per step"


def test_the_page_stands_alone(make_results: Any, tmp_path: Path) -> None:
    """The page refers to no other file or address, and runs no script."""
    target = write_page(make_results(), tmp_path / "deep" / "report.html")
    page = target.read_text(encoding="utf-8")
    seen = Elements(page)
    assert [tag for tag, attrs in seen.elements if {"src", "action", "srcset"} & attrs.keys()] == []
    assert {str(attrs["href"])[:14] for _, attrs in seen.elements if "href" in attrs} == {"data:text/csv;"}
    assert [tag for tag, _ in seen.elements if tag in ("link", "iframe", "base", "object", "embed", "script")] == []
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_default_place_is_the_folder(make_results: Any) -> None:
    """Without `out` the page is `report.html` in the results folder."""
    folder = make_results(methods=("dense",), seeds=(0,))
    assert write_page(folder) == folder / "report.html"
    assert (folder / "report.html").exists()
    assert list(folder.glob("*.tmp")) == []


def test_curves_can_be_drawn_against_steps_seconds_and_flops(make_results: Any) -> None:
    """Loss and accuracy are there against all three axes, seconds rising to the run's duration; one is shown."""
    folder = make_results(seeds=(0,))
    groups = series(read_results(folder).cells)
    for axis, last in (("step", 1000), ("seconds", read_results(folder).cells[0].seconds)):
        figure = curves(groups, "loss", axis)
        assert figure
        assert next(t for t in figure.data if t["name"] == "dense")["x"][-1] == pytest.approx(last, rel=1e-5)
    page = page_of(folder)
    assert "training so far (TFLOPs)" in page
    assert len(re.findall('type="radio" name="t0-axis"', page)) == 3 and page.count(" checked") == 1
    busy = {label: [replace(cell, clock="shared") for cell in cells] for label, cells in groups.items()}
    assert "by-seconds" in curve_section("t0", groups) and "by-seconds" not in curve_section("t0", busy)


def test_curves_without_seconds_or_values(make_results: Any) -> None:
    """Points that lack a value, or the axis' one, are left out."""
    cell = read_results(make_results(methods=("dense",), seeds=(0,))).cells[0]
    points = [Point(step, None, 1.0, "validation", math.nan if step == 2 else 0.5, None) for step in (1, 2, 3)]
    groups = {"dense": (replace(cell, history=tuple(points)),)}
    figure = curves(groups, "loss", "step")
    assert figure and figure.data[0]["y"] == [0.5, None, 0.5] and "<svg" in drawing(figure, "")
    assert curves(groups, "loss", "seconds") is None and curves(groups, "accuracy", "step") is None


def test_the_page_of_committed_results_is_small(tmp_path: Path) -> None:
    """Of 270 runs of 28 methods, with three ledgers, the page has less than a megabyte, and is made for print too."""
    page = write_page(ROOT / "results" / "finetune", tmp_path / "report.html")
    assert page.stat().st_size < 1_000_000
    text = page.read_text(encoding="utf-8")
    assert text.count('class="run"') == 3
    assert (
        text.index("How the budget was met: FLOPs per step") < text.index("What it costs") < text.index("All numbers")
    )
    printed = text[text.index("@media print") : text.index("</style>")]
    for rule in ("break-inside: avoid", "display: table-header-group", ".choice", "print-color-adjust: exact"):
        assert rule in printed
    assert text.count("prefers-color-scheme") == text.count("@media screen and (prefers-color-scheme")


def test_runs_that_have_no_room_are_counted(make_results: Any) -> None:
    """At least one run is shown decision by decision; how many are not stands on the page."""
    groups = series(read_results(make_results(seeds=(0, 1, 2))).cells)
    made = run_section("t0", groups, 1)
    assert made.count('<details class="run"') == 1 and "2 more runs are not shown" in made


def test_hostile_names_stay_text(make_results: Any) -> None:
    """Names with markup appear as text: no element, no end of a script element, no template placeholder."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>%{y}"
    folder = make_results(task=evil, environment={evil: evil}, date=evil)
    for ledger in folder.glob("*/ledger.jsonl"):
        evil_json = json.dumps(evil)[1:-1]
        text = ledger.read_text()
        for name in ("stem.conv", "worth below the price", "channel", '"flops"'):
            text = text.replace(name, evil_json if name != '"flops"' else f'"{evil_json}"')
        ledger.write_text(text)
    page = page_of(folder)
    seen = Elements(page)
    assert [tag for tag, _ in seen.elements if tag in ("img", "script")] == []
    assert evil in seen.text and f"of 16 {evil}s" in seen.text  # the latter in a figure


def test_a_single_cell_is_enough(make_results: Any) -> None:
    """One dense run without a ledger gives a page with its curves and without a section on the budget."""
    seen = Elements(page_of(make_results(methods=("dense",), seeds=(0,))))
    assert "How training went" in seen.text
    assert "How the budget was met" not in seen.text


def test_a_page_with_a_run_that_diverged(make_results: Any) -> None:
    """A metric that is not a number, or missing, stands there as unknown; the page is drawn."""
    folder = make_results(seeds=(0,))
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, value in zip(lines, (float("nan"), None), strict=False):
        line["value"] = value
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    assert "not a number" in page and not re.search(r'd="[^"]*nan|:nan%', page)


def test_a_busy_machine_is_told(make_results: Any) -> None:
    """Where the seconds were measured on a machine at other work, the page says so, as the table does."""
    folder = make_results(seeds=(0,))
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    timed = [{key: line[key] for key in ("task", "method", "budget", "seed", "schema", "seconds")} for line in lines]

    def timings(load: float) -> str:
        text = "".join(json.dumps({**line, "load": [load, load]}) + "\n" for line in timed)
        (folder / "timing.jsonl").write_text(text)
        return Elements(page_of(folder)).text

    assert "not idle then: load average 1.7" in timings(1.7)
    assert "not idle then: load average 0.6" in timings(0.6)
    assert "idle: load average 0.40" in timings(0.4) and "not idle" not in timings(0.4)


def test_a_missing_ledger_and_history_are_survived(make_results: Any) -> None:
    """Without ledgers and histories the summary remains, and the page says what is missing."""
    folder = make_results(seeds=(0,))
    for path in [*folder.glob("*/ledger.jsonl"), *folder.glob("*/history.jsonl")]:
        path.unlink()
    seen = Elements(page_of(folder))
    assert "How the budget was met" not in seen.text and "How training went" not in seen.text
    assert "digits setpoint seed 0: no history.jsonl" in seen.text
    assert "1.2 GFLOPs" in seen.text


def test_a_ledger_without_header_facts_is_drawn(make_results: Any) -> None:
    """A ledger whose header says nothing still shows its widths, rebuilt from the first entry."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    path.write_text("\n".join(['{"ledger": 1}', *path.read_text().splitlines()[1:]]) + "\n")
    figure = figures.widths(record_in(folder))
    assert figure and [row[0] for row in figure.data[0]["z"]] == [1.0] * 5
    assert "/ 64" in figure.layout["yaxis"]["ticktext"][3]
    assert "Width of each group" in page_of(folder)


def test_a_ledger_without_entries_is_drawn(make_results: Any) -> None:
    """A run that decided nothing shows full widths and a level line at the dense cost."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    spent = next(t for t in figures.spending(record_in(folder), "flops").data if t["name"] == "spent")
    assert (spent["x"], spent["y"]) == ([0, 1000], [2.4, 2.4])
    assert "Spent against reference" in page_of(folder)


def test_every_drop_is_told(make_results: Any) -> None:
    """The timeline has one marker per dropped unit, each with its group, origin, worth and the reason."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    record = record_in(folder)
    figure = figures.timeline(record, "flops")
    assert figure
    drops = [trace for trace in figure.data if trace["name"] == "dropped"]
    told = sorted(item[0] for trace in drops for item in trace["customdata"])
    expected = [
        f"{name}, channel {origin}"
        for entry in record.entries
        for name, origins in entry.dropped.items()
        for origin in origins
    ]
    assert told == sorted(expected)
    assert all("loss per GFLOPs" in item[1] for trace in drops for item in trace["customdata"])
    assert "first cut: reference left the dense cost" in drops[0]["hovertemplate"]


def test_a_unit_that_came_back_lives_on(make_results: Any) -> None:
    """A unit that was dropped and brought back has a line up to its drop and one from its return on."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    figure = figures.timeline(record_in(folder), "flops")
    assert figure
    traces = {trace["name"]: trace for trace in figure.data}
    (height,) = traces["brought back"]["y"]
    step = traces["brought back"]["x"][0]
    starts = {
        (x, y)
        for name in ("kept", "dropped later")
        for x, y in zip(traces[name]["x"][::3], traces[name]["y"][::3], strict=True)
    }
    assert {(0, height), (step, height)} <= starts


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    """A folder without results is refused, with what to do."""
    with pytest.raises(ReportError, match="setpoint bench --out"):
        write_page(tmp_path)


def test_measured_and_predicted_stand_apart(make_results: Any) -> None:
    """With a meter its readings are markers and columns of their own, and a table says where a step's time goes."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {
        "dense": {"latency": 0.2},
        "limit": {"latency": 0.1},
        "modelled": {"latency": "modelled: operations"},
        "measured": {"latency": "measured: seconds"},
        "calibration": {"latency": 0.04, "inference": 0.02},
        "limit_run": {"latency": 50.0},
    }
    for line in lines[1:]:
        line |= {"spent": {"latency": 0.11}, "reference": {"latency": 0.12}, "price": {"latency": 1.0}}
        line |= {"metered": {"latency": 0.13}, "predicted": {"latency": 0.125}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    measured = next(t for t in figures.spending(record_in(folder), "latency").data if t["name"] == "measured")
    assert measured["y"] == [0.13] * 8 and measured["hovertext"] == ["predicted 0.125 s"] * 8
    for words in ("predicted before", "measured before", "0.125 s", "0.13 s", "modelled: operations"):
        assert words in page
    assert "budget of the whole run 50 s" in page and "within 4.00 % of copies of the model" in page
