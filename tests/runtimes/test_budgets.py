"""Budgets of seconds in a runtime: met by the finished model, by its own fit and readings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import setpoint
from runtimes.clock import Clock, linears, straight
from setpoint.errors import BudgetError, RuntimeUnavailable
from setpoint.loop.summary import Summary
from setpoint.runtimes import Command, Forward


def bent(model: nn.Module) -> float:
    """Seconds that no line of FLOPs and bytes has: outputs count in blocks of 8, and inputs less than in proportion."""
    return 1e-3 + 1e-7 * sum(-(-m.weight.shape[0] // 8) * 8 * m.weight.shape[1] ** 0.8 * 3 for m in linears(model))


def blocked(model: nn.Module) -> float:
    """Seconds of kernels to which widths that are no multiples of 8 are slow."""
    return 1e-3 + 1e-7 * sum(m.weight.numel() * (2.0 if m.out_features % 8 else 1.0) for m in linears(model))


def trained(
    budget: Any, steps: int = 100, width: int = 128, attached: Callable[[], object] = int, **settings: Any
) -> tuple[nn.Module, Summary, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.05), torch.Generator().manual_seed(1)
    x = torch.randn(32, 16, generator=generator)
    loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=steps, **settings)
    attached()
    for _ in range(steps):
        x = torch.randn(32, 16, generator=generator)
        loss = (model(x) - x[:, :4]).square().mean()
        loop.observe(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, loop.finish(), loop


@pytest.mark.parametrize("share", [0.75, 0.6, 0.45])
@pytest.mark.parametrize("law", [straight, bent])
def test_the_finished_model_meets_its_share(law: Callable[[nn.Module], float], share: float) -> None:
    """Claim: the finished model takes the share of the dense seconds, never more, and at most 4 % less."""
    clock = Clock(law)
    dense = law(trained("100% flops", steps=1)[0])
    model, summary, _ = trained(setpoint.Budget.fraction(share, of="inference", runtime=clock))
    assert 0.96 * share <= law(model) / dense <= share
    assert summary.budget_met
    assert summary.metered["inference"] == pytest.approx(law(model), rel=1e-6)
    assert "measured: seconds of a forward in clock" in summary.sources["inference"]


@dataclass
class Shaky(Clock):
    """Readings of one loaded model agree, and are off by .7 %, the standard deviation of loads."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def load(self, model: nn.Module, example: Any) -> Forward:
        forward, off = super().load(model, example), float(torch.randn((), generator=self.generator))
        return lambda: forward() * (1 + 0.007 * off)


@pytest.mark.parametrize("seed", range(3))
def test_readings_that_are_off_do_not_lead_over_the_budget(seed: int) -> None:
    """Claim: where neither readings nor the fit are exact, a deep net takes at most its share, and at most 4 % less."""
    torch.manual_seed(0)
    inner = [layer for _ in range(6) for layer in (nn.Linear(192, 192), nn.ReLU())]
    model = nn.Sequential(nn.Linear(16, 192), nn.ReLU(), *inner, nn.Linear(192, 4))
    dense, clock = bent(model), Shaky(bent, generator=torch.Generator().manual_seed(seed))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.01), torch.randn(32, 16)
    budget = setpoint.Budget.fraction(0.75, of="inference", runtime=clock)
    loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=40)
    for _ in range(40):
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.finish()
    assert 0.96 * 0.75 <= bent(model) / dense <= 0.75


def test_a_machine_that_becomes_slower_does_not_change_the_answer() -> None:
    """Claim: where the machine is twice as slow from some forward on, the same widths are chosen."""
    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight))
    slower = setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight, lambda number: 1.0 + (number > 500)))
    assert trained(budget)[1].widths == trained(slower)[1].widths


def test_an_absolute_budget_is_one_of_seconds() -> None:
    """Claim: 3 ms are 3 ms of the quiet machine, and the batch that is timed is one sample, or the example given."""
    clock = Clock(straight)
    model, summary, _ = trained(setpoint.Budget.total(2e-3, of="inference", runtime=clock))
    assert 0.95 * 2e-3 <= straight(model) <= 2e-3
    assert summary.budget_met
    assert set(clock.batches) == {1}
    clock = Clock(straight)
    trained(setpoint.Budget.total(2e-3, of="inference", runtime=clock, example=(torch.zeros(5, 16),)))
    assert set(clock.batches) == {5}


class Slowing:
    """A runtime in which every model but the first becomes slower with each forward."""

    name, loads = "slowing", 0

    def load(self, model: nn.Module, example: Any) -> Forward:
        self.loads, calls = self.loads + 1, count(1)
        return (lambda: 1e-3) if self.loads == 1 else (lambda: 1e-3 * next(calls))


def test_seconds_that_never_agree_are_no_fit() -> None:
    """Claim: where no copy was read there is nothing to fit, which is said before any training."""
    with pytest.raises(RuntimeUnavailable, match="no two readings of any copy agree"):
        trained(setpoint.Budget.fraction(0.5, of="inference", runtime=Slowing()))


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("8 onnxruntime", "^the budget of onnxruntime '8' is not understood.*such as '8 ms'$"),
        ("-8 ms onnxruntime", "^the budget of onnxruntime '-8 ms' is not understood"),
        ("nan ms onnxruntime", "^the budget of onnxruntime 'nan ms' is not understood"),
        ({"onnxruntime": "50%", "openvino": "50%"}, "got onnxruntime, openvino; one run has one runtime$"),
        ("50% onnxruntime per run", "no budget per run of 'onnxruntime'"),
    ],
)
def test_errors_have_the_word_that_was_given(budget: object, words: str) -> None:
    """Claim: a runtime is named in an error of its budget, and not the resource behind it."""
    with pytest.raises(BudgetError, match=words):
        trained(budget)


def test_a_budget_below_the_constant_part_is_refused() -> None:
    """Claim: what no width can save is said before any training, with the least that can be reached."""
    with pytest.raises(BudgetError, match=r"cannot be reached.*Ask for at least \d+\.\d% clock$"):
        trained(setpoint.Budget.total(0.5e-3, of="inference", runtime=Clock(straight)))


@pytest.mark.parametrize("error", [RuntimeUnavailable("it lacks the op Relu"), KeyError("it lacks the op Relu")])
def test_a_runtime_that_fails_in_mid_run_leaves_training_going(error: Exception) -> None:
    """Claim: one warning, whatever it raises; the budget is held by the fit, which here is exact."""
    failing = Clock(straight, fails_after=12, error=error)  # the dense model twice, two copies, and eight for the fit
    with pytest.warns(UserWarning, match="lacks the op Relu'?. The budget of inference is held by the fit") as told:
        model, summary, _ = trained(setpoint.Budget.fraction(0.5, of="inference", runtime=failing))
    assert len([each for each in told if "lacks the op" in str(each.message)]) == 1
    assert summary.budget_met
    assert straight(model) / straight(trained("100% flops", steps=1)[0]) == pytest.approx(0.5, abs=0.03)


def test_a_program_that_fails_in_mid_run_leaves_training_going(tmp_path: Path) -> None:
    """Claim: a phone that is unplugged in mid-run is warned of once, with what the program said last."""
    program = tmp_path / "phone.sh"
    program.write_text('#!/bin/sh\necho "$(wc -c < "$1") ms"\n')
    program.chmod(0o700)
    unplugged = partial(program.write_text, "#!/bin/sh\necho device offline >&2; exit 1\n")
    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=Command(f"{program} {{model}}"))
    with pytest.warns(UserWarning, match="'device offline'.*held by the fit") as told:
        _, summary, _ = trained(budget, attached=unplugged)
    assert len([each for each in told if "device offline" in str(each.message)]) == 1
    assert summary.budget_met and summary.limit["inference"] > 0


def test_a_runtime_that_does_not_load_is_said_before_training() -> None:
    """Claim: the error of the runtime comes out of attach, and the model can be attached to afterwards."""
    with pytest.raises(RuntimeUnavailable, match="lacks the op"):
        trained(setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight, fails_after=0)))


def test_without_an_example_a_runtime_that_does_not_load_is_said_by_attach() -> None:
    """Claim: the error does not wait for the first step, and nothing stays attached."""
    model = nn.Linear(4, 4)
    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=Clock(straight, fails_after=0))
    with pytest.raises(RuntimeUnavailable, match="lacks the op"):
        setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.1), budget, total_steps=10)
    assert not model._forward_hooks


def test_a_busy_machine_is_said_and_not_obeyed() -> None:
    """Claim: where no two readings agree after calibration, a warning says so, and the fit holds the budget."""
    clock, calls = Clock(straight), [0]

    class Noisy:
        name = "clock"

        def load(self, model: nn.Module, example: Any) -> Forward:
            forward = clock.load(model, example)
            late = clock.loads > 15

            def jumping() -> float:
                calls[0] += 1
                return forward() * (1.02 ** calls[0] if late else 1.0)

            return jumping

    budget = setpoint.Budget.fraction(0.5, of="inference", runtime=Noisy())
    with pytest.warns(UserWarning, match="the machine is busy"):
        model, summary, _ = trained(budget)
    assert straight(model) / straight(trained("100% flops", steps=1)[0]) == pytest.approx(0.5, abs=0.05)


def test_a_bill_goes_together_with_a_runtime() -> None:
    """Claim: the saved FLOPs buy steps, and both budgets are met."""
    clock = Clock(straight)
    budgets = [
        setpoint.Budget.fraction(0.5, of="inference", runtime=clock),
        setpoint.Budget.fraction(1.0, of="flops", per="run"),
    ]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    dense = straight(copy.deepcopy(model))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.05), torch.randn(32, 16)
    loop, steps = setpoint.attach(model, optimizer, budgets, example=(x,), total_steps=100), 0
    while steps < loop.total_steps:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    summary = loop.finish()
    assert steps > 130
    assert straight(model) <= 0.5 * dense
    assert summary.budget_met


@pytest.mark.parametrize(("law", "grid"), [(blocked, None), (straight, 32)])
def test_widths_keep_to_the_grid(law: Callable[[nn.Module], float], grid: int | None) -> None:
    """Claim: widths are multiples of 16 where the runtime is slow off them, and of the number that the user names."""
    model, _, _ = trained(setpoint.Budget.fraction(0.6, of="inference", runtime=Clock(law)), width=160, grid=grid)
    assert {module.out_features % (grid or 16) for module in linears(model)[:-1]} == {0}
    assert min(module.out_features for module in linears(model)[:-1]) < 160


@pytest.mark.parametrize("goal", [setpoint.Price, setpoint.Tolerance])
def test_a_price_and_a_tolerance_are_of_seconds_in_a_runtime(goal: Any) -> None:
    """Claim: what they save is timed in the runtime that they name."""
    clock = Clock(straight)
    dense = straight(trained("100% flops", steps=1)[0])
    model, summary, _ = trained(goal(10.0, of="inference", runtime=clock))
    assert straight(model) < dense
    assert "seconds of a forward in clock" in summary.sources["inference"]


def test_texts_name_runtimes() -> None:
    """Claim: a text and a mapping name a runtime, and budgets of two runtimes are refused."""
    from setpoint.cost.budget import parse_budget

    one, two = parse_budget({"compiled": "8 ms", "params": "60%"})
    assert (one.resource, one.limit, one.runtime.name) == ("inference", 0.008, "compiled")
    assert two == setpoint.Budget.fraction(0.6, of="params")
    assert parse_budget("50% eager").runtime.name == "eager"
    with pytest.raises(BudgetError, match="one budget for each resource"):
        trained(["50% eager", "50% compiled"])
    with pytest.raises(BudgetError, match="runtime is for a budget"):
        setpoint.Budget.fraction(0.5, of="flops", runtime="eager")
