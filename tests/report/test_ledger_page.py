"""The report of one ledger: tables and a page for a run of the user's own."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

import setpoint
from loop.test_budgets import Machine, machine, mlp, train
from setpoint.cli import app
from setpoint.errors import ReportError
from setpoint.ledger import Entry, Ledger
from setpoint.report.page import bill, entries_table, run, write_ledger_page
from setpoint.report.record import Record, dense_of, facts, limit_of, read_ledger, record_of

__all__ = ["machine"]


def record_of_run(machine: Machine, budget: object, folder: Path) -> tuple[setpoint.Loop, Record]:
    """A run under that budget, and its ledger as it comes back from the file."""
    loop = train(mlp(), budget, 120, machine.live)
    loop.ledger.save(folder / "run.jsonl")
    return loop, read_ledger(folder / "run.jsonl")


def test_spending_and_reference_are_in_one_unit(machine: Machine, tmp_path: Path) -> None:
    """Where a meter reads half as much again as predicted, dense, budget, spent and reference are all as metered."""
    loop, record = record_of_run(machine, setpoint.Budget.fraction(0.6, of="latency"), tmp_path)
    dense = machine.factor * machine.step_s({"a": 256, "b": 256})
    assert dense_of(record, "latency") == pytest.approx(dense)
    assert limit_of(record, "latency") == pytest.approx(0.6 * dense)
    last = record.entries[-1]
    assert last.spent["latency"] == pytest.approx(machine.factor * machine.step_s(loop.widths), rel=0.02)
    assert last.error["latency"] == pytest.approx(last.spent["latency"] / last.reference["latency"] - 1)
    said = facts(record)
    assert said["verdict"] == loop.summary.reason  # type: ignore[union-attr]
    assert "by the meter's last reading" in said["seconds"]
    text = entries_table(record, "latency")
    assert "predicted before" in text and "measured before" in text


def test_what_a_run_budget_has_spent_is_told(machine: Machine, tmp_path: Path) -> None:
    """Of a budget of the whole run the page says how much of it went by when."""
    _, record = record_of_run(machine, setpoint.Budget.fraction(0.7, of="latency", per="run"), tmp_path)
    assert limit_of(record, "latency") is None and "of which" in facts(record)["seconds"]


def test_a_bill_is_drawn_against_what_was_spent() -> None:
    """The first picture of a run with a bill is what it spent so far: to its end, or what is to come by its plan."""
    ledger = Ledger({"groups": {}, "dense": {"flops": 9e6}, "limit": {"flops": 3e6}, "limit_run": {"flops": 1e9}})
    ledger.header["total_steps"] = 200
    ledger.append(Entry(step=40, widths={}, spent={"flops": 6e6}, spent_run={"flops": 3.7e8}))
    ledger.append(Entry(step=60, widths={}, spent={"flops": 3e6}, spent_run={"flops": 4.9e8}, limit={"flops": 3e6}))
    record = record_of(ledger)
    running = bill(record, "flops")
    assert running is not None and limit_of(record, "flops") == 3e6
    spent, ahead, _ = running.traces
    assert spent.points == [(0, 0.0), (40, pytest.approx(0.37)), (60, pytest.approx(0.49))]
    assert ahead.points == [(60, pytest.approx(0.49)), (200, pytest.approx(0.91))]
    ledger.end(220, 220, budget_met=True, reason="")
    whole, _ = bill(record_of(ledger), "flops").traces  # type: ignore[union-attr]
    assert whole.points[-2:] == [(60, pytest.approx(0.49)), (220, pytest.approx(0.97))]
    page = run(record_of(ledger))
    assert page.index("Spent of the run budget: FLOPs") < page.index("Spent against reference: FLOPs")
    assert "budget 1 GFLOPs" in page
    assert bill(record_of(Ledger({"groups": {}, "dense": {"flops": 9e6}, "limit": {"flops": 3e6}})), "flops") is None


def test_a_run_under_a_price_is_shown(machine: Machine, tmp_path: Path) -> None:
    """A run without a budget has a price, and its resource is shown by that."""
    loop, record = record_of_run(machine, setpoint.Price(30.0, of="latency"), tmp_path)
    assert record.resources == ("latency",) and "Price of seconds" in run(record)
    assert any("for each s" in entry.reason for entry in loop.ledger)


def test_the_command(machine: Machine, tmp_path: Path) -> None:
    """`setpoint report FILE` prints what the page begins with, or with --json one object, and writes the page beside
    it; the run's folder will do.
    """
    _, record = record_of_run(machine, setpoint.Budget.fraction(0.6, of="latency"), tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run.jsonl")])
    lines = [line.split(maxsplit=1) for line in result.stdout.splitlines()[:-1]]
    assert result.exit_code == 0 and lines == [list(item) for item in facts(record).items()], result.output
    answer = json.loads(CliRunner().invoke(app, ["report", str(tmp_path), "--json"]).stdout)
    page = Path(answer["report"])
    assert page == tmp_path / "report.html" and "Spent against reference" in page.read_text(encoding="utf-8")


def test_the_page_of_many_groups_and_decisions_is_small(tmp_path: Path) -> None:
    """Of 96 groups that are all cut at 40 decisions the page has less than a megabyte, and is made for print too."""
    names, rng = [f"transformer.h.{place // 2}.mlp.c_fc.{place % 2}" for place in range(96)], random.Random(0)
    ledger = Ledger({"groups": {name: {"num_units": 256, "what": "neuron"} for name in names}, "dense": {"flops": 9e9}})
    for step in range(40):
        dropped = {name: [3 * step, 3 * step + 1, 3 * step + 2] for name in names}
        worth = {name: [rng.random() for _ in range(3)] for name in names}
        left = {name: 253 - 3 * step for name in names}
        entry = Entry(step=step, widths=left, dropped=dropped, worth=worth, price={"flops": 1.0}, spent={"flops": 9e9})
        ledger.append(entry)
    ledger.save(tmp_path / "run.jsonl")
    page = write_ledger_page(tmp_path / "run.jsonl")
    assert page.stat().st_size < 1_000_000
    text = page.read_text(encoding="utf-8")
    assert text.index("Spent against reference") < text.index("what was dropped when, and why")
    assert "252 in 84 more groups" in text
    assert "@media print" in text and "<script" not in text


def test_a_file_that_is_no_ledger(tmp_path: Path) -> None:
    """Anything else is an error that says how a ledger is written, and leaves no page."""
    (tmp_path / "notes.jsonl").write_text("not json\n", encoding="utf-8")
    with pytest.raises(ReportError, match=r"Ledger\.save or log_to wrote"):
        write_ledger_page(tmp_path / "notes.jsonl")
    assert not (tmp_path / "notes.html").exists()
