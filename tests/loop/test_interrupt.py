"""Ctrl-C at any line of a decision: it comes through, and model, optimizer and loop agree."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from loop.test_regrowth import Scripted
from setpoint.errors import LoopError
from setpoint.loop.hooks import uninterrupted

DROPS, BACK = {3: {"0": [1, 4]}, 6: {"0": [0], "2": [3]}}, {6: {"0": [1]}}
PLACES = 16
"""So many of the lines that run are tried, evenly spread."""


@pytest.fixture(autouse=True)
def in_the_foreground() -> Iterator[None]:
    """Python's own handler, which is not there where tests run in the background and inherit that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupting:
    """Sends this process a SIGINT at the n-th line of Setpoint that runs, and counts the lines."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Interrupting:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *ending: Any) -> None:
        sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        ours = f"{'setpoint'}/" in file.replace("\\", "/") and "/src/" in file.replace("\\", "/")
        return self._line if ours and not file.endswith(("hooks.py", "interrupt.py")) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                signal.raise_signal(signal.SIGINT)
        return self._line


def run(back: bool) -> tuple[nn.Module, torch.optim.Optimizer, setpoint.Loop]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    controller = Scripted(DROPS, BACK if back else {}, regrow=back)
    budget, example = setpoint.Budget.fraction(0.9, of="params"), (torch.randn(8, 6),)
    loop = setpoint.attach(
        model, optimizer, budget, example=example, total_steps=40, controller=controller, verify=False
    )
    train(model, optimizer, range(5))
    return model, optimizer, loop


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, at: int | None = None) -> int:
    lines = 0
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        with Interrupting(at) as interrupting:
            optimizer.step()
        lines = interrupting.lines
        optimizer.zero_grad()
    return lines


@pytest.mark.parametrize("back", [False, True], ids=["cut", "cut and return"])
def test_an_interrupt_at_any_line_leaves_a_whole_run(back: bool) -> None:
    """Claim: wherever in a step SIGINT comes, KeyboardInterrupt follows behind it, and the run goes on: to the weights
    that it has without, or, if it came ahead of the optimizer's step, as after a step that was left out.
    """
    model, optimizer, loop = run(back)
    lines = train(model, optimizer, range(5, 6), at=0)
    train(model, optimizer, range(6, 10))
    want, widths = [p.detach().clone() for p in model.parameters()], loop.widths
    loop.detach()
    for at in range(1, lines, lines // PLACES):
        model, optimizer, loop = run(back)
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, range(5, 6), at)
        optimizer.zero_grad()
        loop.state_dict()
        stepped = loop.step == 6
        train(model, optimizer, range(6, 10))
        assert loop.widths == widths, at
        assert not stepped or all(map(torch.equal, want, model.parameters())), at
        loop.detach()


def test_a_second_interrupt_comes_through_at_once() -> None:
    """Claim: who insists gets through."""
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        reached = True
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one waits")
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_users_own_handler_is_called_afterwards() -> None:
    """Claim: a handler of the user's is called behind the change and stays, and other threads are left alone."""
    calls: list[str] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: calls.append("user"))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            calls.append("inside")
        assert calls == ["inside", "user"]
        other = threading.Thread(target=lambda: uninterrupted().__enter__())
        other.start()
        other.join()
        signal.raise_signal(signal.SIGINT)
        assert calls == ["inside", "user", "user"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_model_of_another_size_is_not_saved() -> None:
    """Claim: a loop whose model was changed behind its back gives no state, so no good checkpoint is overwritten."""
    model, _, loop = run(back=False)
    layer: Any = model[0]
    layer.weight = nn.Parameter(layer.weight[:-1].detach().clone())
    with pytest.raises(LoopError, match="the model is of another size"):
        loop.state_dict()
    loop.detach()
