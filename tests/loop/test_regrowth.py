"""Regrowth in a loop: units rest, visit, come back, and everything is recorded."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import setpoint
from controller.returning import Returning
from setpoint.controller.plan import Conduct, Controller, Observation, Plan
from setpoint.controller.priced import PricedController
from setpoint.controller.schedule import Schedule
from setpoint.errors import LoopError
from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group, Slice, keep_all
from setpoint.regrowth.regrowing import Regrowing
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.reading import Reading, Traits


class Net(nn.Module):
    """A convolutional net with batch norm and a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.inner = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 1))
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + self.inner(x)).mean((2, 3)))


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 2, 6, 6, generator=generator)
    return x, (x[:, 0].mean((1, 2)) > 0).long() + (x[:, 1, 0, 0] > 0.5).long()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> list[float]:
    losses = []
    for step in range(first, first + steps):
        x, y = data(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@dataclass(frozen=True)
class Scripted(Controller[None]):
    """A controller that drops and brings back what it is told to, at the steps that it is told."""

    drop: Mapping[int, Mapping[str, list[int]]]
    back: Mapping[int, Mapping[str, list[int]]] = field(default_factory=dict)
    last: int = 30
    regrow: bool = True
    seen: list[Observation] = field(default_factory=list)

    @property
    def conduct(self) -> Conduct:
        return Conduct(regrow=self.regrow)

    def init(self, groups: tuple[Group, ...]) -> None:
        """It remembers nothing."""

    def due(self, step: int, total_steps: int) -> bool:
        return step in {*self.drop, *self.back, self.last}

    def probe_due(self, step: int, total_steps: int) -> bool:
        return any(self.due(each, total_steps) for each in (step + 1, step + 2))

    def decide(self, state: Any, observation: Observation, cost: Any, groups: Any) -> tuple[Any, Plan]:
        self.seen.append(observation)
        keep = {group.name: np.ones(group.num_units, bool) for group in groups}
        for name, units in self.drop.get(observation.step, {}).items():
            keep[name][units] = False
        grow = {name: np.array(units) for name, units in self.back.get(observation.step, {}).items()}
        worth = {name: np.full(len(units), 2.0) for name, units in grow.items()}
        budget_met = observation.step == self.last
        return state, Plan(observation.step, keep, {}, {"params": 1.0}, {}, budget_met, "as told", grow, worth)


def attach(
    model: nn.Module, controller: Any, total_steps: int = 40, **options: Any
) -> tuple[torch.optim.Optimizer, setpoint.Loop]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    budget = setpoint.Budget.fraction(0.9, of="params")
    settings = {"example": (data(0)[0],), "total_steps": total_steps, "controller": controller, **options}
    return optimizer, setpoint.attach(model, optimizer, budget, **settings)


DROP, BACK = (
    {5: {"inner.0": [1, 4, 9], "stem": [0, 3]}, 10: {"inner.0": [0]}},
    {15: {}, 20: {"inner.0": [0, 4], "stem": [3]}},
)


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets probing take any share of a run too short to pay for it."""
    monkeypatch.setattr("setpoint.regrowth.regrowing._PROBE_SHARE", 1.0)


def test_units_rest_are_probed_and_come_back(dear: None) -> None:
    """Claim: what was dropped comes back at its origin; ledger, explanations, summary, sensor and copies follow."""
    torch.manual_seed(0)
    model, controller = Net(), Scripted(DROP, BACK)
    ema = copy.deepcopy(model)
    optimizer, loop = attach(model, controller, copies=(ema,))
    train(model, optimizer, 20)
    assert loop.widths == {"stem": 11, "inner.0": 14}
    assert loop.origin["stem"].tolist() == [1, 2, 3, *range(4, 12)]
    assert loop.origin["inner.0"].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, *range(10, 16)]
    assert ema.stem.weight.shape == model.stem.weight.shape == (11, 2, 3, 3)
    entry = loop.ledger[-1]
    assert entry.grown == {"inner.0": [0, 4], "stem": [3]} and entry.grown_worth["stem"] == [2.0]
    probe = controller.seen[-1].probe
    assert probe is not None and probe.origins["inner.0"].tolist() == [0, 1, 4, 9]
    assert entry.gain["inner.0"] == [probe.gain["inner.0"][0], probe.gain["inner.0"][2]]
    assert np.isfinite(probe.error["inner.0"]).all() and probe.num_steps <= 8
    assert probe.rested["inner.0"].tolist() == [2, 3, 3, 3] and set(probe.drops["stem"]) == {1}
    back, gone = loop.explain("stem", 3), loop.explain("stem", 0)
    assert back.alive and back.returned == 20 and math.isnan(back.saliency) and "came back at step 20" in str(back)
    assert not gone.alive and gone.returned is None and gone.step == 5
    train(model, optimizer, 20, 20)
    summary = loop.finish()
    assert summary.budget_met and math.isfinite(loop.explain("stem", 3).saliency)
    assert (summary.dropped_units, summary.regrown_units, dropped_again(loop)) == (6, 3, 0)
    assert summary.spent["params"] == sum(parameter.numel() for parameter in model.parameters())


def test_probing_is_counted_and_stays_within_its_share() -> None:
    """Claim: probed steps cost what the flop counter says they cost more, are overhead, and take at most 1 %."""
    torch.manual_seed(0)
    model = Net()
    optimizer, loop = attach(
        model, Scripted({60: {"inner.0": [1]}, 70: {"stem": [0]}}, {65: {}}, last=90), total_steps=100
    )
    train(model, optimizer, 63)
    small = counted(model)
    before = loop.spending.account.train_flops, loop.spending.account.probed_steps
    train(model, optimizer, 5, 63)
    assert loop.spending.account.train_flops - before[0] == pytest.approx(5 * small, rel=1e-3) and before[1] == 0
    train(model, optimizer, 2, 68)
    summary_flops, steps = loop.spending.account.probing_flops, loop.spending.account.probed_steps
    wide = Net()
    assert steps == 2 and summary_flops == pytest.approx(2 * (counted(wide) - small), rel=1e-3)
    train(model, optimizer, 30, 70)
    summary = loop.finish()
    assert 0 < loop.spending.account.probing_flops <= 0.01 * summary.train_flops
    assert summary.overhead_seconds >= summary.overhead["probing"] > 0


def dropped_again(loop: setpoint.Loop) -> int:
    """How many units were dropped more than once."""
    drops = Counter((name, unit) for entry in loop.ledger for name, units in entry.dropped.items() for unit in units)
    return sum(count > 1 for count in drops.values())


def counted(model: nn.Module) -> float:
    x, y = data(0)
    with FlopCounterMode(display=False) as counter:
        nn.functional.cross_entropy(copy.deepcopy(model)(x), y).backward()
    return float(counter.get_total_flops())


def test_what_comes_back_is_what_rested() -> None:
    """Claim: a unit comes back with its weights to the bit, but for outgoing weights, which are zero, so that outputs
    stay as they are; where a cut is taken back, with these too.
    """
    for undoes in (False, True):
        torch.manual_seed(0)
        model = Net()
        _, loop = attach(model, Scripted({}))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        keep = {"inner.0": np.arange(16) > 4, "stem": np.arange(12) != 2}
        loop.control.actuator.act(Plan(1, keep), Reading(1, {}, 1))
        assert loop.widths == {"stem": 11, "inner.0": 11}
        back = {"inner.0": np.arange(5), "stem": np.array([2])}
        loop.control.actuator.act(Plan(2, keep_all(loop.groups), grow=back, undoes=undoes), Reading(2, {}, 1))
        if not undoes:
            assert not model.head.weight[:, 2].any() and not model.inner[3].weight[:, :5].any()
            before["head.weight"][:, 2] = before["inner.3.weight"][:, :5] = before["inner.0.weight"][:, 2] = 0.0
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)
        loop.detach()


def run(seed: int, controller: Any) -> tuple[setpoint.Loop, nn.Module]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    budget = setpoint.Budget.fraction(0.4, of="flops")
    x = torch.randn(400, 16, 8)
    with setpoint.attach(model, optimizer, budget, example=(x[0],), total_steps=400, controller=controller) as loop:
        for step in range(400):
            # The task changes in the middle, so that other units become useful.
            target = (x[step, :, :4] if step < 150 else x[step, :, 4:]).argmax(1)
            nn.functional.cross_entropy(model(x[step]), target).backward()
            optimizer.step()
            optimizer.zero_grad()
    return loop, model


def test_a_regrowing_run_lands_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: with regrowth every run lands at 70 %, never over the limit after a third, and probing keeps within its
    share; where there is room units come back; over all runs at most a tenth of those dropped are dropped again;
    and the same seed makes the same ledger.
    """
    monkeypatch.setattr("setpoint.regrowth.regrowing._PROBE_SHARE", 0.05)  # the run is short
    rising = Returning(PricedController(Schedule(settle=0.15), regrow=True), share=0.6)
    runs = [run(0, rising), *(run(seed, PricedController(regrow=True)) for seed in range(3))]
    summaries = [loop.summary for loop, _ in runs if loop.summary is not None]
    for (loop, model), summary in zip(runs, summaries, strict=True):
        assert summary.budget_met and summary.spent["flops"] <= summary.limit["flops"]
        assert all(entry.spent["flops"] <= summary.limit["flops"] for entry in loop.ledger if entry.step >= 120)
        assert loop.ledger[-1].step == 280 and not loop.ledger[-1].grown
        assert 0 < loop.spending.account.probing_flops <= 0.05 * summary.train_flops
        assert summary.final_params == sum(parameter.numel() for parameter in model.parameters())
    assert summaries[0].regrown_units > 0
    assert sum(dropped_again(loop) for loop, _ in runs) <= 0.1 * sum(each.dropped_units for each in summaries)
    first, model = runs[0]
    second, other = run(0, rising)
    assert [(e.dropped, e.grown, e.reason) for e in first.ledger] == [
        (e.dropped, e.grown, e.reason) for e in second.ledger
    ]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_small_reserve_lets_go_and_says_so() -> None:
    """Claim: with room for next to nothing the run goes on, warns, and names what it let go in the entry."""
    model = Net()
    optimizer, loop = attach(model, Scripted({5: {"inner.0": [1, 4]}}), actuator=Regrowing(reserve_bytes=100))
    with pytest.warns(UserWarning, match="reserve of 100 bytes is full"):
        train(model, optimizer, 10)
    assert "let go" in loop.ledger[0].reason
    loop.detach()


def test_detaching_while_units_visit_leaves_the_shrunk_model(dear: None) -> None:
    """Claim: after a detach, or an interrupt, in the middle of a probed forward pass the model is the shrunk one."""

    class Interrupted(Net):
        stop = False

        def forward(self, x: Tensor) -> Tensor:
            if self.stop and self.training:
                raise KeyboardInterrupt
            return super().forward(x)

    torch.manual_seed(0)
    model = Interrupted()
    optimizer, loop = attach(model, Scripted({60: {"inner.0": [1]}}, {65: {}}, last=80), 100)
    train(model, optimizer, 77)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert loop.widths["inner.0"] == 15
    train(model, optimizer, 1, 77)
    assert loop.widths["inner.0"] == 16
    model.stop = True
    with pytest.raises(KeyboardInterrupt), loop:
        train(model, optimizer, 1)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes
    assert loop.widths["inner.0"] == 15 and loop.reading().finite()
    model.stop = False
    train(model, optimizer, 2)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head((x + checkpoint(self.inner, x, use_reentrant=False)).mean((2, 3)))


@pytest.mark.parametrize(
    "build", [lambda: torch.compile(Net(), backend="eager"), Checkpointed], ids=["compiled", "saved"]
)
def test_compiled_code_and_activation_checkpointing_are_probed(build: Any, dear: None) -> None:
    """Claim: visitors are real units, so that compiled code sees them, and so do forwards that are run again."""
    torch.manual_seed(0)
    model, controller = build(), Scripted({5: {"inner.0": [1, 4, 9]}}, {15: {}, 20: {"inner.0": [4]}})
    optimizer, loop = attach(model, controller)
    train(model, optimizer, 40)
    gain = loop.ledger[2].gain["inner.0"]
    assert loop.finish().regrown_units == 1 and np.isfinite(gain).all() and gain[0] != 0.0


def test_a_sensor_whose_units_cannot_come_back_is_refused() -> None:
    """Claim: a sensor that cannot take units in is refused by name, also inside a chain."""
    once = setpoint.TaylorSensor(16)
    once.traits = Traits(returns=False)
    for sensor in (once, SensorChain(setpoint.HankelSensor(16), once)):
        with pytest.raises(LoopError, match=f"{type(sensor).__name__} reads no units that have come back"):
            attach(Net(), PricedController(regrow=True), sensor=sensor)


def test_a_taylor_state_begins_anew_for_units_that_came_back() -> None:
    """Claim: after cut and grow, units that stayed read as before, and one that came back reads as if the sensor
    had begun with it.
    """
    group = Group("a", "unit", 3, (Slice("weight", 1, "consume", np.arange(3)),))
    model, sensor = nn.Linear(3, 2, bias=False), setpoint.TaylorSensor(4, window=5)
    gradients = torch.randn(12, 2, 3)

    def update(state: Any, some: Any, taken: list[int]) -> Any:
        for gradient in some:
            model.weight.grad = gradient[:, taken].clone()
            state = sensor.update(state, (group,), model)
        return state

    def read(state: Any) -> Reading:
        return sensor.read(state, (group,), 1)

    whole = update(sensor.init((group,), model), gradients, [0, 1, 2])
    late = update(sensor.init((group,), model), gradients[8:], [0, 1, 2])
    state = update(sensor.init((group,), model), gradients[:8], [0, 1, 2])
    state = follow(state, Change({"a": np.array([True, False, True])}, {"a": np.array([False, True, False])}))
    assert read(state).saliency["a"][1] == 0.0 and read(state).finite()
    state = update(state, gradients[8:], [0, 1, 2])
    np.testing.assert_allclose(read(state).saliency["a"][[0, 2]], read(whole).saliency["a"][[0, 2]], rtol=1e-5)
    np.testing.assert_allclose(read(state).saliency["a"][1], read(late).saliency["a"][1], rtol=1e-5)
