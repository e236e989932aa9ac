"""Runtimes: readings in turns, and what counts as a runtime."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import cycle

import pytest
import torch
from torch import nn

from setpoint.errors import BudgetError, ExportError, RuntimeUnavailable
from setpoint.runtimes import Called, Compiled, Eager, OnnxRuntime, OpenVINO, Runtime, as_runtime, named
from setpoint.runtimes.runtime import in_turns, ratios, typical


def test_readings_in_turns_cancel_a_machine_that_changes() -> None:
    """Claim: where the machine is three times as slow in every second turn, the ratio of two models is still theirs."""
    speed = cycle([1.0, 1.0, 3.0, 3.0])
    dense, cut = in_turns([lambda: 0.02 * next(speed), lambda: 0.01 * next(speed)])
    assert len(dense) == len(cut) >= 7
    assert ratios(cut, dense) == pytest.approx([0.5] * len(cut))
    assert typical(cut) == pytest.approx(0.01)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as inductor is imported
@pytest.mark.parametrize("runtime", [Eager(), Compiled()], ids=lambda each: each.name)
def test_a_runtime_times_the_forward(runtime: Runtime) -> None:
    """Claim: each call makes one forward in eval mode without autograd; its seconds are within those of the call."""
    calls = []

    class Net(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                calls.append(torch.is_grad_enabled())
            return x.sin()

    forward = runtime.load(Net().eval(), (torch.zeros(4),))
    forward()
    before = time.perf_counter()
    assert 0 < forward() <= time.perf_counter() - before
    assert calls == ([False, False] if isinstance(runtime, Eager) else [])


class Waits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return x


def test_eager_on_one_thread_reads_the_seconds_of_the_thread() -> None:
    """Claim: where PyTorch has one thread, what the machine does for others meanwhile does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        forward = Eager().load(Waits(), (torch.zeros(1),))
        assert forward() < 0.02
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("returned", [None, "fast", float("nan"), float("inf"), 0, -1e-3, lambda: 1])
def test_a_function_that_returns_no_seconds_is_refused(returned: object) -> None:
    """Claim: what a function of the user's own returns is positive seconds, or is named as what it is."""
    with pytest.raises(RuntimeUnavailable, match=r"^board (failed with TypeError|failed with ValueError|returned .*)"):

        def board(model: nn.Module, example: object) -> object:
            return returned

        as_runtime(board).load(nn.Linear(1, 1), ())()


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVINO()], ids=lambda each: each.name)
def test_an_operation_that_a_runtime_lacks_is_named(runtime: Runtime) -> None:
    """Claim: the sentence has the operation, and no place in foreign code."""

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svd(x)[0]

    with pytest.raises(ExportError, match=r"Turned cannot be exported to \w+: No .*linalg_svd"):
        runtime.load(Turned().eval(), (torch.ones(2, 2),))


def test_what_counts_as_a_runtime() -> None:
    """Claim: a name, a runtime and a function are runtimes; a class and anything else are refused by name."""
    assert as_runtime("eager") == Eager() == named("eager")
    assert as_runtime(Eager()) == Eager()
    mine = as_runtime(lambda model, example: 0.25)
    assert isinstance(mine, Called)
    assert mine.load(nn.Identity(), (torch.zeros(1),))() == 0.25
    for wrong, words in ((Eager, "is a class"), (8, "got 8"), ("onnxruntme", "unknown runtime")):
        with pytest.raises(BudgetError, match=words):
            as_runtime(wrong)


def test_runtimes_are_imported_when_somebody_asks() -> None:
    """Claim: `import setpoint` is enough for `setpoint.runtimes`, and imports no package of a runtime."""
    code = (
        "import sys, setpoint; assert not {'onnxruntime', 'openvino'} & {*sys.modules}; setpoint.runtimes.OnnxRuntime()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
