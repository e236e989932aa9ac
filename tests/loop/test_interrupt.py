"""Ctrl-C at any line of a decision: it comes through, and model, optimizer and loop agree."""

from __future__ import annotations

import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from loop.test_regrowth import Scripted
from runtimes.clock import Clock, straight
from setpoint.errors import LoopError
from setpoint.interrupts import uninterrupted
from setpoint.loop.cutting import Cutting

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
    """Sends this process a SIGINT at the n-th line of Setpoint that runs, and counts the lines.

    The collector of garbage rests meanwhile: what it finalizes of other tests is no line of a decision, and an
    exception there comes through nowhere.
    """

    def __init__(self, at: int | None) -> None:
        self.at, self.lines = at, 0

    def __enter__(self) -> Interrupting:
        gc.disable()
        sys.settrace(self._enter)
        return self

    def __exit__(self, *ending: Any) -> None:
        sys.settrace(None)
        gc.enable()

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        file = frame.f_code.co_filename
        ours = f"{'setpoint'}/" in file.replace("\\", "/") and "/src/" in file.replace("\\", "/")
        return self._line if ours and not file.endswith(("untouched.py", "interrupt.py")) else None

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
    for at in range(1, lines - lines // PLACES, lines // PLACES):  # the first time, more lines run than later
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


class Late(Exception):
    """What a user's handler of a time limit raises."""


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*args: Any, **named: Any) -> None:
        raise error

    return raises


def test_a_time_limit_within_a_cut_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: the exception of any signal's handler, raised when the model is cut and the loop has yet to know, comes
    behind the step, and the run goes on.
    """
    model, optimizer, loop = run(back=False)
    before = signal.signal(signal.SIGTERM, raising(Late()))
    cut_to = Cutting._cut_to
    monkeypatch.setattr(Cutting, "_cut_to", lambda *args: signal.raise_signal(signal.SIGTERM) or cut_to(*args))
    try:
        with pytest.raises(Late):
            train(model, optimizer, range(5, 6))
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    optimizer.zero_grad()
    train(model, optimizer, range(6, 40))
    assert loop.step == 40 and loop.widths == {"0": 13, "2": 11} and loop.finish().steps == 40


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Late()], ids=["Ctrl-C", "a time limit"])
def test_a_first_step_that_is_interrupted(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: after Ctrl-C in the discovery `finish` says so, and the next step begins the loop with what was counted
    until then; after an error the loop is off, and `finish` says that.
    """
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    loop = setpoint.attach(model, optimizer, "50% params", total_steps=20)

    def step() -> None:
        for _ in range(3):  # gradients add up
            model(torch.randn(8, 6)).square().mean().backward()
        optimizer.step()

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(sys.modules["setpoint.attach"], "unit_candidates", raising(error))
        step()
    again = isinstance(error, KeyboardInterrupt)
    with pytest.raises(LoopError, match="begins at the next optimizer step" if again else "Late: .*was detached"):
        loop.finish()
    for _ in range(20):
        step()
    if again:
        done = loop.finish()
        assert done.budget_met and done.dense_flops == 3 * 3 * 2 * 8 * (6 * 16 + 16 * 3) - 3 * 2 * 8 * 6 * 16


class Pressed(nn.Sequential):
    """Ctrl-C is pressed when it is exported."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_exporting():
            signal.raise_signal(signal.SIGINT)
        out: torch.Tensor = super().forward(x)
        return out


def test_an_interrupt_waits_for_the_end_of_an_export() -> None:
    """Claim: Ctrl-C within PyTorch's exporter, which could end the process, comes behind it and leaves no hooks."""
    model = Pressed(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-2), torch.randn(8, 6)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            setpoint.attach(model, optimizer, 0.5, total_steps=20, example=(x,))
    assert not optimizer._optimizer_step_pre_hooks and not model._state_dict_hooks


def test_a_signal_comes_through_between_two_copies_that_are_timed() -> None:
    """Claim: Ctrl-C while copies are timed ends attach before the next copy, and leaves nothing attached."""
    model = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=1e-2), torch.randn(8, 6)

    def speed(number: int) -> float:
        if number == 20:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    pressed = Clock(straight, speed)
    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=pressed)
    with pytest.raises(KeyboardInterrupt):
        setpoint.attach(model, optimizer, budget, total_steps=20, example=(x,))
    assert pressed.loads == 3 and not optimizer._optimizer_step_pre_hooks  # the dense model twice, and a copy


@pytest.mark.parametrize("inner", [nullcontext, uninterrupted])
def test_a_second_interrupt_comes_through_at_once(inner: Callable[[], AbstractContextManager[None]]) -> None:
    """Claim: who insists gets through, also in a block inside of another."""
    reached = False
    with pytest.raises(KeyboardInterrupt), uninterrupted(), inner():
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
