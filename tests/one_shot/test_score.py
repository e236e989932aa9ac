"""What is lost with a unit when the layers that read it make up for it as well as they can."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import setpoint
from setpoint.groups.group import Group
from setpoint.one_shot.forward import moments_on
from setpoint.sensor.consumer import find_consumers, input_rows
from setpoint.sensor.moments import Moment, find_readers, moment_of
from setpoint.sensor.reconstruction import Elimination, Map, energy_shares, unit_scores


def _scores(model: nn.Module, *batches: Tensor) -> dict[str, np.ndarray]:
    """The scores of all groups that can be fitted again, on these batches."""
    groups = setpoint.find_groups(model, (batches[0],))
    groups = tuple(group for group in groups if find_consumers(group, model))
    return _scores_of(model, groups, *batches)


def _scores_of(model: nn.Module, groups: tuple[Group, ...], *batches: Tensor) -> dict[str, np.ndarray]:
    readers = find_readers(model, groups)
    moments = moments_on(model, readers, [(batch,) for batch in batches], "running")
    return unit_scores(model, groups, readers, moments)


def _map(x: Tensor, weight: Tensor) -> Map:
    """A map of what units give by column and row, `(units, columns, rows)`."""
    rows = x.flatten(0, 1).mT
    return Moment((moment_of(rows).double(),)), np.arange(rows.shape[1]), weight, len(x)


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
    (saliency,) = _scores(model, x).values()
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


def test_scores_need_no_more_than_the_precision_of_moments() -> None:
    """Claim: units of float32 moments, made in strips, go in the order of float64 ones."""
    x, weight = _mixed(2000, 300), _mixed(300, 8)
    moments = [moment_of(rows) for rows in (x, x.float())]
    torch.testing.assert_close(moments[0][:-1, :-1], x.mT @ x)
    exact, found = (energy_shares([(Moment((moment,)), np.arange(300), weight, 300)]) for moment in moments)
    np.testing.assert_array_equal(exact.argsort(), found.argsort())
    np.testing.assert_allclose(exact, found, rtol=1e-3)


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
    rows = input_rows(layer, x, 10_000).flatten(1)
    made = rows[:, consumer.columns] @ consumer.weight(layer) + layer.bias
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
    (found,) = [scores for scores in _scores(model, x).values() if len(scores) == 6]
    hidden = model[:3](x).detach()
    patches = F.unfold(hidden, 3).movedim(1, 2).reshape(-1, 6, 9)
    alone = energy_shares([_map(patches.permute(1, 2, 0), model[3].weight[1].detach().reshape(54, 1))])
    np.testing.assert_allclose(found, alone, rtol=1e-3)


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
    found = _scores(model, x)
    hidden = torch.relu(model.up(x)).detach()
    flat = hidden.flatten(2).permute(1, 2, 0), model.one.weight.detach().mT
    pointwise = hidden.permute(1, 0, 2, 3).reshape(5, 1, -1), model.two.weight.detach()[:, :, 0, 0].mT
    np.testing.assert_allclose(found["up"], energy_shares([_map(*flat), _map(*pointwise)]), rtol=1e-4)


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
    read = [group for group in groups if find_consumers(group, model)]
    assert heads in read and all("out.weight" in {place.tensor for place in group.slices} for group in read)
    scores = _scores_of(model, (heads,), torch.randn(8, 5, 12))[heads.name]
    assert scores.argmin() == 1 and scores[1] == 0.0
    closed = nn.MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    theirs = setpoint.find_groups(closed, (x, x, x))
    assert theirs and not any(find_consumers(group, closed) for group in theirs)


def test_batches_count_together() -> None:
    """Claim: rows of several batches are scored as those of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x, other = torch.randn(20, 4), torch.randn(20, 4)
    np.testing.assert_allclose(_scores(model, x, other)["0"], _scores(model, torch.cat([x, other]))["0"], rtol=1e-5)
