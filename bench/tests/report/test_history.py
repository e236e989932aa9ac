"""A history: a jump of the loss shows at the event where it happened."""

from __future__ import annotations

from setpoint.ledger import Entry
from setpoint.report.record import Record
from setpoint_bench.report.history import Point, loss_around

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


def test_a_jump_shows_at_its_event() -> None:
    """A loss that is 1 up to step 30 and 2 after it: the curve of that event rises by 1 at 0, the other's is flat."""
    history = [Point(step, None, None, "train", 1.0 if step <= 30 else 2.0, None) for step in range(1, 101)]
    figure = loss_around(RECORD, history)
    assert figure
    curves = {trace["name"].partition(":")[0]: trace for trace in figure.data}
    assert {y for x, y in zip(curves["step 30"]["x"], curves["step 30"]["y"], strict=True) if x < 0} == {0.0}
    assert {y for x, y in zip(curves["step 30"]["x"], curves["step 30"]["y"], strict=True) if x > 0} == {1.0}
    assert set(curves["step 10"]["y"]) == set(curves["step 60"]["y"]) == {0.0}
    assert "step 40" not in curves
    assert loss_around(RECORD, []) is None


def test_there_is_no_loss_around_nothing() -> None:
    """Without a drop there is no figure."""
    quiet = Record(RECORD.units, RECORD.what, RECORD.dense, RECORD.limit, 100, RECORD.entries[2:3])
    assert loss_around(quiet, [Point(1, None, None, "train", 1.0, None)]) is None
