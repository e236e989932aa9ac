"""Budgets in real units end to end: memory for real, seconds and joules on a recorded clock and meter."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import setpoint
from resources.peak import peak_bytes
from setpoint.errors import CostError
from setpoint.resources import costing
from setpoint.resources.joules import Counter, EnergyMeter
from setpoint.spending import meter as meter_file
from setpoint_bench.networks import PlainNet

Budget = setpoint.Budget


def cnn() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """A small CNN whose activations outweigh its weights."""
    torch.manual_seed(0)
    model = PlainNet({"conv1": 32, "conv2": 64, "conv3": 64}, frozenset({1, 2}), channels=3, classes=10)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(8, 3, 16, 16)


def mlp() -> tuple[nn.Module, torch.optim.Optimizer, Tensor]:
    """Two hidden layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(8, 16)


def train(
    made: tuple[nn.Module, torch.optim.Optimizer, Tensor],
    budget: Any,
    steps: int,
    each: Callable[[setpoint.Loop], None] = lambda loop: None,
    **settings: Any,
) -> setpoint.Loop:
    """The user's own loop; `each` is called in every step."""
    model, optimizer, x = made
    loop = setpoint.attach(model, optimizer, budget, example=(x,), total_steps=steps, **settings)
    for _ in range(steps):
        step(model(x), optimizer, lambda: each(loop))
    loop.finish()
    return loop


def step(logits: Tensor, optimizer: torch.optim.Optimizer, each: Callable[[], None] = lambda: None) -> None:
    """The rest of a step whose forward has been made."""
    nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
    each()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine whose steps take times in closed form, and whose clock the test turns."""
    made = Machine()

    def timed(make: Any, vectors: Any, device: Any, meter: EnergyMeter | None) -> Iterator[Any]:
        for widths in vectors:
            seconds = made.step_s(widths) if make.keywords.get("trains", True) else made.pass_s(widths)
            yield widths, seconds, made.watts * seconds if meter else None

    monkeypatch.setattr(costing, "timed", timed)
    monkeypatch.setattr(meter_file, "_now", lambda synchronize: made.now)
    yield made


class Machine:
    """A step costs 1 ms and its FLOPs; the user's own code costs half as much again."""

    def __init__(self) -> None:
        self.now = self.joules = 0.0
        self.factor = 1.5
        self.watts = 30.0

    def step_s(self, widths: Mapping[str, int]) -> float:
        a, b = widths.values()
        return 1e-3 + 1e-5 * (16 * a + a * b + 4 * b) / 64

    def pass_s(self, widths: Mapping[str, int]) -> float:
        """Seconds of a forward pass: a third of a step."""
        return self.step_s(widths) / 3

    def live(self, loop: setpoint.Loop) -> None:
        """One of the user's steps goes by."""
        seconds = self.factor * self.step_s(loop.widths)
        self.now += seconds
        self.joules += self.watts * seconds


def test_memory_lands_within_the_budget() -> None:
    """The cut model's own step, measured afresh with the user's loss, is within the budget and near it."""
    made = cnn()
    loop = train(made, Budget.fraction(0.6, of="memory"), 60)
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    model, optimizer, x = made
    held = [value for state in optimizer.state.values() for value in state.values()]
    measured = peak_bytes(lambda: step(model(x), optimizer), [*model.parameters(), *model.buffers(), x, *held])
    assert 0.85 * summary.limit["memory"] < measured <= 1.01 * summary.limit["memory"]
    assert summary.metered["memory"] == pytest.approx(measured, rel=0.02)
    assert summary.sources["memory"].startswith("measured")
    read = [entry for entry in loop.ledger if "memory" in entry.metered]
    assert read and all(entry.predicted["memory"] == pytest.approx(entry.metered["memory"], rel=0.1) for entry in read)


def test_memory_is_metered_at_a_decision_that_had_to_wait(machine: Machine) -> None:
    """In a run so short that decisions wait for seconds, each that is made knows the bytes of its step, too."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not measured")
        loop = train(mlp(), {"latency": "50%", "memory": "60%"}, 60, machine.live)
    made = [entry for entry in loop.ledger if not entry.reason.startswith("no decision")]
    assert len(made) < len(loop.ledger) and len(made) > 1
    assert all("memory" in entry.metered for entry in made)


def by_parts(model: nn.Module, x: Tensor) -> Tensor:
    """The model's answer, each layer called by itself."""
    for layer in model:  # type: ignore[attr-defined]
        x = layer(x)
    return x


@pytest.mark.filterwarnings("ignore:training made a step without a call")
@pytest.mark.parametrize("way", ["by parts", "forward", "eval mode"])
def test_a_step_begins_however_the_model_is_called(way: str) -> None:
    """By its parts, by `forward`, or in eval mode: an evaluation between steps is no part of the step."""
    call = {"by parts": by_parts, "forward": lambda model, x: model.forward(x)}.get(way, lambda model, x: model(x))
    found = []
    for validated in (False, True):
        model, optimizer, x = mlp()
        model.train(way != "eval mode")
        half = Budget.fraction(0.5, of="memory")
        loop = setpoint.attach(model, optimizer, half, example=(x,), total_steps=40)
        for _ in range(40):
            step(call(model, x), optimizer)
            if validated:
                with torch.no_grad():
                    call(model.eval(), x.repeat(500, 1))
                model.train(way != "eval mode")
        loop.finish()
        found.append([entry.metered for entry in loop.ledger])
    assert found[0] == found[1] and any(found[0])


@pytest.mark.filterwarnings("ignore:a step gives the model 3 times")  # it does, and bytes are measured
def test_memory_is_metered_where_units_come_back() -> None:
    """A step of three passes holds more than the example's one: with a reserve too, steps between probes tell."""
    model, optimizer, x = mlp()
    controller = setpoint.PricedController(regrow=True)
    limit = Budget.total(700_000, of="memory")
    loop = setpoint.attach(model, optimizer, limit, example=(x,), total_steps=200, controller=controller)

    def three() -> None:
        step(sum(model(x + shift) for shift in range(3)), optimizer)  # type: ignore[arg-type]

    for _ in range(200):
        three()
    summary = loop.finish()
    held = [*model.parameters(), *(value for state in optimizer.state.values() for value in state.values())]
    assert summary.budget_met and loop.spending.account.probed_steps > 0
    assert peak_bytes(three, [*held, x]) <= 1.01 * 700_000
    assert summary.metered["memory"] <= 700_000 and summary.sources["memory"].startswith("measured")


def test_a_model_can_be_stored_and_copied_while_a_step_is_awaited() -> None:
    """What waits for a step's first call is neither stored nor copied with the model, and nothing of it is left."""
    found = []
    for copied in (False, True):
        model, optimizer, x = mlp()
        half = Budget.fraction(0.5, of="memory")
        loop = setpoint.attach(model, optimizer, half, example=(x,), total_steps=40)
        for _ in range(40):
            step(model(x), optimizer)
            if copied:
                for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
                    twin(x)
        loop.finish()
        found.append([entry.metered for entry in loop.ledger])
        assert not any(each._forward_pre_hooks for each in model.modules())
    assert [set(each) for each in found[0]] == [set(each) for each in found[1]]


def test_a_second_loop_that_cannot_be_metered_says_so() -> None:
    """Of two loops on memory in one process one is metered at a time: the other says once that it is modelled."""
    first, second = mlp(), mlp()
    half = Budget.fraction(0.5, of="memory")
    with pytest.warns(UserWarning, match="memory is not measured now .*second loop") as caught:
        loops = [setpoint.attach(*made[:2], half, example=made[2:], total_steps=40) for made in (first, second)]
        for _ in range(40):
            for model, optimizer, x in (first, second):
                step(model(x), optimizer)
        summaries = [loop.finish() for loop in loops]
    assert len(caught) == 1 and all(summary.budget_met for summary in summaries)


def test_two_budgets_are_both_met() -> None:
    """FLOPs at 0.5 and memory at 0.6 in one run: both within, each with a price, and the one that binds has it."""
    loop = train(cnn(), [Budget.fraction(0.5, of="flops"), Budget.fraction(0.6, of="memory")], 60)
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    assert summary.spent["flops"] <= summary.limit["flops"]
    assert summary.metered["memory"] <= summary.limit["memory"] * 1.01
    cut = [entry for entry in loop.ledger if any(entry.dropped.values())]
    assert cut and all(set(entry.price) == set(entry.reference) == {"flops", "memory"} for entry in cut)
    assert all(sum(price > 0 for price in entry.price.values()) == 1 for entry in cut)


def test_the_loop_says_what_the_summary_says(machine: Machine) -> None:
    """Steps that become slow after the last decision miss the budget: the finished loop, its metrics and line agree."""

    def live(loop: setpoint.Loop) -> None:
        machine.factor = 6.0 if loop.budget_met else 1.5
        machine.live(loop)

    with pytest.warns(UserWarning, match="the budget is not met"):
        loop = train(mlp(), Budget.fraction(0.6, of="latency"), 120, live)
    assert loop.summary is not None and not loop.summary.budget_met
    assert not loop.budget_met and loop.metrics()["budget_met"] == 0.0 and "last decision made" not in repr(loop)


def metered(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, read_j: Callable[[], float], range_j: float | None = None
) -> None:
    """Give the machine a recorded energy meter."""
    counter = Counter("recorded", read_j, range_j)
    monkeypatch.setattr(costing, "find_energy_meter", lambda devices: (EnergyMeter([counter]), ""))


@pytest.mark.parametrize(("resource", "margin"), [("latency", 0.03), ("energy", 0.05)])
def test_feedback_by_meters(machine: Machine, monkeypatch: pytest.MonkeyPatch, resource: str, margin: float) -> None:
    """Steps take half as long again as copies of them: feedback still lands within the limit, and not far below."""
    metered(machine, monkeypatch, lambda: machine.joules)
    loop = train(mlp(), Budget.fraction(0.6, of=resource), 120, machine.live)
    summary, unit = loop.summary, machine.factor * (machine.watts if resource == "energy" else 1.0)
    assert summary is not None and summary.budget_met, summary
    limit = 0.6 * unit * machine.step_s({"a": 256, "b": 256})  # of the dense model as measured
    assert summary.limit[resource] == pytest.approx(limit)
    assert 0.9 * limit < unit * machine.step_s(loop.widths) <= (1 + margin) * limit
    assert summary.sources[resource].startswith("measured") and {"modelled", "measured"} <= set(loop.ledger.header)


def test_energy_without_a_meter(machine: Machine) -> None:
    """Without a meter an energy budget needs a stated power, and is labelled as modelled everywhere."""
    if costing.find_energy_meter([torch.device("cpu")])[0] is not None:
        pytest.skip("this machine has a meter")
    with pytest.raises(CostError, match=r"no meter of energy.*watts="):
        train(mlp(), Budget.fraction(0.6, of="energy"), 120)
    loop = train(mlp(), Budget.fraction(0.6, of="energy", watts=25.0), 120, machine.live)
    summary = loop.summary
    assert summary is not None and summary.budget_met and not summary.metered, summary
    assert summary.sources["energy"] == "modelled: stated watts x seconds"
    dense_s = machine.factor * machine.step_s({"a": 256, "b": 256})
    assert summary.limit["energy"] == pytest.approx(0.6 * 25.0 * dense_s, rel=0.05)
    assert machine.factor * machine.step_s(loop.widths) <= 1.03 * 0.6 * dense_s


def test_a_metered_step_leaves_training_alone() -> None:
    """With a memory budget of 1.0 weights are bit-identical to training without Setpoint, metered steps included."""
    plain, watched = mlp(), mlp()
    train(watched, Budget.fraction(1.0, of="memory"), 20)
    model, optimizer, x = plain
    for _ in range(20):
        step(model(x), optimizer)
    assert all(map(torch.equal, model.parameters(), watched[0].parameters()))


def test_a_step_under_another_mode_is_not_read() -> None:
    """A step under the user's own dispatch mode gives no bytes, which is said once, and the mode stays in place."""
    model, optimizer, x = cnn()
    loop = setpoint.attach(model, optimizer, Budget.fraction(0.6, of="memory"), example=(x,), total_steps=30)
    with pytest.warns(UserWarning, match="memory is not measured now") as caught:
        for _ in range(30):
            with FlopCounterMode(display=False) as counter:
                step(model(x), optimizer)
            assert counter.get_total_flops() > 0
    assert loop.finish().metered == {} and len(caught) == 1
    assert loop.summary is not None and loop.summary.budget_met


def test_a_changed_budget_keeps_what_the_meter_has_told(machine: Machine) -> None:
    """Another fraction in the middle of the run is one of the dense model as measured, and is met by the meter."""

    def live(loop: setpoint.Loop) -> None:
        machine.live(loop)
        if loop.step == 10:
            loop.budget = Budget.fraction(0.7, of="latency")

    loop = train(mlp(), Budget.fraction(0.9, of="latency"), 60, live)
    limit = 0.7 * machine.factor * machine.step_s({"a": 256, "b": 256})
    summary = loop.summary
    assert summary is not None and summary.budget_met, summary
    assert summary.limit["latency"] == pytest.approx(limit)
    assert 0.85 * limit < machine.factor * machine.step_s(loop.widths) <= 1.03 * limit


@pytest.mark.filterwarnings("ignore:the budget of .* is above")
def test_a_model_that_was_not_cut_is_the_whole_of_the_dense_one(machine: Machine) -> None:
    """A clock that slows down and speeds up says nothing of an uncut model: its share of the dense latency is 100 %."""
    model, optimizer, x = mlp()
    loop = setpoint.attach(model, optimizer, "0.1 s latency", total_steps=60, example=(x,))
    for number in range(60):
        machine.factor = 4.0 if number < 20 else 1.0
        step(model(x), optimizer, lambda: machine.live(loop))
    summary = loop.finish()
    assert summary.budget_met and summary.resizes == 0
    assert summary.reason.endswith(": 100.0 % of the dense latency"), summary.reason
