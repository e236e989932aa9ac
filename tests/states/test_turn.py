import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pypi_s5 import S5Classifier
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors
from setpoint.errors import GroupError
from setpoint.groups.group import Group
from setpoint.groups.states import state_layer
from setpoint.groups.trace import find_groups
from setpoint.regrowth.reserve import Reserve, regrow
from setpoint.states import BalancedPairs, balance
from setpoint.states.turn import turned
from setpoint_bench.models import SequenceClassifier, lru
from states.systems import balance_and_shrink

X = torch.randn(5, 14, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def _lru(silent: int = 0) -> SequenceClassifier:
    """A double model of 9 states, the last of which nobody hears or reaches."""
    torch.manual_seed(0)
    with patch.object(lru, "_MODULI", (0.6, 0.999)):  # wider apart than in training, so that modes differ
        model = SequenceClassifier(1, 3, num_channels=4, num_states=9).double()
    with torch.no_grad():
        for layer in (model.blocks[0].lru,):
            for place in range(9 - silent, 9):
                for weight in (layer.C_re.mT, layer.C_im.mT) if place % 2 else (layer.B_re, layer.B_im):
                    weight[place] = 0.0
    return model


def _states(model: nn.Module, x: Tensor = X) -> tuple[Group, BalancedPairs]:
    (group,) = (each for each in find_groups(model, (x,)) if each.kind == "state")
    return group, BalancedPairs(balance(state_layer(model, group)[1].state_space()))


def _first(group: Group, kept: int) -> dict[str, np.ndarray]:
    return {group.name: np.arange(group.num_units) < kept}


def _cut(model: nn.Module, optimizer: torch.optim.Optimizer | None, kept: int, x: Tensor = X) -> tuple[Group, ...]:
    """Only so many of the states stay."""
    group, basis = _states(model, x)
    return balance_and_shrink(model, optimizer, (group,), _first(group, kept), {group.name: basis})


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor = X) -> None:
    optimizer.zero_grad()
    (model(x) * torch.arange(1.0, 4.0)).square().sum().backward()
    optimizer.step()


def test_states_without_value_go_for_nothing() -> None:
    """Twin: dropping states of Hankel value 0 leaves outputs as they are, and B, C of the layer at its new size."""
    model = _lru(silent=5)
    want = model(X).detach()
    (remaining,) = _cut(model, None, 4)
    torch.testing.assert_close(model(X), want, rtol=1e-7, atol=1e-7)
    assert remaining.num_units == 4 and model.blocks[0].lru.B_re.shape == (4, 4)
    assert find_groups(model, (X,))[-1].num_units == 4


@pytest.mark.parametrize("kind", ["lru", "s5"])
def test_first_moments_are_gradients_in_the_new_coordinates(kind: str) -> None:
    """With momentum as the only memory, what is carried equals the gradient that the smaller model itself has.

    The dropped states have value 0, so that both models are the same function and the identity is exact.
    """
    torch.manual_seed(0)
    model: nn.Module = _lru(silent=5) if kind == "lru" else S5Classifier(states=9)
    x = X if kind == "lru" else X.float()
    if kind == "s5":
        with torch.no_grad():
            model.layer.s5.seq.B[4:7] = 0.0
            model.layer.s5.seq.C[:, 7:] = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    _step(model, optimizer, x)
    _cut(model, optimizer, 4, x)
    buffers = {name: optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}
    _step(model, optimizer, x)
    names = [name for name in buffers if name.split(".")[-1] in ("B_re", "B_im", "C_re", "C_im", "B", "C")]
    assert names
    for name, parameter in model.named_parameters():
        if name in names:
            assert parameter.grad is not None
            scale = float(parameter.grad.abs().max())
            tolerance = 1e-6 if kind == "lru" else 2e-3
            torch.testing.assert_close(buffers[name], parameter.grad, rtol=0, atol=tolerance * scale)


def test_first_moments_follow_modes_that_the_layer_mirrors() -> None:
    """A layer that puts the mirror image of a mode in its place has the gradients of that: of modes below the axis, and
    of old modes that fill up where fewer states have a value than are kept.
    """
    model = _lru(silent=5)
    layer = model.blocks[0].lru
    with torch.no_grad():
        layer.theta_log[:3] = torch.tensor([4.0, 5.0, 6.0]).log()  # below the real axis
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    _step(model, optimizer)
    want = model(X).detach()
    _cut(model, optimizer, 6)
    torch.testing.assert_close(model(X), want, rtol=1e-7, atol=1e-7)
    buffers = {
        name: optimizer.state[getattr(layer, name)]["momentum_buffer"] for name in ("B_re", "B_im", "C_re", "C_im")
    }
    carried = {name: buffer.clone() for name, buffer in buffers.items()}
    _step(model, optimizer)
    for name, buffer in carried.items():
        gradient = getattr(layer, name).grad
        torch.testing.assert_close(buffer, gradient, rtol=0, atol=1e-6 * float(gradient.abs().max()))


def test_second_moments_stay_positive_and_of_their_size() -> None:
    """Second moments go through squared maps: never negative, finite; those of eigenvalues are their mean."""
    model = _lru()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        _step(model, optimizer)
    layer = model.blocks[0].lru
    mean = optimizer.state[layer.nu_log]["exp_avg_sq"].mean().item()
    _cut(model, optimizer, 5)
    for name in ("B_re", "B_im", "C_re", "C_im"):
        second = optimizer.state[getattr(layer, name)]["exp_avg_sq"]
        assert second.shape == getattr(layer, name).shape and (second >= 0).all() and torch.isfinite(second).all()
        assert float(second.max()) > 0
    state = optimizer.state[layer.nu_log]
    torch.testing.assert_close(state["exp_avg_sq"], torch.full((5,), mean, dtype=torch.float64))
    assert (state["exp_avg"] == 0).all() and state["step"] == 3
    _step(model, optimizer)


def test_any_balanced_states_can_be_kept() -> None:
    """A keep that is no prefix keeps those balanced states: without the largest, the layer errs more."""
    errors = []
    u = torch.randn(8, 40, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for keep in (np.arange(9) < 6, np.arange(9) >= 3):
        model = _lru()
        want = model.blocks[0].lru(u).detach()
        group, basis = _states(model)
        balance_and_shrink(model, None, (group,), {group.name: keep}, {group.name: basis})
        errors.append(float((model.blocks[0].lru(u).detach() - want).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_copies_follow() -> None:
    """An EMA copy that equals the model still equals it, and an averaged wrapper may hold it."""
    model = _lru()
    plain, averaged = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    group, basis = _states(model)
    balance_and_shrink(model, None, (group,), _first(group, 4), {group.name: basis}, (plain, averaged))
    torch.testing.assert_close(plain(X), model(X))
    torch.testing.assert_close(averaged(X), model(X))


@pytest.mark.parametrize("kind", ["lru", "s5"])
def test_states_come_back_with_their_moments(kind: str) -> None:
    """Twin: states dropped, trained without, brought back and trained on are those of the full model whose dropped
    modes are silenced meanwhile, and then heard again with the weights and moments that they had.
    """
    torch.manual_seed(0)
    model: nn.Module = _lru() if kind == "lru" else S5Classifier(states=9)
    x, tolerance = (X, 1e-10) if kind == "lru" else (X.float(), 1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        _step(model, optimizer, x)
    group, basis = _states(model, x)
    reserve, keep = Reserve.of(model, (group,)), _first(group, 4)
    with turned(model, optimizer, (group,), keep, {group.name: basis}, rest=True):
        twin, other = copy.deepcopy((model, optimizer))
        reserve = reserve.rest(model, optimizer, keep)
        groups = shrink(model, optimizer, (group,), keep)
    resting = copy.deepcopy((twin.state_dict(), other.state_dict()["state"]))
    for _ in range(3):
        _step(model, optimizer, x)
        for piece in group.slices:
            if piece.role == "consume":
                named_tensors(twin)[piece.tensor].data.index_fill_(piece.dim, torch.arange(4, 9), 0.0)
        _step(twin, other, x)
    groups, reserve = regrow(model, optimizer, groups, reserve, {group.name: np.arange(4, 9)})
    for number, (name, parameter) in enumerate(twin.named_parameters()):
        for piece in group.slices:
            if piece.tensor == name:
                gone = torch.arange(4, 9)
                parameter.data.index_copy_(piece.dim, gone, resting[0][name].index_select(piece.dim, gone))
                for key in ("exp_avg", "exp_avg_sq"):
                    moment = resting[1][number][key].index_select(piece.dim, gone)
                    other.state[parameter][key].index_copy_(piece.dim, gone, moment)
    for _ in range(3):
        _step(model, optimizer, x)
        _step(twin, other, x)
    assert groups[0].num_units == 9 and not reserve.tensors
    for one, two in zip(_snapshot(model, optimizer), _snapshot(twin, other), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def _snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in (*named_tensors(model).values(), *states)]


def _stale(group: Group, basis: BalancedPairs) -> dict[str, BalancedPairs]:
    model = SequenceClassifier(1, 3, num_channels=4, num_states=4)
    return {group.name: BalancedPairs(balance(model.blocks[0].lru.state_space()))}


def _other_kind(group: Group, basis: BalancedPairs) -> dict[str, BalancedPairs]:
    object.__setattr__(group, "kind", "unit")
    return {group.name: basis}


@contextmanager
def _unchanged(
    model: nn.Module, optimizer: torch.optim.Optimizer, error: type[Exception], words: str
) -> Iterator[None]:
    """Inside, this error is raised; weights and moments are as they were, to the bit."""
    _step(model, optimizer)
    before = _snapshot(model, optimizer)
    with pytest.raises(error, match=words):
        yield
    assert all(torch.equal(old, new) for old, new in zip(before, _snapshot(model, optimizer), strict=True))


@pytest.mark.parametrize(
    ("change", "kept", "message"),
    [
        (_stale, 4, "basis of group .* is for 4 states, but it has 9"),
        (_other_kind, 4, "no balanced coordinates"),
        (lambda group, basis: {group.name: basis}, 0, "min_units is 1"),
    ],
    ids=["stale", "other kind", "no state"],
)
def test_bad_requests_change_nothing(
    change: Callable[[Group, BalancedPairs], dict[str, BalancedPairs]], kept: int, message: str
) -> None:
    """A stale basis, a group without balanced coordinates, no state left: an error, and all is as it was."""
    model = _lru()
    optimizer = torch.optim.AdamW(model.parameters())
    group, basis = _states(model)
    with _unchanged(model, optimizer, GroupError, message):
        balance_and_shrink(model, optimizer, (group,), _first(group, kept), change(group, basis))


def test_a_failing_cut_is_rolled_back() -> None:
    """When the cut fails after the layer was turned, weights and moments are put back to the bit."""
    model = _lru()
    optimizer = torch.optim.AdamW(model.parameters())
    failing = patch("states.systems.shrink", side_effect=RuntimeError("no memory"))
    with _unchanged(model, optimizer, RuntimeError, "no memory"), failing:
        _cut(model, optimizer, 4)
