from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from actuator.hand_made import (
    CASES,
    Residual,
    group,
    kept_only,
    masked_step,
    mlp,
    mlp_model,
    residual,
    some_keep,
    tied,
    train_step,
)
from setpoint.actuator import shrink as shrink_module
from setpoint.actuator.cut import cut_groups, plan_cut
from setpoint.actuator.mask import mask
from setpoint.actuator.shrink import shrink
from setpoint.actuator.tensors import named_tensors, take
from setpoint.errors import GroupError, OptimizerError
from setpoint.groups.group import Group, Slice


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> bytes:
    """Everything that must be untouched after a failure, as bytes."""
    state = None if optimizer is None else optimizer.state_dict()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return pickle.dumps((model.state_dict(), state, grads, str(model), sorted(model.__dict__)))


@pytest.mark.parametrize("name", list(CASES))
def test_a_shrunk_model_trains_like_its_masked_twin(name: str) -> None:
    """Claim: outputs, gradients and weights equal the masked twin's for 5 further AdamW steps, fp64, to 1e-10."""
    model, inputs, groups = CASES[name]()
    model, inputs = model.double(), tuple(each.double() if each.is_floating_point() else each for each in inputs)
    optimizer = adamw(model)
    for _ in range(2):
        train_step(model, optimizer, inputs)
    twin = copy.deepcopy(model)
    twin_optimizer = adamw(twin)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    keep = some_keep(groups)
    shrink(model, optimizer, groups, keep)
    mask(twin, twin_optimizer, groups, keep)
    torch.testing.assert_close(model(*inputs), twin(*inputs), rtol=0, atol=1e-10)
    for _ in range(5):
        loss, twin_loss = train_step(model, optimizer, inputs), masked_step(twin, twin_optimizer, inputs, groups, keep)
        torch.testing.assert_close(loss, twin_loss, rtol=0, atol=1e-10)
    whole = named_tensors(twin)
    for place, tensor in [*model.named_parameters(), *model.named_buffers()]:
        torch.testing.assert_close(tensor, kept_only(whole[place], place, groups, keep), rtol=0, atol=1e-10)
        if tensor.grad is not None:
            twin_grad = kept_only(whole[place].grad, place, groups, keep)
            torch.testing.assert_close(tensor.grad, twin_grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_a_shrunk_model_is_bit_equal_to_a_fresh_small_one(name: str, last: bool) -> None:
    """Claim: in fp32, 5 further steps equal, bit for bit, those of a small model built fresh and loaded with slices."""
    model, inputs, groups = CASES[name]()
    if last and name == "residual":
        model, inputs = model.to(memory_format=torch.channels_last), (inputs[0].to(memory_format=torch.channels_last),)
    optimizer = adamw(model)
    for _ in range(2):
        train_step(model, optimizer, inputs)
    keep = some_keep(groups)
    widths = [int(keep[each.name].sum()) for each in groups]
    fresh = mlp_model(*widths) if name == "mlp" else Residual(*widths)
    fresh = fresh.to(memory_format=torch.channels_last) if last and name == "residual" else fresh
    fresh.load_state_dict({key: kept_only(value, key, groups, keep) for key, value in model.state_dict().items()})
    fresh_optimizer = adamw(fresh)
    state = copy.deepcopy(optimizer.state_dict())
    for number, (key, _) in enumerate(model.named_parameters()):
        for moment in ("exp_avg", "exp_avg_sq"):
            state["state"][number][moment] = kept_only(state["state"][number][moment], key, groups, keep)
    fresh_optimizer.load_state_dict(state)
    shrink(model, optimizer, groups, keep)
    for _ in range(5):
        assert torch.equal(train_step(model, optimizer, inputs), train_step(fresh, fresh_optimizer, inputs))
    for one, other in zip(named_tensors(model).values(), named_tensors(fresh).values(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def test_everything_that_holds_a_parameter_goes_on_working() -> None:
    """Claim: an old loss may be alive; schedulers, clip lists, hooks and identities survive; frozen stays frozen."""
    model, inputs, groups = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    clip, seen = list(model.parameters()), []
    model[0].weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(tuple(parameter.grad.shape)))
    loss = model(*inputs).square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    shrink(model, optimizer, groups, some_keep(groups))
    assert all(one is other for one, other in zip(clip, model.parameters(), strict=True))
    assert not model[0].bias.requires_grad
    for _ in range(2):
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        nn.utils.clip_grad_norm_(clip, 0.1)
        optimizer.step()
        scheduler.step()
    assert seen == [(6, 3)] * 2 + [(4, 3)] * 4
    assert {tuple(state["momentum_buffer"].shape) for state in optimizer.state.values()} >= {(4, 3), (4, 4)}
    del loss


def test_gradients_are_cut_along_and_others_are_not_touched() -> None:
    """Claim: a script that logs gradients after the step finds those of the kept entries, and the other objects."""
    model, inputs, groups = mlp()
    train_step(model, adamw(model), inputs)
    untouched, keep = model[4].bias.grad, some_keep(groups)
    before = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    shrink(model, None, groups, keep)
    dims = plan_cut(groups, keep).dims()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == set(before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, take(before[name], dims.get(name, {})))
    assert model[4].bias.grad is untouched
    gradient = model[0].weight.grad  # one of another dtype, which PyTorch would not assign, goes
    gradient.data = gradient.data.double()
    shrink(model, None, cut_groups(groups, keep), {"first": np.arange(4) > 0})
    assert model[0].weight.grad is None and model[0].bias.grad is not None


def test_nothing_is_a_view_of_the_old_memory() -> None:
    """Claim: after a cut each tensor and moment owns exactly the bytes it needs."""
    model, inputs, groups = residual()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    shrink(model, optimizer, groups, some_keep(groups))
    moments = [each for state in optimizer.state.values() for each in state.values()]
    for tensor in [*named_tensors(model).values(), *moments]:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_tied_parameters_stay_tied() -> None:
    """Claim: after a cut both names still hold one Parameter."""
    model, inputs, groups = tied()
    shrink(model, None, groups, some_keep(groups))
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.shape == (7, 4)
    assert model(*inputs).shape == (3, 4, 7)


def test_autocast_does_not_use_weights_from_before_the_cut() -> None:
    """Claim: a cut inside an autocast region is not answered from autocast's cache of cast weights."""
    model, inputs, groups = mlp()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(*inputs)
        shrink(model, None, groups, some_keep(groups))
        within = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(within, model(*inputs))


def test_several_optimizers_and_several_cuts() -> None:
    """Claim: each optimizer's state follows, and the returned groups serve for the next cut."""
    model, inputs, groups = mlp()
    halves = list(model.parameters())
    optimizers = [torch.optim.Adam(halves[:3], lr=0.1), torch.optim.SGD(halves[3:], lr=0.1, momentum=0.9)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        groups = shrink(model, optimizers, groups, some_keep(groups))
    assert [each.num_units for each in groups] == [3, 3]
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(each.shape == parameter.shape for each in state.values() if each.dim())


@pytest.mark.parametrize("averaged", [False, True])
def test_copies_are_cut_along(averaged: bool) -> None:
    """Claim: an EMA copy, wrapped or not, is cut alike, and averaging goes on."""
    model, inputs, groups = residual()
    ema = AveragedModel(model) if averaged else copy.deepcopy(model)
    keep = some_keep(groups)
    expected = {key: kept_only(value, key, groups, keep) for key, value in model.state_dict().items()}
    shrink(model, None, groups, keep, copies=(ema, ema))
    inner = ema.module if averaged else ema
    assert all(torch.equal(value, expected[key]) for key, value in inner.state_dict().items())
    torch.testing.assert_close(ema(*inputs), model(*inputs))
    if averaged:
        train_step(model, adamw(model), inputs)
        ema.update_parameters(model)


def test_copies_that_do_not_mirror_the_model_are_refused() -> None:
    """Claim: a copy of another shape, or one that shares tensors with the model, raises GroupError; nothing changes."""
    model, _, groups = mlp()
    before = fingerprint(model)
    for wrong, words in (
        (mlp_model(7), "7, 3"),
        (nn.Linear(2, 2), "no tensor"),
        (nn.Sequential(*model), "shares tensors"),
    ):
        with pytest.raises(GroupError, match=words):
            shrink(model, None, groups, some_keep(groups), copies=(wrong,))
        assert fingerprint(model) == before


@pytest.mark.parametrize("failing", ["swap", "apply_sizes", "take", "cut_state", "note_cut"])
@pytest.mark.parametrize("call", [0, 2])
def test_a_failure_at_any_point_leaves_all_as_it_was(failing: str, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: whatever raises, at whichever call, model, gradients, moments, sizes and copies are as before."""
    model, inputs, groups = residual()
    optimizer = adamw(model)
    train_step(model, optimizer, inputs)
    ema, other = copy.deepcopy(model), copy.deepcopy(model)
    before = fingerprint(model, optimizer), fingerprint(ema)
    pointers = [tensor.data_ptr() for tensor in named_tensors(model).values()]
    calls, real = [], getattr(shrink_module, failing)

    def fail_later(*args: object) -> object:
        calls.append(args)
        if len(calls) > call:
            raise MemoryError("out of memory")
        return real(*args)

    monkeypatch.setattr(shrink_module, failing, fail_later)
    with pytest.raises(MemoryError):
        shrink(model, optimizer, groups, some_keep(groups), copies=(ema, other))
    assert (fingerprint(model, optimizer), fingerprint(ema)) == before
    assert pointers == [tensor.data_ptr() for tensor in named_tensors(model).values()]
    train_step(model, optimizer, inputs)


class Split(nn.Module):
    """Splits one layer's output into two of literal lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.left, self.right = nn.Linear(3, 9), nn.Linear(4, 2), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.fc(x).split([4, 5], 1)
        return self.left(left) + self.right(torch.tanh(right))


def test_all_sizes_of_a_call_are_set_together() -> None:
    """Claim: when one piece of a split changes, the corrected call knows the length of every piece."""
    groups = []
    for number, (name, width, start) in enumerate((("left", 4, 0), ("right", 5, 4))):
        index = np.full(9, -1)
        index[start : start + width] = np.arange(width)
        fused = group(name, width, "fc.weight:0:produce fc.bias:0:carry", "fc:out_features", index)
        read = group(name, width, f"{name}.weight:1:consume", f"{name}:in_features :split#0[{number}]")
        groups.append(Group(name, "unit", width, fused.slices + read.slices, fused.sizes + read.sizes))
    for keep in ({"left": np.array([1, 0, 1, 0], bool)}, {"right": np.array([1, 0, 1, 0, 1], bool)}):
        model, twin, x = Split(), Split(), torch.randn(4, 3)
        twin.load_state_dict(model.state_dict())
        mask(twin, None, tuple(groups), keep)
        shrink(model, None, tuple(groups), keep)
        torch.testing.assert_close(model(x), twin(x))


class Marked(torch.Tensor):
    """A tensor subclass that nobody has taught to change its shape."""


def test_tensors_that_cannot_be_cut_are_refused_by_name() -> None:
    """Claim: subclassed, memory-sharing, doubly named and unknown tensors, and factors of a state, change nothing."""
    keep = some_keep(mlp()[2])

    def refuse(model: nn.Module, groups: tuple[Group, ...], words: str) -> None:
        with pytest.raises(GroupError, match=words):
            shrink(model, None, groups, keep)

    model, _, groups = mlp()
    model[0].bias = nn.Parameter(torch.zeros(6).as_subclass(Marked))
    refuse(model, groups, "'0.bias' is a Marked")
    model, _, groups = mlp()
    model[2].bias.data = model[4].weight.data[0]
    refuse(model, groups, "shares its memory")
    model, _, groups = mlp()
    model[1].extra = model[0].weight
    again = Slice("1.extra", 0, "produce", np.arange(6))
    refuse(model, (Group("first", "unit", 6, (*groups[0].slices, again)), groups[1]), "one tensor")
    refuse(nn.Sequential(model[0]), groups, "no tensor '2.weight'")
    model, _, groups = mlp()
    model[2].in_features = 99
    refuse(model, groups, "2.in_features is 99")
    model, inputs, groups = mlp()
    optimizer = torch.optim.Adafactor(model.parameters())
    train_step(model, optimizer, inputs)
    before = fingerprint(model, optimizer)
    with pytest.raises(OptimizerError, match=r"Adafactor keeps state\['row_var'\].*'0.weight'"):
        shrink(model, optimizer, groups, keep)
    assert fingerprint(model, optimizer) == before


def test_single_weights_can_be_masked_but_not_cut() -> None:
    """Claim: a group of single weights is zeroed by mask and refused by shrink."""
    model = nn.Linear(3, 2)
    weights = Group("weights", "weight", 6, (Slice("weight", None, "carry", np.arange(6)),))
    keep = {"weights": np.array([1, 0, 1, 1, 0, 1], bool)}
    mask(model, None, (weights,), keep)
    assert (model.weight == 0).flatten().tolist() == [False, True, False, False, True, False]
    with pytest.raises(GroupError, match="masked but not cut"):
        shrink(model, None, (weights,), keep)
