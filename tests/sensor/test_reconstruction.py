"""What is lost with a unit when the layers that read it make up for it as well as they can."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import setpoint
from setpoint.errors import GroupError, LoopError
from setpoint.groups.group import Group
from setpoint.sensor.chain import SensorChain
from setpoint.sensor.consumer import find_consumers, input_rows
from setpoint.sensor.elimination import Elimination, energy_shares
from setpoint.sensor.magnitude import MagnitudeSensor
from setpoint.sensor.reading import Reading

Sensor = setpoint.ReconstructionSensor


def _read(model: nn.Module, *inputs: Tensor, sensor: Any = None) -> tuple[Reading, tuple[Group, ...]]:
    """The reading after one step on these inputs, one forward for each."""
    sensor = sensor or Sensor()
    groups = sensor.readable(setpoint.find_groups(model, (inputs[0],)), model)
    state = sensor.init(groups, model)
    for x in inputs:
        model(x).square().mean().backward()
    reading = sensor.read(sensor.update(state, groups, model), groups, 1)
    sensor.release(state)
    return reading, groups


def _mixed(rows: int, columns: int) -> Tensor:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(rows, columns, generator=generator).double()
        @ torch.randn(columns, columns, generator=generator).double()
    )


def _error_without(gone: list[int], x: Tensor, weight: Tensor) -> float:
    """Share of the energy of `x W` that ridge regression on the other columns of x leaves, by least squares."""
    ridge = 0.01 * x.square().sum(0).mean()
    rows = torch.cat([x, ridge.sqrt() * torch.eye(x.shape[1]).to(x)])
    kept = [column for column in range(x.shape[1]) if column not in gone]
    target = rows @ weight
    left = target - rows[:, kept] @ torch.linalg.lstsq(rows[:, kept], target).solution
    return float(left.square().sum() / (x @ weight).square().sum())


def test_saliencies_add_up_to_the_error_of_a_new_fit() -> None:
    """Claim: the k least saliencies of a linear layer sum up to the error of its least-squares fit without these k."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 4)).double()
    x = _mixed(250, 6)
    (saliency,) = _read(model, x)[0].saliency.values()
    order = np.argsort(saliency)
    hidden, weight = model[0](x).detach(), model[1].weight.detach().mT
    for k in range(1, 6):
        left = _error_without(order[:k].tolist(), hidden, weight)
        assert saliency[order[:k]].sum() == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize(("num_units", "each"), [(90, 1), (30, 3)])
def test_losses_add_up_over_many_removals(num_units: int, each: int) -> None:
    """Claim: so do the losses of many units, or of ones that own several columns, in whatever order they go; and the
    next one is told right.
    """
    x, weight = _mixed(300, 90), _mixed(90, 4)
    one = Elimination(x.mT @ x, weight, each)
    gone, lost = list[int](), 0.0
    for number in range(num_units - 2):
        unit = int(one.losses.argmin()) if number % 3 else int(np.isfinite(one.losses).argmax())
        lost += one.losses[unit]
        one.remove(unit)
        gone += range(unit * each, (unit + 1) * each)
        if number % 20 == 7 or number == num_units - 3:
            assert lost / one.energy == pytest.approx(_error_without(gone, x, weight), rel=1e-6)


def test_one_of_two_equal_units_is_free() -> None:
    """Claim: a unit that repeats another one costs next to nothing, whatever its weights; the other one then does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        for tensor in (model[0].weight, model[0].bias):
            tensor[5] = tensor[2]
    (saliency,) = _read(model, torch.randn(200, 8))[0].saliency.values()
    assert saliency.argmin() in (2, 5) and saliency.min() < 0.2 * np.delete(saliency, [2, 5]).min()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 2, 3, padding=2),
        nn.Conv2d(3, 4, (3, 2), stride=2, padding=1),
        nn.Conv2d(3, 4, 3, padding="same", dilation=2),
        nn.Conv2d(3, 4, 2, padding="valid"),
        nn.Conv3d(3, 4, 2, padding=1),
        nn.Linear(3, 5),
    ],
    ids=str,
)
def test_rows_times_columns_are_the_outputs(layer: nn.Module) -> None:
    """Claim: the rows of a layer's input times its weights by column are what the layer gives, position by position."""
    torch.manual_seed(0)
    spatial = {nn.Conv1d: (7,), nn.Conv2d: (6, 5), nn.Conv3d: (4, 3, 5)}.get(type(layer), ())
    x = torch.randn(4, 3, *spatial)
    group = Group("in", "unit", 3, (setpoint.groups.group.Slice("weight", 1, "consume", np.array([2, 0, 1])),))
    (consumer,) = find_consumers(group, layer)
    rows = consumer.rows(layer, x, 10_000)
    made = rows.flatten(0, 1).mT @ consumer.weight(layer) + layer.bias
    expected = layer(x)
    expected = expected if layer.bias is None or not spatial else expected.movedim(1, -1)
    torch.testing.assert_close(made, expected.reshape(-1, expected.shape[-1]))
    few = input_rows(layer, x, 2)
    assert len(few) == 2


def test_a_norm_behind_the_layer_weighs_its_outputs() -> None:
    """Claim: outputs count by the scale of the BatchNorm behind them, and not at all where that is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1, groups=6),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 2),
    )
    x = torch.randn(16, 2, 5, 5)
    with torch.no_grad():
        model[4].weight.copy_(torch.tensor([0.0, 2.0, 0.0, 0.0]))
    reading, groups = _read(model, x)
    (group,) = [group for group in groups if group.num_units == 6]
    model(x)
    hidden = model[:3](x).detach()
    patches = F.unfold(hidden, 3).movedim(1, 2).reshape(-1, 6, 9)
    alone = energy_shares([(patches.permute(1, 2, 0), model[3].weight[1].detach().reshape(54, 1))])
    np.testing.assert_allclose(reading.saliency[group.name], alone, rtol=1e-3)


def test_several_consumers_and_flattened_channels() -> None:
    """Claim: shares of several consumers add up; of a flattened map a channel owns all its positions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.one, self.two = nn.Conv2d(1, 5, 3), nn.Linear(20, 3), nn.Conv2d(5, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.up(x))
            return self.one(hidden.flatten(1)).sum() + self.two(hidden).sum()

    torch.manual_seed(0)
    model, x = Net(), torch.randn(9, 1, 4, 4)
    reading, _ = _read(model, x)
    hidden = torch.relu(model.up(x)).detach()
    flat = hidden.flatten(2).permute(1, 2, 0), model.one.weight.detach().mT
    pointwise = hidden.permute(1, 0, 2, 3).reshape(5, 1, -1), model.two.weight.detach()[:, :, 0, 0].mT
    np.testing.assert_allclose(reading.saliency["up"], energy_shares([flat, pointwise]), rtol=1e-4)


def test_heads_are_read_where_the_values_leave() -> None:
    """Claim: attention heads are judged by the output projection; the heads of `nn.MultiheadAttention` are refused."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(3)), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (each(x).unflatten(-1, (-1, 4)).transpose(1, 2) for each in self.qkv)
            return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    model = Attention()
    with torch.no_grad():
        model.out.weight[:, 4:8] = 0.0
    groups = setpoint.find_groups(model, (torch.randn(2, 5, 12),))
    (heads,) = [group for group in groups if group.what == "head"]
    sensor = Sensor()
    assert heads in sensor.readable(groups, model)
    assert not [each for each in sensor.readable(groups, model) if "out.weight" not in {p.tensor for p in each.slices}]
    state = sensor.init((heads,), model)
    model(torch.randn(8, 5, 12)).sum().backward()
    reading = sensor.read(sensor.update(state, (heads,), model), (heads,), 1)
    assert reading.saliency[heads.name].argmin() == 1 and reading.saliency[heads.name][1] == 0.0
    closed = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    theirs = setpoint.find_groups(closed, (x, x, x))
    assert theirs and sensor.readable(theirs, closed) == ()
    with pytest.raises(GroupError, match="are read by something else than linear layers and convolutions"):
        sensor.init(theirs, closed)


def test_only_training_forwards_count_once() -> None:
    """Claim: forwards without gradients do not count, checkpointed ones count once, and accumulated ones all count."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, other = torch.randn(20, 4), torch.randn(20, 4)
    (both,) = _read(model, torch.cat([x, other]))[0].saliency.values()
    (parts,) = _read(model, x, other)[0].saliency.values()
    np.testing.assert_allclose(parts, both, rtol=1e-5)

    def rows_of(forward: Any) -> int:
        groups = setpoint.find_groups(model, (x,))
        sensor = Sensor()
        state = sensor.init(groups, model)
        with torch.no_grad():
            model(other)
        forward().sum().backward()
        state = sensor.update(state, groups, model)
        sensor.release(state)
        return int(state.seen[0].rows["0"].shape[2])

    wanting = x.clone().requires_grad_()
    for reentrant in (False, True):
        assert rows_of(lambda: checkpoint(model, wanting, use_reentrant=reentrant)) == 20  # noqa: B023


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )


class _Run:
    """A run to half of the FLOPs on batches that are known by their step."""

    def __init__(self, steps: int = 40, **settings: Any) -> None:
        self.model, self.steps = _net(), steps
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.sensor = Sensor(rows=64, steps=2)
        self.loop = setpoint.attach(
            self.model,
            self.optimizer,
            "50% flops",
            example=(torch.zeros(16, 16),),
            total_steps=steps,
            sensor=self.sensor,
            **settings,
        )
        self.hooked: list[int] = []

    def decisions(self) -> list[dict[str, Any]]:
        """The ledger, without seconds."""
        return [{key: v for key, v in row.items() if "seconds" not in key} for row in self.loop.ledger.to_rows()]

    def go(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
            if any(layer._forward_hooks for layer in self.model.modules()):
                self.hooked.append(step)
            self.model(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def test_a_run_meets_its_budget_and_listens_only_before_decisions() -> None:
    """Claim: a run meets its budget; hooks are on the model in the two steps before each decision, and then gone."""
    run = _Run()
    assert not run.loop.ledger.header["frozen"] or "1" in run.loop.widths
    run.go(0, 40)
    decisions = [entry.step for entry in run.loop.ledger]
    assert run.loop.finish().budget_met
    expected = {step for each in decisions for step in (each - 2, each - 1) if step >= 0} | {0}
    assert set(run.hooked) == expected and len(expected) < 40


@pytest.mark.parametrize("at", [7, 9])
def test_a_run_goes_on_bit_for_bit(at: int) -> None:
    """Claim: a run that is resumed at any step, in the middle of a window or not, decides as if it had gone on."""
    straight = _Run()
    straight.go(0, 40)
    first = _Run()
    first.go(0, at)
    held = io.BytesIO()
    torch.save([first.loop.state_dict(), first.model.state_dict(), first.optimizer.state_dict()], held)
    held.seek(0)
    second = _Run()
    for part, state in zip(
        (second.loop, second.model, second.optimizer), torch.load(held, weights_only=True), strict=True
    ):
        part.load_state_dict(state)
    second.go(at, 40)
    assert second.decisions() == straight.decisions()
    for one, other in zip(second.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_it_cannot_do_is_refused_by_name() -> None:
    """Claim: compiled code runs no hooks, a price needs units of the loss, a chain reads all along: all are said."""
    model = torch.compile(_net(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(GroupError, match="inputs of the layers behind it are not read in compiled code"):
        setpoint.attach(model, optimizer, "50% flops", example=(torch.zeros(4, 16),), total_steps=9, sensor=Sensor())
    run = _net()
    optimizer = torch.optim.SGD(run.parameters(), lr=0.05)
    price = setpoint.Price(1e-3, of="flops")
    for sensor in (Sensor(), MagnitudeSensor(), SensorChain(setpoint.TaylorSensor(1), MagnitudeSensor())):
        with pytest.raises(LoopError, match=f"{type(sensor).__name__} reads in no unit of the loss"):
            setpoint.attach(run, optimizer, price, example=(torch.zeros(16, 16),), total_steps=10, sensor=sensor)
    with pytest.raises(ValueError, match="rows"):
        Sensor(rows=0)
    with pytest.raises(ValueError, match="ReconstructionSensor reads only the steps before a decision"):
        SensorChain(setpoint.TaylorSensor(1), Sensor())


def test_numbers_that_are_not_finite_decide_nothing() -> None:
    """Claim: a step whose inputs overflow is skipped as a whole and counted, and weights that are NaN read NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    groups = setpoint.find_groups(model, (torch.ones(2, 4),))
    sensor = Sensor()
    state = sensor.init(groups, model)
    model(torch.full((8, 4), np.inf))
    state = sensor.update(state, groups, model)
    model(torch.randn(8, 4))
    state = sensor.update(state, groups, model)
    reading = sensor.read(state, groups, 2)
    assert reading.skipped_steps == 1 and reading.num_steps == 1 and reading.finite()
    with torch.no_grad():
        model[2].weight[0, 0] = np.nan
    assert not sensor.read(state, groups, 2).finite()


def test_a_copy_of_the_model_is_not_listened_to() -> None:
    """Claim: a deep copy of the model, or one that was pickled, may run without being read."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    groups = setpoint.find_groups(model, (torch.ones(2, 4),))
    sensor = Sensor()
    state = sensor.init(groups, model)
    held = io.BytesIO()
    torch.save(model, held)
    copy.deepcopy(model)(torch.randn(8, 4))
    assert sensor.update(state, groups, model).steps_seen == {"0": 0}


def test_flops_follow_the_sizes() -> None:
    """Claim: a reading is counted: halving the widths of a layer costs less than half."""
    wide, narrow = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 3)) for n in (64, 32))
    costs = [Sensor().flops(setpoint.find_groups(each, (torch.ones(2, 4),)), each) for each in (wide, narrow)]
    assert 0 < costs[1] < 0.5 * costs[0]


def test_moments_are_exact_under_autocast() -> None:
    """Claim: where the whole step runs under autocast, the optimizer's included, readings are those without it."""
    x = _mixed(64, 16).float()

    def reading(*, enabled: bool) -> Reading:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return _read(model, x)[0]

    rounded, exact = reading(enabled=True).saliency["0"], reading(enabled=False).saliency["0"]
    assert np.isfinite(rounded).all() and np.corrcoef(rounded, exact)[0, 1] > 0.98
