"""`setpoint watch`: the present state of a ledger's file, and a view that follows it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from setpoint.cli import app
from setpoint.errors import ReportError
from setpoint.ledger import Entry, Ledger
from setpoint.report import resources
from setpoint.report import watch as watching
from setpoint.report.record import record_of

HEADER = {
    "groups": {f"layer{n}": {"num_units": 64, "what": "channel"} for n in range(3)},
    "dense": {"flops": 1e9, "params": 1e6},
    "limit": {"flops": 5e8},
    "total_steps": 100,
}


def entry(step: int, width: int) -> Entry:
    """A decision that has cut the first layer to this width."""
    return Entry(
        step=step,
        widths={"layer0": width, "layer1": 64, "layer2": 64},
        dropped={"layer0": list(range(64 - width))},
        spent={"flops": 1e9 * width / 64, "params": 1e6},
        reference={"flops": 6e8},
        price={"flops": 2.5e-9},
        loss=0.25,
        seconds=12.0,
        reason=f"dropped units at step {step}",
    )


def ledger(*entries: Entry) -> Ledger:
    """A ledger of these."""
    found = Ledger(HEADER)
    for each in entries:
        found.append(each)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A ledger of one decision."""
    path = tmp_path / "run.jsonl"
    ledger(entry(10, 48)).save(path)
    return path


def once(path: Path, *options: str) -> Result:
    """`setpoint watch PATH --once`."""
    return CliRunner().invoke(app, ["watch", str(path), "--once", *options])


def test_once_shows_the_present_state(file: Path) -> None:
    """Claim: step, share of dense, reference, budget, price and every width; JSON is asked for."""
    result = once(file)
    text, shown = result.stdout, result.stdout.splitlines()
    assert result.exit_code == 0 and "{" not in text and json.loads(once(file, "--json").stdout)["step"] == 10
    for word in (
        "step 10 of 100",
        "1 decision, 1 cut, 16 units",
        "loss 0.25",
        "75.0 % of dense",
        "750 MFLOPs per step",
    ):
        assert word in text
    for word in ("reference 60.0 %", "budget 50.0 %", "price 2.5e-09", "dropped units at step 10"):
        assert word in text
    (row,) = [line for line in shown if line.startswith("layer0")]
    (whole,) = [line for line in shown if line.startswith("layer1")]
    assert "48 of 64 channels" in row and row.count("━") == 18 and whole.count("━") == 24


def test_a_run_that_has_ended_says_so(file: Path) -> None:
    """Claim: in the place of the last decision's step; and so does the sentence of the page."""
    ended = Ledger.load(file)
    ended.end(30, 90, budget_met=False, reason="it stopped early")
    ended.save(file)
    shown = once(file).stdout
    assert "ended at step 30 of 90" in shown and "the budget is NOT met: it stopped early" in shown
    line = resources.ledger_line(record_of(ended))
    assert line.endswith("over 30 optimizer steps of 90 that were planned; the budget is NOT met: it stopped early.")


def test_json_has_a_field_for_each_fact(file: Path) -> None:
    """Claim: of a run under way and of one that has ended; `report` answers the same beside the page's path."""
    found = json.loads(once(file, "--json").stdout)
    widths = {"layer0": 48, "layer1": 64, "layer2": 64}
    assert found == {
        "step": 10,
        "total_steps": 100,
        "cost": {"flops": 7.5e8, "params": 1e6},
        "dense_cost": {"flops": 1e9, "params": 1e6},
        "limit": {"flops": 5e8},
        "limit_run": {},
        "spent_run": {},
        "units": 176,
        "dense_units": 192,
        "widths": widths,
        "decisions": 1,
        "cuts": 1,
        "ended": None,
        "budget_met": None,
    }
    ended = Ledger.load(file)
    ended.end(30, 90, budget_met=False, reason="it stopped early")
    ended.save(file)
    end = {"step": 30, "total_steps": 90, "ended": "it stopped early", "budget_met": False}
    assert json.loads(once(file, "--json").stdout) == {**found, **end}
    reported = json.loads(CliRunner().invoke(app, ["report", str(file), "--json"]).stdout)
    assert reported == {"report": str(file.parent / "report.html"), **found, **end}


def test_a_run_without_a_decision_is_shown(tmp_path: Path) -> None:
    """Claim: of a header alone, the dense model."""
    path = tmp_path / "run.jsonl"
    ledger().save(path)
    shown = once(path).stdout
    assert "no decision yet" in shown and "100 % of dense" in shown and shown.count("64 of 64 channels") == 3


def test_the_most_cut_groups_are_shown_where_lines_are_few(file: Path) -> None:
    """Claim: in a low terminal those that have lost most are there, and the number of the others."""
    screen = Console(file=io.StringIO(), width=100)
    screen.print(watching.view(watching.read_ledger(file), "run", lines=10))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert (
        len(text.splitlines()) <= 10
        and "layer0" in text
        and "layer1" not in text
        and "and 2 groups of which more is left" in text
    )


DAMAGED = {
    "missing": None,
    "binary": b"\x80\x81\x00\xff" * 9,
    "empty": b"",
    "other json": b'{"a": 1}\n',
    "line in the middle": b'{"ledger": 1}\n{"step": 1, "wid\n{"step": 2, "widths": {}}\n',
    "widths": b'{"ledger": 1}\n{"step": 1, "widths": {"a": "b"}}\n{"step": 2, "widths": {}}\n',
    "order": b'{"ledger": 1}\n{"step": 3, "widths": {}}\n{"step": 2, "widths": {}}\n',
    "lists": b'{"ledger": 1}\n{"step": 1, "widths": {}, "saliency": 3}\n',
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_missing_or_damaged_file_gives_a_sentence(name: str, tmp_path: Path) -> None:
    """Claim: one line that names the file, exit code 2, and no traceback."""
    path, content = tmp_path / "run.jsonl", DAMAGED[name]
    if content is not None:
        path.write_bytes(content)
    result = once(path)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.output
    assert result.stderr.startswith(f"error: the ledger {path} cannot be read")


def test_a_folder_gives_a_sentence(tmp_path: Path) -> None:
    """Claim: the same of a folder."""
    assert once(tmp_path).exit_code == 2


def follow(path: Path, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], Any], drawn: bool = True) -> str:
    """What is shown while these things happen to the file, one after each look at it, and then Ctrl-C."""
    left = [*steps]

    def sleep(seconds: float) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop(0)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    screen = Console(file=io.StringIO(), width=160, height=40, force_terminal=drawn, color_system=None)
    watching.watch(path, screen, 0.0)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


@pytest.mark.parametrize("drawn", [True, False], ids=["terminal", "pipe"])
def test_the_view_follows_the_file(file: Path, monkeypatch: pytest.MonkeyPatch, drawn: bool) -> None:
    """Claim: decisions that are appended show, also when a line is caught half written; Ctrl-C is no error."""
    lines = list(ledger(entry(10, 48), entry(20, 40), entry(30, 32)).lines(2))

    def append(text: str) -> Callable[[], Any]:
        return lambda: file.write_text(file.read_text() + text)

    half = append(lines[1][:50])
    shown = follow(file, monkeypatch, append(lines[0]), half, append(lines[1][50:]), drawn=drawn)
    first, second, third = (shown.index(f"{width} of 64 channels") for width in (48, 40, 32))
    assert first < second < third and "is no ledger" not in shown


def test_what_becomes_of_the_file_is_told_and_waited_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a file that is damaged or removed under way gives a sentence below the last view; a new one is read."""
    shown = follow(
        file,
        monkeypatch,
        lambda: file.write_text("nonsense\n"),
        file.unlink,
        lambda: ledger(entry(10, 48), entry(20, 16)).save(file),
    )
    assert (
        shown.index("is not a Setpoint ledger")
        < shown.index("there is no such file")
        < shown.index("16 of 64 channels")
    )


def test_a_file_that_is_not_there_yet_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a line says so and how a run writes it; an empty file is not read yet; then the view comes."""
    path = tmp_path / "run.jsonl"
    shown = follow(path, monkeypatch, path.touch, lambda: ledger(entry(10, 48)).save(path))
    assert shown.index(f"waiting for {path}, which a run writes by log_to") < shown.index("48 of 64 channels")


def test_a_pipe_is_told_of_the_wait_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: also where stdout is no terminal a line says what is waited for."""
    path = tmp_path / "run.jsonl"
    assert "waiting" not in follow(path, monkeypatch, lambda: ledger(entry(10, 48)).save(path), drawn=False)
    assert capsys.readouterr().err.startswith(f"waiting for {path}, which a run writes by log_to")


def test_to_begin_with_there_must_be_a_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a folder that is not there is refused at once, and so is a file that has not come by Ctrl-C."""
    for path in (tmp_path / "nowhere" / "run.jsonl", tmp_path / "nothing.jsonl"):
        with pytest.raises(ReportError, match="there is no such file"):
            follow(path, monkeypatch)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("drawn", [True, False])
def test_it_ends_with_the_run(file: Path, drawn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a ledger whose run has ended is shown once, and not waited for."""
    ended = Ledger.load(file)
    ended.end(20, 20, budget_met=True, reason="budget met at step 4 of 20")
    ended.save(file)
    screen = Console(file=io.StringIO(), force_terminal=drawn, width=100)
    monkeypatch.setattr(watching.time, "sleep", lambda seconds: pytest.fail("it waits for more"))
    assert watching.watch(file, screen, 1.0).end_step == 20


def test_control_c_ends_it_cleanly(file: Path) -> None:
    """Claim: a real process that watches ends by SIGINT with exit code 0, nothing on stderr, and the next step last."""
    command = [sys.executable, "-m", "setpoint", "watch", str(file), "--every", "0.05"]
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": listening}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert "step 10 of 100" in first and (process.returncode, err) == (0, "")
    assert out.splitlines()[-1] == f"next: setpoint report {file} writes a page of the run"
