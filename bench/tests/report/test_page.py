"""The page holds every section, stands alone, and survives names and folders of any kind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from setpoint.errors import ReportError
from setpoint.report import decisions, figures
from setpoint.report.record import Record
from setpoint_bench.report.folder import read_results
from setpoint_bench.report.page import render, write_page

SECTIONS = (
    "What it costs",
    "All numbers",
    "Against its rivals",
    "How training went",
    "How the budget was met",
    "Spent against reference",
    "Price of FLOPs",
    "Width of each group",
    "What was dropped when, and why",
    "Architecture before and after",
    "Every drop and every return, like a spike train",
    "How long units rested",
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
    """The page of a folder, with a stand-in for the Plotly library."""
    return render(read_results(folder), "window.Plotly = {};")


def specs_of(page: str) -> dict[str, Any]:
    """The figures of a page, by id."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def record_in(folder: Path) -> Record:
    """The record of the folder's only run that has one."""
    (record,) = [cell.record for cell in read_results(folder).cells if cell.record]
    return record


def test_the_page_has_every_section(make_results: Any) -> None:
    """A folder with everything in it gives a page with every section, figure places and their figures."""
    page = page_of(make_results())
    seen = Elements(page)
    assert [section for section in SECTIONS if section not in seen.text] == []
    places = {attrs["id"] for tag, attrs in seen.elements if attrs.get("class") == "plot"}
    assert places == set(specs_of(page))
    assert len(places) == 3 + 2 + 2 + 1  # three costs, loss and accuracy, the loss around each event, seconds
    drawn = [attrs["aria-label"] for tag, attrs in seen.elements if tag == "svg"]
    assert len(drawn) == 2 * 6 and drawn[0] == "Spent against reference: FLOPs per step"


def test_the_page_stands_alone(make_results: Any, tmp_path: Path) -> None:
    """The page refers to no other file or address, and holds the Plotly library once."""
    target = write_page(make_results(), tmp_path / "deep" / "report.html")
    page = target.read_text(encoding="utf-8")
    seen = Elements(page)
    assert [tag for tag, attrs in seen.elements if {"src", "action", "srcset"} & attrs.keys()] == []
    assert {str(attrs["href"])[:14] for _, attrs in seen.elements if "href" in attrs} == {"data:text/csv;"}
    assert [tag for tag, _ in seen.elements if tag in ("link", "iframe", "base", "object", "embed")] == []
    assert page.count(figures.plotly_script()) == 1
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_default_place_is_the_folder(make_results: Any) -> None:
    """Without `out` the page is `report.html` in the results folder."""
    folder = make_results(methods=("dense",), seeds=(0,))
    assert write_page(folder) == folder / "report.html"
    assert (folder / "report.html").exists()
    assert list(folder.glob("*.tmp")) == []


def test_plotly_accepts_every_figure(make_results: Any) -> None:
    """Every figure is valid by Plotly's own schema, on either axis."""
    graph_objects = pytest.importorskip("plotly.graph_objects")
    specs = specs_of(page_of(make_results(budgets=(0.5, 0.25))))
    assert specs
    for spec in specs.values():
        graph_objects.Figure({"data": spec["data"], "layout": spec["layout"]})
        for _, xs in spec["abscissas"].values() if spec["abscissas"] else ():
            assert [len(x) for x in xs] == [len(trace["y"]) for trace in spec["data"]]


def test_curves_can_be_drawn_against_steps_seconds_and_flops(make_results: Any) -> None:
    """Loss and accuracy carry the values of all three axes, seconds rising to the run's duration."""
    folder = make_results(seeds=(0,))
    spec = specs_of(page_of(folder))["t0-loss"]
    assert set(spec["abscissas"]) == {"step", "seconds", "flops"}
    dense = next(place for place, trace in enumerate(spec["data"]) if trace["name"] == "dense")
    assert spec["abscissas"]["seconds"][1][dense][-1] == pytest.approx(read_results(folder).cells[0].seconds, rel=1e-5)
    assert spec["abscissas"]["flops"][0] == "training so far (TFLOP)"


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
    assert [tag for tag, _ in seen.elements if tag == "img"] == []
    assert sum(tag == "script" for tag, _ in seen.elements) == 4
    assert evil in seen.text
    for spec in specs_of(page).values():
        assert "<script" not in json.dumps(spec) and "<img" not in json.dumps(spec)
        for trace in spec["data"]:
            known = {"x", "y", "z", "text", "hovertext", "customdata[0]", "customdata[1]", "customdata[2]"}
            names = re.findall(r"%\{([^}:]*)", trace.get("hovertemplate", ""))
            assert set(names) <= known
        assert "alert(2)>%{y}" not in json.dumps(spec["data"])


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
    assert "NaN" not in json.dumps(specs_of(page_of(folder)))


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
    assert "1.2 GFLOP" in seen.text


def test_a_ledger_without_header_facts_is_drawn(make_results: Any) -> None:
    """A ledger whose header says nothing still shows its widths, rebuilt from the first entry."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    path.write_text("\n".join(['{"ledger": 1}', *path.read_text().splitlines()[1:]]) + "\n")
    figure = decisions.widths(record_in(folder))
    assert figure and [row[0] for row in figure.data[0]["z"]] == [1.0] * 5
    assert "/ 64" in figure.layout["yaxis"]["ticktext"][3]
    assert "Width of each group" in page_of(folder)


def test_a_ledger_without_entries_is_drawn(make_results: Any) -> None:
    """A run that decided nothing shows full widths and a level line at the dense cost."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    (path,) = folder.glob("*/ledger.jsonl")
    path.write_text(path.read_text().splitlines()[0] + "\n")
    spent = next(t for t in decisions.spending(record_in(folder), "flops").data if t["name"] == "spent")
    assert (spent["x"], spent["y"]) == ([0, 1000], [2.4, 2.4])
    assert "Spent against reference" in page_of(folder)


def test_every_drop_is_told(make_results: Any) -> None:
    """The timeline has one marker per dropped unit, each with its group, origin, worth and the reason."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    record = record_in(folder)
    figure = decisions.timeline(record, "flops")
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
    assert all("loss per GFLOP" in item[1] for trace in drops for item in trace["customdata"])
    assert "first cut: reference left the dense cost" in drops[0]["hovertemplate"]


def test_a_unit_that_came_back_lives_on(make_results: Any) -> None:
    """A unit that was dropped and brought back has a line up to its drop and one from its return on."""
    folder = make_results(methods=("setpoint",), seeds=(0,))
    figure = decisions.timeline(record_in(folder), "flops")
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


def test_without_plotly_the_error_says_what_to_install(make_results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly the report asks for the extra and leaves no file."""
    folder = make_results(methods=("dense",), seeds=(0,))
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "setpoint\[report\]"'):
        write_page(folder)
    assert not (folder / "report.html").exists()


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
        "step_seconds": {"stem.conv": 0.05, "head.fc": 0.1},
        "calibration": {"latency": 0.04, "inference": 0.02},
        "limit_run": {"latency": 50.0},
    }
    for line in lines[1:]:
        line |= {"spent": {"latency": 0.11}, "reference": {"latency": 0.12}, "price": {"latency": 1.0}}
        line |= {"metered": {"latency": 0.13}, "predicted": {"latency": 0.125}}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(folder)
    measured = next(t for t in decisions.spending(record_in(folder), "latency").data if t["name"] == "measured")
    assert measured["y"] == [0.13] * 8 and measured["hovertext"] == ["predicted 0.125 s"] * 8
    for words in ("predicted before", "measured before", "0.125 s", "0.13 s", "modelled: operations"):
        assert words in page
    assert "budget of the whole run 50 s" in page and "within 4.00 % of copies of the model" in page
    assert page.index("head.fc</th><td>100 ms</td><td>50") < page.index("stem.conv</th><td>50 ms</td><td>25")
