"""Faults: whatever goes wrong in the middle of a run, the model still works and the run can go on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import setpoint
from loop.test_regrowth import BACK, DROP, Scripted, data, dear
from loop.test_state import Run, tensors
from setpoint.actuator import shrink as shrink_module

__all__ = ["dear"]


def start() -> Run:
    return Run(lambda: Scripted(DROP, BACK), split=True, budget=0.9, verify=False)


def copied(run: Run) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(run)]


def assert_same(run: Run, before: list[torch.Tensor], statistics: bool = True) -> None:
    """All tensors are equal, batch norm's statistics only if asked: a forward that fails has counted its batch."""
    counted = set() if statistics else {each.data_ptr() for each in run.model.buffers()}
    for a, b in zip(tensors(run), before, strict=True):
        assert a.shape == b.shape and (a.data_ptr() in counted or torch.equal(a, b))


def assert_goes_on(run: Run, first: int) -> None:
    """The run can be trained to its end, and lands."""
    run.train(first, 40)
    assert run.loop.widths == {name: len(origin) for name, origin in run.loop.origin.items()}
    assert sum(p.numel() for p in run.model.parameters()) == run.loop.finish().spent["params"]


def forward_with(run: Run, step: int, error: BaseException) -> None:
    """A forward pass that raises in its last layer."""

    def trouble(*args: Any) -> None:
        raise error

    handle = run.model.head.register_forward_pre_hook(trouble)  # type: ignore[operator, union-attr]
    try:
        with pytest.raises(type(error)):
            run.model(data(step)[0])
    finally:
        handle.remove()


@pytest.mark.parametrize("step", [0, 9, 22])  # 9: while resting units are present; 22: while weights rise
def test_an_exception_in_a_forward(step: int, dear: None) -> None:
    """Claim: after an error in the user's forward the model is as before, in a probed step too; the run goes on."""
    run = start()
    run.train(0, step)
    before = copied(run)
    forward_with(run, step, ArithmeticError("of the user"))
    assert_same(run, before, statistics=False)
    assert_goes_on(run, step)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), MemoryError("of the host"), torch.OutOfMemoryError("of the GPU")]
)
@pytest.mark.parametrize(("step", "call"), [(5, 1), (5, 7), (20, 1), (20, 9)])  # 5: units go; 20: units come back
def test_a_resize_that_is_interrupted(
    error: BaseException, step: int, call: int, monkeypatch: pytest.MonkeyPatch, dear: None
) -> None:
    """Claim: Ctrl-C or no memory in the middle of a cut or a return leaves the model, its optimizers and the averaged
    copy as they were before, and the run goes on and makes up for it at its next step.
    """
    drop = {**DROP, 6: DROP[5]} if step == 5 else DROP
    back = {**BACK, 21: BACK[20]} if step == 20 else BACK
    run = Run(lambda: Scripted(drop, back), split=True, budget=0.9, verify=False)
    run.train(0, step - 1)
    widths, left = run.loop.widths, [call]
    swap = shrink_module.swap

    def failing(*args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        swap(*args)

    monkeypatch.setattr(shrink_module, "swap", failing)
    with pytest.raises(type(error)):
        run.train(step - 1, step)
    monkeypatch.undo()
    monkeypatch.setattr("setpoint.regrowth.regrowing._PROBE_SHARE", 1.0)
    assert left[0] == 0 and run.loop.widths == widths
    shapes = {name: tuple(tensor.shape) for name, tensor in run.model.named_parameters()}
    assert shapes == {name[7:]: tuple(tensor.shape) for name, tensor in run.ema.named_parameters()}
    for optimizer in run.optimizers:
        assert all(p.shape == optimizer.state[p]["exp_avg"].shape for p in optimizer.state)
    for each in run.optimizers:
        each.zero_grad()
    assert_goes_on(run, step)


def test_a_run_goes_on_from_its_file_when_a_return_finds_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dear: None
) -> None:
    """Claim: a run that ends for want of memory while units come back resumes to the end of an undisturbed one."""
    whole, run = start(), start()
    losses = whole.train(0, 40)

    def parts(one: Run) -> dict[str, Any]:
        named = {f"optimizer{number}": each for number, each in enumerate(one.optimizers)}
        named |= {f"scheduler{number}": each for number, each in enumerate(one.schedulers)}
        return {**named, "model": one.model, "ema": one.ema, "loop": one.loop}

    def full(*args: Any, **options: Any) -> None:
        raise MemoryError("full")

    run.train(0, 18)
    setpoint.save_run(tmp_path / "run", **parts(run))
    with monkeypatch.context() as patch:
        patch.setattr("setpoint.regrowth.regrowing.regrow", full)
        with pytest.raises(MemoryError):
            run.train(18, 40)
    again = start()
    setpoint.load_run(tmp_path / "run", **parts(again))
    assert again.train(18, 40) == losses[18:]
    assert_same(again, copied(whole))


def said(script: str, count: int) -> str:
    path = Path(__file__).with_name(script)
    command = [sys.executable, "-W", "ignore", str(path), "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork and no SIGKILL")
def test_killed_runs_end_alike() -> None:
    """Claim: runs killed with SIGKILL at any moment, in resizes and saves too, resume to the same final weights, bit
    for bit. `make soak` kills 50.
    """
    words = said("killed.py", 5)
    assert words.startswith("5 of 5 runs ended alike"), words
    assert all(int(n) > 0 for n in re.findall(r"(\d+) (?:inside|between|at)", words)), words


@pytest.mark.slow
def test_many_resizes_leave_nothing_behind() -> None:
    """Claim: 100 cuts and returns in training stay within 1e-10 of the masked twin, and no memory is left over.
    `make soak` makes 2,000.
    """
    assert said("resized.py", 100).startswith("100 resizes")
