import numpy as np
import pytest
import torch
from torch import Tensor, nn

from setpoint import HankelSensor, TaylorSensor
from setpoint.errors import StateSpaceError
from setpoint.groups.group import Group
from setpoint.groups.trace import find_groups
from setpoint.sensor.chain import SensorChain
from setpoint.states import balance
from setpoint_bench.models import SequenceClassifier

X = torch.randn(6, 12, 1, generator=torch.Generator().manual_seed(1))


class _Mixed(nn.Module):
    """States and hidden neurons in one model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.states = SequenceClassifier(1, 8, num_channels=4, num_states=10, num_blocks=2)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.relu(self.hidden(self.states(x))))
        return logits


def _groups(model: nn.Module) -> tuple[Group, ...]:
    return tuple(group for group in find_groups(model, (X,)) if group.lossless)


def _gradients(model: nn.Module, seed: int = 0) -> None:
    model.zero_grad()
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
    (model(x) * torch.arange(1.0, 4.0)).sum(1).square().mean().backward()


def test_states_are_ranked_by_hankel_value_and_summed_by_taylor() -> None:
    """Saliency falls with the Hankel values, in proportion to their squares; a layer's sum is its gate's saliency."""
    model = _Mixed()
    groups = tuple(group for group in _groups(model) if group.kind == "state")
    assert [group.num_units for group in groups] == [10, 10]
    sensor = HankelSensor(num_samples=6)
    state = sensor.init(groups, model)
    gates: dict[str, list[float]] = {group.name: [] for group in groups}
    for seed in range(4):
        _gradients(model, seed)
        state = sensor.update(state, groups, model)
        for position, group in enumerate(groups):
            layer = model.states.blocks[position].lru
            r = sum((w * w.grad).sum() for w in (layer.C_re, layer.C_im) if w.grad is not None)
            gates[group.name].append(float(torch.as_tensor(r).detach()))
    reading = sensor.read(state, groups, step=4)
    for position, group in enumerate(groups):
        values = balance(model.states.blocks[position].lru.state_space()).values.numpy()
        saliency = reading.saliency[group.name]
        assert (np.diff(saliency) <= 0).all()
        energy = (values**2).reshape(-1, 2).sum(1)
        np.testing.assert_allclose(saliency / saliency.sum(), energy / energy.sum(), rtol=1e-9)
        r = np.array(gates[group.name])
        assert abs(saliency.sum() - 0.5 * (6 * r.var(ddof=1) + r.mean() ** 2)) < 0.05 * saliency.sum()
        assert group.name in reading.basis
    assert reading.calibrated and reading.finite()


def test_kinds_are_read_by_their_own_sensor() -> None:
    """Units read by Taylor and states by Hankel in one reading are those that each sensor reads alone."""
    model = _Mixed()
    groups = _groups(model)
    units, states = TaylorSensor(num_samples=6), HankelSensor(num_samples=6)
    sensor = SensorChain(states, units)
    assert sensor.readable(groups, model) == groups
    parts = {kind: tuple(group for group in groups if group.kind == kind) for kind in ("unit", "state")}
    state, alone = sensor.init(groups, model), (units.init(parts["unit"], model), states.init(parts["state"], model))
    for seed in range(3):
        _gradients(model, seed)
        state = sensor.update(state, groups, model)
        alone = (units.update(alone[0], parts["unit"], model), states.update(alone[1], parts["state"], model))
    got = sensor.read(state, groups, 3)
    want = (units.read(alone[0], parts["unit"], 3), states.read(alone[1], parts["state"], 3))
    for each in want:
        for name, values in each.saliency.items():
            np.testing.assert_allclose(got.saliency[name], values)
    assert set(got.basis) == {group.name for group in parts["state"]} and got.calibrated
    assert sensor.flops(groups, model) == units.flops(parts["unit"], model) + states.flops(parts["state"], model)


def test_unstable_states_make_no_decision() -> None:
    """A layer that has become NaN reads NaN; one that is so from the start is refused by name."""
    model = _Mixed()
    groups = tuple(group for group in _groups(model) if group.kind == "state")
    sensor = HankelSensor(num_samples=6)
    state = sensor.init(groups, model)
    _gradients(model)
    state = sensor.update(state, groups, model)
    with torch.no_grad():
        model.states.blocks[1].lru.nu_log[2] = torch.nan
    assert not sensor.read(state, groups, 1).finite()
    with pytest.raises(StateSpaceError, match=r"layer 'states.blocks.1.lru' has NaN"):
        sensor.init(groups, model)
