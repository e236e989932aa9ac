"""The state of a loop: a run that was interrupted goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import setpoint
from conformance.test_optimizers import ROWS
from loop.test_regrowth import BACK, DROP, Net, Scripted, data, dear
from setpoint.controller.penalty import PenaltyController
from setpoint.controller.priced import PricedController
from setpoint.cost.budget import Price
from setpoint.errors import CheckpointError, LoopError
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint_bench.scheduled import ScheduledController

__all__ = ["dear"]
STEPS = 40


class Run:
    """A training run with all that a run may have: an averaged copy, a scheduler, two optimizers if asked for."""

    def __init__(
        self,
        controller: Callable[[], Any],
        make: Callable[[Any], Optimizer] = lambda p: torch.optim.AdamW(p, lr=0.01),
        split: bool = False,
        budget: float = 0.5,
        model: Callable[[], nn.Module] = Net,
        total_steps: int = STEPS,
        goal: Price | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        parameters = list(self.model.parameters())
        parts = [parameters[::2], parameters[1::2]] if split else [parameters]
        self.optimizers = [make(part) for part in parts]
        self.schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda s: 1 / (1 + s)) for each in self.optimizers]
        self.loop = setpoint.attach(
            self.model,
            self.optimizers,
            goal or setpoint.Budget.fraction(budget, of="params"),
            example=(data(0)[0],),
            total_steps=total_steps,
            controller=controller(),
            copies=(self.ema,),
            **options,
        )

    def train(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            x, y = data(step)
            loss = nn.functional.cross_entropy(self.model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
            for each in (*self.optimizers, *self.schedulers):
                each.step()
            for each in self.optimizers:
                each.zero_grad()
            self.ema.update_parameters(self.model)
            self.loop.observe(loss=loss)
            losses.append(loss.item())
        return losses

    def parts(self) -> list[Any]:
        return [self.loop, self.model, self.ema, *self.optimizers, *self.schedulers]

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts()], file)
        return file

    def load(self, file: io.BytesIO) -> Run:
        file.seek(0)
        for part, state in zip(self.parts(), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
        return self


def told(loop: setpoint.Loop) -> list[dict[str, Any]]:
    """The ledger, without seconds."""
    rows = [{key: v for key, v in row.items() if "seconds" not in key} for row in loop.ledger.to_rows()]
    return rows


def tensors(run: Run) -> list[torch.Tensor]:
    """Everything that training has changed."""
    found = [*run.model.state_dict().values(), *run.ema.state_dict().values()]
    for optimizer in run.optimizers:
        for state in optimizer.state.values():
            found += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return found


def check_resumes(start: Callable[..., Run], at: list[int], steps: int = STEPS) -> None:
    """Interrupt a run at each of these steps, and compare what comes of it with the run that was left alone."""
    whole = start()
    dense, losses, files = whole.loop.widths, [], {}
    for step in range(steps):
        if step in at:
            files[step] = whole.saved()
        losses += whole.train(step, step + 1)
    assert len(whole.loop.ledger) > 1 and whole.loop.widths != dense
    ended = whole.loop.finish()
    for step, file in files.items():
        again = start(verify=False).load(file)
        assert again.loop.step == step
        assert again.train(step, steps) == losses[step:], step
        assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))
        assert told(whole.loop) == told(again.loop) and whole.loop.widths == again.loop.widths
        assert all(np.array_equal(origin, again.loop.origin[name]) for name, origin in whole.loop.origin.items())
        summary = vars(again.loop.finish())
        for name, value in vars(ended).items():
            assert value == summary[name] or name in ("seconds", "overhead", "break_even_step"), name


def test_a_run_resumes_bit_for_bit_at_any_step(dear: None) -> None:
    """Claim: losses, weights, moments, averaged copy, ledger and summary are those of the uninterrupted run: before the
    first cut, while units rest, while they visit, after their return, and after the landing.
    """

    def start(**options: Any) -> Run:
        return Run(lambda: Scripted(DROP, BACK), split=True, budget=0.9, **options)

    check_resumes(start, [0, 5, 8, 10, 20, 28, STEPS])


RATE = Price(3.0, of="params")


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(lambda: PricedController(regrow=True, min_density=0.0), id="priced-regrow"),
        pytest.param(lambda: PenaltyController(RATE), id="penalty"),
        pytest.param(ScheduledController, id="scheduled"),
    ],
)
def test_every_controller_resumes(controller: Callable[[], Any], dear: None, request: pytest.FixtureRequest) -> None:
    """Claim: the state of each controller survives, at decisions and between them; the sensor's steps not yet folded
    into its moments survive as well.
    """
    goal = RATE if "penalty" in request.node.name else None
    check_resumes(lambda **options: Run(controller, goal=goal, **options), [7, 17, 26])


ONE_BY_ONE = [row for row in ROWS if "foreach" not in str(row.id)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        pytest.param(*row.values, marks=[*row.marks, *[pytest.mark.slow] * (n % 3 > 0)], id=row.id)
        for n, row in enumerate(ONE_BY_ONE)
    ],
)
def test_every_optimizer_resumes(kind: type[Optimizer], settings: dict[str, Any]) -> None:
    """Claim: the state of each optimizer of the battery goes into the dense model's optimizer, bit for bit."""
    whole = Run(lambda: Scripted({4: DROP[5]}, regrow=False), lambda p: kind(p, **settings), verify=False)
    whole.train(0, 6)
    again = Run(lambda: Scripted({4: DROP[5]}, regrow=False), lambda p: kind(p, **settings), verify=False)
    again.load(whole.saved())
    assert again.train(6, 10) == whole.train(6, 10)
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole), tensors(again), strict=True))


def test_a_step_that_is_sensed_rarely_and_a_memory_format_survive() -> None:
    """Claim: a channels-last run whose every second step is sensed resumes bit for bit."""

    def start(**options: Any) -> Run:
        def controller() -> Any:
            return Scripted({5: DROP[5]}, regrow=False)

        return Run(controller, model=lambda: Net().to(memory_format=torch.channels_last), total_steps=400, **options)

    whole = start()
    whole.train(0, 9)
    again = start().load(whole.saved())
    assert again.model.stem.weight.stride() == whole.model.stem.weight.stride()  # type: ignore[union-attr]
    assert again.train(9, 12) == whole.train(9, 12)


# What does not belong together.


def snapshot(run: Run) -> list[Any]:
    return [{name: tensor.clone() for name, tensor in run.model.state_dict().items()}, run.loop.widths, run.loop.step]


def assert_untouched(run: Run, before: list[Any]) -> None:
    tensors, widths, step = snapshot(run)
    assert (widths, step) == (before[1], before[2]) and len(run.loop.ledger) == step == 0
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in before[0].items())


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    run = Run(lambda: Scripted(DROP, BACK), budget=0.9, verify=False)
    run.train(0, 12)
    return run.loop.state_dict()


class Wider(Net):
    """The same groups, but another head."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.8}, "budgets"),
        ({"total_steps": 50}, "total_steps"),
        ({"split": True}, "optimizers"),
        ({"model": Wider}, "dense|another model"),
        ({"make": lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizers"),
        ({"sensor": MagnitudeSensor()}, "sensor"),
    ],
)
def test_a_state_of_another_run_is_refused(state: dict[str, Any], options: dict[str, Any], words: str) -> None:
    """Claim: a state of another model, budget, length, optimizer or sensor is refused, and nothing is changed."""
    run = Run(lambda: Scripted(DROP, BACK), **{"budget": 0.9, "verify": False, **options})
    before = snapshot(run)
    with pytest.raises(CheckpointError, match=words):
        run.loop.load_state_dict(state)
    assert_untouched(run, before)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a state, the entries of its ledger left out."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, each in items:
        found += paths(each, (*path, key)) if key != "ledger" else []
    return found


def damaged(state: Any, path: tuple[Any, ...], value: Any) -> Any:
    """The state with another value at the end of the path."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    items = copy.copy(state) if isinstance(state, dict) else list(state)
    items[key] = damaged(items[key], rest, value)
    return items if isinstance(state, (dict, list)) else tuple(items)


def test_a_damaged_value_is_refused_wherever_it_stands(state: dict[str, Any]) -> None:
    """Claim: a value of another type, sign or size is refused in words, and nothing is changed."""
    run = Run(lambda: Scripted(DROP, BACK), budget=0.9, verify=False)
    before = snapshot(run)
    for number, path in enumerate(paths(state)):
        if path[0] != "rng_state":
            bad: Any = ["x", None, -7, {}, [], float("nan"), 3.5, torch.ones(2, 2)][number % 8]
            with pytest.raises(CheckpointError, match="digest|is of another run|no state|format"):
                run.loop.load_state_dict(damaged(state, path, (bad,)))
    assert_untouched(run, before)


def test_a_state_needs_a_fresh_loop(state: dict[str, Any]) -> None:
    """Claim: a loop that has made a step takes over no state."""
    run = Run(lambda: Scripted(DROP, BACK), budget=0.9, verify=False)
    run.train(0, 1)
    with pytest.raises(LoopError, match="freshly attached"):
        run.loop.load_state_dict(state)


def test_an_optimizer_loaded_in_the_wrong_order_is_refused() -> None:
    """Claim: optimizer states of other shapes, which PyTorch takes without a word, are refused by name before the
    loop's state is loaded; nothing is changed.
    """
    run = Run(lambda: Scripted({4: DROP[5]}, regrow=False), verify=False)
    run.train(0, 6)
    saved = run.optimizers[0].state_dict()
    again = Run(lambda: Scripted({4: DROP[5]}, regrow=False), verify=False)
    with pytest.raises(CheckpointError, match=r"exp_avg.*stem.weight.*loop.load_state_dict"):
        again.optimizers[0].load_state_dict(saved)
    assert not again.optimizers[0].state


def test_a_state_in_the_middle_of_a_step_is_refused() -> None:
    """Claim: between the steps of two optimizers no state is given out."""
    run = Run(lambda: Scripted(DROP, BACK), split=True, budget=0.9, verify=False)
    x, y = data(0)
    nn.functional.cross_entropy(run.model(x), y).backward()
    run.optimizers[0].step()
    with pytest.raises(LoopError, match="middle of a step"):
        run.loop.state_dict()
    run.optimizers[1].step()
    run.loop.state_dict()
