"""The ledger and its file."""

import json
import math
from pathlib import Path

import pytest

from setpoint.errors import CheckpointError
from setpoint.ledger import Entry, Ledger

HEADER = {"total_steps": 40, "groups": {"conv": {"num_units": 4, "what": "channel"}}, "limit": {"flops": 5.0}}


def _ledger() -> Ledger:
    ledger = Ledger(HEADER)
    ledger.append(Entry(step=10, widths={"conv": 4}, loss=1.5, reason="rests"))
    ledger.append(
        Entry(
            step=20,
            widths={"conv": 2},
            dropped={"conv": [0, 3]},
            saliency={"conv": [0.5, 0.25]},
            worth={"conv": [math.nan, 2.0]},
            loss=math.inf,
            spent={"flops": 4.0},
            price={"flops": 0.1},
        )
    )
    return ledger


def test_keeps_entries_in_order() -> None:
    """Length, indexing, slicing and iteration agree, and the past cannot be written to."""
    ledger = _ledger()
    assert len(ledger) == 2
    assert [entry.step for entry in ledger] == [ledger[0].step, ledger[-1].step] == [10, 20]
    assert ledger[1:] == (ledger[1],)
    with pytest.raises(ValueError, match="in order"):
        ledger.append(Entry(step=19, widths={}))
    assert len(ledger) == 2


def test_survives_its_file(tmp_path: Path) -> None:
    """What was saved is loaded: header, entries, NaN in lists; a number that JSON lacks is None. The first line is the
    header with the format's version; every line is JSON without NaN.
    """
    path, ledger = tmp_path / "ledger.jsonl", _ledger()
    ledger.save(path)
    loaded = Ledger.load(path)
    assert loaded.header == HEADER and loaded[0] == ledger[0] and loaded[1].dropped == {"conv": [0, 3]}
    assert math.isnan(loaded[1].worth["conv"][0]) and loaded[1].worth["conv"][1] == 2.0
    assert loaded[1].loss is None
    assert [each.name for each in tmp_path.iterdir()] == ["ledger.jsonl"]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines == [{"ledger": 1, **HEADER}, *ledger.to_rows()]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    """Wherever the last line breaks off, the entries before it are loaded."""
    path = tmp_path / "ledger.jsonl"
    _ledger().save(path)
    text = path.read_text()
    start = text.rindex("\n", 0, -1) + 1
    for end in (start, start + 1, (start + len(text)) // 2, len(text) - 1):
        path.write_text(text[:end])
        assert [entry.step for entry in Ledger.load(path)] == [10]


@pytest.mark.parametrize("text", ["", "{", "[]\n", '{"ledger": 99}\n', '{"step": 1, "widths": {}}\n', "\x80\x02\n"])
def test_refuses_other_files(tmp_path: Path, text: str) -> None:
    """A file that does not begin with a header of this format is refused."""
    path = tmp_path / "other"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="not a Setpoint ledger"):
        Ledger.load(path)


def test_a_loss_after_is_noted_once(tmp_path: Path) -> None:
    """What the last change did to the loss is noted at that entry, once, and survives the file."""
    ledger = _ledger()
    ledger.append(Entry(step=30, widths={"conv": 2}, reason="rests"))
    ledger.complete(1.75)
    ledger.complete(9.0)
    assert [entry.loss_after for entry in ledger] == [None, 1.75, None]
    ledger.save(tmp_path / "ledger.jsonl")
    assert Ledger.load(tmp_path / "ledger.jsonl")[1].loss_after == 1.75


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"step": 30, "widths": {"conv": "2"}}', r"its widths\['conv'\] must be a count, got '2'"),
        ('{"step": 30, "widths": [2]}', "its widths must be an object, got a list"),
        ('{"step": true, "widths": {}}', "its step must be a count, got True"),
        ('{"step": -1, "widths": {}}', "its step must be a count, got -1"),
        ('{"step": 1e3, "widths": {}}', "its step must be a count"),
        ('{"step": 5, "widths": {}}', "order of steps"),
        ('{"step": 30, "widths": {}, "reason": {"a": 1}}', "its reason must be a text, got a dict"),
        ('{"step": 30, "widths": {}, "seconds": []}', "its seconds must be a number, got a list"),
        ('{"step": 30, "widths": {}, "loss": "low"}', "its loss must be a number, got 'low'"),
        ('{"step": 30, "widths": {}, "worth": 3}', "its worth must be an object, got 3"),
        ('{"step": 30, "widths": {}, "worth": {"conv": [{}]}}', r"its worth\['conv'\]\[0\] must be a number"),
        ('{"step": 30, "widths": {}, "dropped": {"conv": [1e9]}}', r"its dropped\['conv'\]\[0\] must be a count"),
        ('{"step": 30, "widths": {}, "spent": {"flops": ' + "9" * 400 + "}}", r"its spent\['flops'\] must be a number"),
        ("3", "not a whole entry"),
        ('{"step": 30, "wid', ""),
    ],
)
def test_names_a_damaged_line(tmp_path: Path, line: str, said: str) -> None:
    """Damage before the last line is an error that names the line, not a shorter ledger; of a value of another type
    than the entry's, field and value are named, too.
    """
    path = tmp_path / "ledger.jsonl"
    _ledger().save(path)
    path.write_text(path.read_text() + line + "\n" + json.dumps({"step": 40, "widths": {}}) + "\n")
    with pytest.raises(CheckpointError, match=rf"line 4 of .* is damaged \(.*{said}"):
        Ledger.load(path)


def test_the_end_of_a_run_is_the_last_line(tmp_path: Path) -> None:
    """Claim: it is read back; a file without it has no end; an entry after it does not hide it."""
    ledger = Ledger({"total_steps": 10})
    ledger.append(Entry(step=3, widths={"a": 2}))
    ledger.save(tmp_path / "before")
    ledger.end(4, 12, budget_met=False, reason="the run was too short")
    ledger.save(tmp_path / "after")
    assert Ledger.load(tmp_path / "before").ended is None
    again = Ledger.load(tmp_path / "after")
    assert len(again) == 1
    assert again.ended == {"step": 4, "total_steps": 12, "budget_met": False, "reason": "the run was too short"}
    assert json.loads((tmp_path / "after").read_text().splitlines()[-1]) == {"ended": again.ended}
