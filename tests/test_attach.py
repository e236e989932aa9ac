"""What attach takes and what it refuses; then it touches nothing."""

from __future__ import annotations

import copy
import sys
import threading
from collections import ChainMap, UserDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import setpoint
from setpoint.errors import BudgetError, ExampleError, ExportError, GroupError, LoopError, OptimizerError
from setpoint.groups.group import Group
from setpoint.groups.trace import trace
from setpoint.regrowth.regrowing import Regrowing
from setpoint.sensor.magnitude import MagnitudeSensor

HALF = setpoint.Budget.fraction(0.5, of="flops")


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def _attach(model: nn.Module, optimizer: Any, budget: setpoint.Budget = HALF, **options: Any) -> setpoint.Loop:
    return setpoint.attach(model, optimizer, budget, **{"example": (torch.zeros(4, 6),), "total_steps": 10, **options})


class Codes(Tensor):
    """Numbers of 8 bits that stand for others, as torchao keeps them: no operation but its own knows them."""

    codes: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor) -> Codes:
        made: Codes = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes = codes
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse."""
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        raise NotImplementedError(str(function))


class EightBits(Optimizer):
    """SGD with a moment that large parameters have in 8 bits."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move."""
        for settings in self.param_groups:
            for each in settings["params"]:
                if each.numel() >= 4096:
                    self.state[each]["moment"] = Codes(torch.zeros(each.shape, dtype=torch.int8))
                each.sub_(settings["lr"] * each.grad)


class Branching(nn.Module):
    """A forward whose path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.inner(x)
        return self.inner(-x)


class StoresItsLoss(nn.Module):
    """Its forward returns nothing that a loss could be made of."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _mlp()

    def forward(self, x: Tensor) -> None:
        self.loss = self.net(x).square().mean()


class Listing:
    """An average that holds a list, which is none of tensors."""

    shadow_params: ClassVar[list[int]] = [1, 2]


def _nan_weight() -> nn.Sequential:
    model = _mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = torch.nan  # type: ignore[index]
    return model


def _blocks(size: object) -> list[Group]:
    (group, *others) = setpoint.find_groups(_mlp(), (torch.zeros(4, 6),))
    return [replace(group, multiple_of=size), *others]  # type: ignore[arg-type]


GROUPS = "out of find_groups"
NAN = torch.full((4, 6), torch.nan)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # Budgets, and the length of the run.
    "too small": ({"budget": "0.1% flops"}, BudgetError, "cannot be reached.*still needs .*Ask for at least"),
    "too few parameters": ({"budget": "3 params"}, BudgetError, "cannot be reached.*params"),
    "too few bytes": ({"budget": "1% memory"}, BudgetError, "cannot be reached.*bytes.*Ask for at least"),
    "parameters of a run": (
        {"budget": setpoint.Budget.fraction(0.5, of="params", per="run")},
        BudgetError,
        "no budget per run of 'params'.*per='step'",
    ),
    "per cent": ({"budget": 50}, BudgetError, "at most 1, got 50.0: 1.0 is the dense model and 0.5 is 50 %"),
    "no steps": ({"total_steps": 0}, ValueError, r"positive integer.*such as epochs \* len\(loader\)"),
    "True steps": ({"total_steps": True}, ValueError, "positive integer, got True"),
    "steps as a float": ({"total_steps": np.float64(12)}, ValueError, "positive integer, got np.float64"),
    # Models.
    "DataParallel": ({"model": lambda: nn.DataParallel(_mlp())}, LoopError, "DataParallel is not supported"),
    "one layer": ({"model": lambda: nn.Sequential(nn.Linear(6, 3))}, GroupError, "can be pruned: .*output"),
    "a branch on data": ({"model": Branching}, ExportError, r"test_attach\.py.*if x\.sum"),
    "no output": ({"model": StoresItsLoss}, ExportError, "returns no tensor of floats.*return the loss"),
    "NaN in a weight": ({"model": _nan_weight}, LoopError, "'2.weight' holds NaN"),
    "the meta device": ({"model": lambda: _mlp().to("meta")}, LoopError, "'0.weight' is on the meta.*to_empty"),
    # Examples.
    "another shape": ({"example": (torch.zeros(4, 5),)}, ExampleError, "example"),
    "too many inputs": ({"example": (torch.zeros(4, 6), torch.zeros(4))}, ExampleError, "example"),
    "an unknown name": ({"example": {"nonsense": torch.zeros(4, 6)}}, ExampleError, "example"),
    "integers": ({"example": (torch.zeros(4, 6).long(),)}, ExampleError, "example"),
    "another device": ({"example": (torch.zeros(4, 6, device="meta"),)}, ExampleError, "meta.*cpu"),
    "NaN in the example": ({"example": (NAN,)}, LoopError, "the example holds NaN"),
    "a number of inputs": ({"example": 3}, ExampleError, "must be a tuple of positional inputs.*got int"),
    "no rows": ({"example": (torch.zeros(0, 6),)}, ExampleError, "has no rows"),
    # Optimizers.
    "no optimizer": ({"optimizer": []}, OptimizerError, "at least one"),
    "an optimizer of another model": (
        {"optimizer": lambda p: [torch.optim.SGD(p), torch.optim.Adam(_mlp().parameters())]},
        OptimizerError,
        "Adam holds",
    ),
    "an optimizer's class": ({"optimizer": torch.optim.SGD}, OptimizerError, "got <class 'torch.optim.sgd.SGD'>"),
    "Adafactor": ({"optimizer": lambda p: torch.optim.Adafactor(p)}, OptimizerError, "Adafactor"),
    "8 bits": (
        {"optimizer": lambda p: EightBits(p)},
        OptimizerError,
        "EightBits keeps state.'moment'. of .* as a Codes.*such as torch.optim.AdamW",
    ),
    # Parts.
    "a controller's class": ({"controller": setpoint.PricedController}, LoopError, "is a class: give an object"),
    "no controller": ({"controller": object()}, LoopError, "controller must be.*got <object.*no decide and no due"),
    "a sensor's name": ({"sensor": "taylor"}, LoopError, "sensor must be a Sensor.*got 'taylor'"),
    "an actuator's class": ({"actuator": setpoint.Masking}, LoopError, r"actuator is Masking\(...\)"),
    "regrowth at a price": (
        {"actuator": setpoint.Regrowing(), "budget": setpoint.Price(0.02, of="flops")},
        LoopError,
        "brings nothing back",
    ),
    # Groups and copies.
    "a group's name": ({"groups": "0"}, GroupError, f"{GROUPS}.*got '0'"),
    "a single group": ({"groups": _blocks(1)[0]}, GroupError, "must be a sequence of groups.*got Group"),
    "groups of another model": (
        {"groups": setpoint.find_groups(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), (NAN[:, :6],))},
        GroupError,
        "not one of this model's",
    ),
    "empty blocks": ({"groups": _blocks(0)}, GroupError, "multiple_of of group '0' is a whole number of units"),
    "one copy": ({"copies": nn.Linear(6, 3)}, GroupError, r"got Linear: write copies=\(it,\)"),
    "a list of numbers": ({"copies": [Listing()]}, GroupError, "is no copy of the model: its shadow_params"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claim: each is refused by what was given and with what to do, and model, optimizer and hooks are as before."""
    # As users have it: the type checker of the tests would refuse first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    options, error, words = REFUSED[what]
    options = dict(options)
    model = options.pop("model", _mlp)()
    optimizer = options.pop("optimizer", None)
    if getattr(optimizer, "__name__", "") == "<lambda>":
        optimizer = optimizer(model.parameters())  # type: ignore[misc]
    own = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    state = {} if "meta" in what or "NaN in a weight" in what else copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        _attach(model, own if optimizer is None else optimizer, options.pop("budget", HALF), **options)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert not own._optimizer_step_pre_hooks and not any(m._forward_pre_hooks for m in model.modules())


def test_a_default_device_without_data_is_refused() -> None:
    """Claim: a default device meta at `attach`, in a first step and in `compress`, and a loss there, are named."""
    model, x = _mlp(), torch.zeros(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    waiting = setpoint.attach(model, optimizer, 0.5, total_steps=20)
    model(x).sum().backward()
    with pytest.raises(ValueError, match="loss is on the meta device"):
        waiting.observe(loss=torch.zeros((), device="meta"))
    for call in (optimizer.step, lambda: _attach(model, optimizer), lambda: setpoint.compress(model, [x], 0.5)):
        with torch.device("meta"), pytest.raises(LoopError, match=r"default device is meta.*set_default_device.'cpu'"):
            call()


def test_the_cheapest_reachable_budget_is_reached() -> None:
    """What the error names as the least to ask for is accepted and met."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(BudgetError) as caught:
        _attach(model, optimizer, setpoint.Budget.fraction(0.001, of="flops"))
    least = str(caught.value).split("Ask for at least ")[1]
    with _attach(model, optimizer, least, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary is not None and loop.summary.budget_met


def test_refuses_a_second_loop_on_one_model() -> None:
    """A model has one loop at a time; a failed attach leaves the first at work, and afterwards there is room."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    loop = _attach(model, optimizer)
    with pytest.raises(LoopError, match=r"finish\(\) or detach\(\)"):
        _attach(model, optimizer)
    loop.finish()
    _attach(model, optimizer).detach()


def test_only_the_given_groups_are_pruned() -> None:
    """With `groups` the others are not pruned, and the budget still counts the whole model."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    one = trace(model, (torch.zeros(4, 6),)).groups[:1]
    dense = sum(each.numel() for each in model.parameters())
    with _attach(model, optimizer, setpoint.Budget.fraction(0.6, of="params"), groups=one, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert set(loop.widths) == {one[0].name}
    assert loop.summary is not None and loop.summary.budget_met
    assert sum(each.numel() for each in model.parameters()) <= 0.6 * dense


def test_frozen_outgoing_weights_keep_their_group_whole() -> None:
    """A group that the sensor cannot read is left out, and the ledger's header says why."""
    model = _mlp()
    for frozen in (model[0].weight, model[0].bias, model[2].weight):  # so that no gradient comes to the units either
        frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
    loop = _attach(model, optimizer, setpoint.Budget.fraction(0.9, of="flops"))
    read = {each.tensor for group in loop.groups for each in group.slices if each.role == "consume"}
    assert read == {"4.weight"}
    assert any("TaylorSensor cannot read it" in reason for reason in loop.ledger.header["frozen"].values())
    loop.detach()


def test_a_budget_out_of_reach_names_what_is_not_pruned() -> None:
    """Layers that are not pruned are named by reason, with their share of the FLOPs and the remedy."""
    model = _mlp()
    for frozen in (model[0].weight, model[0].bias, model[2].weight):
        frozen.requires_grad_(False)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 0.1)
    wanted = r"needs .*Not pruned are [\d.]+ % of the FLOPs, 0: their weights are frozen \(train them: requires_grad_"
    with pytest.raises(BudgetError, match=wanted):
        _attach(model, optimizer, setpoint.Budget.fraction(0.2, of="flops"))
    model[:4].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    with pytest.raises(GroupError, match=r"nothing in this model can be pruned: .*Train the frozen weights"):
        _attach(model, torch.optim.SGD([model[4].bias], 0.1))


class Blocked(nn.Module):
    """Layers whose units stay, since `op` stands between them, and others that can be cut."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.others, self.op = nn.Linear(6, 24), nn.Linear(24, 3), _mlp(), op

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(self.op(self.a(x))) + self.others(x)
        return y


@pytest.mark.filterwarnings("ignore:.*cannot be followed, so they stay")
@pytest.mark.parametrize(
    ("op", "words"),
    [
        (lambda x: x.cumsum(-1), "a, b: a softmax, a running sum or a sort runs over this dim, at cumsum. Ask for"),
        (torch.special.bessel_j0, "a: no rule knows this op, at special_bessel_j0 .docs/own-ops.md says how"),
    ],
)
def test_a_budget_out_of_reach_names_the_op_that_stands_in_the_way(op: Callable[[Tensor], Tensor], words: str) -> None:
    """Where an op freezes the units of layers, the error has its reason and its name."""
    model = Blocked(op)
    with pytest.raises(BudgetError, match=f"Not pruned are .*{words}"):
        _attach(model, torch.optim.SGD(model.parameters(), 0.1), setpoint.Budget.fraction(0.1, of="flops"))


def test_allow_lossy_is_advised_only_where_it_helps() -> None:
    """A group that cannot be read either is named by that: `allow_lossy=True` would not prune it."""
    model = nn.Sequential(nn.Linear(6, 24), nn.LayerNorm(24), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))
    model[:3].requires_grad_(False)
    for allow_lossy in (False, True):
        optimizer = torch.optim.SGD(model[4].parameters(), 0.1)
        with pytest.raises(BudgetError, match=r"0: their weights are frozen \(train them") as caught:
            _attach(model, optimizer, setpoint.Budget.fraction(0.1, of="flops"), allow_lossy=allow_lossy)
        assert "allow_lossy" not in str(caught.value)


def test_a_budget_that_needs_less_than_a_tenth_of_layers_is_warned_of() -> None:
    """A budget in reach only with groups below a tenth of their width names them and what is needed at a tenth."""
    model = nn.Sequential(nn.Linear(6, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wanted = (
        r"a budget of 1.0 % narrows layers below a tenth of their width: with 0, 2 at a tenth the model needs 1.3 %"
    )
    with pytest.warns(UserWarning, match=wanted):
        _attach(model, optimizer, setpoint.Budget.fraction(0.01, of="flops")).detach()


class UnitGradient(torch.autograd.Function):
    """The identity, whose gradient is divided by its norm."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / gradient.norm()


class WithUnitGradients(nn.Module):
    def __init__(self, widths: tuple[int, int]) -> None:
        super().__init__()
        self.layers, (first, second) = _mlp(), widths
        self.a, self.b, self.c = nn.Linear(3, first), nn.Linear(first, second), nn.Linear(second, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(UnitGradient.apply(self.b(UnitGradient.apply(self.a(self.layers(x))))))
        return y


def test_a_function_that_freezes_much_of_a_net_is_warned_of() -> None:
    """What cannot be followed and keeps a large share of the FLOPs is named with that share; of a small one no word."""
    large, small = WithUnitGradients((24, 24)), WithUnitGradients((3, 3))
    with pytest.warns(
        UserWarning, match=r"units with 63 % of the FLOPs cannot .*Function UnitGradient has a .*own-ops"
    ):
        _attach(large, torch.optim.SGD(large.parameters(), 0.1), setpoint.Budget.fraction(0.9, of="flops")).detach()
    _attach(small, torch.optim.SGD(small.parameters(), 0.1), setpoint.Budget.fraction(0.9, of="flops")).detach()


class Rounded(nn.Module):
    """Layers with an op after each that no rule knows, also on their weights, and the rest of a net."""

    def __init__(self, num: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(num))
        self.rest = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            weight, x = (torch.fake_quantize_per_tensor_affine(each, 0.1, 0, -128, 127) for each in (layer.weight, x))
            x = nn.functional.linear(x, weight).relu()
        y: Tensor = self.rest(x)
        return y


def test_an_unknown_op_that_freezes_much_of_a_net_is_warned_of() -> None:
    """What no rule knows is named with the share that it keeps, also of layers behind it; of a small share no word."""
    large, small = Rounded(20), Rounded(3)
    wanted = r"units with 53 % of the FLOPs cannot .*no rule knows this op \(model: fake_quantize_per_tensor_affine\)"
    with pytest.warns(UserWarning, match=wanted) as warned:
        _attach(large, torch.optim.SGD(large.parameters(), 0.1), setpoint.Budget.fraction(0.9, of="flops")).detach()
    assert len(warned) == 1
    _attach(small, torch.optim.SGD(small.parameters(), 0.1), setpoint.Budget.fraction(0.9, of="flops")).detach()


def test_groups_that_fail_verification_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named in one warning and in the ledger's header; `verify=False` asks no question."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    names = [group.name for group in setpoint.find_groups(model, (torch.zeros(4, 6),))]
    monkeypatch.setattr(sys.modules["setpoint.actuator.verify"], "failing_groups", lambda *_: (names[0],))
    budget = setpoint.Budget.fraction(0.9, of="flops")
    with pytest.warns(UserWarning, match=f"not pruned.*: {names[0]}") as warned:
        loop = _attach(model, optimizer, budget)
    assert len(warned) == 1
    assert list(loop.widths) == names[1:]
    assert "did not behave like masking" in loop.ledger.header["frozen"][names[0]]
    loop.detach()
    loop = _attach(model, optimizer, budget, verify=False)
    assert list(loop.widths) == names
    assert loop.finish().overhead_flops == 0
    monkeypatch.undo()


class Normed(nn.Module):
    """A neuron layer followed by a LayerNorm over its neurons: zero is not absent there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.norm(self.up(x))))


def test_lossy_groups_need_leave() -> None:
    """A group in which zero is not absent is pruned only with `allow_lossy`."""
    model = Normed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with pytest.raises(GroupError, match="allow_lossy=True"):
        _attach(model, optimizer)
    with _attach(model, optimizer, allow_lossy=True, total_steps=40) as loop:
        for _ in range(40):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary is not None and loop.summary.budget_met
    assert model.norm.normalized_shape == (model.up.out_features,)
    assert model.up.out_features < 16


class TwoHeads(nn.Module):
    """Two heads on one trunk, one of which runs."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor, second: bool = False) -> Tensor:
        y = self.trunk(x).relu()
        out: Tensor = self.second(y) if second else self.first(y)
        return out


def test_weights_that_the_example_leaves_out_are_named() -> None:
    """A head that reads prunable units but is not reached draws a warning with its name."""
    model = TwoHeads()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"does not reach second\.weight"):
        setpoint.attach(
            model, optimizer, setpoint.Budget.fraction(0.5, of="flops"), example=(torch.randn(4, 8),), total_steps=9
        ).finish()


def test_a_state_that_cannot_follow_is_refused() -> None:
    """Claim: a sensor whose state is a dict with a number for each unit is refused before training starts."""

    class Dict(MagnitudeSensor):
        def init(self, groups: Any, model: nn.Module) -> Any:
            return {"sums": {group.name: np.zeros(group.num_units) for group in groups}}

    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer, example = torch.optim.SGD(model.parameters(), lr=0.1), (torch.randn(8, 4),)
    with pytest.raises(LoopError, match="make the state a frozen dataclass"):
        setpoint.attach(
            model,
            optimizer,
            setpoint.Budget.fraction(0.5, of="flops"),
            example=example,
            total_steps=10,
            sensor=Dict(),
        )


def in_threads(*calls: Any) -> list[Any]:
    """What each call returns or raises, all begun at once, each in a thread of its own."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def run(number: int) -> None:
        barrier.wait()
        try:
            found[number] = calls[number]()
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return found


def test_two_threads_attach_to_one_model() -> None:
    """Of two threads that attach to a model at once one gets its loop, and the other is refused by name."""
    model = _mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    once = partial(_attach, model, optimizer, verify=False)
    results = in_threads(once, once)
    assert sorted(type(each).__name__ for each in results) == ["Loop", "LoopError"]
    (loop,) = (each for each in results if isinstance(each, setpoint.Loop))
    (error,) = (each for each in results if isinstance(each, LoopError))
    assert "has a loop already" in str(error)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    loop.detach()


def test_threads_begin_without_an_example() -> None:
    """Loops that begin at their first step, in threads of their own at once, do so one after the other; discovery in
    another thread waits, too.
    """

    def begin(seed: int) -> dict[str, int]:
        model = _mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        loop = _attach(model, optimizer, example=None)
        for step in range(2):
            model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed + step))).square().mean().backward()
            optimizer.step()
        loop.detach()
        return loop.dense_widths

    find = partial(setpoint.find_groups, _mlp(), (torch.zeros(4, 6),))
    *widths, groups = in_threads(*(partial(begin, seed) for seed in range(3)), find)
    assert widths == [{"0": 16, "2": 16}] * 3
    assert [each.name for each in groups] == ["0", "2"]


def test_a_hook_that_looks_at_values_is_no_obstacle() -> None:
    """Claim: a user's hook that asks for values, which an export does not have, stays, and the model is pruned."""
    model, seen = _mlp(), list[np.ndarray]()
    model[1].register_forward_hook(lambda module, given, output: seen.append(output.detach().numpy()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with _attach(model, optimizer) as loop:
        for _ in range(10):
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
    assert loop.summary.budget_met and len(model[1]._forward_hooks) == 1 and len(seen) >= 10


class FailsAtFirst(setpoint.PricedController):
    """A controller that cannot begin."""

    def init(self, groups: Any) -> Any:
        """It fails."""
        raise ValueError("not today")


@pytest.mark.parametrize("given", [True, False], ids=["with an example", "at the first step"])
def test_a_controller_that_cannot_begin_leaves_no_hook(given: bool) -> None:
    """Claim: what a sensor reads through is off the model where the controller fails as the loop begins."""
    model = _mlp()
    model[2].weight.requires_grad_(False)  # a frozen weight is read through a hook
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parts = {"controller": FailsAtFirst()}
    with pytest.raises(ValueError, match="not today"):
        loop = _attach(model, optimizer, example=(torch.zeros(4, 6),) if given else None, **parts)
        model(torch.randn(4, 6)).square().mean().backward()
        try:
            optimizer.step()
        finally:
            loop.detach()
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


# What users may hand in.


def _hand_in(model: nn.Module, optimizer: Any = None, budget: Any = HALF, **options: Any) -> setpoint.Loop:
    optimizer = torch.optim.SGD(model.parameters(), 0.1) if optimizer is None else optimizer
    return _attach(model, optimizer, budget, **{"example": (torch.ones(4, 6),), "total_steps": 12, **options})


def _train(model: nn.Module, optimizers: list[Optimizer], loop: setpoint.Loop, *inputs: Tensor) -> setpoint.Summary:
    for _ in range(loop.total_steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return loop.finish()


@pytest.fixture
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the type checker of the tests, which would refuse first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Words(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], sparse: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = kind(20, 16, sparse=sparse)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Of words by their numbers."""
        return self.b(torch.relu(self.a(self.words(x))))


def sgd(model: Words) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1)]


def sparse_adam(model: Words) -> list[Optimizer]:
    head = [*model.a.parameters(), *model.b.parameters()]
    return [torch.optim.SparseAdam(model.words.parameters(), 0.01), torch.optim.SGD(head, 0.1)]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_with_sparse_gradients_attach(kind: Callable[..., nn.Module]) -> None:
    """Claim: sparse=True attaches, is cut to budget, and with SGD trains and is cut as the dense embedding is."""
    ids, ends = torch.randint(0, 20, (4, 5)), []
    for sparse, make in ((True, sparse_adam), (True, sgd), (False, sgd)):
        model = Words(kind, sparse)
        optimizers = make(model)
        loop = _hand_in(model, optimizers, example=(ids,), controller=setpoint.PricedController())
        assert _train(model, optimizers, loop, ids).budget_met and loop.widths["words"] < 16
        ends.append(([*model.parameters()], loop.widths))
    (_, (weights, widths), (others, same)) = ends
    assert widths == same and all(map(torch.allclose, weights, others))


class Graph(nn.Module):
    def __init__(self, layout: str, trained: bool) -> None:
        super().__init__()
        neighbours = torch.eye(4).to_sparse() if layout == "coo" else torch.eye(4).to_sparse_csr()
        if trained:
            self.neighbours = nn.Parameter(neighbours)
        else:
            self.register_buffer("neighbours", neighbours)
        self.inner = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Of what the neighbours are."""
        return self.inner(torch.sparse.mm(self.neighbours, x))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(("layout", "trained"), [("coo", False), ("csr", False), ("coo", True)])
def test_models_that_hold_sparse_tensors_attach(layout: str, trained: bool) -> None:
    """Claim: beside a sparse buffer or weight everything else is tried out, and cut to budget."""
    model = Graph(layout, trained)
    optimizer = torch.optim.SGD(model.inner.parameters(), 0.1)
    loop = _hand_in(model, optimizer)
    assert set(loop.widths) == {"inner.0", "inner.2"}
    assert _train(model, [optimizer], loop, torch.ones(4, 6)).budget_met


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _mlp()

    def forward(self, x: Tensor) -> Tensor:
        """Of x by its name."""
        return self.inner(x)


class Batch(UserDict[str, Tensor]):
    """As transformers' BatchEncoding is one."""


@pytest.mark.parametrize("kind", [Batch, MappingProxyType, ChainMap])
def test_any_mapping_is_an_example(kind: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Claim: cuts are tried out on it as on a dict of the same inputs."""
    loops = [_hand_in(Named(), example=example({"x": torch.randn(64, 6)})) for example in (dict, kind)]
    tried = [loop.spending.account.overhead_flops for loop in loops]
    assert tried[0] == tried[1] > 0 and loops[0].widths == loops[1].widths


def _python(value: Any) -> bool:
    """Whether no number in it is NumPy's."""
    return not isinstance(value, np.generic) and "np." not in repr(value) and "array" not in repr(value)


@pytest.mark.parametrize("make", [np.float32, np.float16, np.array])
def test_numpy_numbers_are_taken_as_settings(make: Callable[[float], Any]) -> None:
    """Claim: wherever a number is asked for one of NumPy's will do, and is Python's own from there on."""
    half, three = make(0.5), np.int64(3)
    schedule = setpoint.Schedule(make(0.125), half, make(0.75), three)
    made = [
        setpoint.Budget.fraction(half, of="flops", deadband=half),
        setpoint.Budget.total(np.int32(100), of="energy", watts=half),
        setpoint.Price(half, of="flops"),
        setpoint.Tolerance(half),
        schedule,
        setpoint.PricedController(schedule=schedule, slew=half, hysteresis=half, dwell=three),
        Regrowing(three),
    ]
    assert all(map(_python, made))
    sensor = setpoint.TaylorSensor(three, window=three)
    assert type(sensor.num_samples) is type(sensor.window) is int


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("kept", [[1] * 16, torch.ones(16), np.arange(16), "0" * 16, [True] * 15])
def test_shrink_refuses_what_is_not_one_boolean_per_unit(kept: Any) -> None:
    """Claim: numbers are no booleans, and each unit has one."""
    model = _mlp()
    groups = setpoint.find_groups(model, (torch.ones(4, 6),))
    with pytest.raises(GroupError, match=r"keep\['0'\]"):
        setpoint.shrink(model, None, groups, {"0": kept})
    with pytest.raises(GroupError, match="by name of the group, got a list"):
        setpoint.shrink(model, None, groups, [kept])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["allow_lossy", "even", "resume", "verify"])
def test_a_flag_is_true_or_false(name: str) -> None:
    """Claim: a text such as "no", which counts as true in Python, is refused."""
    model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match=f"{name} is True or False, got 'no'"):
        setpoint.attach(model, torch.optim.SGD(model.parameters(), 0.1), 0.5, total_steps=2, **{name: "no"})  # type: ignore[arg-type]
