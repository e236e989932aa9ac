"""What every sensor must do; a row per sensor, and one for each registered criterion.

`largest_pull` is a criterion that the library does not have: these lines are all that a new one takes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import setpoint
from actuator.hand_made import group
from setpoint.errors import LoopError
from setpoint.groups.follow import Change, follow
from setpoint.groups.group import Group
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.reading import Reading, Sensor, Traits
from setpoint.sensor.taylor import CRITERIA, AveragingSensor, TaylorSensor, criterion
from setpoint.sensor.units import Units
from setpoint.states.hankel import HankelSensor
from setpoint_bench.random_sensor import RandomSensor


@criterion(role="produce")
def largest_pull(units: Units) -> Tensor:
    """Sum of `|w dL/dw|` over the weights that write a unit."""
    return units.add_up(lambda weight, gradient: (weight * gradient).abs())


SENSORS = [
    *(pytest.param(AveragingSensor(each, 8, window=5), id=name) for name, each in CRITERIA.items()),
    pytest.param(TaylorSensor(8, window=5), id="taylor"),
    pytest.param(MagnitudeSensor(), id="magnitude"),
    pytest.param(RandomSensor(), id="random"),
    pytest.param(SensorChain(HankelSensor(8), TaylorSensor(8, window=5)), id="chain"),
]
rows = pytest.mark.parametrize("sensor", SENSORS)


def _model(hidden: int = 6) -> tuple[nn.Sequential, tuple[Group, ...]]:
    model = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 5), nn.ReLU(), nn.Linear(5, 2))
    return model, tuple(
        group(name, size, f"{name}.weight:0:produce {name}.bias:0:carry {reader}.weight:1:consume")
        for name, reader, size in (("0", "2", hidden), ("2", "4", 5))
    )


def _steps(sensor: Sensor[Any], state: Any, model: nn.Module, groups: tuple[Group, ...], count: int) -> Any:
    for _ in range(count):
        model.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        state = sensor.update(state, groups, model)
    return state


@rows
def test_reads_one_finite_number_per_unit(sensor: Sensor[Any]) -> None:
    """A reading holds a saliency >= 0 in float64 for each unit of each group, and says how it came about."""
    model, groups = _model()
    assert sensor.readable(groups, model) == groups
    reading = sensor.read(_steps(sensor, sensor.init(groups, model), model, groups, 4), groups, 4)
    assert reading.finite()
    assert {name: values.shape for name, values in reading.saliency.items()} == {"0": (6,), "2": (5,)}
    assert all(values.dtype == np.float64 and (values >= 0).all() for values in reading.saliency.values())
    assert (reading.step, reading.num_steps, reading.skipped_steps) == (4, 4, 0)


@rows
def test_leaves_model_and_chance_alone(sensor: Sensor[Any]) -> None:
    """Sensing changes no weight, no gradient and no random state."""
    model, groups = _model()
    state = _steps(sensor, sensor.init(groups, model), model, groups, 1)
    before = [tensor.clone() for each in model.parameters() for tensor in (each.detach(), each.grad)]
    chance = torch.get_rng_state()
    state = sensor.update(state, groups, model)
    sensor.read(state, groups, 2)
    after = [tensor for each in model.parameters() for tensor in (each.detach(), each.grad)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(chance, torch.get_rng_state())


@rows
def test_same_steps_same_reading(sensor: Sensor[Any]) -> None:
    """The same steps give the same reading to the last bit; an older state is not touched by a later update."""
    readings = []
    for _ in range(2):
        torch.manual_seed(1)
        model, groups = _model()
        early = _steps(sensor, sensor.init(groups, model), model, groups, 3)
        first = sensor.read(early, groups, 3)
        _steps(sensor, early, model, groups, 2)
        readings += [first, sensor.read(early, groups, 3)]
    for name in ("0", "2"):
        assert len({values.saliency[name].tobytes() for values in readings}) == 1


@rows
def test_a_cut_state_remembers_the_kept_units(sensor: Sensor[Any]) -> None:
    """After model, groups and state are cut alike, the cut group's reading is that of its kept units; updates go on."""
    model, groups = _model()
    state = _steps(sensor, sensor.init(groups, model), model, groups, 4)
    before = sensor.read(state, groups, 4)
    kept = np.array([True, False, True, True, False, True])
    small, small_groups = _model(4)
    with torch.no_grad():
        for target, source in zip(small.parameters(), model.parameters(), strict=True):
            rows = kept if source.shape[0] == 6 else slice(None)
            values = source[torch.from_numpy(kept)] if rows is kept else source
            target.copy_(values[:, torch.from_numpy(kept)] if values.dim() == 2 and values.shape[1] == 6 else values)
    state = follow(state, Change(keep={"0": kept}))
    if isinstance(sensor, MagnitudeSensor):
        state = sensor.update(state, small_groups, small)
    after, expected = sensor.read(state, small_groups, 4), before.saliency["0"][kept]
    np.testing.assert_allclose(after.saliency["0"], expected, rtol=1e-5)
    again = sensor.read(_steps(sensor, state, small, small_groups, 1), small_groups, 5)
    assert {name: values.shape for name, values in again.saliency.items()} == {"0": (4,), "2": (5,)}


@rows
def test_does_not_wait_for_the_device(sensor: Sensor[Any]) -> None:
    """An update reads no value back to the host: it runs on the meta device, which has none."""
    with torch.device("meta"):
        model, groups = _model()
    state = sensor.init(groups, model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    state = sensor.update(state, groups, model, torch.ones((), device="meta"))
    for _ in range(40):
        state = sensor.update(state, groups, model)
    assert sensor.flops(groups, model) >= 0


def test_a_new_criterion_is_averaged_by_its_definition() -> None:
    """Claim: a criterion of three lines reads its definition, averaged over steps; NaN and scales change nothing."""
    model, groups = _model()
    sensor = AveragingSensor(largest_pull, window=10**8)
    state, expected = sensor.init(groups, model), []
    for step in range(4):
        model.zero_grad()
        model(torch.randn(8, 4) * (torch.nan if step == 2 else 1.0)).square().mean().backward()
        expected.append((model[0].weight * model[0].weight.grad).abs().sum(1).detach())
        model.apply(lambda layer: [p.grad.mul_(64.0) for p in layer.parameters(recurse=False)])
        state = sensor.update(state, groups, model, torch.tensor(64.0))
    reading = sensor.read(state, groups, 4)
    mean = torch.stack([expected[step] for step in (0, 1, 3)]).mean(0)
    np.testing.assert_allclose(reading.saliency["0"], mean.numpy(), rtol=1e-5)
    assert (reading.num_steps, reading.skipped_steps, reading.calibrated) == (3, 1, False)


def driven(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, sensor: Any) -> setpoint.Loop:
    """A run with this sensor, which meets its budget."""
    with setpoint.attach(model, optimizer, 0.5, example=(x,), total_steps=30, sensor=sensor) as loop:
        for _ in range(30):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert loop.summary is not None and loop.summary.budget_met
    return loop


def test_a_new_criterion_drives_a_run() -> None:
    """Claim: a run with it meets its budget; a Price, which needs the unit of the loss, is refused."""
    model, x = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(8, 4)
    optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), AveragingSensor(largest_pull)
    with pytest.raises(LoopError, match="AveragingSensor reads in no unit of the loss"):
        setpoint.attach(model, optimizer, setpoint.Price(1e-3, of="flops"), example=(x,), total_steps=30, sensor=sensor)
    driven(model, optimizer, x, sensor)


class Counting:
    """A sensor of one's own that derives from nothing: units that come later are worth more."""

    traits = Traits()

    def readable(self, groups: tuple[Group, ...], model: nn.Module) -> tuple[Group, ...]:
        return groups

    def init(self, groups: tuple[Group, ...], model: nn.Module) -> int:
        return 0

    def update(self, state: int, groups: Any, model: nn.Module, grad_scale: Tensor | None = None) -> int:
        return state + 1

    def read(self, state: int, groups: tuple[Group, ...], step: int) -> Reading:
        return Reading(step, {group.name: np.arange(1.0, group.num_units + 1) for group in groups}, 1)

    def flops(self, groups: Any, model: nn.Module) -> float:
        return 0.0

    def over(self, ranks: Any) -> Any:
        return self

    def forget(self, state: int) -> None: ...

    def release(self, state: int) -> None: ...


@pytest.mark.parametrize("lacking", ["", "traits", "forget", "read"])
def test_a_sensor_of_ones_own_needs_no_base(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: an object with a sensor's methods and traits is one; of another, the error names what it lacks."""
    model, x = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)), torch.randn(8, 4)
    optimizer, sensor = torch.optim.SGD(model.parameters(), lr=0.1), Counting()
    if lacking:
        monkeypatch.delattr(Counting, lacking)
        with pytest.raises(LoopError, match=rf"which has no {lacking}: .*setpoint\.sensor\.reading\.Sensor"):
            setpoint.attach(model, optimizer, 0.5, example=(x,), total_steps=30, sensor=sensor)
        return
    assert isinstance(sensor, Sensor)
    assert driven(model, optimizer, x, sensor).origin["0"].tolist() == list(range(16, 32))
