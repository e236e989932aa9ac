"""A line on a terminal or in a notebook while something takes its time, and nothing anywhere else."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch
from jupyter_client.manager import start_new_kernel

import setpoint
from golden.models import mlp
from setpoint.errors import SetpointError
from setpoint.resources import costing
from setpoint.under_way import under_way


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        """It is."""
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """In the place of stderr; in the test itself, since pytest puts streams of its own there after the fixtures."""
    found = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", found)
    return found


def taken_away(text: str) -> bool:
    """Whether behind the last line that was drawn the terminal is told to erase it, and nothing more is drawn."""
    behind = text[text.rindex("━") :]
    return "\x1b[2K" in behind and "setpoint" not in behind


def attach(budget: Any = 0.5, **settings: Any) -> setpoint.Loop:
    """Attach to an MLP at once."""
    model = mlp(6, 24, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings = {"total_steps": 9, "example": (torch.randn(4, 6),), **settings}
    return setpoint.attach(model, optimizer, budget, **settings)


def test_attach_tells_what_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the line is there before anything is done, names the stages, and is gone at the end."""
    stream = terminal(monkeypatch)
    attach().detach()
    text = stream.getvalue()
    first = text.index("setpoint: attach")
    assert first < text.index("finding what can be cut") < text.index("trying every cut on copies")
    assert taken_away(text)


@pytest.mark.filterwarnings("ignore:the budget of .* is above")
def test_measuring_costs_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: a budget in seconds shows that operations and whole steps are timed."""
    stream = terminal(monkeypatch)
    monkeypatch.setattr(costing, "_ENOUGH_S", 0.0)
    attach("10 ms latency", verify=False).detach()
    text = stream.getvalue()
    assert text.index("recording a step") < text.index("timing operations") < text.index("timing whole steps (latency)")


def test_an_error_takes_the_line_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: what attach refuses leaves no line behind, and the next attach has one again."""
    stream = terminal(monkeypatch)
    with pytest.raises(SetpointError):
        attach(1e-3)
    assert taken_away(stream.getvalue())
    before = len(stream.getvalue())
    attach().detach()
    assert "setpoint: attach" in stream.getvalue()[before:]


def test_what_a_model_prints_stays_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Claim: stdout is not led to the terminal of stderr."""
    stream = terminal(monkeypatch)
    with under_way("work"):
        print("from the model")
    assert capsys.readouterr().out == "from the model\n" and "from the model" not in stream.getvalue()


def test_only_the_first_rank_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: processes that share a terminal do not write over each other."""
    stream = terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    with under_way("work") as show:
        show(0.5)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("forced", [False, True], ids=["plain", "colours forced"])
def test_nothing_is_written_to_a_pipe(
    forced: bool, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claim: where stderr is no terminal nothing is written, not even where colours are asked for, as on CI."""
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    attach().detach()
    assert capfd.readouterr() == ("", "")


class OnlyWrites:
    """A stream of a program that is no file: it can be written to, and nothing else."""

    def write(self, text: str) -> int:
        """Take it."""
        return len(text)

    def flush(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("stream", [None, OnlyWrites(), "closed"], ids=["none", "only writes", "closed"])
def test_a_stderr_that_is_no_file_is_no_terminal(monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    """Claim: where a program has put something else in the place of stderr, nothing is shown and nothing fails."""
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed if stream == "closed" else stream)
    attach().detach()


CELL = """
import torch
import setpoint
model = torch.nn.Sequential(torch.nn.Linear(6, 24), torch.nn.ReLU(), torch.nn.Linear(24, 3))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
setpoint.attach(model, optimizer, 0.5, total_steps=9, example=(torch.randn(4, 6),)).detach()
"""


def test_a_notebook_shows_the_line_below_the_cell() -> None:
    """Claim: the first message of a cell's output names the work, later ones its stages, and the last one is empty."""
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        replies = list[dict[str, Any]]()
        reply = client.execute_interactive(CELL, output_hook=replies.append, timeout=60)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert reply["content"]["status"] == "ok", reply["content"]
    shown = [each["content"] for each in replies if each["msg_type"] in ("display_data", "update_display_data")]
    assert len({each["transient"]["display_id"] for each in shown}) == 1
    texts = [each["data"]["text/plain"] for each in shown]
    named = [text for text in texts if text]
    assert named[0] == "setpoint: attach" and named[1] == "setpoint: attach\n  finding what can be cut"
    assert any("trying every cut on copies" in text for text in named)
    assert shown[-1]["data"] == {"text/plain": "", "text/html": ""}
    assert {each["msg_type"] for each in replies} <= {"display_data", "update_display_data", "status", "execute_input"}
