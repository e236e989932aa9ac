"""What a loop tells while it runs: numbers, one line, a line in the log for each cut, and a summary for a reader."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from golden.models import mlp
from setpoint.ledger import Entry

STEPS = 20
PAGE = Path(__file__).parents[2] / "docs" / "watching.md"


def attached(budget: Any = 0.5, **settings: Any) -> tuple[setpoint.Loop, Callable[[int], None]]:
    """A loop, and what trains its model for so many steps."""
    torch.manual_seed(0)
    model = mlp(6, 24, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if not isinstance(budget, setpoint.Price):
        settings = {"controller": setpoint.PricedController(), **settings}
    loop = setpoint.attach(model, optimizer, budget, total_steps=STEPS, verify=False, **settings)
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))

    def train(steps: int) -> None:
        for _ in range(steps):
            loss = nn.functional.cross_entropy(model(x), y)
            loop.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop, train


@dataclass
class Whole:
    """A whole run, and all that it told."""

    loop: setpoint.Loop
    summary: setpoint.Summary
    metrics: list[dict[str, float]]
    news: list[Any]
    few: list[Any]
    lines: list[str]
    levels: set[str]
    shown: list[str]


@pytest.fixture(scope="module")
def whole() -> Iterator[Whole]:
    """Trained from a loop that has not begun to its end, with a handler at the logger "setpoint"."""
    records: list[logging.LogRecord] = []
    handler, log = logging.Handler(), logging.getLogger("setpoint")
    handler.emit = records.append  # type: ignore[method-assign]
    log.addHandler(handler)
    before = log.level
    log.setLevel(logging.INFO)
    loop, train = attached()
    shown, metrics, news, few = [repr(loop)], [loop.metrics()], list[Any](), list[Any]()
    loop.on_step(lambda each: metrics.append(loop.metrics()))
    loop.on_step(news.append)
    off = loop.on_step(few.append)
    train(1)
    shown.append(repr(loop))
    train(4)
    off()
    off()
    train(STEPS - 5)
    shown.append(repr(loop))
    summary = loop.finish()
    shown.append(repr(loop))
    lines, levels = [each.getMessage() for each in records], {each.levelname for each in records}
    yield Whole(loop, summary, metrics, news, few, lines, levels, shown)
    log.removeHandler(handler)
    log.setLevel(before)


def test_metrics_have_the_same_names_at_every_step(whole: Whole) -> None:
    """Claim: empty before the loop begins, then the same names with plain floats at every step, also after the end."""
    loop, summary = whole.loop, whole.summary
    none, *seen = whole.metrics
    assert none == {}
    assert len(seen) == STEPS + 1 and all(each.keys() == seen[0].keys() for each in seen)
    assert all(type(value) is float for each in seen for value in each.values())
    assert [each["step"] for each in seen] == [*range(1, STEPS + 1), STEPS]
    last = seen[-1]
    assert last["cost/flops"] == summary.final_flops and last["cost_ratio/flops"] == summary.final_flops_ratio
    assert last["limit/flops"] == summary.limit["flops"] and last["reference/flops"] > 0 and last["price/flops"] > 0
    assert {name: last[f"width/{name}"] for name in loop.widths} == loop.widths
    assert last["units"] == sum(loop.widths.values()) < last["dense_units"] == seen[0]["units"]
    assert seen[0]["reference/flops"] == seen[0]["cost/flops"] and seen[0]["price/flops"] == 0
    assert (last["budget_met"], last["resizes"], last["decisions"]) == (1, summary.resizes, len(loop.ledger))
    assert last["overhead_flops"] == summary.overhead_flops and 0 < last["overhead_seconds"] < last["seconds"]


@pytest.mark.parametrize(
    ("budget", "named"),
    [
        (setpoint.Price(1e-9, of="flops"), {"price/flops"}),
        (
            [setpoint.Budget.fraction(0.6, of="flops"), setpoint.Budget.fraction(0.5, of="params")],
            {f"{kind}/{name}" for kind in ("limit", "reference", "price") for name in ("flops", "params")},
        ),
        (
            setpoint.Budget.fraction(0.7, of="flops", per="run"),
            {f"{kind}/flops" for kind in ("limit", "limit_run", "spent_run", "reference", "price")},
        ),
    ],
    ids=["price", "two budgets", "of the run"],
)
def test_metrics_are_of_what_the_run_is_held_to(budget: Any, named: set[str]) -> None:
    """Claim: limits, references and prices are there for each resource that the run is held to, and no others."""
    loop, train = attached(budget)
    train(1)
    first = loop.metrics()
    train(STEPS - 1)
    kinds = ("limit", "limit_run", "spent_run", "reference", "price")
    assert {name for name in first if name.split("/")[0] in kinds} == named and loop.metrics().keys() == first.keys()
    assert repr(loop).count("\n") == 0 and len(str(loop.finish()).splitlines()) == 6


def test_every_metric_is_documented() -> None:
    """Claim: the page has each name in a table, and no other."""
    loop, train = attached(setpoint.Budget.fraction(0.7, of="flops", per="run"))
    train(1)
    rows = re.findall(r"^\| `([a-z_]+)(?:/[A-Z]+)?`", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) == len(set(rows)) and set(rows) == {name.split("/")[0] for name in loop.metrics()}


def test_metrics_do_not_wait_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: no tensor is read, though losses lie on the device."""
    loop, train = attached()
    train(3)
    loop.observe(loss=torch.tensor(1.0))

    def read(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    for name in ("cpu", "item", "tolist", "numpy", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    assert loop.metrics()["step"] == 3
    with pytest.raises(AssertionError, match="was read"):
        _ = loop.ledger  # what was observed is brought to the host for it


def test_a_callback_sees_every_step_and_every_decision(whole: Whole) -> None:
    """Claim: it gets each entry once, None where nothing was decided, and the summary at last; taken off, no more."""
    seen = whole.news
    steps = [each.step for each in seen if isinstance(each, Entry)]
    assert len(seen) == STEPS + 1 and seen[-1] is whole.summary and len(whole.few) == 5
    assert steps == [each.step for each in whole.loop.ledger] and seen.count(None) == STEPS - len(steps)
    assert [place + 1 for place, each in enumerate(seen) if isinstance(each, Entry)] == steps


def test_a_checkpoint_may_be_taken_in_a_callback() -> None:
    """Claim: when it is called the step is complete, so that the loop's state can be taken, and goes on from there."""
    loop, train = attached(example=(torch.randn(16, 6),))
    states: list[Any] = []
    loop.on_step(lambda news: states.append(loop.state_dict()) if isinstance(news, Entry) and news.changed else None)
    train(STEPS)
    other, _ = attached(example=(torch.randn(16, 6),))
    other.load_state_dict(states[-1])
    assert other.widths == loop.widths and len(states) >= 2


def test_the_log_has_a_line_for_each_cut_and_one_for_the_budget(whole: Whole) -> None:
    """Claim: at INFO, by the logger "setpoint"; each cut with its step, units, share of dense and price.

    Before them stands what `attach` begins, where no terminal shows it.
    """
    ledger, lines = whole.loop.ledger, [line for line in whole.lines if line.startswith("step ")]
    assert whole.lines[0] == "averages and target networks must be named in copies="
    assert whole.lines[: -len(lines)][1:3] == ["attach ...", "finding what can be cut ..."]
    cuts = [entry for entry in ledger if entry.changed]
    dense = ledger.header["dense"]["flops"]
    assert whole.levels == {"INFO"} and len(lines) == len(cuts) + 1 > 2
    for line, entry in zip(lines, cuts, strict=False):
        dropped = sum(map(len, entry.dropped.values()))
        assert line.startswith(f"step {entry.step}: {dropped} units dropped, ")
        assert f"{100 * entry.spent['flops'] / dense:.1f} % of dense flops, price {entry.price['flops']:.3g}" in line
    assert f"step {ledger[-1].step}: budget met at " in lines[-1]


def test_the_log_is_silent_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    """Claim: a run writes nothing to either stream, and logs nothing at the level that is shown by default."""
    loop, train = attached()
    train(STEPS)
    loop.finish()
    assert capfd.readouterr() == ("", "")


def test_masks_are_told_in_weights(caplog: pytest.LogCaptureFixture) -> None:
    """Claim: where single weights are masked, lines and metrics count them."""
    caplog.set_level(logging.INFO, logger="setpoint")
    budget, masking = setpoint.Budget.fraction(0.5, of="params"), setpoint.Masking()
    loop, train = attached(budget, actuator=masking, example=(torch.randn(16, 6),))
    train(STEPS)
    summary = loop.finish()
    lines = [each.getMessage() for each in caplog.records if each.name == "setpoint"]
    lines = [line for line in lines if line.startswith("step ")]
    assert len(lines) > 1 and re.match(r"step \d+: [\d,]+ units dropped", lines[0])
    assert loop.metrics()["dense_units"] - loop.metrics()["units"] == sum(
        int((~mask).sum()) for mask in loop.masks.values()
    )
    assert "if masked weights cost nothing" in str(summary).splitlines()[1]


def test_a_loop_is_one_line_at_every_stage(whole: Whole) -> None:
    """Claim: not begun, under way, its budget met, and finished: one line each, and each another."""
    lines = whole.shown
    assert len(set(lines)) == 4 and all(line.startswith("<Loop: ") and "\n" not in line for line in lines)
    assert "not begun" in lines[0] and "step 1 of 20" in lines[1] and "budget 50.0%" in lines[1]
    assert "last decision made" in lines[2] and "finished" in lines[3]


def test_a_summary_is_read_in_six_lines(whole: Whole) -> None:
    """Claim: `print` shows six lines: verdict, cost, size, steps, overhead, and when it pays; `repr` is whole. Layers
    below a tenth of their width are named in another.
    """
    summary = whole.summary
    lines = str(summary).splitlines()
    words = ("verdict", "cost", "size", "training", "overhead", "time saved")
    assert len(lines) == 6 and all(line.startswith(word) for line, word in zip(lines, words, strict=True))
    assert lines[0] == f"verdict     {summary.reason}" and summary.reason.startswith("budget met at step")
    share = f"{100 * summary.final_flops_ratio:.1f} %"
    assert lines[0].count(share) == 1 and share not in lines[1] and "FLOPs per step; a budget of" in lines[1]
    assert f"per step, {share} of the dense FLOPs" in str(replace(summary, reason="done"))
    assert f"{summary.final_params:,} parameters" in lines[2] and "20 of 20 steps" in lines[3]
    late, never = (str(replace(summary, break_even_step=step)).splitlines()[-1] for step in (1200, None))
    assert late == "time saved  more than the overhead from step 1,200 on, by the clock of this run"
    assert never == "time saved  less than the overhead"
    assert repr(summary).startswith("Summary(budget_met=True, steps=20,")
    assert str(replace(summary, budget_met=False)).startswith("verdict     budget NOT met: ")
    layers = {"conv1": 24, "conv2": 20}
    narrow = replace(summary, dense_widths=layers, widths={"conv1": 2, "conv2": 2})
    assert str(narrow).splitlines()[3] == "narrow      conv1 24 -> 2: below a tenth of the width"
    assert "narrow" not in str(replace(narrow, theoretical_flops=1.0))  # single weights, not units


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(28, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("asked", [0, 16])
def test_a_summary_says_what_rounding_cost(asked: int) -> None:
    """Claim: the last cut breaks the usual blocks of a recurrent layer; blocks that were asked for leave a note."""
    model, x = Recurrent(), torch.randn(4, 28, 28)
    groups = [replace(group, multiple_of=asked or group.multiple_of) for group in setpoint.find_groups(model, (x,))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loop = setpoint.attach(model, optimizer, 0.5, example=(x,), total_steps=STEPS, groups=groups)
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
    summary = loop.finish()
    assert summary.budget_met and summary.widths == {"lstm": 32 if asked else 42}
    note = "rounding leaves 38.6 % of the budget unused: the smallest block that could return, of lstm, takes 59.6 %"
    assert summary.note == (note if asked else "") and (note in str(summary)) == bool(asked)


def test_a_summary_goes_through_json(whole: Whole) -> None:
    """Claim: what `to_dict` gives is the same after JSON, makes the same summary, and has no NaN."""
    found = whole.summary.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert setpoint.Summary(**found) == whole.summary
    assert replace(whole.summary, final_loss=float("nan")).to_dict()["final_loss"] is None


@pytest.mark.parametrize(
    ("end", "told"),
    [("pass", True), ("loop.finish()", False), ("loop.detach()", False), ("raise ValueError", False)],
    ids=["forgotten", "finished", "detached", "failed"],
)
def test_a_forgotten_finish_is_told_at_the_end_of_the_process(end: str, told: bool) -> None:
    """A run that nobody finished is warned of when the process ends, unless an exception ended it."""
    code = f"""
import torch, setpoint
model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
loop = setpoint.attach(model, optimizer, 0.5, total_steps=1, example=(torch.randn(4, 4),), verify=False)
model(torch.randn(4, 4)).sum().backward()
optimizer.step()
{end}
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == (end == "raise ValueError"), run.stderr
    assert ("a run was not finished" in run.stderr) is told


@pytest.mark.parametrize(("decays", "warned"), [(0.1, True), (0.9, False)])
def test_a_last_cut_behind_the_decay_of_the_rate_is_warned_of(
    decays: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Claim: advice is printed where the last cut comes at less than half of the learning rate, and only there."""
    loop, train = attached(controller=setpoint.PricedController(setpoint.Schedule.gradual()))
    (optimizer,) = loop.host.optimizers
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1 + int(decays * STEPS)], 0.1)
    for _ in range(STEPS):
        train(1)
        scheduler.step()
    said = [text for text in caplog.messages if "the learning rate at 10% of its highest" in text]
    assert len(said) == warned and loop.finish().budget_met
