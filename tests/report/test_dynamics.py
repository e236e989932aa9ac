"""Dynamics: every event is a spike, and stays in the reserve are timed."""

from __future__ import annotations

from setpoint.ledger import Entry
from setpoint.report import dynamics
from setpoint.report.record import Record

RECORD = Record(
    units={"a": 4, "b": 3},
    what={"a": "channel", "b": "head"},
    dense={"flops": 100.0},
    limit={"flops": 50.0},
    total_steps=100,
    entries=(
        Entry(step=10, widths={"a": 2, "b": 3}, dropped={"a": [0, 3]}),
        Entry(step=30, widths={"a": 3, "b": 2}, dropped={"b": [1]}, grown={"a": [3]}),
        Entry(step=40, widths={"a": 3, "b": 2}, reason="nothing to drop"),
        Entry(step=60, widths={"a": 2, "b": 2}, dropped={"a": [3]}),
    ),
)


def test_every_stay_in_the_reserve_is_timed() -> None:
    """A stay lasts from the drop to the return, or to the end; a unit dropped twice stays twice."""
    stays = {(r.group, r.origin, r.begin, r.end, r.returned) for r in dynamics.rests(RECORD)}
    assert stays == {
        ("a", 3, 10, 30, True),
        ("a", 0, 10, 100, False),
        ("b", 1, 30, 100, False),
        ("a", 3, 60, 100, False),
    }
    figure = dynamics.reserve_lives(RECORD)
    assert figure and [trace["x"] for trace in figure.data] == [[20], [90, 70, 40]]
    told = dynamics.dynamics_line(RECORD)
    assert told == "3 units dropped, 1 of them brought back after 20 steps (median), 1 dropped again."


def test_every_event_is_a_spike() -> None:
    """The raster has a tick for each drop and each return, at its step in its group's band, and counts them below."""
    figure = dynamics.raster(RECORD)
    assert figure
    ticks = {trace["name"]: trace for trace in figure.data if trace["type"] == "scatter"}
    assert list(zip(ticks["dropped"]["x"], ticks["dropped"]["text"], strict=True)) == [
        (10, "a 0"), (10, "a 3"), (30, "b 1"), (60, "a 3")
    ]  # fmt: skip
    assert (ticks["brought back"]["x"], ticks["brought back"]["text"]) == ([30], ["a 3"])
    assert [int(y) for y in ticks["dropped"]["y"]] == [0, 0, 1, 0]
    bars = {trace["name"]: (trace["x"], trace["y"]) for trace in figure.data if trace["type"] == "bar"}
    assert bars == {"dropped": ([10, 30, 60], [-2, -1, -1]), "brought back": ([30], [1])}


def test_a_run_without_events_has_no_spikes() -> None:
    """Without a drop there is no raster and no stay."""
    quiet = Record(RECORD.units, RECORD.what, RECORD.dense, RECORD.limit, 100, RECORD.entries[2:3])
    assert dynamics.raster(quiet) is None and dynamics.reserve_lives(quiet) is None
