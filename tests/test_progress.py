"""A line on a terminal while something takes its time, and nothing anywhere else; warnings at the user's line."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import setpoint
from golden.models import mlp
from setpoint.errors import SetpointError
from setpoint.messages import progress


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """In the place of stderr; in the test itself, since pytest puts streams of its own there after the fixtures."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def attach(budget: Any = 0.5, **settings: Any) -> setpoint.Loop:
    """Attach to an MLP at once."""
    model = mlp(6, 24, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    settings = {"total_steps": 9, "example": (torch.randn(4, 6),), **settings}
    return setpoint.attach(model, optimizer, budget, **settings)


def test_attach_shows_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the line is there before anything is done, names the stages, and is erased at the end, also where attach
    refuses something; the next attach has one again.
    """
    stream = terminal(monkeypatch)
    with pytest.raises(SetpointError):
        attach(1e-3)
    assert stream.getvalue().rpartition("\r")[2] == ""
    before = len(stream.getvalue())
    attach().detach()
    text = stream.getvalue()[before:]
    first = text.index("setpoint: attach")
    assert first < text.index("finding what can be cut") < text.index("trying every cut on copies")
    assert text.rpartition("\r")[2] == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_shows_it(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: processes that share a terminal do not write over each other."""
    stream = terminal(monkeypatch)
    monkeypatch.setenv("RANK", rank)
    with progress("work"):
        print("from the model")  # goes to stdout, as always
    assert ("setpoint: work" in stream.getvalue()) == (rank == "0") == bool(stream.getvalue())


@pytest.mark.parametrize("stream", [None, "a file", "closed"])
def test_nothing_is_written_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: str | None
) -> None:
    """Claim: a file stays empty, and a program that has closed stderr or has none is not disturbed."""
    with (tmp_path / "log").open("w+") as file:
        if stream == "closed":
            file.close()
        monkeypatch.setattr(sys, "stderr", file if stream else None)
        attach().detach()
    assert (tmp_path / "log").read_text() == ""


def test_a_warning_points_at_the_users_line() -> None:
    """Claim: a budget above the dense model, and a step after the last one, are warned of in this file."""
    model = mlp(4, 16, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        loop = setpoint.attach(model, optimizer, "4 M parameters", total_steps=1, example=(torch.randn(2, 4),))
        for _ in range(2):
            model(torch.randn(2, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        loop.detach()
    assert [each.filename for each in caught] == [__file__] * 2
    assert caught[0].lineno == line and caught[1].lineno == line + 3
