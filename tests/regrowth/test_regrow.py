"""Regrow and reserve: what was dropped comes back exactly, in any order, and trains on like its masked twin."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from actuator.hand_made import CASES, masked_step, mlp, residual, some_keep, train_step
from conformance.test_optimizers import ROWS
from groups.zoo import MODELS as ZOO
from setpoint.actuator import shrink as shrink_module
from setpoint.actuator.mask import mask
from setpoint.actuator.model_shapes import ModelShapes
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import as_sequence, map_tensors, named_tensors
from setpoint.errors import GroupError
from setpoint.groups.group import Group, random_keep, widths_of
from setpoint.groups.sizes_in_code.shim import get_call_sizes
from setpoint.regrowth import reserve as reserve_module
from setpoint.regrowth.reserve import Reserve, regrow
from twin.test_twin import double, groups_of


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)


def snapshot(model: nn.Module, optimizer: Any = None) -> list[Any]:
    """Everything that a regrowth must give back: values, strides, state, sizes and forwards."""
    tensors = [(name, tensor.detach().clone(), tensor.stride()) for name, tensor in named_tensors(model).items()]
    states: list[Any] = []
    for each in as_sequence(optimizer):
        for name, parameter in model.named_parameters():
            for key, value in each.state.get(parameter, {}).items():
                map_tensors(value, lambda v, at, n=name: states.append((n, at, v.clone(), v.stride())) or v, key)
    sizes = [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int) and not key.startswith("_setpoint")
    ]
    calls = [(name, get_call_sizes(module)) for name, module in model.named_modules()]
    forwards = [(name, "forward" in module.__dict__) for name, module in model.named_modules()]
    return [tensors, states, sizes, calls, forwards]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def dropped(keep: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.flatnonzero(~kept) for name, kept in keep.items()}


@pytest.mark.parametrize(("kind", "options"), ROWS)
def test_shrink_and_regrow_gives_everything_back(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Claim: weights, buffers, moments, strides and sizes are bit for bit as before, for every optimizer; also where
    channels_last tensors were cut to a single channel.
    """
    model, inputs, groups = residual()
    last = "foreach" in options
    model = model.to(memory_format=torch.channels_last) if last else model
    optimizer = kind(model.parameters(), **options)
    for _ in range(2):
        train_step(model, optimizer, inputs)
    before, identities = snapshot(model, optimizer), [id(p) for p in model.parameters()]
    keep = {group.name: np.arange(group.num_units) == 0 for group in groups} if last else some_keep(groups)
    reserve = Reserve.of(model, groups).rest(model, optimizer, keep)
    small = shrink(model, optimizer, groups, keep)
    again, reserve = regrow(model, optimizer, small, reserve, dropped(keep))
    assert_same(snapshot(model, optimizer), before)
    assert [id(p) for p in model.parameters()] == identities
    assert widths_of(again) == widths_of(groups) and reserve.num_bytes == 0 and not reserve.origins()
    train_step(model, optimizer, inputs)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ZOO)
def test_a_partial_return_is_a_smaller_cut(name: str, which: int) -> None:
    """Claim: where every other group comes back whole and of the rest half of the units, the model is bit for bit, in
    sizes, corrected calls, recorded places and outputs, the one that was cut to these units at once.
    """
    build, example = ZOO[name]
    model, inputs, groups = build().double(), double(example()), groups_of(name)
    model.eval()
    twin = copy.deepcopy(model)
    keep = random_keep(groups)
    gone = dropped(keep)
    back = {each: gone[each] if at % 2 == which else gone[each][::2] for at, each in enumerate(sorted(gone))}
    after = {each: kept | np.isin(np.arange(len(kept)), back[each]) for each, kept in keep.items()}
    reserve = Reserve.of(model, groups).rest(model, None, keep)
    small = shrink(model, None, groups, keep)
    again, _ = regrow(model, None, small, reserve, back)
    shrink(twin, None, groups, after)
    assert widths_of(again) == {each: int(kept.sum()) for each, kept in after.items()}
    assert_same(snapshot(model), snapshot(twin))
    assert recorded_calls(model) == recorded_calls(twin)
    assert_same(model(*inputs), twin(*inputs))


def recorded_calls(model: nn.Module) -> dict[Any, int]:
    return {at: size for at, size in ModelShapes.of(model).sizes.items() if "#" in at[1]}


class Attending(nn.Module):
    """Torch's attention in a residual stream whose width can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Linear(8, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.inner, self.head = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = y + self.attend(y, y, y)[0]
        return self.head(y + torch.relu(self.inner(y)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("gone", "back"),
    [
        ({"embed": 8}, {"embed": 4}),
        ({"embed": 8, "attend": 1}, {"embed": 4, "attend": 1}),
        ({"embed": 8, "attend": 1}, {"embed": 8}),
        ({"embed": 8, "attend": 2}, {"attend": 1}),
        ({"embed": 8, "attend": 2}, {"attend": 2}),
        ({"embed": 8, "attend": 2}, {"embed": 8, "attend": 2}),
    ],
)
def test_attention_of_part_of_its_width_runs(gone: dict[str, int], back: dict[str, int], training: bool) -> None:
    """Claim: with some of the dropped heads and entries of the embedding back, torch's attention gives the outputs of
    the twin in which the others are masked, in fp64 to 1e-13, and so after a further cut; it has its own
    forward again once all are there.
    """
    torch.manual_seed(0)
    model, x = Attending().double().train(training), torch.randn(3, 5, 8, dtype=torch.float64)
    groups = setpoint.find_groups(model, (x,))
    dense = copy.deepcopy(model)

    def check(active: dict[str, np.ndarray]) -> None:
        twin = copy.deepcopy(dense)
        mask(twin, None, groups, active)
        torch.testing.assert_close(model(x), twin(x), rtol=0, atol=1e-13)

    keep = {group.name: np.arange(group.num_units) >= gone.get(group.name, 0) for group in groups}
    reserve = Reserve.of(model, groups).rest(model, None, keep)
    now = shrink(model, None, groups, keep)
    now, reserve = regrow(model, None, now, reserve, {name: range(n) for name, n in back.items()})
    check(dict(reserve.active))
    assert ("forward" in model.attend.__dict__) == any(not units.all() for units in reserve.active.values())
    keep = {"embed": np.arange(now[0].num_units) != 2}
    reserve = reserve.rest(model, None, keep)
    now = shrink(model, None, now, keep)
    check(dict(reserve.active))
    regrow(model, None, now, reserve, reserve.origins())
    assert "forward" not in model.attend.__dict__


def fill(
    model: nn.Module, optimizer: Optimizer, groups: tuple[Group, ...], store: dict[Any, Tensor], active: Any
) -> None:
    """A plain model of the reserve: one dense tensor per key, into which the live entries are written."""
    for key, live in live_tensors(model, optimizer):
        index = box(key[0], groups, active, store[key].shape)
        store[key][index] = live.detach()


def live_tensors(model: nn.Module, optimizer: Optimizer) -> list[tuple[tuple[str, str], Tensor]]:
    found: list[tuple[tuple[str, str], Tensor]] = []
    found += [((name, ""), tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    for name, parameter in model.named_parameters():
        for part, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found.append(((name, part), value))
    return found


def box(name: str, groups: tuple[Group, ...], active: dict[str, np.ndarray], shape: torch.Size) -> tuple[Tensor, ...]:
    kept = [np.ones(length, bool) for length in shape]
    for group in groups:
        for part in group.slices:
            if part.tensor == name and part.dim is not None:
                units = part.index
                kept[part.dim] &= (units < 0) | active[group.name][units]
    return tuple(torch.from_numpy(i) for i in np.ix_(*(np.flatnonzero(k) for k in kept)))


@given(data=st.data(), name=st.sampled_from(sorted(CASES)))
@settings(max_examples=12, deadline=None)
def test_any_order_of_drops_and_returns(data: st.DataObject, name: str) -> None:
    """Claim: after any mixture of drops, returns and training steps every entry, crossing ones of two groups among
    them, has the value it had when it was last in the model.
    """
    torch.manual_seed(0)
    model, inputs, groups = CASES[name]()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    store = {key: tensor.detach().clone() for key, tensor in live_tensors(model, optimizer)}
    active = {group.name: np.ones(group.num_units, bool) for group in groups}
    reserve, now = Reserve.of(model, groups), groups
    for _ in range(data.draw(st.integers(1, 5))):
        fill(model, optimizer, groups, store, active)
        if data.draw(st.booleans()):
            keep = {}
            for group in now:
                kept = np.array(data.draw(st.lists(st.booleans(), min_size=group.num_units, max_size=group.num_units)))
                kept[0] = True
                keep[group.name] = kept
                active[group.name][np.flatnonzero(active[group.name])[~kept]] = False
            reserve = reserve.rest(model, optimizer, keep)
            now = shrink(model, optimizer, now, keep)
        else:
            grow = {
                each: [int(u) for u in origins if data.draw(st.booleans())]
                for each, origins in reserve.origins().items()
            }
            now, reserve = regrow(model, optimizer, now, reserve, grow)
            for each, origins in grow.items():
                active[each][origins] = True
        for key, live in live_tensors(model, optimizer):
            assert torch.equal(live.detach(), store[key][box(key[0], groups, active, store[key].shape)]), key
        assert widths_of(now) == {each: int(units.sum()) for each, units in active.items()}
        model(*inputs)
        fill(model, optimizer, groups, store, active)
        train_step(model, optimizer, inputs)


@pytest.mark.parametrize("name", ["mlp", "residual", "concat"])
def test_between_drop_and_return_the_model_trains_like_its_masked_twin(name: str) -> None:
    """Claim: cut, k steps, return, k steps: outputs and weights equal the twin that was masked for k steps and
    then got the masked entries and moments back, in fp64 to 1e-10.
    """
    model, inputs, groups = CASES[name]()
    model, inputs = model.double(), tuple(x.double() for x in inputs)
    optimizer = adamw(model)
    for _ in range(2):
        train_step(model, optimizer, inputs)
    twin = copy.deepcopy(model)
    of_twin = adamw(twin)
    of_twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep = some_keep(groups)
    store = {key: tensor.detach().clone() for key, tensor in live_tensors(twin, of_twin)}
    reserve = Reserve.of(model, groups).rest(model, optimizer, keep)
    small = shrink(model, optimizer, groups, keep)
    for _ in range(3):
        one, other = train_step(model, optimizer, inputs), masked_step(twin, of_twin, inputs, groups, keep)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    regrow(model, optimizer, small, reserve, dropped(keep))
    for key, tensor in live_tensors(twin, of_twin):
        index = box(key[0], groups, keep, tensor.shape)
        trained = tensor.detach()[index].clone()
        tensor.data.copy_(store[key])
        tensor.data[index] = trained
    for _ in range(3):
        one, other = train_step(model, optimizer, inputs), train_step(twin, of_twin, inputs)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for (key, one), (_, other) in zip(live_tensors(model, optimizer), live_tensors(twin, of_twin), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=str(key))


@pytest.mark.parametrize("averaged", [False, True])
def test_copies_come_back_along(averaged: bool) -> None:
    """Claim: an EMA copy, wrapped or not, gets its own values back, not the model's."""
    model, inputs, groups = residual()
    optimizer = adamw(model)
    ema = torch.optim.swa_utils.AveragedModel(model) if averaged else copy.deepcopy(model)
    train_step(model, optimizer, inputs)
    before, keep = snapshot(ema), some_keep(groups)
    reserve = Reserve.of(model, groups).rest(model, optimizer, keep, (ema,))
    small = shrink(model, optimizer, groups, keep, (ema,))
    regrow(model, optimizer, small, reserve, dropped(keep), (ema,))
    assert_same(snapshot(ema), before)


def test_the_limit_is_kept_and_says_what_it_let_go() -> None:
    """Claim: a full reserve lets go of what was dropped first, names it, and such units cannot come back."""
    model, inputs, groups = mlp()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    first = {"first": np.arange(6) != 2}
    unlimited = Reserve.of(model, groups).rest(model, optimizer, first)
    limit = unlimited.num_bytes + 3
    reserve = Reserve.of(model, groups, limit).rest(model, optimizer, first, when=1)
    assert reserve.let_go == {} and reserve.num_bytes == unlimited.num_bytes
    groups = shrink(model, optimizer, groups, first)
    second = {"first": np.arange(5) != 3}
    reserve = reserve.rest(model, optimizer, second, when=2)
    groups = shrink(model, optimizer, groups, second)
    assert reserve.let_go == {"first": (2,)} and 0 < reserve.num_bytes <= limit
    assert {name: units.tolist() for name, units in reserve.origins().items()} == {"first": [4]}
    with pytest.raises(GroupError, match="unit 2 of 'first' does not rest"):
        regrow(model, optimizer, groups, reserve, {"first": [2]})
    groups, reserve = regrow(model, optimizer, groups, reserve, {"first": [4]})
    assert widths_of(groups) == {"first": 5, "second": 5}
    train_step(model, optimizer, inputs)
    model, _, groups = mlp()
    assert Reserve.of(model, groups, limit_bytes=0).rest(model, None, first).num_bytes == 0


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    """Claim: unknown groups, active units, and a cut that the reserve did not see raise GroupError."""
    model, inputs, groups = mlp()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    keep = some_keep(groups)
    reserve = Reserve.of(model, groups).rest(model, optimizer, keep)
    small = shrink(model, optimizer, groups, keep)
    before = snapshot(model, optimizer)
    units = dropped(keep)
    for grow, words in (
        ({"third": [0]}, "unknown group"),
        ({"first": [99]}, "does not rest"),
        ({"first": [-1]}, "rest"),
    ):
        with pytest.raises(GroupError, match=words):
            regrow(model, optimizer, small, reserve, grow)
    with pytest.raises(GroupError, match="by the reserve's account"):
        regrow(model, optimizer, groups, reserve, units)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("failing", "call"), [("swap", 0), ("swap", 9), ("apply_sizes", 1), ("take", 0), ("take", 3), ("in_format", 1)]
)
def test_a_failure_at_any_point_leaves_all_as_it_was(failing: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: whatever raises, at whichever call, model, moments, sizes and copies are as before, and a retry works."""
    model, inputs, groups = residual()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    ema, keep = copy.deepcopy(model), some_keep(groups)
    reserve = Reserve.of(model, groups).rest(model, optimizer, keep, (ema,))
    small = shrink(model, optimizer, groups, keep, (ema,))
    before = snapshot(model, optimizer), snapshot(ema)
    of = reserve_module if hasattr(reserve_module, failing) else shrink_module
    calls, real = [], getattr(of, failing)

    def fail_later(*args: object) -> object:
        calls.append(args)
        result = real(*args) if of is shrink_module or len(calls) <= call else None
        if len(calls) > call:
            raise MemoryError("out of memory")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(of, failing, fail_later)
        with pytest.raises(MemoryError):
            regrow(model, optimizer, small, reserve, dropped(keep), (ema,))
    assert_same((snapshot(model, optimizer), snapshot(ema)), before)
    again, _ = regrow(model, optimizer, small, reserve, dropped(keep), (ema,))
    assert widths_of(again) == widths_of(groups)
