"""`results.md` holds the tables, bold only where an interval excludes 0, and keeps names text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from setpoint_bench.report.folder import read_results
from setpoint_bench.report.markdown import markdown, write_markdown


def set_values(folder: Path, values: dict[str, float]) -> None:
    """Give each method's runs the same value, a little higher with each seed."""
    path = folder / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["value"] = values[line["method"]] + 0.001 * line["seed"] ** 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_tables_and_differences(make_results: Any) -> None:
    """Every method has its rows; differences come with intervals, the clear ones bold."""
    folder = make_results(seeds=(0, 1, 2))
    set_values(folder, {"dense": 0.98, "small": 0.96, "setpoint": 0.97})
    text = write_markdown(folder).read_text(encoding="utf-8")
    assert text == markdown(read_results(folder))
    assert "## digits" in text
    assert "| setpoint | **−1.00 [−1.00, −1.00]** | **+1.00 [+1.00, +1.00]** |" in text
    assert "3 seeds a row (0, 1, 2)" in text


def test_nothing_is_bold_without_an_interval(make_results: Any) -> None:
    """Two seeds have no interval, so nothing is bold, whatever the difference."""
    text = markdown(read_results(make_results(seeds=(0, 1))))
    assert "**" not in text
    assert "(n = 2)" in text


def test_names_stay_text(make_results: Any) -> None:
    """Markup and pipes in names neither make elements nor break the table."""
    text = markdown(read_results(make_results(task="a|b<img>", seeds=(0,))))
    assert "<img>" not in text and "a\\|b&lt;img>" in text


def test_clocks_are_told_apart(make_results: Any) -> None:
    """Seconds of a busy machine are labelled; once timings are there, they alone count."""
    folder = make_results(seeds=(0,), clock="shared")
    text = markdown(read_results(folder))
    assert "training time (busy machine)" in text and "they are not comparable" in text
    times = {"dense": 100.0, "setpoint": 61.0}
    with (folder / "timing.jsonl").open("w") as file:
        for method, seconds in times.items():
            line = {
                "schema": 2,
                "task": "digits",
                "method": method,
                "budget": 1.0 if method == "dense" else 0.5,
                "seed": 0,
            }
            file.write(json.dumps(line | {"seconds": seconds, "rounds": [seconds - 1, seconds + 1]}) + "\n")
        file.write('{"schema": 2, "task')
    results = read_results(folder)
    assert "line 3 of timing.jsonl is not a complete JSON object and was left out" in results.remarks
    text = markdown(results)
    assert "busy machine" not in text
    row = [line for line in text.splitlines() if line.startswith("| setpoint |")][1]  # the table of what training took
    assert "61 s ± 1.41 s | 61.0 %" in row
    assert "| – |" in [line for line in text.splitlines() if line.startswith("| small |")][1]
